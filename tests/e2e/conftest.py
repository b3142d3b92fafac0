"""A small corpus, its tokenizer and datasets, made once by the tools; a configuration that trains on them."""

from pathlib import Path

import pytest

from tests.e2e.commands import ROOT, tool, write_json

VOCAB_SIZE = 640


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus") / "corpus"
    made = tool("make_sample_corpus.py", "--output", directory, "--mb", 2)
    assert made.returncode == 0, made.stderr
    return directory


@pytest.fixture(scope="session")
def data(corpus: Path) -> Path:
    """tokenizer.model and one dataset per source."""
    directory = corpus.parent / "data"
    tokenizer = directory / "tokenizer.model"
    for made in (
        # Less coverage than usual: which rare characters the machine's texts hold is not ours to say.
        tool(
            "train_tokenizer.py", "--input", corpus, "--output", tokenizer, "--vocab-size", VOCAB_SIZE,
            "--character-coverage", 0.995,
        ),
        tool(
            "preprocess_dolma.py", "--input-root", corpus, "--output-root", directory,
            "--tokenizer", tokenizer, "--workers", 1,
        ),
    ):  # fmt: skip
        assert made.returncode == 0, made.stderr
    return directory


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    return tiny_config(data, tmp_path)


def tiny_config(data: Path, directory: Path) -> Path:
    """MLA, MoE and MTP at the smallest sizes; every step is logged; the run is in `directory`/run."""
    return write_json(
        directory / "config.json",
        {
            "extends": str(ROOT / "configs" / "debug.json"),
            "output_dir": str(directory / "run"),
            "model": {
                "num_layers": 2,
                "vocab_size": VOCAB_SIZE,
                "mla": {
                    "d_model": 32, "d_latent": 16, "q_lora_rank": 16, "num_heads": 2, "qk_nope_head_dim": 16,
                    "qk_rope_head_dim": 8, "v_head_dim": 16, "max_context_length": 32,
                },
                "moe": {"num_experts": 4, "expert_intermediate_size": 32, "bias_update_rate": 0.02},
            },
            "training": {
                "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 32, "train_steps": 8,
                "lr_warmup_steps": 2, "log_interval": 1, "eval_interval": 0, "save_interval": 0,
            },
            "data": {
                "cache_dir": str(data),
                "tokenizer_path": str(data / "tokenizer.model"),
                "split": "80,20,0",
                "sources": [{"name": name, "subset": name} for name in ("code", "docs", "manuals")],
            },
            "distributed": {"device": "cpu"},
            "logging": {"tensorboard": {"enabled": False}},
        },
    )  # fmt: skip
