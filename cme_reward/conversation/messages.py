"""Conversations as callers write them -> messages of texts, in forms that templates know."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cme_reward.errors import InputError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
"""What templates read of a message."""

SYSTEM = ("system", "developer")


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt's messages, with their contents as text; a string is one user message.

    Text parts (`[{"type": "text", "text": ...}]`) are joined. A message with tool calls may lack a
    content, which is then empty; its calls are `{"function": {"name": ..., "arguments": ...}}`,
    with arguments as a mapping where they are the JSON of one. Fields that are None are left out.

    Raises:
        InputError: for what is no conversation, naming the message.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    try:
        given = list(prompt)
    except TypeError:
        given = [prompt]
    messages = [_message(k, message) for k, message in enumerate(given)]
    if not messages:
        raise InputError("a prompt holds no messages; expected at least one")
    return messages


def as_text(prompt: Prompt) -> str:
    """A prompt for people to read: roles and contents, calls as JSON; a string is itself.

    Raises:
        InputError: as `as_messages`.
    """
    if isinstance(prompt, str):
        return prompt
    shown = []
    for message in as_messages(prompt):
        calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
        said = "\n".join(part for part in (message["content"], *calls) if part)
        shown.append(f"{message['role']}: {said}")
    return "\n\n".join(shown)


def plain_messages(messages: Sequence[Mapping[str, Any]], where: str) -> list[Message]:
    """Messages as `as_messages` gives them, without fields that templates do not read.

    Args:
        messages: as a data set holds them.
        where: they come from, for the error.

    Raises:
        InputError: for a message without a text.
    """
    known = [{name: m[name] for name in FIELDS if name in m} for m in messages]
    try:
        check_characters("it", known)
        return as_messages(known)
    except InputError as error:
        raise InputError(
            f"a message in {where} is not one ({error}); expected "
            '{"role": "user", "content": "..."}'
        ) from error


def check_characters(name: str, value: Any) -> None:
    """JSON can write half of a surrogate pair, which is no character and breaks tokenizers.

    Args:
        name: of the value, for the error.
        value: a text, or anything made of texts, such as messages.

    Raises:
        InputError: where one of them holds such a half.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds {text[error.start]!a}, half of a surrogate pair and no character; "
            "expected Unicode text"
        ) from None


def _message(k: int, given: Any) -> Message:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise InputError(
            f"{given!r} is not a message; expected a string prompt or a list of messages "
            "such as {'role': 'user', 'content': '...'}"
        )
    message = {name: value for name, value in given.items() if value is not None}
    calls = message.pop("tool_calls", None)
    content = message.get("content", "" if calls else None)
    if not isinstance(content, str):
        content = _joined(k, message["role"], content)
    message["content"] = content
    if calls:
        message["tool_calls"] = _calls(k, message["role"], calls)
    return message


def name_of(k: int, message: Message) -> str:
    """A message, for people."""
    return f"message {k} (role {message['role']!r})"


def _joined(k: int, role: str, content: Any) -> str:
    parts = content if isinstance(content, Sequence) else [content]
    texts = []
    for part in parts:
        if isinstance(part, Mapping):
            text = part.get("text") if part.get("type", "text") == "text" else None
        else:
            text = part if parts is content else None
        if not isinstance(text, str):
            shown = repr(part)
            raise InputError(
                f"message {k} (role {role!r}) holds {shown[:80]}{'...' * (len(shown) > 80)}, which "
                "a verifier cannot be shown: it reads text alone. Expected a text as content, or "
                "parts such as {'type': 'text', 'text': '...'}"
            )
        texts.append(text)
    return "".join(texts)


def _calls(k: int, role: str, given: Any) -> list[Message]:
    calls = []
    several: Any = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for call in several:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f"message {k} (role {role!r}) has the tool call {call!r}; expected "
                "{'function': {'name': '...', 'arguments': {...}}}"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, Mapping):
            arguments = function.get("arguments") or {}
        about = {} if function is call else {n: v for n, v in call.items() if v is not None}
        function = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function", **about, "function": function})
    return calls


