"""What a chat template writes between the messages of a conversation, found by rendering it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, product
from typing import Any, NamedTuple, Protocol

from cme_reward.conversation.marked import MARK, is_half

ROLES = ("user", "tool", "ipython", "environment", "observation", "function", "system")
"""In which an environment may speak. Of roles that a template writes alike, the first counts."""

ASSISTANT, END = "assistant", "end"

# Private-use characters stand for what a template is given; no template writes them by itself.
_QUOTED = '"\\\n'  # how a role's content is escaped shows on these
_HOLE = "\ue000{}\ue001" + _QUOTED + "\ue002"
_HOLES = re.compile("\ue000(\\d+)\ue001(.*?)\ue002", re.DOTALL)
_SAID, _NEW = 1, 10  # numbers of holes: the assistant's words, and what follows them
_BEFORE_SAID = re.compile(f"(?<=\ue002)[^\ue000]*(?=\ue000{_SAID}\ue001)")
_NAME = "\ue003cmecall\ue004"  # of a tool or a call; Mistral insists on nine characters
_UNLIKE_WORDS = re.compile(r"[^\w\s]{2}|\w:|[\[\]<>｜]")
_LEXEMES = re.compile(f"{MARK.pattern}|\\s+|(?:(?!{MARK.pattern})\\S)+")


class Render(Protocol):
    """A conversation as text; None where the template refuses it."""

    def __call__(self, messages: Sequence[Mapping[str, Any]], *, ask: bool) -> str | None: ...


class Escape(NamedTuple):
    """How a template writes a role's content."""

    json: bool

    def read(self, content: str) -> str:
        """The content from what was written.

        Raises:
            ValueError: for what the template cannot have written.
        """
        if not self.json:
            return content
        read = json.loads(f'"{content}"')
        if content not in (json.dumps(read)[1:-1], json.dumps(read, ensure_ascii=False)[1:-1]):
            raise ValueError(f"{content!r} is not how the template writes JSON")
        return read


class Opening(NamedTuple):
    """What stands between an assistant's sampled words and the next message."""

    closing: str
    """The end of the assistant's turn, which may have been sampled with it."""
    rest: str


