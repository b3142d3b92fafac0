"""What makes a model that model: which settings weights depend on, and in which two runs may differ."""

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import ValidationError

from megads.config.explain import shorten
from megads.config.schema import Model

HARDWARE_FIELDS = frozenset({
    "model.mla.use_flash_mla", "model.mla.flash_mla_backend", "model.mla.fallback_to_dense",
    "model.mla.use_fp8_kv", "model.moe.use_deep_ep", "model.moe.deep_ep_fp8", "model.moe.deep_ep_async",
    "model.backend",
})  # fmt: skip
"""Fields of `config.model` that choose a kernel or a transport; they may change on resume."""

YARN = "model.mla.rope_scaling"

OF_A_START = frozenset({"checkpointing.load", "checkpointing.init_from", "training.exit_step"})

NEW_RUN_FIELDS = frozenset({
    "model.init_method_std", "model.hidden_dropout", "model.mla.max_context_length", "model.mla.rope_theta",
    "model.mla.sliding_window", "model.mla.attn_dropout", "model.moe.dropout",
    "model.moe.bias_update_rate", "model.moe.bias_update_rate_phases",
    "model.moe.bias_update_centered", "model.moe.balance_loss_type", "model.moe.router_aux_loss_weight",
    "model.moe.router_aux_loss_weight_phases", "model.moe.router_z_loss_weight",
    "model.moe.router_temperature", "model.moe.router_temperature_phases", "model.moe.router_noise_std",
    "model.moe.router_noise_std_phases", "model.moe.capacity_factor", "model.moe.min_expert_capacity",
})  # fmt: skip
"""Fields of `config.model` that a new run on old weights may set anew: the reach of positions, what is for
training only, how experts are balanced. No shape of a weight depends on them."""


def model_differences(
    then: dict[str, Any], now: dict[str, Any], allow_changed: Collection[str] = (), *, new_run: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, then, now) of all in which two configurations (as JSON) are of different models.

    Compared: all of `model` but HARDWARE_FIELDS, `training.use_mtp` and (with MTP)
    `training.num_predict_tokens`. For a `new_run` on the weights of the other, NEW_RUN_FIELDS and YaRN may
    differ too, but weights trained with YaRN do not go back to plain RoPE. `allow_changed` names further
    fields, or sections of them.
    """
    before, after = _identity(then), _identity(now)
    differing = [
        (name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    free = set(allow_changed)
    if new_run:
        free |= NEW_RUN_FIELDS | {YARN}
        if YARN not in before and YARN in after and YARN not in allow_changed:
            yield YARN, "YaRN", None
    yield from (found for found in differing if not _is_within(found[0], free))


def setting_changes(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Each setting with another value in a run that goes on, in words; both configurations as JSON.

    Left out: what a job is started with (`checkpointing.load`, `training.exit_step`), and settings that came
    into the schema after the save.
    """
    before, after = _flatten(then), _flatten(now)
    for name in after:
        if name in before and before[name] != after[name] and name not in OF_A_START:
            yield f"{name}: {shorten(before[name])}, now {shorten(after[name])}"


def _is_within(name: str, fields: Collection[str]) -> bool:
    """Whether `name` is one of `fields`, or a setting of a section that is."""
    return any(name == field or name.startswith(field + ".") for field in fields)


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a model that model, as flat dotted names; YaRN's settings only where there is YaRN."""
    leaves = _flatten(_with_defaults(config.get("model", {})), "model")
    identity = {name: value for name, value in leaves.items() if name not in HARDWARE_FIELDS}
    training = config.get("training", {})
    identity["training.use_mtp"] = bool(training.get("use_mtp", False))
    if identity["training.use_mtp"]:
        identity["training.num_predict_tokens"] = training.get("num_predict_tokens")
    return identity


def _with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """Gives fields that came into the schema after the save their defaults."""
    try:
        return Model.model_validate(model).model_dump(mode="json")
    except ValidationError:
        return model  # a field that has gone since then: shown as a difference


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            leaves |= _flatten(value, path)
        else:
            leaves[path] = value
    return leaves