def plain_content(k: int, message: Message, where: str) -> str:
    """The text of a message for a prompt without a template, which cannot show tool calls.

    Raises:
        InputError: for a message with tool calls, naming it.
    """
    if "tool_calls" in message:
        raise InputError(
            f"{name_of(k, message)} has tool calls, which {where} cannot show; expected a verifier "
            "with a chat template that writes them, or the calls as text in the content"
        )
    return message["content"]


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The same conversation in other words, for templates that do not know all of these.

    First come the messages as they are; then what an environment says as the words of a tool, and
    as a user's; then system, user and assistant only, neighbours of one role joined; then the
    system prompt at the head of the first user message. Each with tool calls in the forms in which
    templates expect them, and with contents as parts.
    """
    shapes: list[Callable[[Message], Message]] = [dict]
    if any("tool_calls" in m for m in messages):
        shapes += [_arguments_as_text, _no_content, lambda m: _no_content(_arguments_as_text(m))]
    shapes.append(_as_parts)
    for roles in (list, _as_tool, _as_user, _plain_roles, _without_system):
        for shape in shapes:
            yield [shape(message) for message in roles(messages)]


def _speaking(messages: Sequence[Message], role: str) -> list[Message]:
    def of(message: Message) -> str:
        given = message["role"]
        if given in SYSTEM:
            return "system"
        return given if given in ("user", "assistant") else role

    return [{**message, "role": of(message)} for message in messages]


def _as_tool(messages: Sequence[Message]) -> list[Message]:
    return _speaking(messages, "tool")


def _as_user(messages: Sequence[Message]) -> list[Message]:
    return _speaking(messages, "user")


def _plain_roles(messages: Sequence[Message]) -> list[Message]:
    """System, user and assistant only, neighbours of one role joined."""
    plain: list[Message] = []
    for message in _as_user(messages):
        joinable = plain and plain[-1]["role"] == message["role"]
        if joinable and not ("tool_calls" in plain[-1] or "tool_calls" in message):
            joined = f"{plain[-1]['content']}\n\n{message['content']}"
            plain[-1] = {"role": message["role"], "content": joined}
        else:
            names = ("role", "content", "tool_calls")
            plain.append({name: message[name] for name in names if name in message})
    return plain


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The system prompt at the head of the first user message, for templates without that role."""
    turned = [{**m, "role": "user"} if m["role"] in SYSTEM else m for m in messages]
    return _plain_roles(turned)


def _arguments_as_text(message: Message) -> Message:
    def text(call: Message) -> Message:
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [text(call) for call in message["tool_calls"]]}


def _no_content(message: Message) -> Message:
    if "tool_calls" in message and not message["content"]:
        return {**message, "content": None}
    return message


def _as_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def marked(messages: Sequence[Message]) -> tuple[list[Message], list[list[str]]]:
    """Messages with marks in place of what they say, and the marks of each.

    A template shows a message if it writes its marks, trimmed and escaped though they may be.
    """
    probe: list[Message] = []
    marks: list[list[str]] = []
    for k, message in enumerate(messages):
        changed, own = dict(message), []
        if message["content"] or "tool_calls" not in message:
            changed["content"] = f"cme{k}content"
            own.append(f"cme{k}content")
        if "tool_calls" in message:
            changed["tool_calls"] = []
            for n, call in enumerate(message["tool_calls"]):
                parts = [f"cme{k}call{n}{part}" for part in ("name", "key", "value")]
                own += parts
                function = {"name": parts[0], "arguments": {parts[1]: parts[2]}}
                changed["tool_calls"].append({**call, "function": function})
        probe.append(changed)
        marks.append(own)
    return probe, marks


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A message, or a part of one, with each text in it changed, but for its role."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            with_texts(name, change): item if name == "role" else with_texts(item, change)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [with_texts(item, change) for item in value]
    return value
