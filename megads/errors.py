"""The mistakes a user can make, as types: each message says what is wrong, where, and what to do.

The entry points print a `MegadsError` as one screen without a traceback and exit with its code;
any other exception is a bug of ours and keeps its traceback.
"""


class MegadsError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code = 2


class ConfigError(MegadsError):
    """The configuration is wrong: an unknown key, a bad value, an impossible combination."""

    exit_code = 2


class DataError(MegadsError):
    """Input text, tokenizer or dataset files are missing, damaged or do not fit the model."""

    exit_code = 3


class CheckpointError(MegadsError):
    """A checkpoint is missing, damaged, or belongs to another model or run."""

    exit_code = 4


class EnvironmentSetupError(MegadsError):
    """The machine lacks what the configuration asks for: a package, a device, a version."""

    exit_code = 5


class TrainingError(MegadsError):
    """Training cannot go on: the loss is not finite, or a process of the job failed."""

    exit_code = 6


class RunStopped(MegadsError):
    """No mistake: a run was asked to stop, has saved, and goes on when it is started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class BudgetReached(RunStopped):
    """A run has cost what it may: it has saved, and goes on only when its budget is raised."""

    exit_code = 7
