"""A checkpoint of another model is refused with every differing field."""

import json

import pytest

from megads.checkpoint.compare import check_compatible
from megads.config.identity import setting_changes
from megads.config.schema import Config
from megads.errors import CheckpointError


def record_of(config: Config, **more: object) -> dict:
    return json.loads(json.dumps({"config": config.model_dump(mode="json"), **more}))


def changed(**sections: dict) -> Config:
    return Config.model_validate(sections)


def test_same_model_in_another_layout_is_accepted() -> None:
    record = record_of(Config(), tokenizer_sha256="aa")
    other = changed(
        distributed={"tensor_parallel_size": 2, "pipeline_parallel_size": 4},
        training={"global_batch_size": 128, "learning_rate": 1e-4, "num_predict_tokens": 5},
        model={"mla": {"use_flash_mla": True}, "moe": {"use_deep_ep": True}},
        seed=7,
    )
    check_compatible(record, other, "aa")


def test_every_difference_is_listed_at_once() -> None:
    record = record_of(changed(training={"use_mtp": True, "num_predict_tokens": 2}), tokenizer_sha256="aa")
    other = changed(
        model={"num_layers": 3, "mla": {"d_latent": 99}, "moe": {"num_experts": 16}},
        training={"use_mtp": True, "num_predict_tokens": 3},
    )
    with pytest.raises(CheckpointError) as caught:
        check_compatible(record, other, "bb")
    listed = {line.split(":")[0].strip() for line in str(caught.value).splitlines() if line.startswith("  ")}
    assert listed == {
        "model.num_layers", "model.mla.d_latent", "model.moe.num_experts", "training.num_predict_tokens",
        "tokenizer_sha256",
    }  # fmt: skip
    assert "checkpoint 12, now 3" in str(caught.value)


def test_mtp_switched_on_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"training.use_mtp: checkpoint False, now True"):
        check_compatible(record_of(Config()), changed(training={"use_mtp": True}), None)


def test_yarn_switched_on_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model.mla.rope_scaling"):
        check_compatible(record_of(Config()), changed(model={"mla": {"rope_scaling": {"factor": 8.0}}}), None)


def test_a_change_on_purpose_is_allowed_by_name() -> None:
    other = changed(model={"moe": {"bias_update_rate": 0.0}})
    with pytest.raises(CheckpointError, match="bias_update_rate"):
        check_compatible(record_of(Config()), other, None)
    check_compatible(record_of(Config()), other, None, allow_changed={"model.moe.bias_update_rate"})


def test_a_field_newer_than_the_checkpoint_counts_as_its_default() -> None:
    record = record_of(Config())
    del record["config"]["model"]["moe"]["n_group"]
    check_compatible(record, Config(), None)
    with pytest.raises(CheckpointError, match="n_group: checkpoint 1, now 2"):
        check_compatible(record, changed(model={"moe": {"n_group": 2}}), None)


def test_a_field_that_has_gone_is_shown() -> None:
    record = record_of(Config())
    record["config"]["model"]["window_kind"] = "x"
    with pytest.raises(CheckpointError, match=r"model.window_kind: checkpoint 'x', now None"):
        check_compatible(record, Config(), None)


def test_a_record_without_configuration_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no configuration"):
        check_compatible({}, Config(), None)


def test_what_a_run_changes_when_it_goes_on_is_listed() -> None:
    record = record_of(changed(training={"learning_rate": 1e-3, "exit_step": 5}, experiment_name="a"))
    del record["config"]["seed"]  # saved before there was such a setting
    now = changed(training={"learning_rate": 2e-3}, experiment_name="a", seed=7)
    found = list(setting_changes(record["config"], now.model_dump(mode="json")))
    assert found == ["training.learning_rate: 0.001, now 0.002"]
