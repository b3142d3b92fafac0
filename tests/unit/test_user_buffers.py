"""What Transformer Engine is asked for as user buffers, and which job cannot have them.

Skips itself without Transformer Engine.
"""

import os
from typing import Any
from unittest import mock

import pytest
import torch

from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.errors import EnvironmentSetupError
from megads.mcore import user_buffers
from megads.mcore.groups import destroy_process_groups
from tests.dist import tiny

te = pytest.importorskip("transformer_engine.pytorch")
NONE, FP8 = te.UserBufferQuantizationMode.NONE, te.UserBufferQuantizationMode.FP8
TP = "distributed.tensor_parallel_size"
SETTINGS: dict[str, Any] = {
    "distributed.device": "cuda",
    "distributed.tp_comm_overlap": True,
    "model.mla.d_model": 64,
    "training.num_predict_tokens": 2,
    TP: 2,
}
TENSORWISE = {"training.use_fp8": True, "training.fp8.recipe": "tensorwise"}


@pytest.fixture(autouse=True)
def four_processes_per_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("UB_TIMEOUT", "")  # what is set from here on is undone at the end
    monkeypatch.delenv("UB_TIMEOUT")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    asked = mock.create_autospec(te.initialize_ub)
    monkeypatch.setattr(te, "initialize_ub", asked)
    yield asked
    user_buffers.destroy_user_buffers()


def initialize(settings: dict[str, Any], world_size: int = 4) -> None:
    config = load_config(None, tiny.BASE | SETTINGS | settings)
    user_buffers.initialize_user_buffers(config, resolve(config, world_size, cuda=True))


@pytest.mark.parametrize(
    ("settings", "tokens", "modes"),
    [
        ({}, 4 * 16, [NONE]),
        ({"distributed.context_parallel_size": 2}, 4 * 16 // 2, [NONE]),
        # A curriculum has the same tokens in more sequences, a ramp more micro-batches of them.
        ({"training.seq_length_phases": [{"to": 8, "until_tokens": 1280}]}, 4 * 16, [NONE]),
        (TENSORWISE, 4 * 16, [FP8]),
        (TENSORWISE | {"training.fp8.bf16_first_layers": 1}, 4 * 16, [FP8, NONE]),
        (TENSORWISE | {"training.fp8.bf16_mtp": True}, 4 * 16, [FP8, NONE]),
        (TENSORWISE | {"training.fp8.bf16_mtp": True, "training.use_mtp": False}, 4 * 16, [FP8]),
    ],
)
def test_the_hidden_states_of_a_micro_batch(
    settings: dict[str, Any], tokens: int, modes: list[Any], asked: Any
) -> None:
    initialize(settings)
    (call,) = asked.call_args_list
    assert call.kwargs["shape"] == [tokens, 64]
    assert call.kwargs["tp_size"] == 2
    assert call.kwargs["quantization_modes"] == modes
    assert call.kwargs["dtype"] == torch.bfloat16
    assert call.kwargs["bootstrap_backend"] == "nccl"


@pytest.mark.parametrize(("chosen", "expected"), [(None, "1800"), ("60", "60")])
def test_nobody_goes_on_without_the_others_before_the_job_is_ended(
    chosen: str | None, expected: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen is not None:
        monkeypatch.setenv("UB_TIMEOUT", chosen)
    initialize({"distributed.timeout_minutes": 15})
    assert os.environ["UB_TIMEOUT"] == expected


def test_they_are_freed_once(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    destroy = mock.create_autospec(te.destroy_ub)
    monkeypatch.setattr(te, "destroy_ub", destroy)
    user_buffers.destroy_user_buffers()
    assert not destroy.called
    initialize({})
    user_buffers.destroy_user_buffers()
    user_buffers.destroy_user_buffers()
    assert destroy.call_count == 1


def test_they_end_with_the_process_groups(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    destroy = mock.create_autospec(te.destroy_ub)
    monkeypatch.setattr(te, "destroy_ub", destroy)
    initialize({})
    destroy_process_groups()
    assert destroy.called


def test_tensor_parallelism_over_hosts(asked: Any) -> None:
    with pytest.raises(EnvironmentSetupError, match="inside a host, and 4 processes on each do not divide"):
        initialize({TP: 8}, 8)
    assert not asked.called


def test_gpus_that_cannot_share_memory_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Transformer Engine says of a device without multicast."""
    from transformer_engine.pytorch.module import base

    monkeypatch.delenv("UB_SKIPMC", raising=False)
    monkeypatch.setattr(base.tex, "device_supports_multicast", lambda: False)
    with pytest.raises(EnvironmentSetupError, match=r"Launch app with UB_SKIPMC=1.*tp_comm_overlap to false"):
        initialize({})
    assert not te.module.base.is_ub_initialized()
