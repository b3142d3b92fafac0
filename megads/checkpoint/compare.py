"""Refuses to resume from a checkpoint of another model, before any tensor is read."""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ValidationError

from megads.config.schema import Config
from megads.errors import CheckpointError

HARDWARE_FIELDS = frozenset({
    "model.mla.use_flash_mla", "model.mla.flash_mla_backend", "model.mla.fallback_to_dense",
    "model.mla.use_fp8_kv", "model.moe.use_deep_ep", "model.moe.deep_ep_fp8", "model.moe.deep_ep_async",
})  # fmt: skip
"""Fields of `config.model` that choose a kernel or a transport; they may change on resume."""


def check_compatible(
    record: dict[str, Any], config: Config, tokenizer_sha256: str | None, allow_changed: Collection[str] = ()
) -> None:
    """Raises one CheckpointError that lists every field in which the checkpoint's model differs.

    Compared: all of `config.model` but HARDWARE_FIELDS, `training.use_mtp` and (with MTP)
    `training.num_predict_tokens`, and the tokenizer's SHA-256 where both sides know it. Parallel
    layout, batch size and schedules may change freely. `allow_changed` names fields
    (`model.moe.bias_update_rate`, `tokenizer_sha256`) that the user changes on purpose.

    `record` is what `CheckpointStore.save` was given; it must hold `config` (the configuration as
    JSON) and may hold `tokenizer_sha256`.
    """
    saved = record.get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(
            "the checkpoint's record holds no configuration: it was not written by training"
        )
    then = _identity(saved, record.get("tokenizer_sha256"), type(config))
    now = _identity(config.model_dump(mode="json"), tokenizer_sha256, type(config))
    if None in (then["tokenizer_sha256"], now["tokenizer_sha256"]):
        del then["tokenizer_sha256"], now["tokenizer_sha256"]
    differing = [
        f"  {name}: checkpoint {then.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and name not in allow_changed
    ]
    if differing:
        raise CheckpointError(
            "the checkpoint is of another model; these settings differ:\n"
            + "\n".join(differing)
            + "\nSet them as in the checkpoint, name those meant to change in checkpointing.allow_changed, "
            "or start afresh in a new directory"
        )


def _identity(config: dict[str, Any], tokenizer_sha256: str | None, schema: type[Config]) -> dict[str, Any]:
    """What makes a model that model, as flat dotted names."""
    leaves = _flatten(_with_defaults(config.get("model", {}), schema), "model")
    identity = {name: value for name, value in leaves.items() if name not in HARDWARE_FIELDS}
    training = config.get("training", {})
    use_mtp = bool(training.get("use_mtp", False))
    identity["training.use_mtp"] = use_mtp
    if use_mtp:
        identity["training.num_predict_tokens"] = training.get("num_predict_tokens")
    identity["tokenizer_sha256"] = tokenizer_sha256
    return identity


def _with_defaults(model: dict[str, Any], schema: type[Config]) -> dict[str, Any]:
    """Gives fields that came into the schema after the save their defaults."""
    model_type = schema.model_fields["model"].annotation
    assert isinstance(model_type, type)
    assert issubclass(model_type, BaseModel)
    try:
        return model_type.model_validate(model).model_dump(mode="json")
    except ValidationError:
        return model  # a field that has gone since then: shown as a difference


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}.{name}")
        else:
            leaves[f"{prefix}.{name}"] = value
    return leaves
