"""The generated command line."""

import subprocess
import sys
from typing import Any

import pytest

from megads.config.flags import blend, build_parser, parse_flags
from megads.config.loader import load_config
from megads.config.schema import Config
from megads.config.tree import get, leaves
from megads.errors import ConfigError


def config_of(*words: str) -> Config:
    arguments = parse_flags(words)
    return load_config(arguments.config, arguments.overrides, arguments.origins)


def test_every_leaf_and_every_megatron_name_is_a_flag() -> None:
    flags = build_parser()._option_string_actions
    for leaf in leaves():
        for name in (f"--{leaf.path}", *leaf.flags):
            assert flags[name].dest == leaf.path, name


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--training.learning_rate", "1e-3"], "training.learning_rate", 1e-3),
        (["--lr=1e-3"], "training.learning_rate", 1e-3),
        (["--lr", "1", "--training.learning_rate", "2e-3"], "training.learning_rate", 2e-3),
        (["--tensor-model-parallel-size", "4"], "distributed.tensor_parallel_size", 4),
        (["--micro-batch-size", "3"], "training.micro_batch_size", 3),
        (["--distributed.data_parallel_size", "-1"], "distributed.data_parallel_size", -1),
        (["--training.use_mtp"], "training.use_mtp", True),
        (["--training.use_mtp", "false"], "training.use_mtp", False),
        (["--training.use_mtp", "--no-training.use_mtp"], "training.use_mtp", False),
        (["--no-bf16"], "training.use_bf16", False),
        (["--sequence-parallel"], "distributed.sequence_parallel", True),
        (["--distributed.sequence_parallel", "null"], "distributed.sequence_parallel", None),
        (["--lr-decay-style", "WSD"], "training.lr_decay_style", "wsd"),
        (["--training.gradient_checkpointing"], "training.gradient_checkpointing", True),
        (["--training.gradient_checkpointing", "selective"], "training.gradient_checkpointing", "selective"),
        (["--distributed.zero_stage", "0"], "distributed.zero_stage", 0),
        (["--load", "null"], "checkpointing.load", None),
        (["--load", "out/step_5"], "checkpointing.load", "out/step_5"),
        (["--experiment_name", "12"], "experiment_name", "12"),
        (["--model.dense_layers", "[0, 3]"], "model.dense_layers", (0, 3)),
        (["--training.train_steps", "1e3"], "training.train_steps", 1000),
        (["--model.mla.rope_scaling.factor", "4"], "model.mla.rope_scaling.factor", 4.0),
        (["--model.mla.rope_scaling", '{"factor": 8}'], "model.mla.rope_scaling.factor", 8.0),
        (["--data.split", "90,5,5"], "data.split", "90,5,5"),
    ],
)
def test_a_flag_sets_its_setting(words: list[str], path: str, value: Any) -> None:
    found = get(config_of(*words), path)
    assert found == value
    assert type(found) is type(value)


def test_data_path_is_a_blend_as_in_megatron() -> None:
    sources = config_of("--data-path", "0.3", "corpus/code", "0.7", "other/code", "--seed", "1").data.sources
    assert [(source.name, source.weight, source.path) for source in sources] == [
        ("code", 0.3, "corpus/code"),
        ("code_1", 0.7, "other/code"),
    ]
    assert [entry["weight"] for entry in blend(["a", "b"])] == [1.0, 1.0]


@pytest.mark.parametrize("words", [["0.3"], ["0.3", "a", "b"], ["a", "0.3"], ["0.5", "a", "b", "c"]])
def test_data_path_that_is_neither_prefixes_nor_pairs(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--data-path"):
        blend(words)


def test_general_flags() -> None:
    arguments = parse_flags(["--config", "a.json", "--dry-run", "--world-size", "8"])
    assert (arguments.config, arguments.dry_run, arguments.world_size) == ("a.json", True, 8)
    assert parse_flags(["--nproc-per-node", "2"]).nproc_per_node == 2
    assert arguments.overrides == {}
    assert parse_flags([]).dry_run is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.learning_rat", "1"], "--training.learning_rate"),
        (["--learning_rate", "1"], "--training.learning_rate"),
        (["--learning-rate", "1"], "--training.learning_rate"),
        (["--training.learn", "1"], "unknown flag"),
        (["--lrr=1"], "--lr"),
        (["stray"], "belongs to no flag"),
        (["--lr"], "expected one argument"),
        (["--world-size", "x"], "--world-size"),
    ],
)
def test_wrong_flags_are_config_errors(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(words)
    assert said in str(caught.value)


def test_a_bad_value_names_the_flag_that_was_typed() -> None:
    with pytest.raises(ConfigError, match=r"training\.learning_rate: must be a number, got \"x\" \(--lr\)"):
        config_of("--lr", "x")


def test_help_is_grouped_and_tells_default_unit_and_source() -> None:
    text = " ".join(build_parser().format_help().split())
    for part in (
        "training:",
        "model.moe:",
        "--training.seq_length N, --seq-length N",
        "default: 2048; unit: tokens",
        "source: DeepSeek-V3",
        "--config PATH",
    ):
        assert part in text, part


def test_help_is_quick_and_imports_no_torch() -> None:
    program = (
        "import sys, time; from megads.config.flags import build_parser; build_parser().format_help(); "
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules; print(time.process_time())"
    )
    seconds = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(3)]
    # 0.35 s of processor time, of which other programs take nothing; the bound leaves room for slow ones.
    assert min(seconds) < 2
