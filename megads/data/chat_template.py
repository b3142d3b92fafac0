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
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from megads.data.chat_format import ChatFormat
from megads.errors import DataError

# Noncharacters, which Unicode keeps out of texts: one breaks names of control tokens, two enclose answers.
SHIELD, BEGIN, END = RESERVED = ("\ufdd0", "\ufdd1", "\ufdd2")


class Piece(NamedTuple):
    """A stretch of text or, if `control_id` is not None, a control token by name; `answer`: it counts."""

    text: str
    control_id: int | None
    answer: bool


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
