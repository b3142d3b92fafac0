"""Conversations as text, by Jinja templates as Hugging Face tokenizers carry them; and its answers.

What the people in a conversation wrote must stay text: `<|im_end|>` in a message is no end of turn. So
before a template sees a message, every name of a control token in it is broken up by a character that no
text may hold. Names that are whole in what was rendered are the template's own, and become control tokens.
A message without such a name reaches the template as it is, which renders just what Hugging Face's would.

Answers are the `{% generation %}` blocks of a template that has them (Hugging Face's convention). Else each
is what one more assistant message adds to the conversation before it, which is rendered as if to be answered
(`add_generation_prompt`); a template that changes its mind about what came before is refused.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import orjson

from megads.data.tokenizer import EOD_TOKENS, Tokenizer
from megads.errors import DataError

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
# Noncharacters, which Unicode keeps out of texts: one breaks names of control tokens, two enclose answers.
SHIELD, BEGIN, END = RESERVED = ("\ufdd0", "\ufdd1", "\ufdd2")


class Piece(NamedTuple):
    """A stretch of text or, if `control_id` is not None, a control token by name; `answer`: it counts."""

    text: str
    control_id: int | None
    answer: bool


@dataclass(frozen=True)
class ChatFormat:
    """How lines become conversations, and conversations text.

    `form` is one of `instructions.FORMS`; `special_tokens` (`bos_token`, ...) are what templates call them;
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


class ConversationError(Exception):
    """A conversation that a template cannot render; `reason` is a short stable name."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class ChatTemplate:
    """Conversations to pieces of text and control tokens.

    Raises DataError for a template that is not one.
    """

    def __init__(self, chat: ChatFormat) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlocks]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(chat.template)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"The chat template, line {error.lineno}: {error.message}.") from error
        self._special_tokens = dict(chat.special_tokens)
        # A name of one character cannot be broken up, and is text wherever it stands.
        self._control_ids = {name: token_id for name, token_id in chat.control_tokens if len(name) > 1}
        names = "|".join(map(re.escape, sorted(self._control_ids, key=len, reverse=True))) or r"(?!)"
        self._control = re.compile(names)
        self._start_of_control = re.compile(f"(?={names})")
        self._marks = re.compile(f"({BEGIN}|{END}|{names})")
        self._beginnings = {name[:i] for name in self._control_ids for i in range(1, len(name))}
        self._endings = {name[i:] for name in self._control_ids for i in range(1, len(name))}
        self._longest_part = max(map(len, self._beginnings), default=0)

    def pieces(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> list[Piece]:
        """The conversation, whole. Raises ConversationError."""
        messages, tools = self._shielded(list(messages)), self._shielded(tools)
        text = self._render(messages, tools, answer_follows=False)
        if BEGIN not in text:
            text = self._with_answers_marked(text, messages, tools)
        return list(self._cut(text))

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, *, answer_follows: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=answer_follows,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            what = f"{type(error).__name__}: {error}"
            raise ConversationError("template_error", f"the chat template refuses it: {what}.") from error

    def _with_answers_marked(self, text: str, messages: Sequence[dict[str, Any]], tools: Any) -> str:
        parts, done = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], tools, answer_follows=True)
            after = self._render(messages[: number + 1], tools, answer_follows=False)
            if not after.startswith(before) or not text.startswith(after):
                raise ConversationError(
                    "answers_not_found",
                    f"the chat template renders what comes before and in message {number + 1}, an answer, "
                    "differently when more follows, so that nobody can say which tokens are the answer. Put "
                    "{% generation %} blocks around the answers in the template.",
                )
            end = len(after)
            controls = list(self._control.finditer(after, len(before)))
            if controls and not after[controls[-1].end() :].strip():
                end = controls[-1].end()  # what stands between turns is the template's, not the answer's
            parts += [text[done : len(before)], BEGIN, text[len(before) : end], END]
            done = end
        return "".join([*parts, text[done:]])

    def _cut(self, text: str) -> Iterator[Piece]:
        answer = False
        for part in self._marks.split(text):
            if part in (BEGIN, END):
                if answer is (part == BEGIN):
                    raise ConversationError(
                        "template_error", "the generation blocks of the chat template overlap."
                    )
                answer = part == BEGIN
            elif (control_id := self._control_ids.get(part)) is not None:
                yield Piece(part, control_id, answer)
            elif plain := part.replace(SHIELD, ""):
                yield Piece(plain, None, answer)

    def _shielded(self, value: Any) -> Any:
        """The value, in its texts no whole name of a control token, and no part of one at an edge."""
        if isinstance(value, str):
            return self._shielded_text(value)
        if isinstance(value, list):
            return [self._shielded(item) for item in value]
        if isinstance(value, dict):
            return {self._shielded(key): self._shielded(item) for key, item in value.items()}
        return value

    def _shielded_text(self, text: str) -> str:
        cuts = [match.start() + 1 for match in self._start_of_control.finditer(text)]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        text = SHIELD.join(pieces)
        lengths = range(1, min(self._longest_part, len(text)) + 1)
        if any(text[-n:] in self._beginnings for n in lengths):
            text += SHIELD
        if any(text[:n] in self._endings for n in lengths):
            text = SHIELD + text
        return text


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` puts BEGIN and END around what it encloses."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END)
        )
        return [begin, *body, end]


def _to_json(value: Any, **options: Any) -> str:
    """As Hugging Face's: jinja2's own filter escapes for HTML."""
    import json

    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


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
