"""The shipped configurations: each loads, is sound on its own processes, and is what it claims."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from megads.config.flops import count_parameters
from megads.config.jsonschema import as_text, json_schema
from megads.config.loader import load_config
from megads.config.resolve import planned_hardware, resolve
from megads.config.schedule import learning_rate_schedule
from megads.config.show import dry_run
from megads.config.stages import check_stages, load_stages, planned_processes
from megads.config.tree import leaves
from megads.config.validate import check, notes

CONFIGS = Path(__file__).parents[2] / "configs"
# (configuration, processes, parameters without MTP; None: as published, see test_flops.py)
SHIPPED = [
    ("debug", 1, 5.7e6),
    ("sft_debug", 2, 5.7e6),
    ("train_config_tiny", 1, 100e6),
    ("train_config_small", 4, 1e9),
    ("demo", 2, 5.7e6),
    ("train_config_small", 8, 1e9),
    ("train_config_large", 128, 15e9),
    ("deepseek_v3_671b", 2048, 671e9),
    ("deepseek_v2_lite", 64, 15.7e9),
    ("moonlight_16b_a3b", 64, 16e9),
]
# (configuration with stages, processes)
STAGED = {"stages_debug": 2, "context_extension": 1, "deepseek_v3_671b_stages": 2048}
DOMAINS = [
    "cc", "refined_web", "starcoder", "c4", "reddit", "pes2o", "redpajama", "flan", "openwebmath",
    "proof_pile_2", "gutenberg", "metawika", "wikimedia",
]  # fmt: skip
SUBSETS = {f"dolma_v1_6_{name}" for name in DOMAINS}


def test_no_configuration_is_forgotten() -> None:
    fragments = {"dolma", "deepspeed_zero1", "megads.schema"}
    known = {name for name, _, _ in SHIPPED} | set(STAGED) | fragments
    assert {path.stem for path in CONFIGS.glob("*.json")} == known


@pytest.mark.parametrize(("name", "world_size", "parameters"), SHIPPED)
def test_it_is_sound_and_of_its_size(name: str, world_size: int, parameters: float) -> None:
    config = load_config(CONFIGS / f"{name}.json")
    cuda = name not in ("debug", "sft_debug")
    check(config, world_size, cuda)
    assert notes(config) == []
    assert count_parameters(config).total == pytest.approx(parameters, rel=0.07)
    assert f"{world_size} on {'cuda' if cuda else 'cpu'}" in dry_run(config, world_size, cuda)
    if config.distributed.slurm.enabled:
        assert planned_hardware(config) == (world_size, True)


@pytest.mark.parametrize(("name", "world_size"), STAGED.items())
def test_stages_are_sound(name: str, world_size: int) -> None:
    stages = load_stages(CONFIGS / f"{name}.json")
    cuda = name not in ("stages_debug", "context_extension")
    assert planned_processes(stages) == (world_size, cuda)
    check_stages(stages, world_size, cuda)
    assert [notes(stage.config) for stage in stages] == [[]] * len(stages)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in SHIPPED} - {"debug", "sft_debug", "demo"}))
def test_it_blends_the_thirteen_sources(name: str) -> None:
    sources = load_config(CONFIGS / f"{name}.json").data.sources
    assert {source.subset for source in sources} == SUBSETS
    assert sum(source.weight for source in sources) == pytest.approx(1)


def test_debug_has_every_part_and_runs_in_parallel_layouts() -> None:
    path = CONFIGS / "debug.json"
    config = load_config(path)
    resolved = resolve(config, 1, cuda=False)
    assert config.model.mla.q_lora_rank
    assert config.model.moe.use_aux_loss_free
    assert resolved.shape.is_moe == (False, True, True, True)
    assert resolved.shape.mtp_depth == 1
    assert resolved.precision == "fp32"
    assert resolve(config, 1, cuda=True).precision == "bf16"
    layouts = [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"expert_parallel_size": 2},
        {"context_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_parallel_size": 2, "pipeline_parallel_size": 1},
        {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2},
        {"expert_tensor_parallel_size": 2},
    ]
    for layout in layouts:
        overrides: dict[str, Any] = {f"distributed.{name}": size for name, size in layout.items()}
        check(load_config(path, overrides), 2, cuda=False)


def test_deepseek_v3_is_the_published_recipe() -> None:
    config = load_config(CONFIGS / "deepseek_v3_671b.json")
    resolved = resolve(config, 2048, cuda=True)
    assert resolved.total_tokens == 14_800_000_000_000
    assert (resolved.pp, resolved.ep, resolved.tp, resolved.dp) == (16, 64, 1, 128)
    assert sum(resolved.pipeline_layout) == 61
    assert resolved.pipeline_layout[-1] == 1
    batch = resolved.batch
    assert [batch.batch_size(tokens) for tokens in (0, 468_999_999_999, 469_000_000_000)] == [
        3072,
        12288,
        15360,
    ]
    rate = learning_rate_schedule(config.training, resolved.total_tokens, batch)
    assert rate.value(batch.tokens_after(1000)) == pytest.approx(1.1e-4)
    trillion = 10**12
    expected = {
        batch.tokens_after(2000): 2.2e-4,
        10 * trillion: 2.2e-4,
        12_150_000_000_000: (2.2e-4 + 2.2e-5) / 2,
        14_300_000_000_000: 2.2e-5,
        14_633_000_000_000: 2.2e-5,
        14_633_000_000_001: 7.3e-6,
        14_800_000_000_000: 7.3e-6,
    }
    for tokens, value in expected.items():
        assert rate.value(tokens) == pytest.approx(value), tokens


def test_moonlight_is_the_published_recipe() -> None:
    config = load_config(CONFIGS / "moonlight_16b_a3b.json")
    resolved = resolve(config, 64, cuda=True)
    batch = resolved.batch
    assert [batch.batch_size(tokens) for tokens in (0, 200_000_000_000)] == [2048, 4096]
    rate = learning_rate_schedule(config.training, resolved.total_tokens, batch)
    annealing = 5_200_000_000_000
    expected = {
        batch.tokens_after(2000): 4.2e-4,
        annealing: 4.2e-5,
        annealing + 100 * 4096 * 8192: 1e-4,
        5_700_000_000_000: 0,
    }
    for tokens, value in expected.items():
        assert rate.value(tokens) == pytest.approx(value), tokens


def test_v2_lite_is_the_published_recipe() -> None:
    config = load_config(CONFIGS / "deepseek_v2_lite.json")
    resolved = resolve(config, 64, cuda=True)
    rate = learning_rate_schedule(config.training, resolved.total_tokens, resolved.batch)
    tenth = resolved.total_tokens // 10
    values = [rate.value(tokens) / 4.2e-4 for tokens in (7 * tenth, 8 * tenth + 1, 9 * tenth + 1)]
    assert values == pytest.approx(list(accumulate([1, 0.316, 0.316], lambda a, b: a * b)))


def test_the_json_schema_is_current() -> None:
    committed = (CONFIGS / "megads.schema.json").read_text(encoding="utf-8")
    assert committed == as_text(), "run tools/make_schema.py"


def test_the_json_schema_knows_every_name() -> None:
    schema = json_schema()
    for leaf in leaves():
        *sections, _ = leaf.path.split(".")
        place = schema
        for section in sections:
            setting = place["properties"][section]
            reference = setting.get("$ref") or setting["anyOf"][0]["$ref"]
            place = schema["$defs"][reference.rpartition("/")[2]]
        for name in (leaf.name, *leaf.aliases):
            assert leaf.unit in place["properties"][name]["description"], leaf.path
        assert place["additionalProperties"] is False
    assert "gradient_checkpointing" in schema["$defs"]["Model"]["properties"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_files_are_plain_json_with_known_keys_at_the_top(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.stem not in ("megads.schema", "deepspeed_zero1"):
        assert content["$schema"] == "megads.schema.json"
        assert set(content) <= set(json_schema()["properties"])
