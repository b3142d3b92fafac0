"""Transformer Engine as far as a machine without a GPU shows it: what is built, not what it computes.

Its modules refuse to be built without CUDA, so the processes say that there is one while they build, and hold
their tensors on the CPU.
"""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.dist import tiny
from tests.dist.harness import host_store, rank_environment, run_distributed
from tests.dist.test_resume import load, save

pytestmark = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
LAYOUTS = ("single", "tp2", "ep2", "etp2", "pp2-uneven")
SAVED_STEP = 2


# --- in a worker ------------------------------------------------------------------------------


def build_with_transformer_engine(settings: dict[str, Any], **distributed: Any) -> Any:
    """The training step; in a process that has not imported Megatron-Core yet.

    `distributed` are settings past the checks, for which this is a run on the CPU.
    """
    hopper = SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30)
    torch.cuda.get_device_capability = lambda *device: (hopper.major, hopper.minor)
    torch.cuda.get_device_properties = lambda *device: hopper
    import megatron.core.extensions.transformer_engine  # noqa: F401 (later it would be hidden)

    from megads.mcore.groups import initialize_device, initialize_process_groups

    config, resolved = tiny.configure(settings)
    initialize_device("cpu")
    initialize_process_groups(resolved, timeout_minutes=4, seed=config.seed)
    from megads.train.step import TrainingStep

    changes = {
        "model": config.model.model_copy(update={"backend": "transformer_engine"}),
        "distributed": config.distributed.model_copy(update=distributed),
    }
    with mock.patch("torch.cuda.is_available", return_value=True):
        return TrainingStep(config.model_copy(update=changes), resolved)


def native_shards(settings: dict[str, Any], directory: Path) -> tuple[list[tiny.Shard], list[tiny.Shard]]:
    """Before the first step, and after some, which are saved into `directory`."""
    step = tiny.start(settings)
    first = tiny.shards(step, optimizer=False)
    tiny.train(step, 0, SAVED_STEP)
    save(step, directory, SAVED_STEP)
    return first, tiny.shards(step)


def other_shards(settings: dict[str, Any], directory: Path) -> tuple[list[tiny.Shard], list[tiny.Shard]]:
    """Before the first step, and with the native checkpoint loaded, which is saved again."""
    step = build_with_transformer_engine(settings)
    computing = {type(module).__module__.split(".")[-1] for module in step.chunks[0].modules()}
    assert "transformer_engine" in computing
    first = tiny.shards(step, optimizer=False)
    load(step, directory, generators=False)
    save(step, directory.with_name("theirs"), SAVED_STEP)
    return first, tiny.shards(step)


def loaded_shards(settings: dict[str, Any], directory: Path) -> list[tiny.Shard]:
    """Of a native run."""
    step = tiny.start(settings)
    load(step, directory, generators=False)
    return tiny.shards(step)


