"""Refuses a checkpoint of another model, before any tensor is read."""

from collections.abc import Collection
from typing import Any

from megads.config.identity import model_differences
from megads.config.schema import Config
from megads.errors import CheckpointError


def check_compatible(
    record: dict[str, Any],
    config: Config,
    tokenizer_sha256: str | None,
    allow_changed: Collection[str] = (),
    *,
    new_run: bool = False,
) -> None:
    """Raises one CheckpointError that lists every field in which the checkpoint's model differs.

    Compared: what `identity.model_differences` compares, for a resume or for a `new_run` on the
    checkpoint's weights, and the tokenizer's SHA-256 where both sides know it. Parallel layout, batch size
    and schedules may change freely. `allow_changed` names fields (`model.moe.bias_update_rate`,
    `tokenizer_sha256`) that the user changes on purpose.

    `record` is what `CheckpointStore.save` was given; it must hold `config` (the configuration as
    JSON) and may hold `tokenizer_sha256`.
    """
    saved = record.get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(
            "the checkpoint's record holds no configuration: it was not written by training"
        )
    now = config.model_dump(mode="json")
    differing = list(model_differences(saved, now, allow_changed, new_run=new_run))
    tokenizers = record.get("tokenizer_sha256"), tokenizer_sha256
    if None not in tokenizers and tokenizers[0] != tokenizers[1] and "tokenizer_sha256" not in allow_changed:
        differing.append(("tokenizer_sha256", *tokenizers))
    if differing:
        raise CheckpointError(
            "the checkpoint is of another model; these settings differ:\n"
            + "\n".join(f"  {name}: checkpoint {then!r}, now {now!r}" for name, then, now in differing)
            + "\nSet them as in the checkpoint, name those meant to change in checkpointing.allow_changed, "
            "or start afresh in a new directory"
        )
