"""Stages in a configuration: what each inherits, what they may not set, and every mistake with its stage."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megads.config.flags import parse_flags
from megads.config.loader import load_config
from megads.config.resolve import resolve
from megads.config.scalars import Schedules
from megads.config.show import dry_run_stages
from megads.config.stages import Stage, check_stages, load_stages, planned_processes, select
from megads.config.validate import find_problems, notes
from megads.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
YARN = {"max_context_length": 1024, "rope_scaling": {"factor": 4, "original_max_position_embeddings": 256}}
EXTEND = {"name": "extend", "model": {"mla": YARN}, "training": {"seq_length": 1024}}


def write(directory: Path, stages: Any, **settings: Any) -> Path:
    path = directory / "stages.json"
    path.write_text(
        json.dumps(
            {"extends": str(CONFIGS / "debug.json"), "output_dir": "out"} | settings | {"stages": stages}
        )
    )
    return path


def load(directory: Path, stages: Any, **settings: Any) -> tuple[Stage, ...]:
    return load_stages(write(directory, stages, **settings))


def problems(directory: Path, stages: Any, world_size: int = 1, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_stages(load(directory, stages, **settings), world_size, cuda=False)
    return str(caught.value)


# ------------------------------------------------------------------ what a stage is


def test_a_stage_is_the_file_with_its_settings_and_places(tmp_path: Path) -> None:
    file = {"experiment_name": "run", "checkpointing": {"save_dir": "saves", "init_from": "old"}}
    pretrain, extend = load(tmp_path, [{"name": "pretrain", "seed": 7}, EXTEND], **file)
    assert (pretrain.config.seed, extend.config.seed) == (7, 42), "inherited from the file alone"
    assert (pretrain.config.training.seq_length, extend.config.training.seq_length) == (256, 1024)
    assert extend.config.training.learning_rate == 2e-3
    assert [stage.config.output_dir for stage in (pretrain, extend)] == ["out/pretrain", "out/extend"]
    assert [stage.config.experiment_name for stage in (pretrain, extend)] == ["run/pretrain", "run/extend"]
    assert [stage.config.checkpointing.save_dir for stage in (pretrain, extend)] == [
        "saves/pretrain",
        "saves/extend",
    ]
    assert [stage.config.checkpointing.init_from for stage in (pretrain, extend)] == ["old", "saves/pretrain"]
    assert all(not stage.config.stages for stage in (pretrain, extend))
    check_stages((pretrain, extend), 1, cuda=False)


def test_flags_win_over_stages(tmp_path: Path) -> None:
    path = write(tmp_path, [{"name": "a", "training": {"train_steps": 5}}, {"name": "b"}])
    arguments = parse_flags(["--config", str(path), "--train-iters", "9", "--stage", "b"])
    stages = load_stages(arguments.config, arguments.overrides, arguments.origins)
    assert [stage.config.training.train_steps for stage in stages] == [9, 9]
    assert arguments.stage == "b"


def test_a_configuration_without_stages_is_one_without_a_name() -> None:
    (only,) = load_stages(CONFIGS / "debug.json")
    assert only == Stage("", load_config(CONFIGS / "debug.json"))
    with pytest.raises(ConfigError, match="names no stages"):
        select((only,), "pretrain")


def test_what_is_for_one_run_refuses_stages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names stages \(a, b\)"):
        load_config(write(tmp_path, [{"name": "a"}, {"name": "b"}]))


def test_an_unknown_stage_names_the_nearest(tmp_path: Path) -> None:
    stages = load(tmp_path, [{"name": "pretrain"}, EXTEND])
    assert select(stages, "extend") is stages[1]
    with pytest.raises(ConfigError, match="did you mean extend"):
        select(stages, "extnd")
    with pytest.raises(ConfigError, match="there are pretrain, extend"):
        select(stages, "zzz")


def test_the_dry_run_shows_every_stage(tmp_path: Path) -> None:
    layouts = ({"expert_parallel_size": 2}, {"tensor_parallel_size": 2, "expert_parallel_size": 1})
    first, second = ({"distributed": layout} for layout in layouts)
    stages = load(tmp_path, [{"name": "pretrain"} | first, EXTEND | second])
    assert planned_processes(stages) == (2, False)
    text = dry_run_stages(stages, 2, cuda=False)
    before, _, after = text.partition("stage extend:")
    assert "stage pretrain:" in before
    assert "EP 2" in before
    assert "TP 2 with SP" in after
    assert "the weights of out/pretrain/checkpoints" in after
    assert "settings differ from stage pretrain's" in after
    assert "model.mla.rope_scaling.factor = 4" in after
    assert "model.num_layers" not in after


# ------------------------------------------------------------------ mistakes in the file


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([{"training": {}}], "stages, number 1: has no name"),
        ([{"name": 3}], "stages, number 1: 3 cannot be its name"),
        ([{"name": "a/b"}], "'a/b' cannot be its name"),
        ([{"name": ".."}], "'..' cannot be its name"),
        ([{"name": ""}], "'' cannot be its name"),
        ([{"name": "x" * 65}], "cannot be its name"),
        ([{"name": "checkpoints"}], "'checkpoints' cannot be its name"),
        ([{"name": "a"}, {"name": "A"}], "there is a stage 'A' already"),
        ([{"name": "a", "stages": []}], "stage a: stages inside a stage are refused"),
        ([{"name": "a", "output_dir": "x"}], "stage a: output_dir is not a stage's to set"),
        ([{"name": "a", "checkpointing": {"resume": "x"}}], "stage a: checkpointing.load is not a stage's"),
        ([{"name": "a", "checkpointing": {"save_dir": "x"}}], "checkpointing.save_dir is not a stage's"),
        (
            [{"name": "a", "logging": {"tensorboard": {"log_dir": "x"}}}],
            "logging.tensorboard.log_dir is not a stage's",
        ),
        (
            [{"name": "a"}, {"name": "b", "checkpointing": {"init_from": "x"}}],
            "stage b: checkpointing.init_from is for the first stage; this one starts from stage a",
        ),
        (
            [{"name": "a", "training": {"leaning_rate": 1}}],
            "stage a: training.leaning_rate: unknown setting; did you mean training.learning_rate",
        ),
        ([{"name": "a", "extends": "x.json"}], "stage a: extends: unknown setting"),
        (
            [{"name": "a", "training": {"learning_rate": -1}}],
            "stage a: training.learning_rate: must be greater",
        ),
        ([{"name": "a", "training": 3}], "stage a: training: must be an object"),
        (["a"], "stages[0]: must be an object {...}"),
        ({"name": "a"}, "stages: must be a list"),
    ],
)
def test_mistakes_are_told_with_their_stage(tmp_path: Path, stages: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, stages)
    assert expected in str(caught.value)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    stages = [{"name": "a", "seeed": 1}, {"name": "a"}, {"name": "b", "training": {"seq_length": 0}}]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, stages, experiment_nam="x")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in the configuration:"
    for expected in (
        "experiment_nam: unknown",
        "number 2: there is",
        "stage a: seeed",
        "stage b: training.seq",
    ):
        assert sum(expected in line for line in lines) == 1, expected


def test_a_checkpoint_to_go_on_from_is_no_stages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot say which stage"):
        load(tmp_path, [{"name": "a"}], checkpointing={"load": "somewhere"})
    load(tmp_path, [{"name": "a"}], checkpointing={"load": None})


# ------------------------------------------------------------------ stages that cannot run


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"model": {"num_layers": 5}}, "model.num_layers is 5, but 4 in stage a"),
        ({"model": {"vocab_size": 8192}}, "model.vocab_size is 8192, but 4096 in stage a"),
        ({"model": {"mla": {"d_model": 256}}}, "model.mla.d_model is 256, but 128"),
        ({"model": {"moe": {"num_experts": 16}}}, "model.moe.num_experts is 16, but 8"),
        ({"training": {"use_mtp": False}}, "training.use_mtp is False, but True"),
        ({"model": {"mla": {"max_context_length": 128}}}, "training.seq_length = 256 is more than"),
        (
            {"model": {"mla": YARN | {"max_context_length": 4096}}},
            "model.mla.max_context_length = 4096 is beyond YaRN's reach",
        ),
        (
            {
                "model": {
                    "mla": YARN | {"rope_scaling": {"factor": 8, "original_max_position_embeddings": 128}}
                }
            },
            "original_max_position_embeddings = 128, but stage a trains plain RoPE on sequences of 256",
        ),
        ({"distributed": {"device": "cpu"}}, "distributed.device differs from stage a's"),
        ({"distributed": {"tensor_parallel_size": 2}}, "1 process is not a multiple of TP 2"),
        (
            {"checkpointing": {"init_optimizer": "keep"}, "training": {"optimizer": "sgd"}},
            "stage a has adamw and this one sgd",
        ),
        (
            {"training": {"lr_decay_style": "phases", "lr_phases": [{"until_tokens": 10**9, "to": 1e-4}]}},
            "training.learning_rate cannot act",
        ),
        (
            {"training": {"mtp_loss_weight_phases": [{"until_tokens": 1000, "to": 0.1}]}},
            "training.mtp_loss_weight_phases ends at 1,000 tokens but the run has 245,760",
        ),
    ],
)
def test_a_stage_that_cannot_follow(tmp_path: Path, second: dict[str, Any], expected: str) -> None:
    told = problems(tmp_path, [{"name": "a"}, {"name": "b"} | second])
    assert any("stage b: " in line and expected in line for line in told.splitlines()), told


def test_kept_optimizer_must_have_been_saved(tmp_path: Path) -> None:
    without = {"name": "a", "checkpointing": {"save_optimizer": False}}
    told = problems(tmp_path, [without, {"name": "b", "checkpointing": {"init_optimizer": "keep"}}])
    assert "stage b: " in told
    assert "stage a does not save its optimizer" in told


def test_forgetting_yarn_in_a_later_stage_is_told(tmp_path: Path) -> None:
    told = problems(tmp_path, [{"name": "a"}, EXTEND, {"name": "sft"}])
    assert "stage sft: model.mla.rope_scaling is null, but stage extend has YaRN" in told
    check_stages(load(tmp_path, [{"name": "a"}, EXTEND, EXTEND | {"name": "sft"}]), 1, cuda=False)


def test_what_is_wrong_in_all_stages_is_told_once(tmp_path: Path) -> None:
    told = problems(tmp_path, [{"name": "a"}, {"name": "b"}], data={"sources": []})
    assert told.count("data.sources is empty") == 1
    assert "stages a, b: data.sources is empty" in told


def test_what_a_new_run_may_change(tmp_path: Path) -> None:
    changes = {"moe": {"bias_update_rate": 0.0, "router_aux_loss_weight": 0.0}, "hidden_dropout": 0.1}
    check_stages(load(tmp_path, [{"name": "a"}, {"name": "b", "model": changes}]), 1, cuda=False)


# ------------------------------------------------------------------ beyond the end of a run


BILLION = 10**9
MTP = "training.mtp_loss_weight_phases"
RUN = {"training.total_training_tokens": BILLION, "training.lr_warmup_steps": 0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"training.batch_size_rampup_tokens": 2 * BILLION, "training.batch_size_rampup_start": 32},
            "never gets to global_batch_size",
        ),
        (
            {"data.sources": [{"name": "a", "path": "a"}],
             "data.phases": [{"from_tokens": at, "weights": {"a": 1}} for at in (0, BILLION)]},
            "data.phases, phase 2 begins at 1,000,000,000 tokens but the run ends at",
        ),
        (
            {MTP: [{"until_tokens": 2 * BILLION, "to": 0.1, "shape": "linear"}]},
            "on the way to 0.1 at 2,000,000,000 tokens",
        ),
        (
            {"training.lr_decay_style": "multistep", "training.lr_multistep": [[0.5, -0.1]]},
            "cannot be negative",
        ),
        (
            {"training.lr_decay_style": "multistep", "training.lr_multistep": [[0.5, 0.3], [1.5, 0.1]]},
            "between 0 and 1",
        ),
        ({"checkpointing.save_scheduler": False}, "checkpointing.save_scheduler = false is refused"),
        (
            {"checkpointing.init_from": "there", "checkpointing.load": "here"},
            "checkpointing.load = 'here' goes on with one",
        ),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be(settings: dict[str, Any], expected: str) -> None:
    found = list(find_problems(load_config(None, RUN | settings), 1, cuda=False))
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    "settings",
    [
        {
            "training.mtp_loss_weight_phases": [{"until_tokens": 2 * BILLION, "to": 0.1}],
            "training.use_mtp": True,
        },
        {"training.lr_decay_style": "constant", "training.learning_rate": 1e-6},
    ],
)
def test_schedules_that_are_harmless(settings: dict[str, Any]) -> None:
    found = list(find_problems(load_config(None, RUN | settings), 1, cuda=False))
    assert [problem for problem in found if "data.sources" not in problem] == []


def test_steps_after_the_end_are_noted() -> None:
    settings = {"training.train_steps": 10, "training.exit_step": 11, "logging.profile.start_step": 20}
    told = notes(load_config(None, settings))
    assert "training.exit_step has no effect: the run ends after step 10" in told
    assert "logging.profile.start_step has no effect: the run ends after step 10" in told
    told = notes(load_config(None, settings | {"training.exit_step": 5}))
    assert not any("exit_step" in note for note in told)


# ------------------------------------------------------------------ the paper: arXiv:2412.19437, section 4.3


@pytest.mark.parametrize(
    ("name", "length", "batch"), [("extend_32k", 32 * 1024, 1920), ("extend_128k", 128 * 1024, 480)]
)
def test_context_extension_of_deepseek_v3(name: str, length: int, batch: int) -> None:
    stages = load_stages(CONFIGS / "deepseek_v3_671b_stages.json")
    assert [stage.name for stage in stages] == ["pretrain", "extend_32k", "extend_128k"]
    config = select(stages, name).config
    resolved = resolve(config, 2048, cuda=True)
    yarn = config.model.mla.rope_scaling
    assert yarn is not None
    # s = 40, alpha = 1, beta = 32, sqrt(t) = 0.1 ln s + 1, from a context of 4K
    assert (yarn.factor, yarn.beta_slow, yarn.beta_fast) == (40, 1, 32)
    assert (yarn.mscale_all_dim, yarn.mscale, yarn.original_max_position_embeddings) == (1, 1, 4096)
    assert resolved.train_steps == 1000
    schedules = Schedules(config, resolved)
    for tokens in (0, resolved.total_tokens // 2, resolved.total_tokens - 1):
        sequences, scalars = schedules.at(tokens)
        assert (sequences, scalars.seq_length, scalars.learning_rate) == (batch, length, 7.3e-6)
        # as pre-training ended
        assert (scalars.mtp_loss_weight, scalars.bias_update_rate, scalars.aux_loss_weight) == (0.1, 0, 1e-4)


def test_pretraining_of_the_stages_is_the_recipe_alone() -> None:
    (first, *_) = load_stages(CONFIGS / "deepseek_v3_671b_stages.json")
    alone = load_config(CONFIGS / "deepseek_v3_671b.json")
    for part in ("model", "training", "data", "distributed"):
        assert getattr(first.config, part) == getattr(alone, part)


# ------------------------------------------------------------------ the figure


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_schedules", ROOT / "tools" / "plot_schedules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figure_has_the_stages_side_by_side(plot: ModuleType, tmp_path: Path) -> None:
    stages = load_stages(CONFIGS / "stages_debug.json")
    drawn, total = plot.segments(stages, 2, False)
    first, second, third = (resolve(stage.config, 2, cuda=False).total_tokens for stage in stages)
    assert [one.first_tokens for one in drawn] == [0, first, first + second]
    assert total == first + second + third
    assert drawn[1].tokens[0] == first
    assert set(drawn[0].panels["sequence length"]) == {128}
    assert set(drawn[1].panels["sequence length"]) == {512}
    assert "sequence length" in plot.shown_panels(drawn)
    assert "router noise" not in plot.shown_panels(drawn)
    png = tmp_path / "schedules.png"
    assert plot.main(["--config", str(CONFIGS / "stages_debug.json"), "--output", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_the_shares_that_the_data_are_read_with(plot: ModuleType) -> None:
    settings = {
        "training.seq_length": 100,
        "data.sources": [{"name": name, "path": name} for name in ("a", "b")],
        "data.mixing_temperature": 2.0,
        "data.phases": [
            {"from_tokens": 0, "weights": {"a": 1, "b": 2}}, {"from_tokens": 1000, "weights": {"b": 3}},
        ],
    }  # fmt: skip
    shares = plot.mix(load_config(None, settings), [0, 999, 1000])
    assert shares["a"] == pytest.approx([0.2, 0.2, 0.0])
    assert shares["b"] == pytest.approx([0.8, 0.8, 1.0])
