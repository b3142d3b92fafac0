"""Users' mistakes: one typed error on one screen, a non-zero exit, no traceback."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.commands import Finished, pretrain, pretrain_well, tool, write_json
from tests.e2e.conftest import VOCAB_SIZE

SCREEN_LINES = 25


def assert_told(done: Finished, error: str, code: int, *words: object) -> None:
    """The run ended with `error`, on one screen that holds all `words`."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith(f"{error}: "), done.stderr
    assert len(done.stderr.splitlines()) <= SCREEN_LINES, done.stderr
    for word in words:
        assert str(word) in done.stderr, done.stderr


def test_missing_configuration_file(tmp_path: Path) -> None:
    write_json(tmp_path / "there.json", {})
    done = pretrain("--config", tmp_path / "missing.json")
    assert_told(done, "ConfigError", 2, "missing.json", "there.json")


def test_configuration_that_is_no_json(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"seed": 1\n "output_dir": "x"}')
    assert_told(pretrain("--config", broken), "ConfigError", 2, "broken.json", "2")


def test_wrong_keys_and_values_are_told_at_once(tmp_path: Path) -> None:
    wrong = write_json(
        tmp_path / "wrong.json",
        {"training": {"learning_rat": 1e-3, "seq_length": "long"}, "model": {"moe": {"n_experts": 8}}},
    )
    done = pretrain("--config", wrong)
    assert_told(done, "ConfigError", 2, "learning_rat", "learning_rate", "seq_length", "n_experts")


def test_unknown_flag() -> None:
    done = pretrain("--config", "configs/debug.json", "--learning-rate-of-the-run", 1)
    assert_told(done, "ConfigError", 2, "--learning-rate-of-the-run")


def test_impossible_layouts_are_told_at_once() -> None:
    done = pretrain(
        "--config", "configs/debug.json", "--tensor-model-parallel-size", 3,
        "--pipeline-model-parallel-size", 3, "--expert-model-parallel-size", 5,
    )  # fmt: skip
    assert_told(
        done, "ConfigError", 2, "tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size"
    )


def test_a_feature_that_does_not_work_yet() -> None:
    done = pretrain("--config", "configs/debug.json", "--model.mla.use_fp8_kv")
    assert_told(done, "ConfigError", 2, "model.mla.use_fp8_kv", "an FP8 latent cache")


def test_an_error_under_torchrun_is_told_once() -> None:
    done = pretrain("--config", "configs/debug.json", "--num-layers", 0, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("ConfigError: ") == 1, done.stderr
    assert "model.num_layers" in done.stderr


def test_vocabulary_too_small_for_the_tokenizer(config: Path) -> None:
    done = pretrain("--config", config, "--vocab-size", 512)
    assert_told(done, "DataError", 3, f"{VOCAB_SIZE}", "512", "model.vocab_size")


def test_missing_dataset(config: Path, tmp_path: Path) -> None:
    done = pretrain("--config", config, "--data-path", tmp_path / "nothing")
    assert_told(done, "DataError", 3, tmp_path / "nothing.bin", "preprocess_dolma.py")


def test_empty_dataset(config: Path, tmp_path: Path, data: Path) -> None:
    """What a pair of files without a document looks like: a header and one boundary."""
    prefix = tmp_path / "empty"
    header = next((data / "code").glob("*.idx")).read_bytes()[:18]
    prefix.with_suffix(".idx").write_bytes(
        header + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(8)
    )
    prefix.with_suffix(".bin").touch()
    done = pretrain("--config", config, "--data-path", prefix)
    assert_told(done, "DataError", 3, prefix, "empty")


def test_truncated_dataset(config: Path, tmp_path: Path, data: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(next((data / "code").glob(f"*{suffix}")), tmp_path / f"code{suffix}")
    whole = (tmp_path / "code.bin").stat().st_size
    with (tmp_path / "code.bin").open("r+b") as file:
        file.truncate(whole // 2)
    done = pretrain("--config", config, "--data-path", tmp_path / "code")
    assert_told(done, "DataError", 3, tmp_path / "code.bin", "truncated", f"{whole:,}")


def test_checkpoint_of_another_model(config: Path, tmp_path: Path) -> None:
    pretrain_well("--config", config, "--train-iters", 2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    done = pretrain(
        "--config", config, "--train-iters", 4, "--num-experts", 8, "--load", checkpoint,
        "--output_dir", tmp_path / "other",
    )  # fmt: skip
    assert_told(done, "CheckpointError", 4, "model.moe.num_experts", "checkpoint 4", "now 8")


def test_missing_checkpoint(config: Path, tmp_path: Path) -> None:
    done = pretrain("--config", config, "--load", tmp_path / "step_00000009")
    assert_told(done, "CheckpointError", 4, "step_00000009")


@pytest.mark.parametrize("name", ["train_tokenizer.py", "preprocess_dolma.py"])
def test_tools_without_input(name: str, tmp_path: Path) -> None:
    arguments = ["--input", tmp_path / "missing", "--output", tmp_path / "out"]
    if name == "preprocess_dolma.py":
        (tmp_path / "missing").mkdir()
        arguments += ["--tokenizer", tmp_path / "no.model"]
    done = tool(name, *arguments)
    assert_told(done, "error", 3, tmp_path)
    assert not list(tmp_path.glob("out*"))
