"""The linter: each rule fires on its own mistake, with its severity; shipped configurations are clean."""

import json
from pathlib import Path
from typing import Any

import pytest

from megads.config.loader import load_config
from megads.config.resolve import planned_hardware, resolve
from megads.config.stages import load_stages
from megads.config.validate import check
from megads.plan.findings import Finding, Run
from megads.plan.hardware import gpu_named
from megads.plan.lint import is_refused, lint
from megads.plan.lint_run import slurm_seconds

CONFIGS = Path(__file__).parents[2] / "configs"
FRAGMENTS = {"dolma", "deepspeed_zero1", "megads.schema"}
# What the linter has to say of a configuration that is meant to be as it is.
UNDERSTOOD = {
    # 8 nodes of 8 H100 for trillions of tokens: many jobs, which resume from one another.
    "longer-than-limit",
    # As published, where the law is an extrapolation; the small one is the configuration guide's.
    "batch-far-from-law",
    "learning-rate-far-from-law",
    # Made to be tried out in minutes.
    "few-tokens",
    # TP 4 leaves 1760 columns of a dense FFN, 27.5 tiles.
    "inefficient-size",
}


def findings(
    name: str = "deepseek_v2_lite", gpus: int = 64, gpu: str | None = "h100", **changes: Any
) -> list[Finding]:
    run = {key: changes.pop(key) for key in ("data_tokens", "hours_between_interruptions") if key in changes}
    changes = {path.replace("__", "."): value for path, value in changes.items()}
    config = load_config(CONFIGS / f"{name}.json", changes)
    check(config, gpus, cuda=gpu is not None)
    resolved = resolve(config, gpus, cuda=gpu is not None)
    return lint(Run(config, resolved, gpu_named(gpu) if gpu else None, **run))


def ids(found: list[Finding]) -> set[str]:
    return {finding.id for finding in found}


BIASED = {"model__moe__use_aux_loss_free": True, "model__moe__bias_update_rate": 0.001}
GROUPS = {"model__moe__n_group": 8, "model__moe__topk_group": 1}
YARN = {"factor": 40, "original_max_position_embeddings": 2048}
MTP = {"training__use_mtp": True}
SHORT = {"training__total_training_tokens": 500_000_000_000}
COSINE = {"training__lr_decay_style": "cosine"}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("router-unbalanced", "error", {"model__moe__router_aux_loss_weight": 0.0}),
    ("router-unbalanced", "error", {"model__moe__balance_loss_type": "none"}),
    ("router-no-sequence-loss", "note", BIASED | {"model__moe__router_aux_loss_weight": 0.0}),
    ("router-aux-loss-large", "warning", BIASED | {"model__moe__router_aux_loss_weight": 0.1}),
    ("router-gates-not-normalized", "warning", {"model__moe__scoring_func": "sigmoid"}),
    ("router-groups-idle", "note", {"model__moe__n_group": 8, "model__moe__topk_group": 8}),
    ("router-groups-narrow", "warning", GROUPS),
    ("router-groups-and-ranks", "warning", {
        "model__moe__num_experts": 96, "model__moe__n_group": 3, "model__moe__topk_group": 2,
    }),
    ("first-layer-moe", "note", {"model__first_k_dense_replace": 0}),
    ("init-std", "warning", {"model__init_method_std": 0.06}),
    ("init-std", "warning", {"model__init_method_std": 0.001}),
    ("yarn-at-short-length", "warning", {"model__mla__rope_scaling": YARN, "training__seq_length": 2048}),
    ("mtp-weight-zero", "warning", MTP | {"training__mtp_loss_weight": 0.0}),
    ("mtp-weight-large", "warning", MTP | {"training__mtp_loss_weight": 1.0}),
    ("dropout", "note", {"model__hidden_dropout": 0.1}),
    ("capacity-drops-tokens", "note", {"model__moe__capacity_factor": 1.25}),
    ("inefficient-size", "warning", {"model__vocab_size": 102401}),
    ("inefficient-size", "note", {"model__vocab_size": 102408}),
    ("no-warmup", "warning", {"training__lr_warmup_steps": 0}),
    ("long-warmup", "warning", COSINE | {"training__lr_warmup_steps": 100_000}),
    ("learning-rate-far-from-law", "warning", {"training__learning_rate": 4.2e-3}),
    ("learning-rate-far-from-law", "note", {"training__learning_rate": 1e-3}),
    ("batch-far-from-law", "warning", {"training__global_batch_size": 128}),
    ("few-tokens", "note", {
        "training__total_training_tokens": 20_000_000_000, "training__lr_warmup_steps": 100,
    }),
    ("no-gradient-clipping", "warning", {"training__grad_clip": 0.0}),
    ("adam-beta2", "note", {"training__adam_beta2": 0.999}),
    ("no-weight-decay", "note", {"training__weight_decay": 0.0}),
    ("fp16", "note", {"training__use_fp16": True, "training__use_bf16": False}),
    ("tensor-parallel-across-nodes", "warning", {"distributed__tensor_parallel_size": 16}),
    ("optimizer-not-sharded", "warning", {"distributed__zero_stage": 0}),
    ("pipeline-starves", "warning", {
        "distributed__pipeline_parallel_size": 8, "distributed__expert_parallel_size": 1,
        "distributed__pipeline_layout": [4, 4, 4, 4, 4, 3, 2, 2], "training__global_batch_size": 32,
    }),
    ("does-not-fit", "warning", {"training__micro_batch_size": 8, "training__gradient_checkpointing": False}),
    ("checkpoints-rare-for-limit", "warning", {"distributed__slurm__time": "2:00:00"}),
    ("checkpoints-rare-for-interruptions", "warning", {"hours_between_interruptions": 4.0}),
    ("longer-than-limit", "note", {}),
]  # fmt: skip


