"""Whether a job that ended is worth another try, and from which checkpoint that starts.

The job script asks before and after each try: `python restart.py before|after --job JOB -- ARGUMENTS`, where
ARGUMENTS are those of `pretrain_megads.py`. A file next to the checkpoints remembers, for one job or chain
of jobs, which checkpoints there were at its start and after each try. A run that ends again and again without
progress (`progress.py`) is given up.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megads.config.flags import parse_flags
from megads.config.resolve import checkpoint_directory
from megads.config.stages import load_stages
from megads.errors import MegadsError, RunStopped
from megads.launch.progress import Saved, saved_checkpoints
from megads.publish import published

FILE_NAME = "restarts.json"
# The script adds this to the codes of what another try cannot mend: mistakes, and a budget that is spent.
FINAL = 200


@dataclass
class Tries:
    """What is remembered of one job: the checkpoints at its `first` start, and `before` its latest try."""

    job: str
    first: frozenset[Saved]
    before: frozenset[Saved]
    without_progress: int = 0

    def count(self, saved: frozenset[Saved]) -> None:
        """Note the end of a try."""
        self.without_progress = 0 if saved - self.before else self.without_progress + 1
        self.before = saved


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


def _load(path: Path, job: str, saved: frozenset[Saved]) -> Tries:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        first, before = (frozenset(Saved(*entry) for entry in content[name]) for name in ("first", "before"))
        tries = Tries(content["job"], first, before, content["without_progress"])
    except (OSError, ValueError, TypeError, KeyError):
        return Tries(job, saved, saved)
    return tries if tries.job == job else Tries(job, saved, saved)


def _save(path: Path, tries: Tries) -> None:
    content = vars(tries) | {"first": sorted(tries.first), "before": sorted(tries.before)}
    with published(path) as file:
        file.write(json.dumps(content).encode())


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
    directories = [Path(checkpoint_directory(stage.config)) for stage in stages]
    saved = saved_checkpoints(directories)
    path = directories[0].parent / FILE_NAME
    tries = _load(path, options.job, saved)
    if options.when == "before":
        _save(path, tries)
        if saved - tries.first:
            # What the user named was where the first try started; this one goes on from what has come since.
            print("--checkpointing.load=latest")
        return 0
    tries.count(saved)
    _save(path, tries)
    verdict = judge(options.code, tries, stages[0].config.distributed.slurm.max_tries_without_progress)
    print(verdict.why, file=sys.stderr)
    return 0 if verdict.again else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
