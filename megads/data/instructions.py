"""Instruction data: a conversation a line, in the forms that data sets of it have.

What becomes of a line is told as for text (see `documents`): a conversation, or a defect with a reason.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from megads.data.chat_format import ChatFormat
from megads.data.chat_template import RESERVED, ChatTemplate, ConversationError
from megads.data.documents import JSON_NAMES, Defect, LineBatch, Record, decode_object, pick_field

ROLES = ("system", "user", "assistant", "tool")


class ConversationParser:
    """Lines to records whose `pieces` are a rendered conversation, and whose `text` is that of the pieces.

    Reasons of defects beside those of a line that is no JSON object: `no_messages`, `bad_message`,
    `no_answer`, `reserved_character` (see `chat_template`), `template_error` and `answers_not_found`.
    """

    def __init__(self, chat: ChatFormat, fields: Sequence[str] = ()) -> None:
        self._form = chat.form
        self._template = ChatTemplate(chat)
        self._fields = tuple(fields)

    def parse(self, batch: LineBatch) -> Iterator[Record | Defect]:
        """The conversations of a batch in order of their lines; blank lines hold none."""
        yield from batch.defects
        for line, raw in enumerate(batch.data.split(b"\n"), batch.first_line):
            if not raw or raw.isspace():
                continue
            content = decode_object(line, raw)
            if isinstance(content, Defect):
                yield content
                continue
            try:
                yield self._record(line, content)
            except ConversationError as error:
                yield Defect(line, error.reason, str(error))

    def _record(self, line: int, content: dict[str, Any]) -> Record:
        everything = orjson.dumps(content).decode()
        if held := [mark for mark in RESERVED if mark in everything]:
            what = f"it holds U+{ord(held[0]):04X}, which Unicode reserves for programs."
            raise ConversationError("reserved_character", what)
        messages = messages_of(content, self._form)
        pieces = tuple(self._template.pieces(messages, content.get("tools")))
        if not any(piece.answer for piece in pieces):
            raise ConversationError("no_answer", "the chat template renders no answer of an assistant.")
        text = "".join(piece.text for piece in pieces if piece.control_id is None)
        fields = {name: value for name in self._fields for value in pick_field(content, name)}
        record_id = content.get("id")
        return Record(line, text, str(record_id) if type(record_id) in (str, int) else None, fields, pieces)


def messages_of(content: dict[str, Any], form: str) -> list[dict[str, Any]]:
    """The messages of a record in one of `chat_format.FORMS`, checked. Raises ConversationError."""
    messages = content.get("messages") if form == "messages" else _two_messages(content, form)
    if not isinstance(messages, list) or not messages:
        what = "is empty" if messages == [] else _found(messages)
        raise ConversationError("no_messages", f"field 'messages' {what}; a list of messages is expected.")
    for number, message in enumerate(messages, 1):
        _check_message(number, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ConversationError("no_answer", "no message is of the role assistant.")
    return messages


def _two_messages(content: dict[str, Any], form: str) -> list[dict[str, Any]]:
    question, answer = ("prompt", "response") if form == "prompt" else ("instruction", "output")
    for field in (question, answer):
        if not isinstance(content.get(field), str):
            what = f"field {field!r} {_found(content.get(field))}; a string is expected (form {form})."
            raise ConversationError("no_messages", what)
    asked = content[question]
    if form == "alpaca" and content.get("input"):
        asked = f"{asked}\n\n{content['input']}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": content[answer]}]
    if form == "prompt" and content.get("system"):
        messages.insert(0, {"role": "system", "content": content["system"]})
    return messages


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        what = f"message {number} is not of a role that is known ({', '.join(ROLES)}): {str(role)[:40]!r}."
        raise ConversationError("bad_message", what)
    content = message.get("content")
    calls_tools = content is None and message["role"] == "assistant" and message.get("tool_calls")
    if not isinstance(content, str) and not calls_tools:
        what = f"message {number}: 'content' {_found(content)}; a string is expected."
        raise ConversationError("bad_message", what)


def _found(value: Any) -> str:
    return "is missing or null" if value is None else f"is {JSON_NAMES[type(value)]}"
