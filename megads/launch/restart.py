"""Whether a job that ended is worth another try, and from which checkpoint that starts.

The job script asks before and after each try: `python restart.py before|after --job JOB -- ARGUMENTS`, where
ARGUMENTS are those of `pretrain_megads.py`. A file next to the checkpoints remembers, for one job or chain
of jobs, which checkpoint was the newest at its start and after each try. Progress is a new checkpoint: a run
that ends again and again without one is given up.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megads.config.flags import parse_flags
from megads.config.resolve import checkpoint_directory
from megads.config.stages import Stage, load_stages
from megads.errors import MegadsError, RunStopped

FILE_NAME = "restarts.json"
# The script adds this to the codes of what another try cannot mend: mistakes, and a budget that is spent.
FINAL = 200


@dataclass
class Tries:
    """What is remembered of one job. Checkpoints are told apart by path and time; "" is none."""

    job: str
    first: str
    newest: str
    without_progress: int = 0

    def count(self, newest: str) -> None:
        """Note the end of a try."""
        self.without_progress = 0 if newest != self.newest else self.without_progress + 1
        self.newest = newest


@dataclass(frozen=True)
class Verdict:
    """`again`: start it once more; `why`, as a sentence."""

    again: bool
    why: str


def judge(code: int, tries: Tries, most: int) -> Verdict:
    """`code`: that of the try that ended, not 0; `most`: tries in a row that may end without progress."""
    if code >= FINAL:
        return Verdict(False, "another try would end the same way; see the message above")
    ended = "stopped before its end" if code == RunStopped.exit_code else f"ended with exit code {code}"
    if tries.without_progress == 0:
        return Verdict(True, f"{ended}; a checkpoint was saved since the last start")
    if tries.without_progress >= most:
        return Verdict(
            False,
            f"{ended}, and {tries.without_progress} tries in a row saved no checkpoint (the limit: "
            "distributed.slurm.max_tries_without_progress): a shorter training.save_interval, or a longer "
            "distributed.slurm.signal_seconds, lets it get ahead",
        )
    return Verdict(
        True, f"{ended} without a new checkpoint, {tries.without_progress} times of at most {most}"
    )


def newest_checkpoint(stages: Sequence[Stage]) -> str:
    """The checkpoint committed last in any stage, as text that no other one has; "" where there is none."""
    found = [
        (manifest.stat().st_mtime_ns, str(manifest.parent))
        for stage in stages
        for manifest in Path(checkpoint_directory(stage.config)).glob("step_*/COMMIT.json")
    ]
    return "{1} {0}".format(*max(found)) if found else ""


def _load(path: Path, job: str, newest: str) -> Tries:
    try:
        tries = Tries(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Tries(job, newest, newest)
    return tries if tries.job == job else Tries(job, newest, newest)


def _save(path: Path, tries: Tries) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(asdict(tries)), encoding="utf-8")
    temporary.replace(path)


def main(argv: Sequence[str]) -> int:
    """`before` prints the flags that a try needs besides; `after` exits with 0 where another is worth it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("when", choices=("before", "after"))
    parser.add_argument("--code", type=int, default=0, help="of the try that ended")
    parser.add_argument("--job", required=True, help="what the tries belong to")
    own, arguments = list(argv[: argv.index("--")]), argv[argv.index("--") + 1 :]
    options = parser.parse_args(own)
    try:
        given = parse_flags(arguments)
        stages = load_stages(given.config, given.overrides, given.origins)
    except MegadsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    newest = newest_checkpoint(stages)
    path = Path(checkpoint_directory(stages[0].config)).parent / FILE_NAME
    tries = _load(path, options.job, newest)
    if options.when == "before":
        _save(path, tries)
        if newest != tries.first:
            # What the user named was where the first try started; this one goes on from what has come since.
            print("--checkpointing.load=latest")
        return 0
    tries.count(newest)
    _save(path, tries)
    verdict = judge(options.code, tries, stages[0].config.distributed.slurm.max_tries_without_progress)
    print(verdict.why, file=sys.stderr)
    return 0 if verdict.again else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
