"""What a chat format is: the form of conversations, a template, and the control tokens it may write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megads.data.tokenizer import EOD_TOKENS, Tokenizer
from megads.errors import DataError

FORMS = {
    "messages": "`messages`: a list of {role, content}, roles system, user, assistant, tool; perhaps `tools`",
    "prompt": "`prompt` and `response`, perhaps `system`",
    "alpaca": "`instruction` and `output`, perhaps `input` (Alpaca)",
}
DEFAULT = "default"
# The format of DeepSeek LLM and V2, but for the beginning-of-text token: pre-training here knows none.
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ 'Assistant:' }}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
{%- elif message.role == 'system' -%}
{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ 'User: ' + message.content + '\\n\\n' }}
{%- else -%}
{{ message.role | capitalize + ': ' + message.content + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""


@dataclass(frozen=True)
class ChatFormat:
    """How lines become conversations, and conversations text.

    `form` is one of FORMS; `special_tokens` (`bos_token`, ...) are what templates call them;
    `control_tokens` are names and ids of the tokenizer's control tokens.
    """

    form: str
    template: str
    special_tokens: tuple[tuple[str, str], ...]
    control_tokens: tuple[tuple[str, int], ...]

    def settings(self) -> dict[str, Any]:
        """For the record: all but what follows from the tokenizer."""
        return {"form": self.form, "template": self.template, "special_tokens": dict(self.special_tokens)}

    @classmethod
    def of_record(cls, settings: dict[str, Any], tokenizer: Tokenizer, eod_token: str | None) -> "ChatFormat":
        """What `settings` was made from, with the tokenizer that was used then."""
        special = tuple(settings["special_tokens"].items())
        return cls(settings["form"], settings["template"], special, control_tokens(tokenizer, eod_token))


def load_chat_format(
    tokenizer: Tokenizer, form: str, template: str | None = None, eod_token: str | None = None
) -> tuple[ChatFormat, str]:
    """The format for a tokenizer, and where its template comes from.

    `template` is a file, or DEFAULT for the built-in one. None: `chat_template.jinja` or the
    `chat_template` of `tokenizer_config.json` beside the tokenizer's file, else the built-in one. Raises
    DataError for a template that is not there or not one, and for a tokenizer that cannot tell its control
    tokens.
    """
    controls = control_tokens(tokenizer, eod_token)
    directory = tokenizer.path.parent
    config_file = directory / "tokenizer_config.json"
    config = _read_json(config_file) if config_file.is_file() else {}
    names = {key: _name(value) for key, value in config.items() if key.endswith("_token")}
    special = {key: name for key, name in names.items() if name is not None}
    name_of_eod = next((name for name, token_id in controls if token_id == tokenizer.eod_id), None)
    if name_of_eod is None:
        raise DataError(f"{tokenizer.path}: the end-of-document token has no name; name it (--eod-token).")
    special.setdefault("eos_token", name_of_eod)
    special.setdefault("bos_token", "")
    text, where = _find_template(template, directory, config)
    chat = ChatFormat(form, text, tuple(sorted(special.items())), controls)
    from megads.data.chat_template import ChatTemplate  # jinja2 is imported where it is needed

    try:
        ChatTemplate(chat)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return chat, where


def _find_template(template: str | None, directory: Path, config: dict[str, Any]) -> tuple[str, str]:
    beside = directory / "chat_template.jinja"
    if template == DEFAULT:
        return DEFAULT_TEMPLATE, "the built-in template"
    if template is not None or beside.is_file():
        path = beside if template is None else Path(template)
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the chat template cannot be read: {error}.") from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if isinstance(found, str):
        return found, str(directory / "tokenizer_config.json")
    return DEFAULT_TEMPLATE, "the built-in template"


def control_tokens(tokenizer: Tokenizer, eod_token: str | None = None) -> tuple[tuple[str, int], ...]:
    """Names and ids of a tokenizer's control tokens, by id; DataError for one that cannot list them."""
    if tokenizer.kind == "huggingface":
        added = _read_json(tokenizer.path).get("added_tokens") or ()
        names = [str(token["content"]) for token in added]
    elif tokenizer.kind == "sentencepiece":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
        names = [model.id_to_piece(i) for i in range(model.get_piece_size()) if model.is_control(i)]
    else:
        raise DataError(
            f"{tokenizer.path}: a tokenizer plugin cannot list its control tokens, which chat templates "
            "need. Use a tokenizer.json or a sentencepiece .model."
        )
    names += [*EOD_TOKENS, *([eod_token] if eod_token else [])]
    ids = {name: token_id for name in names if (token_id := tokenizer.control_id(name)) is not None}
    return tuple(sorted(ids.items(), key=lambda entry: entry[1]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object.")
    return content


def _name(token: Any) -> str | None:
    """The name of a special token, which is written as itself or as an object."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
