"""Files and overrides to a Config: precedence, extends, aliases, comments, and every kind of mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from megads.config.explain import nearest_settings
from megads.config.loader import load_config
from megads.config.schema import Config
from megads.config.tree import leaves
from megads.errors import ConfigError


def write(directory: Path, content: Any, name: str = "config.json") -> Path:
    path = directory / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def error_of(path: Path | None, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or {})
    return str(caught.value)


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == Config()


def test_flags_win_over_files_over_bases_over_defaults(tmp_path: Path) -> None:
    base = {"training": {"learning_rate": 1e-3, "weight_decay": 0.2, "grad_clip": 2.0}}
    write(tmp_path, base, "base.json")
    child = write(tmp_path, {"extends": "base.json", "training": {"weight_decay": 0.3, "grad_clip": 3.0}})
    training = load_config(child, {"training.grad_clip": 4.0}).training
    values = (training.adam_beta1, training.learning_rate, training.weight_decay, training.grad_clip)
    assert values == (0.9, 1e-3, 0.3, 4.0)


def test_extends_is_relative_to_its_own_file_and_chains(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, {"seed": 1, "experiment_name": "root"}, "root.json")
    write(tmp_path / "deep", {"extends": "../root.json", "seed": 2}, "middle.json")
    top = write(tmp_path, {"extends": "deep/middle.json", "output_dir": "here"}, "top.json")
    config = load_config(top)
    assert (config.seed, config.experiment_name, config.output_dir) == (2, "root", "here")


def test_extends_in_a_circle_names_the_files(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "b.json"}, "a.json")
    write(tmp_path, {"extends": "a.json"}, "b.json")
    message = error_of(tmp_path / "a.json")
    assert "circle" in message
    assert "a.json" in message
    assert "b.json" in message


def test_missing_base_says_who_extends_it(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, {"extends": "gone.json"}))
    assert "gone.json" in message
    assert "extended by" in message
    assert "config.json" in message


def test_lists_are_replaced_and_sections_merged_by_a_child(tmp_path: Path) -> None:
    base = {
        "data": {"sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]},
        "model": {"mla": {"rope_scaling": {"factor": 8, "beta_fast": 16}}},
    }
    write(tmp_path, base, "base.json")
    child = {
        "extends": "base.json",
        "data": {"sources": [{"name": "c", "path": "c"}]},
        "model": {"mla": {"rope_scaling": {"factor": 4}}},
    }
    config = load_config(write(tmp_path, child))
    assert [source.name for source in config.data.sources] == ["c"]
    scaling = config.model.mla.rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.beta_fast) == (4, 16)
    nothing = load_config(tmp_path / "config.json", {"model.mla.rope_scaling": None})
    assert nothing.model.mla.rope_scaling is None


def test_comments_are_blanks_but_not_inside_strings(tmp_path: Path) -> None:
    text = """{
      // one line
      "experiment_name": "a // b /* c */ \\" // d", /* more
      lines */ "seed": 7 // the end
    }"""
    config = load_config(write(tmp_path, text))
    assert config.experiment_name == 'a // b /* c */ " // d'
    assert config.seed == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n  "seed": 1,\n  // note\n  "output_dir" "x"\n}', "line 4, column 16"),
        ("", "empty"),
        ("[1]", "object"),
        ('{"seed": 1, "seed": 2}', "more than once"),
        ('{"training": {"learning_rate": NaN}}', "NaN"),
        ('{"seed": ' + "[" * 100_000 + "}", "deep"),
        ('{"$schema": "x", "extends": ["a.json"]}', "one JSON file"),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    message = error_of(write(tmp_path, text))
    assert said in message
    assert "config.json" in message


def test_files_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"seed": "\xff"}')
    assert "UTF-8" in error_of(path)
    assert "cannot read" in error_of(tmp_path)
    assert "not found" in error_of(tmp_path / "no.json")


def test_every_alias_sets_its_setting(tmp_path: Path) -> None:
    default = json.loads(Config().model_dump_json())
    seen = 0
    for leaf in leaves():
        for alias in leaf.aliases:
            if "rope_scaling." in leaf.path:
                value: Any = "yarn"
            else:
                value = _value(default, leaf.path)
            *sections, _ = leaf.path.split(".")
            content: Any = {alias: value}
            for section in reversed(sections):
                content = {section: content}
            config = load_config(write(tmp_path, content))
            assert _value(config.model_dump(), leaf.path) == value
            assert "unknown" not in error_of(write(tmp_path, json.dumps(content)), {"seed": -1})
            seen += 1
    assert seen >= 15


def _value(tree: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def test_an_alias_takes_effect() -> None:
    assert load_config(None, {"model.mla.kv_lora_rank": 99}).model.mla.d_latent == 99
    assert load_config(None, {"training.mtp_tokens": 3}).training.num_predict_tokens == 3


def test_two_names_of_one_setting_may_agree_but_not_differ(tmp_path: Path) -> None:
    same = {"model": {"moe": {"expert_dim": 64, "expert_intermediate_size": 64}}}
    assert load_config(write(tmp_path, same)).model.moe.expert_intermediate_size == 64
    same["model"]["moe"]["expert_dim"] = 65
    message = error_of(write(tmp_path, same))
    assert "model.moe.expert_dim" in message
    assert "64" in message
    assert "65" in message


def test_gradient_checkpointing_may_stand_in_the_model_section(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": {"gradient_checkpointing": True}})
    assert load_config(path).training.gradient_checkpointing is True
    both = {"model": {"gradient_checkpointing": True}, "training": {"gradient_checkpointing": "selective"}}
    assert "two values" in error_of(write(tmp_path, both))


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("training.learning_rte", "training.learning_rate"),
        ("model.learning_rate", "training.learning_rate"),
        ("training.lr", "training.learning_rate"),
        ("model.n_routed_experts", "model.moe.num_experts"),
        ("slurm", "distributed.slurm"),
        ("distributed.tensor_model_parallel_size", "distributed.tensor_parallel_size"),
        ("trainig", "training"),
    ],
)
def test_unknown_names_get_the_nearest_setting(path: str, suggestion: str) -> None:
    assert f"did you mean {suggestion}" in nearest_settings(path)


def test_a_name_like_nothing_gets_no_suggestion() -> None:
    assert nearest_settings("training.zzzzqqq") == ""


def test_everything_wrong_is_reported_at_once_with_its_origin(tmp_path: Path) -> None:
    write(tmp_path, {"training": {"adam_beta1": 1.5}}, "base.json")
    content = {
        "extends": "base.json",
        "model": {"num_layers": True, "mla": 3},
        "training": {"learning_rte": 1, "seq_length": 1.5, "lr_decay_style": "cosin", "use_mtp": "maybe"},
        "data": {"sources": [{"name": "a", "wieght": 1}, {"path": 4}, 5]},
    }
    lines = error_of(write(tmp_path, content), {"training.adam_beta2": 2, "seed": -1}).splitlines()
    assert lines[0] == f"{len(lines) - 1} problems in the configuration:"
    expected = {
        "training.adam_beta1: must be less than 1, got 1.5": "base.json",
        "model.num_layers: must be a whole number, got true": "config.json",
        "model.mla: must be an object": "config.json",
        "training.learning_rte: unknown setting; did you mean training.learning_rate": "config.json",
        "training.seq_length: must be a whole number, got 1.5": "config.json",
        'training.lr_decay_style: must be "cosine" or "linear" or "constant" or "wsd" or "multistep" or '
        '"phases", got "cosin"; did you mean "cosine"?': "config.json",
        'training.use_mtp: must be true or false, got "maybe"': "config.json",
        "data.sources[0].wieght: unknown setting; did you mean weight?": "config.json",
        "data.sources[1].name: is required": "config.json",
        "data.sources[1].path: must be a list [...] or text or null, got 4": "config.json",
        "data.sources[2]: must be an object": "config.json",
        "training.adam_beta2: must be less than 1, got 2": "(--training.adam_beta2)",
        "seed: must be at least 0, got -1": "(--seed)",
    }
    for text, origin in expected.items():
        assert any(text in line and origin in line for line in lines), text
    assert len(lines) - 1 == len(expected)


def test_numbers_that_are_not_finite_are_refused() -> None:
    assert "training.learning_rate" in error_of(None, {"training.learning_rate": float("inf")})


def test_large_counts_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    path = write(tmp_path, '{"training": {"total_training_tokens": 14.8e12}}')
    assert load_config(path).training.total_training_tokens == 14_800_000_000_000


def test_the_tree_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).training.seq_length = 1
