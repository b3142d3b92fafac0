"""All schedules of a run in one place: what each step gets, as a function of the tokens consumed."""

from megads.config.resolve import Resolved
from megads.config.schedule import learning_rate_schedule, router_noise_schedule
from megads.config.schema import Config
from megads.train.step import Scalars


class Schedules:
    """`at(tokens)` gives batch size (sequences) and scalars of the step that begins there."""

    def __init__(self, config: Config, resolved: Resolved) -> None:
        self._config = config
        self._batch = resolved.batch
        self._learning_rate = learning_rate_schedule(config.training, resolved.total_tokens, resolved.batch)
        self._router_noise = router_noise_schedule(config.model.moe.router_noise_std, resolved.total_tokens)

    def at(self, tokens: int) -> tuple[int, Scalars]:
        """A pure function of the tokens consumed before the step."""
        training, moe = self._config.training, self._config.model.moe
        scalars = Scalars(
            learning_rate=self._learning_rate.value(tokens + self._batch.tokens_per_step(tokens)),
            weight_decay=training.weight_decay,
            mtp_loss_weight=training.mtp_loss_weight,
            bias_update_rate=moe.bias_update_rate,
            router_noise_std=self._router_noise.value(tokens),
        )
        return self._batch.batch_size(tokens), scalars