@pytest.mark.parametrize(("id", "severity", "changes"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_fires_on_its_mistake(id: str, severity: str, changes: dict[str, Any]) -> None:
    found = {finding.id: finding for finding in findings(**changes)}
    assert id in found
    assert found[id].severity == severity
    assert found[id].source
    without = findings() if changes else findings(**SHORT)
    assert id not in ids(without), "it fires without the mistake"


def test_every_rule_has_a_case() -> None:
    text = "".join(
        (CONFIGS.parent / "megads" / "plan" / f"lint_{part}.py").read_text() for part in ("model", "run")
    )
    known = {line.strip().strip('",') for line in text.splitlines() if _is_id(line)}
    assert known == {case[0] for case in CASES} | {"data-repeated"}


def _is_id(line: str) -> bool:
    """Ids stand alone on the line after `Finding(`, in kebab case."""
    word = line.strip()
    return (
        word.endswith('",')
        and word.strip('",').replace("-", "").isalnum()
        and word.count('"') == 2
        and (word.strip('",') not in ("error", "warning", "note", "arXiv:1905.12322"))
    )


def test_data_that_is_read_too_often() -> None:
    tokens = {"common_crawl": 10**11, "starcoder": 10**13}
    (repeated,) = [one for one in findings(data_tokens=tokens) if one.id == "data-repeated"]
    assert "'common_crawl'" in repeated.message
    # 35% of 5.7T tokens from the 98% of 100B that are for training.
    assert f"{0.35 * 5.7e12 / 0.98e11:.1f} times" in repeated.message


def test_without_a_gpu_nothing_is_said_of_memory_and_time() -> None:
    found = ids(findings("debug", 1, None))
    assert not found & {"does-not-fit", "longer-than-limit", "checkpoints-rare-for-limit"}


@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("*.json")} - FRAGMENTS))
def test_shipped_configurations(name: str) -> None:
    for stage in load_stages(CONFIGS / f"{name}.json"):
        gpus, cuda = planned_hardware(stage.config)
        resolved = resolve(stage.config, gpus, cuda)
        found = lint(Run(stage.config, resolved, gpu_named("h100") if cuda else None))
        assert all(finding.severity == "note" for finding in found), found
        assert ids(found) <= UNDERSTOOD, found


def test_the_worst_comes_first_and_decides() -> None:
    found = findings(
        model__moe__balance_loss_type="none", training__grad_clip=0.0, training__weight_decay=0.0
    )
    order = [finding.severity for finding in found]
    assert order == sorted(order, key=("error", "warning", "note").index)
    assert is_refused(found, strict=False)
    only_warning = [finding for finding in found if finding.severity != "error"]
    assert not is_refused(only_warning, strict=False)
    assert is_refused(only_warning, strict=True)
    assert not is_refused([finding for finding in found if finding.severity == "note"], strict=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("45:30", 2730), ("24:00:00", 86400), ("2-12", 216000), ("1-2:30", 95400),
        ("1-00:00:05", 86405), ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_time_limits_of_sbatch(text: str, seconds: int | None) -> None:
    assert slurm_seconds(text) == seconds


def test_findings_are_json() -> None:
    assert json.loads(json.dumps([vars(finding) for finding in findings()]))
