"""Handing a script to SLURM: once, or as a chain of jobs for a run that is longer than the time limit."""

import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from megads.config.schema import Config
from megads.errors import ConfigError, EnvironmentSetupError
from megads.launch.slurm import create_slurm_script, slurm_script

SECONDS_FOR_SLURM = 60


@dataclass(frozen=True)
class Submission:
    """A job script and how it is submitted; `jobs`: the length of the chain, None for one job that requeues.

    With `submit` false the script is written, for someone else to submit.
    """

    config: Config
    arguments: tuple[str, ...]
    path: Path
    jobs: int | None = None
    submit: bool = True

    def describe(self) -> str:
        """The commands, and the script that they submit."""
        chain = "CHAIN" if self.jobs else None
        names = [f"JOB{number}" for number in range(1, (self.jobs or 1) + 1)]
        lines = [shlex.join(self._sbatch(chain, names[:number])) for number in range(len(names))]
        script = slurm_script(self.config, self.arguments)
        return "\n".join([*([*lines, ""] if self.submit else []), f"{self.path}:", "", script])

    def run(self) -> int:
        """Write the script and submit it. Prints the numbers of the jobs.

        Raises EnvironmentSetupError where there is no SLURM or it says no, ConfigError for a partition that
        it does not have.
        """
        if self.submit:
            check_slurm(self.config)
        create_slurm_script(self.config, self.arguments, self.path)
        if not self.submit:
            print(f"written: {self.path}\nsubmit it: {shlex.join(self._sbatch(None, []))}")
            return 0
        self._make_directories()
        chain = secrets.token_hex(4) if self.jobs else None
        jobs: list[str] = []
        for number in range(self.jobs or 1):
            try:
                jobs.append(_run(self._sbatch(chain, jobs)).partition(";")[0].strip())
            except EnvironmentSetupError:
                if jobs:
                    print(
                        f"submitted before the error: scancel {' '.join(jobs)} takes them back",
                        file=sys.stderr,
                    )
                raise
            what = f"job {number + 1} of {self.jobs}" if self.jobs else "job"
            print(f"submitted {what}: {jobs[-1]}", flush=True)
        print(f"script: {self.path}\nlog: {self.config.distributed.slurm.output}")
        print(f"save and requeue now: scancel --signal=USR1 {jobs[0]}; cancel: scancel {' '.join(jobs)}")
        return 0

    def _sbatch(self, chain: str | None, earlier: Sequence[str]) -> list[str]:
        command = ["sbatch", "--parsable"]
        if chain is not None:
            command.append(f"--export=ALL,MEGADS_CHAIN={chain}")
        if earlier:
            # All of the earlier ones: when one finishes the run, the rest can never start and goes away.
            command += [f"--dependency=afternotok:{':'.join(earlier)}", "--kill-on-invalid-dep=yes"]
        return [*command, str(self.path)]

    def _make_directories(self) -> None:
        # SLURM does not make them: the job would fail, and could not say why.
        for pattern in (self.config.distributed.slurm.output, self.config.distributed.slurm.error):
            directory = Path(pattern).parent
            if "%" not in str(directory):
                directory.mkdir(parents=True, exist_ok=True)


def check_slurm(config: Config) -> None:
    """Refuse what SLURM would: no SLURM, no answer from it, no such partition."""
    for name in ("sbatch", "sinfo"):
        if shutil.which(name) is None:
            raise EnvironmentSetupError(
                f"{name} is not on the PATH, so there is no SLURM to submit to: run this on a login node of "
                "the cluster, or start the run here: set distributed.slurm.enabled to false and leave "
                "--submit out"
            )
    partitions = sorted(set(_run(["sinfo", "--noheader", "--format=%R"]).split()))
    asked = config.distributed.slurm.partition
    for name in asked.split(","):
        if name not in partitions:
            near = get_close_matches(name, partitions, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(partitions)}"
            raise ConfigError(
                f"distributed.slurm.partition = {asked!r}: this cluster has no partition {name!r}; {hint}"
            )


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS_FOR_SLURM)
    except subprocess.TimeoutExpired:
        raise EnvironmentSetupError(
            f"{command[0]} does not answer within {SECONDS_FOR_SLURM} s: is SLURM's controller up (scontrol "
            "ping)?"
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise EnvironmentSetupError(f"{shlex.join(command)} failed: {said}")
    return done.stdout