class Markup:
    """What one chat template writes around the messages that may follow an assistant's.

    Found by rendering conversations with holes in place of contents, in several histories, since
    templates write a message by its neighbours (parallel tool replies share a turn) or by what was
    said before. Texts are whatever `render` gives, for ids to be read `MarkedText`.

    Attributes:
        openings: per role, what may stand between an assistant's words and such a message; for
            `END`, what follows an assistant's words where its next turn begins at once.
        between: per two roles, what may stand between two such messages.
        endings: per role, what may stand between such a message and the assistant's next words.
        prefill: the end of the generation prompt that belongs to the assistant's message, as
            `find_prefill` finds it.
        escapes: per readable role, how its content is written.
    """

    def __init__(self, render: Render, prefill: str) -> None:
        self._render = _remembered(render)
        self.prefill = prefill
        self.openings: dict[str, set[Opening]] = defaultdict(set)
        self.between: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.endings: dict[str, set[str]] = defaultdict(set)
        self.escapes: dict[str, Escape] = {}
        histories = list(self._histories())
        for role in (*ROLES, ASSISTANT):
            for history in histories:
                self._learn(history, role)
                if role in self.escapes:  # some templates let nobody speak twice in a row
                    self._learn(history, role, ASSISTANT)
        for history in histories[:1] + histories[-1:]:
            for pair in product(self.escapes, repeat=2):
                self._learn(history, *pair)
        self._drop_echoes()
        self._learn_alone()
        self._complete(histories[0] if histories else [])

    @cached_property
    def signs(self) -> set[str]:
        """Special tokens and words that tell a turn's markup from an environment's words."""
        written = [*self.between.values(), *self.endings.values()]
        texts = {text for some in written for text in some}
        for openings in self.openings.values():
            texts |= {opening.rest for opening in openings}
        if self.openings[END]:
            texts |= {opening.closing for opening in self.openings[END]}
        signs: set[str] = set()
        for text in texts:
            text = text.removesuffix(self.prefill) if self.prefill else text
            signs |= set(MARK.findall(text))
            lines = MARK.sub("\n", text).replace(_NAME, "\n").split("\n")
            signs |= {line.strip() for line in lines if _UNLIKE_WORDS.search(line)}
        return signs

    def _histories(self) -> Iterable[list[dict[str, Any]]]:
        """Conversations that end with an assistant's message: plain ones, and with tool calls."""
        user, said = _message("user", 0), _message(ASSISTANT, _SAID)
        yield [user, said]
        yield [user, said, user, said]
        call: dict[str, Any] | None = None
        for content, arguments in product(("", None), ({}, "{}")):
            function = {"name": _NAME, "arguments": arguments}
            calls = [{"type": "function", "id": _NAME, "function": function}]
            call = {"role": ASSISTANT, "content": content, "tool_calls": calls}
            written = self._render([user, call], ask=False)
            if written is not None and _NAME in written:
                break
        else:
            return
        tool = _message("tool", 2)
        yield [user, call, tool, said]
        yield [user, call, tool, call]
        yield [user, call]

    def _tail(self, history: Sequence[Mapping[str, Any]], *roles: str, ask: bool) -> str | None:
        """What is written after the last words of `history`, messages of these roles included."""
        messages = [*history, *(_message(role, _NEW + k) for k, role in enumerate(roles))]
        written = self._render(messages, ask=ask)
        if written is None:
            return None
        if history[-1].get("tool_calls"):
            alone = self._render(history, ask=False) or ""
            stops = [found.end() for found in re.finditer(_NAME, written)][: alone.count(_NAME)]
        else:
            stops = [hole.end() for hole in _HOLES.finditer(written) if int(hole[1]) == _SAID]
        return written[stops[-1] :] if stops else None

    def _learn(self, history: Sequence[Mapping[str, Any]], *roles: str) -> None:
        """What is written around messages of these roles after this history."""
        closed, tail = self._tail(history, ask=False), self._tail(history, *roles, ask=True)
        if closed is None or tail is None:
            return
        holes = list(_HOLES.finditer(tail))
        if [int(hole[1]) for hole in holes] != [_NEW + k for k in range(len(roles))]:
            return
        escapes = {}
        for role, hole in zip(roles, holes, strict=True):
            if hole[2] not in (_QUOTED, json.dumps(_QUOTED)[1:-1]):
                return
            escapes[role] = Escape(hole[2] != _QUOTED)
            if self.escapes.get(role, escapes[role]) != escapes[role]:
                return
        edges = [0, *(edge for hole in holes for edge in hole.span()), len(tail)]
        literals = [tail[i:j] for i, j in zip(edges[::2], edges[1::2], strict=True)]
        closing = _common_prefix(closed, literals[0])
        if not (closing + literals[0]).strip() or not all(part.strip() for part in literals[1:-1]):
            return  # nothing would tell such a message from words
        self.escapes |= escapes
        self.openings[roles[0]].add(Opening(closing, literals[0][len(closing) :]))
        for pair, text in zip(pairwise(roles), literals[1:-1], strict=True):
            self.between[pair].add(text)
        self._add_ending(roles[-1], literals[-1])

    def _learn_alone(self) -> None:
        """How messages start that are rendered by themselves, as veRL renders a tool's replies.

        The system prompt that a template puts before them is then taken away again.
        """
        empty = {"role": "user", "content": ""}
        one, two = self._render([empty], ask=False), self._render([empty] * 2, ask=False)
        system = "" if one is None or two is None else one[: max(0, 2 * len(one) - len(two))]
        if one is not None and two is not None and one + one[len(system) :] != two:
            system = ""
        for role in self.escapes.keys() - {"system", ASSISTANT}:
            for more in ([], [empty] * (role == "tool")):  # some templates want a user, too
                written = self._render([_message(role, _NEW), *more], ask=True)
                head, hole, _ = (written or "").partition(_HOLE.format(_NEW))
                if hole and head.startswith(system) and head[len(system) :].strip():
                    self.openings[role].add(Opening("", head[len(system) :]))

    def _add_ending(self, role: str, text: str) -> None:
        self.endings[role].add(text)
        if self.prefill and text.endswith(self.prefill):
            self.endings[role].add(text.removesuffix(self.prefill))

    def _complete(self, history: Sequence[Mapping[str, Any]]) -> None:
        """What the template refuses to write, though environments do: two turns of one role."""
        if not history:
            return
        ask = self._tail(history, ask=True)
        closed = self._tail(history, ask=False)
        if ask is not None and closed is not None:
            closing = _common_prefix(closed, ask)
            for end in {ask[len(closing) :], ask[len(closing) :].removesuffix(self.prefill)}:
                self.openings[END].add(Opening(closing, end))
        for a, b in product(self.escapes, repeat=2):
            if self.between[a, b]:
                continue
            closed = self._tail(history, a, ask=False)
            whole = self._tail(history, a, ask=True)
            if closed is None or whole is None:
                continue
            closing = _common_prefix(*(text.rpartition("\ue002")[2] for text in (closed, whole)))
            self.between[a, b] |= {closing + opening.rest for opening in self.openings[b]}
        for pair in [pair for pair, literals in self.between.items() if not literals]:
            del self.between[pair]

    def _drop_echoes(self) -> None:
        """Leave out roles that are written as the assistant is, or as one before them."""
        seen: list[str] = []
        for role in (ASSISTANT, *ROLES):
            if role not in self.escapes:
                continue
            if any(
                self.openings[role] == self.openings[other]
                and self.endings[role] == self.endings[other]
                for other in seen
            ):
                del self.escapes[role], self.openings[role], self.endings[role]
                self.between = defaultdict(
                    set, {pair: some for pair, some in self.between.items() if role not in pair}
                )
            else:
                seen.append(role)


