"""How documents become tokens: everything a user chooses about it, and its name in the records."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from megads.data.documents import MAX_LINE_BYTES
from megads.errors import ConfigError

if TYPE_CHECKING:
    from megads.data.chat_format import ChatFormat

RECIPE_VERSION = 1
"""Grows when the same settings give other tokens than before, so that no dataset mixes the two."""


@dataclass(frozen=True)
class Recipe:
    """What is done to every document of a run. Raises ConfigError for values that cannot be."""

    tokenizer: str
    """Path or plugin, see `tokenizer.load_tokenizer`."""
    eod_token: str | None = None
    text_field: str = "text"
    max_line_bytes: int = MAX_LINE_BYTES
    keep: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(field, values): documents with another value, or without the field, are dropped."""
    score_field: str | None = None
    """A number of each document, stored as float32 beside the tokens."""
    removals: tuple[str, ...] = ()
    """Directories that tools/clean_dolma.py wrote, see `removals`."""
    fim_rate: float = 0.0
    """Share of the documents that are rearranged for fill-in-the-middle, see `fim`."""
    fim_spm_rate: float = 0.0
    """Share of those with the suffix first."""
    fim_seed: int = 0
    split_punctuation_rate: float = 0.0
    """Share of the combined punctuation-and-newline tokens that are split, see `token_splitting`."""
    split_punctuation_seed: int = 0
    chat: "ChatFormat | None" = None
    """The lines are conversations, of which only the answers are learned, see `instructions`."""
    quarantine_quota: float | None = None
    """None: the first bad line stops the run. Else the share of lines that may be quarantined."""

    def __post_init__(self) -> None:
        for name in ("fim_rate", "fim_spm_rate", "split_punctuation_rate", "quarantine_quota"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; it is a share, from 0 to 1.")
        if self.max_line_bytes < 1:
            raise ConfigError(f"max_line_bytes is {self.max_line_bytes}; it must be at least 1.")
        if self.chat is not None and (self.removals or self.needs_keys):
            raise ConfigError(
                "Removals, fill-in-the-middle and token splitting are for texts, not for conversations."
            )

    @property
    def tolerant(self) -> bool:
        return self.quarantine_quota is not None

    @property
    def fields(self) -> tuple[str, ...]:
        """The metadata that is needed of each record."""
        wanted = [field for field, _ in self.keep] + ([self.score_field] if self.score_field else [])
        return tuple(dict.fromkeys(wanted))

    @property
    def needs_keys(self) -> bool:
        """Whether anything is chosen by chance, document by document."""
        return self.fim_rate > 0 or self.split_punctuation_rate > 0

    def settings(self, tokenizer_sha256: str) -> dict[str, Any]:
        """What the output depends on beside the input, for the record; paths stand as their content.

        The removals are input too: each record has the hashes of its own.
        """
        settings = {
            "recipe_version": RECIPE_VERSION,
            "tokenizer_sha256": tokenizer_sha256,
            "eod_token": self.eod_token,
            "text_field": self.text_field,
            "max_line_bytes": self.max_line_bytes,
            "keep": {field: list(values) for field, values in self.keep},
            "score_field": self.score_field,
            "cleaned": bool(self.removals),
            "fim_rate": self.fim_rate,
            "fim_spm_rate": self.fim_spm_rate if self.fim_rate else 0.0,
            "fim_seed": self.fim_seed if self.fim_rate else 0,
            "split_punctuation_rate": self.split_punctuation_rate,
            "split_punctuation_seed": self.split_punctuation_seed if self.split_punctuation_rate else 0,
        }
        # Not in the records of texts, which are as they were before there were conversations.
        return settings | ({"chat": self.chat.settings()} if self.chat is not None else {})


def settings_sha256(settings: dict[str, Any]) -> str:
    """Two datasets with the same hash were made alike."""
    return hashlib.sha256(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)).hexdigest()


def differing_settings(recorded: dict[str, Any], settings: dict[str, Any]) -> str:
    """What differs between the settings of two datasets, for people."""
    names = sorted(name for name in {*recorded, *settings} if recorded.get(name) != settings.get(name))
    return ", ".join(f"{name}: {recorded.get(name)!r}, now {settings.get(name)!r}" for name in names)
