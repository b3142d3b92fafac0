"""Everything that changes while training, tensors excepted, in one object that is saved whole.

Weights, optimizer moments and random-number states are tensors and travel in the checkpoint beside
it. What follows from these numbers (learning rate, batch size, position in the data) is computed
from them and stored nowhere.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from megads.errors import CheckpointError

Number = int | float | None | tuple[float, ...]


@dataclass
class TrainState:
    """Where a run is. `to_dict` and `from_dict` go through JSON without losing a bit."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Training tokens consumed; every schedule reads this."""
    samples: int = 0
    """Training sequences consumed: the position in the data."""
    skipped_steps: int = 0
    """Steps whose update was left out because the gradients were not finite."""
    skipped_samples: int = 0
    """Of `samples`, those that rollbacks left out: no update was made of them, `tokens` has them not."""
    rollbacks: int = 0
    """Returns to an earlier checkpoint after a spike of the loss."""
    lr_factor: float = 1.0
    """Factor on the scheduled learning rate; rollbacks lower it."""
    spikes: int = 0
    """Steps whose loss was out of line with the recent ones."""
    recent_losses: tuple[float, ...] = ()
    """What the next losses are compared with, in nats per token."""
    best_validation_loss: float | None = None
    """Lowest validation loss so far, in nats per token."""
    best_validation_step: int | None = None
    """The step it was seen at."""
    wall_seconds: float = 0.0
    """Time spent in training steps, over all the runs that led here."""
    job_seconds: float = 0.0
    """Time that the jobs of this run took, over all that led here: evaluation and checkpoints included."""
    cost: float = 0.0
    """What that time cost, at the prices of `budget`."""
    flops: float = 0.0
    """Model FLOPs spent in training, recomputation not counted. A float: it outgrows 64-bit integers."""

    def advance(
        self, *, samples: int, tokens: int, flops: float, seconds: float, skipped: bool = False
    ) -> None:
        """Count one optimizer step that consumed `samples` sequences of `tokens` tokens altogether."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens
        self.flops += flops
        self.wall_seconds += seconds
        self.skipped_steps += skipped

    def record_validation(self, loss: float) -> bool:
        """Note a validation loss; true if it is the best so far. A loss that is not finite never is."""
        if not math.isfinite(loss) or (
            self.best_validation_loss is not None and loss >= self.best_validation_loss
        ):
            return False
        self.best_validation_loss = loss
        self.best_validation_step = self.step
        return True

    def to_dict(self) -> dict[str, Number]:
        """The fields as JSON numbers; JSON's shortest notation of a float reads back to the same bits."""
        values: dict[str, Number] = asdict(self)
        flat = [v for value in values.values() for v in (value if isinstance(value, tuple) else (value,))]
        assert all(value is None or math.isfinite(value) for value in flat), values
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "TrainState":
        """The state that `to_dict` gave `values` for.

        Raises CheckpointError, naming every field that is missing, unknown or of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"the training state must be an object of named numbers, not {values!r}")
        expected = {field.name: field.type for field in fields(cls)}
        problems = [f"{name} is missing" for name in expected if name not in values]
        problems += [f"{name} is unknown" for name in values if name not in expected]
        read: dict[str, Number] = {}
        for name, value in values.items():
            if name not in expected:
                continue
            try:
                read[name] = _read(value, expected[name])
            except ValueError as error:
                problems.append(f"{name} {error}")
        if problems:
            raise CheckpointError(
                "the training state of the checkpoint does not fit this version of MegaDS: "
                + "; ".join(problems)
            )
        return cls(**read)  # type: ignore[arg-type]


def _read(value: object, kind: object) -> Number:
    """`value` as the field type `kind`; raises ValueError saying what it must be."""
    if value is None and kind in (int | None, float | None):
        return None
    if kind == tuple[float, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list of numbers, not {value!r}")
        return tuple(_finite(item) for item in value)
    if kind in (int, int | None):
        if type(value) is int and value >= 0:
            return value
        raise ValueError(f"must be a whole number from 0 on, not {value!r}")
    return _finite(value)


def _finite(value: object) -> float:
    # A writer of JSON may have shortened 3.0 to 3.
    if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    raise ValueError(f"must be a finite number, not {value!r}")
