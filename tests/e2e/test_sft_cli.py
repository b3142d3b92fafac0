"""Supervised fine-tuning by command line: conversations, a run on two processes, and its exact resume."""

from pathlib import Path

import pytest

from tests.e2e.commands import pretrain, pretrain_well, records, tool, write_json
from tests.e2e.test_resume_cli import measured

STEPS, STOP_STEP = 20, 10


@pytest.fixture(scope="module")
def conversations(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen, with a line among them that holds none."""
    directory = tmp_path_factory.mktemp("instructions")
    file = directory / "library.jsonl"
    made = tool("make_sample_instructions.py", "--output", file, "--count", 60)
    assert made.returncode == 0, made.stderr
    with open(file, "a") as lines:
        lines.write('{"messages": [{"role": "user", "content": "Anybody?"}]}\n')
    arguments = ("--input", file, "--output", directory / "library", "--conversations", "messages",
                 "--tokenizer", data / "tokenizer.model", "--workers", 1)  # fmt: skip
    refused = tool("preprocess_dolma.py", *arguments)
    assert refused.returncode == 3
    assert "library.jsonl, line 61: no message is of the role assistant" in refused.stderr
    made = tool("preprocess_dolma.py", *arguments, "--tolerant", "--quarantine-quota", 0.1)
    assert made.returncode == 0, made.stderr
    assert "quarantined: no_answer 1" in made.stdout
    checked = tool("verify_dataset.py", directory / "library", "--tokenizer", data / "tokenizer.model")
    assert checked.returncode == 0, checked.stdout
    return directory / "library"


@pytest.fixture
def sft(config: Path, conversations: Path, tmp_path: Path) -> Path:
    return write_json(
        tmp_path / "sft.json",
        {
            "extends": str(config),
            "model": {"mla": {"max_context_length": 256}},
            "training": {"seq_length": 256, "train_steps": STEPS, "learning_rate": 1e-2},
            "data": {
                "document_mask": True,
                "reset_position_ids": True,
                "split": "100,0,0",
                "sources": [{"name": "library", "path": str(conversations)}],
            },
        },
    )


def test_conversations_are_shown_with_their_answers(conversations: Path, data: Path) -> None:
    arguments = (conversations, "--tokenizer", data / "tokenizer.model", "--document", 0)
    shown = tool("inspect_dataset.py", *arguments).stdout
    assert shown.count("⟦answer⟧") == shown.count("⟦end of answer⟧") == 2
    assert "library.jsonl, line 1" in shown
    assert "Assistant:⟦answer⟧ " in shown


def test_answers_are_learned_and_a_resume_is_exact(sft: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--config", sft, "--expert-model-parallel-size", 2)
    done = pretrain_well(*flags, "--output_dir", whole, processes=2)
    assert "library: 60 conversations fill" in done.stdout
    losses = [record["lm_loss"] for record in records(whole, "train")]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) / 3 < 0.8 * sum(losses[:3]) / 3
    pretrain_well(*flags, "--output_dir", cut, "--training.exit_step", STOP_STEP, processes=2)
    pretrain_well(*flags, "--output_dir", cut, processes=2)
    assert measured(cut, "train") == measured(whole, "train")


def test_what_keeps_conversations_apart_is_asked_for(sft: Path) -> None:
    refused = pretrain("--config", sft, "--no-data.document_mask")
    assert refused.returncode == 2
    assert "'library': holds conversations" in refused.stderr
    assert "Set data.document_mask to true" in refused.stderr
    assert "Traceback" not in refused.stderr
