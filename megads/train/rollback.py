"""Back to an earlier checkpoint after a spike of the loss, past the data that it came with.

As PaLM did by hand (arXiv:2204.02311, section 5.1): the newest checkpoint before the spike, the data read
since then left out, the learning rate lowered. The state after the return is saved at once, as another
checkpoint of the same step: its commit sets the checkpoints of the left branch aside, so that a restart
finds this one and knows how often the run went back.
"""

from typing import TYPE_CHECKING

from megads.errors import TrainingError
from megads.train.resume import restore
from megads.train.stability import Verdict

if TYPE_CHECKING:
    from megads.train.loop import Run


def roll_back(run: "Run", verdict: Verdict) -> None:
    """Put `run` back to before `verdict.first_bad_step`; collective.

    Raises TrainingError when no checkpoint is that old, and after `max_rollbacks`.
    """
    settings, left = run.config.training.stability, run.state
    spike = f"the loss rose from {verdict.median:.4f} to {verdict.loss:.4f} at step {verdict.first_bad_step}"
    if left.rollbacks >= settings.max_rollbacks:
        raise TrainingError(
            f"{spike}, and the run has gone back {left.rollbacks} times already "
            "(training.stability.max_rollbacks). Resume from an earlier checkpoint with a lower learning rate"
        )
    run.store.wait()
    found = run.store.find_before(verdict.first_bad_step)
    if found is None:
        raise TrainingError(
            f"{spike}, and no checkpoint is older than that: start again with a lower learning rate or a "
            "longer warm-up, and with a shorter training.save_interval"
        )
    run.step.gather_parameters()
    state = restore(run.resolved, run.store, found, run.step, run.datasets, run.average)
    state.skipped_samples += left.samples - state.samples
    state.samples = left.samples
    state.rollbacks, state.spikes = left.rollbacks + 1, left.spikes
    state.lr_factor = left.lr_factor * settings.rollback_lr_factor
    # What was spent was spent.
    state.wall_seconds, state.flops = left.wall_seconds, left.flops
    run.go_back_to(state)
    facts = {
        "from_step": left.step,
        "first_bad_step": verdict.first_bad_step,
        "loss": verdict.loss,
        "median_loss": verdict.median,
        "skipped_samples": state.skipped_samples,
        "lr_factor": state.lr_factor,
        "rollbacks": state.rollbacks,
    }
    text = (
        f"{spike}: back here, {state.skipped_samples} samples left out, learning rate times "
        f"{state.lr_factor:g} from now on ({state.rollbacks} of at most {settings.max_rollbacks})"
    )
    run.reporter.event(state.step, state.tokens, "rollback", facts, text)