def histories_before_and_after(settings: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    """Delayed scaling: what is saved, what was restored, and what the first forward pass makes of that."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.utils import get_model_config
    from transformer_engine.pytorch import autocast

    from megads.model.fp8_history import _engine_modules, restore_histories, sharded_histories

    step = build_with_transformer_engine(settings)
    transformer = get_model_config(step.chunks[0])
    transformer.fp8, transformer.fp8_recipe, transformer.fp8_amax_history_len = "e4m3", "delayed", 4
    modules = [module for _, module in _engine_modules(step.chunks)]
    saved = []
    with mock.patch("torch.cuda.is_available", return_value=True):
        for module in modules:
            module.fp8_meta["num_gemms"] = getattr(module, "num_gemms", 1)
            module.init_fp8_meta_tensors(get_fp8_recipe(transformer))
            for way in ("scaling_fwd", "scaling_bwd"):
                module.fp8_meta[way].scale.uniform_()
                module.fp8_meta[way].amax_history.uniform_()
        saved.append(copy.deepcopy(sharded_histories(step.chunks).data))
        for module in modules:  # as in a new process
            module.fp8_meta = {"fp8_checkpoint": False, "fp8_group": None}
            module.fp8_meta_tensors_initialized = False
        assert sharded_histories(step.chunks).data == {}
        assert restore_histories(step.chunks, saved[0])
        saved.append(copy.deepcopy(sharded_histories(step.chunks).data))
        with autocast(enabled=True, recipe=get_fp8_recipe(transformer)):
            for module in modules:
                module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
        saved.append(sharded_histories(step.chunks).data)
    return saved


def delayed_weight_gradients(settings: dict[str, Any], directory: Path) -> list[tuple[list[str], list[str]]]:
    """Of each layer, MTP's among them: linears that delay, and those that the combined schedule calls for."""
    from megatron.core.models.common.fine_grained_callables import build_layer_callables
    from transformer_engine.pytorch import GroupedLinear, Linear

    from megads.model import build

    def translated(*args: Any) -> Any:
        config = transformer_config(*args)
        config.delay_wgrad_compute = True  # past the checks, which want CUDA and 16 bits
        return config

    transformer_config = build.transformer_config
    with mock.patch.object(build, "transformer_config", translated):
        step = build_with_transformer_engine(settings)
    (model,) = (build.unwrap(chunk) for chunk in step.chunks)
    layers = [*model.decoder.layers, *model.mtp.layers]
    names = {module: name for name, module in model.named_modules()}
    found = []
    for layer in layers:
        with (
            mock.patch.object(Linear, "backward_dw", autospec=True) as of_linear,
            mock.patch.object(GroupedLinear, "backward_dw", autospec=True) as of_experts,
        ):
            for nodes in build_layer_callables(layer)[1].values():
                for node in nodes if isinstance(nodes, list) else [nodes]:
                    node.backward_dw()
        called = [names[call.args[0]] for call in of_linear.call_args_list + of_experts.call_args_list]
        delaying = [
            names[module]
            for module in layer.modules()
            if isinstance(module, Linear | GroupedLinear) and module.need_backward_dw()
        ]
        found.append((sorted(delaying), sorted(called)))
    return found


def buffers_of_linears(settings: dict[str, Any], directory: Path) -> tuple[dict[str, list[str]], bool]:
    """What each linear does in pieces, by its name, of those that do; and whether the model still does."""
    from transformer_engine.pytorch import Linear
    from transformer_engine.pytorch.module import base

    from megads.model import build

    ways = ("ag_fprop", "rs_fprop", "ag_dgrad", "rs_dgrad")
    # Transformer Engine's linears ask whether buffers are there when they are built.
    with mock.patch.object(
        build, "initialize_user_buffers", side_effect=lambda *args: setattr(base, "_ub_initialized", True)
    ):
        step = build_with_transformer_engine(settings, tp_comm_overlap=True)
    (model,) = (build.unwrap(chunk) for chunk in step.chunks)
    found = {
        name: [f"{module.ub_name} {way}" for way in ways if getattr(module, f"ub_overlap_{way}")]
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }
    return {name: buffers for name, buffers in found.items() if buffers}, model.config.tp_comm_overlap


if __name__ == "__main__":
    name, settings, directory, output = json.loads(sys.argv[1])
    torch.save(globals()[name](settings, Path(directory)), f"{output}/{os.environ['RANK']}.pt")


# --- the tests --------------------------------------------------------------------------------


def in_new_processes(
    count: int, function: Any, settings: dict[str, Any], directory: Path, output: Path
) -> list[Any]:
    """A function of this file on `count` processes: the results by rank."""
    store, own = host_store(), os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        __name__,
        json.dumps([function.__name__, settings, str(directory), str(output)]),
    ]
    processes = [
        subprocess.Popen(
            command, env=own | rank_environment(rank, count, store.port),
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return [torch.load(output / f"{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_the_same_whatever_library_computes_the_layers(layout: str, tmp_path: Path) -> None:
    """First values of the weights, and what the other loads, optimizer included; then all the way back."""
    processes, settings = tiny.LAYOUTS[layout]
    checkpoints = tmp_path / "checkpoints"
    native = run_distributed(processes, native_shards, settings=settings, directory=checkpoints)
    other = in_new_processes(processes, other_shards, settings, checkpoints, tmp_path)
    back = run_distributed(processes, loaded_shards, settings=settings, directory=tmp_path / "theirs")
    assert_same([first for first, _ in native], [first for first, _ in other])
    assert_same([trained for _, trained in native], [loaded for _, loaded in other])
    assert_same([trained for _, trained in native], back)


def assert_same(ranks: list[list[tiny.Shard]], other_ranks: list[list[tiny.Shard]]) -> None:
    whole, other = tiny.assemble(ranks), tiny.assemble(other_ranks)
    assert whole.keys() == other.keys()
    assert [name for name in whole if not torch.equal(whole[name], other[name])] == []


def test_scales_of_delayed_scaling_are_still_there_in_the_first_pass_after_a_resume(tmp_path: Path) -> None:
    ((saved, restored, used),) = in_new_processes(1, histories_before_and_after, {}, tmp_path, tmp_path)
    assert len({name.rsplit(".", 1)[-1] for name in saved}) > 3  # linears of attention, FFN and experts
    for name, of_module in saved.items():
        for way in ("scaling_fwd", "scaling_bwd"):
            for found in (restored, used):
                assert torch.equal(found[name][way]["scale"], of_module[way]["scale"])
                assert torch.equal(found[name][way]["amax"], of_module[way]["amax"])
    assert restored.keys() == used.keys() == saved.keys()


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_the_combined_schedule_calls_once_for_every_delayed_weight_gradient(
    q_lora_rank: int | None, tmp_path: Path
) -> None:
    settings = {"model.mla.q_lora_rank": q_lora_rank, "training.num_predict_tokens": 2}
    (layers,) = in_new_processes(1, delayed_weight_gradients, settings, tmp_path, tmp_path)
    assert all(delaying == called for delaying, called in layers)
    attention = 4 if q_lora_rank is None else 5
    # A dense FFN has 2, shared and routed experts have 4, MTP a projection before its layer.
    assert [len(called) - attention for _, called in layers] == [2, 4, 4, 4, 4 + 1]


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_linears_of_hidden_states_have_user_buffers_and_others_do_not(
    q_lora_rank: int | None, tmp_path: Path
) -> None:
    settings = tiny.LAYOUTS["tp2"].settings | {"model.mla.q_lora_rank": q_lora_rank}
    (found, overlaps), _ = in_new_processes(2, buffers_of_linears, settings, tmp_path, tmp_path)
    assert overlaps  # what Megatron-Core would turn off at the first linear that has none
    layers = [f"decoder.layers.{index}." for index in range(4)]
    layers += [f"mtp.layers.{index}.mtp_model_layer." for index in range(2)]
    expected = {}
    for layer in layers:
        ffn = layer + ("mlp." if layer == "decoder.layers.0." else "mlp.shared_experts.")
        expected[layer + "self_attention.linear_proj"] = ["proj rs_fprop", "proj ag_dgrad"]
        expected[ffn + "linear_fc1"] = ["fc1 ag_fprop"]
        expected[ffn + "linear_fc2"] = ["fc2 rs_fprop", "fc2 ag_dgrad"]
        if q_lora_rank is None:
            expected[layer + "self_attention.linear_q_proj"] = ["qkv ag_fprop"]
    assert found == expected
