"""Printing, the dry run and the saved record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megads.config import provenance
from megads.config.loader import load_config
from megads.config.memory import heaviest_stage, stage_memory
from megads.config.resolve import resolve
from megads.config.show import dry_run, non_defaults, render, save
from megads.config.tree import leaves
from megads.errors import ConfigError, EnvironmentSetupError

CONFIGS = Path(__file__).parents[2] / "configs"


def test_what_differs_is_marked() -> None:
    config = load_config(None, {"training.learning_rate": 0.5, "model.mla.rope_scaling": {"factor": 7}})
    changed = non_defaults(config)
    assert changed["training.learning_rate"] == 0.5
    assert changed["model.mla.rope_scaling.factor"] == 7
    assert {path.rpartition(".")[0] for path in changed} == {"training", "model.mla.rope_scaling"}
    text = render(config)
    assert "  * learning_rate = 0.5\n" in text
    assert "    seq_length = 2048 tokens\n" in text


def test_defaults_have_no_mark_and_every_leaf_a_line() -> None:
    text = render(load_config(None))
    assert "*" not in text
    assert non_defaults(load_config(None)) == {}
    null = ("model.mla.rope_scaling.", "data.curriculum.")
    shown = [leaf for leaf in leaves() if not leaf.path.startswith(null)]
    assert len([line for line in text.splitlines() if " = " in line]) == len(shown)


def test_dry_run_tells_the_facts() -> None:
    text = dry_run(load_config(CONFIGS / "deepseek_v3_671b.json"), 2048, cuda=True)
    for fact in (
        "2048 on cuda (nccl), bf16: TP 1 x PP 16 x CP 1 x DP 128",
        "EP 64 x ETP 1, expert data parallelism 2",
        "4, 1 + 1 MTP",
        "247,199 steps",
        "120 micro-batches of 1",
        "from 3,072 sequences",
        "671B in all, 37.55B active",
        "full square",
        "GiB per process before activations",
        "model.moe.n_group = 8",
    ):
        assert fact in text, fact


def test_dry_run_refuses_what_cannot_run() -> None:
    with pytest.raises(ConfigError, match="7 processes"):
        dry_run(load_config(CONFIGS / "train_config_large.json"), 7, cuda=True)


def test_dry_run_imports_no_torch() -> None:
    program = (
        "import sys; from megads.config.loader import load_config; from megads.config.show import dry_run\n"
        f"dry_run(load_config({str(CONFIGS / 'debug.json')!r}), 1, False)\n"
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_saved_configuration_loads_again(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "deepseek_v3_671b.json", {"experiment_name": "again"})
    save(config, resolve(config, 2048, cuda=True), tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.json") == config
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["non_defaults"]["experiment_name"] == "again"
    assert record["resolved"]["dp"] == 128
    assert record["resolved"]["shape"]["mtp_depth"] == 1
    assert record["provenance"]["packages"]["pydantic"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "run.json"]


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(None)
    with pytest.raises(EnvironmentSetupError, match="output_dir"):
        save(config, resolve(config, 1, cuda=False), tmp_path / "file" / "run")


def test_git_revision_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "megads"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance.megads, "__file__", str(package / "__init__.py"))
    assert provenance.git_revision() is None  # installed, not a checkout
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "m"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    found = provenance.git_revision()
    assert found is not None
    assert len(found["revision"]) == 40
    assert found["modified"] is False
    (package / "__init__.py").write_text("changed = 1")
    assert provenance.git_revision() == {"revision": found["revision"], "modified": True}


def test_memory_of_one_process_adds_up() -> None:
    config = load_config(None, {"distributed.zero_stage": 0})
    memory = heaviest_stage(config, resolve(config, 1, cuda=False))
    # Default model, FP32: weights, gradients and two moments of every parameter.
    assert memory.total_bytes == 16 * memory.parameters
    in_bf16 = heaviest_stage(config, resolve(config, 1, cuda=True))
    offload = {"distributed.zero_offload": True, "distributed.zero_offload_fraction": 0.5}
    offloaded = load_config(None, offload)
    moments = (
        in_bf16.optimizer_bytes - heaviest_stage(offloaded, resolve(offloaded, 1, cuda=True)).optimizer_bytes
    )
    assert moments == 4 * in_bf16.parameters
    assert in_bf16.total_bytes == (2 + 4 + 12) * memory.parameters


def test_memory_falls_with_every_kind_of_parallelism() -> None:
    def bytes_of(world_size: int, **sizes: int) -> int:
        config = load_config(CONFIGS / "debug.json", {f"distributed.{name}": n for name, n in sizes.items()})
        return heaviest_stage(config, resolve(config, world_size, cuda=False)).total_bytes

    alone = bytes_of(1)
    assert bytes_of(2) < alone  # the distributed optimizer
    assert bytes_of(2, zero_stage=0) == alone
    for name in ("tensor", "pipeline", "expert", "expert_tensor"):
        assert bytes_of(2, **{f"{name}_parallel_size": 2, "zero_stage": 0}) < alone, name


def test_stages_together_hold_the_model_once() -> None:
    overrides = {"distributed.pipeline_parallel_size": 2, "distributed.virtual_pipeline_parallel_size": 2}
    one, two = (load_config(CONFIGS / "debug.json", changes) for changes in ({}, overrides))
    whole = heaviest_stage(one, resolve(one, 1, cuda=False)).parameters
    parts = [stage_memory(two, resolve(two, 2, cuda=False), stage).parameters for stage in (0, 1)]
    table = one.model.vocab_size * one.model.mla.d_model
    assert sum(parts) == whole + table  # MTP needs its own copy of the embedding
