"""Who does which shards: the tasks of a job array by bytes, the workers of a task largest first."""

import heapq
import os
from collections.abc import Mapping, Sequence

from megads.data.shards import Shard
from megads.errors import ConfigError, DataError


def divide(shards: Sequence[Shard], tasks: int) -> list[list[Shard]]:
    """The shards of each task, about equal in bytes: the next largest goes to who has least.

    (Graham's LPT rule, at most 4/3 of the best division.) It depends on the list alone, so that the
    tasks agree without talking, whatever is finished already. Within a task the largest come first:
    the small ones then fill the gaps at the end.
    """
    loads = [(0, task) for task in range(tasks)]
    parts: list[list[Shard]] = [[] for _ in range(tasks)]
    for shard in sorted(shards, key=lambda shard: (-shard.input.bytes, str(shard.prefix))):
        load, task = heapq.heappop(loads)
        parts[task].append(shard)
        heapq.heappush(loads, (load + shard.input.bytes, task))
    return parts


def check_prefixes(shards: Sequence[Shard]) -> None:
    """Raise DataError when two inputs would become the same dataset."""
    taken: dict[str, Shard] = {}
    for shard in shards:
        other = taken.setdefault(str(shard.prefix), shard)
        if other is not shard:
            raise DataError(
                f"{other.input.path} and {shard.input.path} would both become {shard.prefix}: rename one."
            )


def array_task(
    num_tasks: int | None, task_id: int | None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """(number of tasks, this one's number from 0): as given, else by SLURM's job array, else (1, 0).

    Raises ConfigError for one without the other, for a number out of range, and for an array whose
    ids have gaps.
    """
    if (num_tasks is None) != (task_id is None):
        raise ConfigError("--num-tasks and --task-id belong together.")
    if num_tasks is None and "SLURM_ARRAY_TASK_ID" in environment:
        try:
            first, last, num_tasks, task_id = (
                int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("MIN", "MAX", "COUNT", "ID")
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"SLURM_ARRAY_TASK_ID is set, but other variables of a job array are not sound ({error}). "
                "Give --num-tasks and --task-id."
            ) from error
        if last - first + 1 != num_tasks:
            raise ConfigError(
                f"The job array has {num_tasks} tasks between {first} and {last}: give --array without gaps."
            )
        task_id -= first
    if num_tasks is None or task_id is None:
        return 1, 0
    if num_tasks < 1:
        raise ConfigError(f"--num-tasks is {num_tasks}; it must be at least 1.")
    if not 0 <= task_id < num_tasks:
        raise ConfigError(f"Task {task_id} of {num_tasks}: task ids go from 0 to {num_tasks - 1}.")
    return num_tasks, task_id
