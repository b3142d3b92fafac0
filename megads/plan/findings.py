"""What the linter finds, and what its rules look at."""

from dataclasses import dataclass
from typing import Literal

from megads.config.resolve import Resolved
from megads.config.schema import Config
from megads.plan.hardware import Gpu

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One remark: what is odd and what to do, and who says so."""

    id: str
    severity: Severity
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.id}; {self.source}]"


@dataclass(frozen=True)
class Run:
    """What the rules look at.

    `gpu` None: nothing about memory and time. `data_tokens` are the training tokens of each source whose
    datasets could be read. `hours_between_interruptions` None: the machines are there to stay.
    """

    config: Config
    resolved: Resolved
    gpu: Gpu | None = None
    data_tokens: dict[str, int] | None = None
    hours_between_interruptions: float | None = None
