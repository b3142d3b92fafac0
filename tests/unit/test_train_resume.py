"""Which optimizer states a run can go on from: what does not load is refused by name before it is read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megads.errors import CheckpointError
from megads.train.resume import check_optimizer_format

FOUND: Any = SimpleNamespace(path=Path("step_00000005"))


def check(then: tuple[int, str], now: tuple[int, str]) -> None:
    record = {"config": {"distributed": {"zero_stage": then[0]}}, "resolved": {"precision": then[1]}}
    step: Any = SimpleNamespace(
        config=SimpleNamespace(distributed=SimpleNamespace(zero_stage=now[0])),
        resolved=SimpleNamespace(precision=now[1]),
    )
    check_optimizer_format(FOUND, record, step)


@pytest.mark.parametrize("then", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("now", ["fp32", "bf16", "fp16"])
def test_the_sharded_optimizer_goes_on_in_any_precision(then: str, now: str) -> None:
    check((1, then), (1, now))


def test_the_other_one_does_within_16_bits() -> None:
    check((0, "bf16"), (0, "fp16"))
    check((0, "fp32"), (0, "fp32"))
    with pytest.raises(CheckpointError, match=r"step_00000005.*in fp32.*in bf16.*init_from"):
        check((0, "fp32"), (0, "bf16"))
    with pytest.raises(CheckpointError, match=r"in fp16.*in fp32"):
        check((0, "fp16"), (0, "fp32"))


@pytest.mark.parametrize(("then", "now"), [(1, 3), (3, 1), (2, 3), (2, 1)])
def test_stages_that_shard_it_read_each_other(then: int, now: int) -> None:
    check((then, "bf16"), (now, "bf16"))


def test_they_do_not_read_each_other() -> None:
    with pytest.raises(CheckpointError, match=r"zero_stage = 0, and this run has 1: set it to 0"):
        check((0, "bf16"), (1, "bf16"))