def _remembered(render: Render) -> Render:
    """The same, rendering nothing twice: most of what is asked for shares its history."""
    written: dict[str, str | None] = {}

    def remembered(messages: Sequence[Mapping[str, Any]], *, ask: bool) -> str | None:
        key = json.dumps([ask, *messages])
        if key not in written:
            written[key] = render(messages, ask=ask)
        return written[key]

    return remembered


def find_prefill(render: Render, tag: str = "") -> str:
    """What the generation prompt writes after the header of the assistant's message.

    That is what it writes beyond the start of an assistant's message within a conversation; where
    the template starts such messages in another way, what it writes from `tag` on.
    """
    user, said, more = _message("user", 0), _message(ASSISTANT, _SAID), _message("user", 2)
    asked, written = render([user], ask=True), render([user, said, more], ask=False)
    if asked is None or written is None:
        return ""
    prompt = _HOLES.split(asked)[-1]
    header = _BEFORE_SAID.search(written)
    begins = (header[0], header[0].rstrip()) if header else ()
    start = next((len(b) for b in begins if b and prompt.startswith(b)), len(prompt))
    if tag and tag in prompt:
        start = min(start, prompt.index(tag))
    prefill = prompt[start:]
    return prefill if prefill.strip() else ""


def starts(opening: Opening) -> str:
    """A pattern for an opening of which the beginning may be missing.

    The end of the assistant's turn may have been sampled, so that any first part of it is not
    there; and trainers that render messages by themselves leave out the white space before one.
    """
    pattern = ""
    for lexeme in _LEXEMES.findall(opening.closing):
        part = f"(?:{literal(lexeme)})?" if lexeme.isspace() else literal(lexeme)
        pattern = f"(?:{pattern}{part})?"
    rest = opening.rest.lstrip()
    white = opening.rest[: len(opening.rest) - len(rest)]
    return pattern + (f"(?:{literal(white)})?" if white else "") + literal(rest)


def literal(text: str) -> str:
    """A pattern for a text of the template, with any names of tools and calls."""
    return r"[\w.:\-]*".join(map(re.escape, text.split(_NAME)))


def written(text: str) -> int:
    """How much of it is the template's own: characters that are not white space."""
    return len("".join(text.split()))


def _message(role: str, number: int) -> dict[str, Any]:
    message = {"role": role, "content": _HOLE.format(number)}
    if role == "tool":
        message |= {"name": _NAME, "tool_call_id": _NAME}
    return message


def _common_prefix(a: str, b: str) -> str:
    n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[: n - 1] if n and is_half(a[n - 1]) else a[:n]
