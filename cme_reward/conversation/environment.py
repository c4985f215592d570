"""The tokens that an environment put between two turns of a generator, as messages."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cme_reward.conversation.marked import MARK, MarkedText
from cme_reward.conversation.markup import END, Markup, find_prefill, literal, starts, written
from cme_reward.conversation.thinking import Piece
from cme_reward.errors import InputError
from cme_reward.spans.table import SpanTable

TOOL_ROLES = ("ipython", "environment", "observation", "function")
"""What some templates call a tool. To other templates it is a "tool"."""


@dataclass
class Written:
    """What an environment wrote between two runs of sampled tokens."""

    words: Piece
    """Its text without special tokens."""
    closes: bool = False
    """The assistant's turn is over; otherwise the words are part of it."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """Of the environment, after the assistant's."""
    prefill: Piece = field(default_factory=Piece)
    """What the template has put at the start of the assistant's next message."""


_NAMES = 256  # characters that names of tools may take in what ends a message


class _Place(NamedTuple):
    """Where a message's content starts, and the best way there."""

    at: int
    role: str
    score: int
    """Characters so far that the template wrote."""
    before: _Place | None
    stop: int
    """Where the content of the message before it stops."""


class EnvironmentReader:
    """Reads the tokens an environment put between two turns of a generator.

    They are read as what the generator's own chat template writes there: the end of the
    assistant's turn (or what is left of it, where it was sampled), messages in any role that the
    template knows, the generation prompt. Of several readings it is the one of which the template
    writes most, so that markup is never taken for words. Text without any of the markup is part of
    the assistant's own turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        thinking_tags: tuple[str, str] = ("<think>", "</think>"),
        *,
        show_special: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.table = SpanTable(tokenizer)
        self.template_kwargs = dict(template_kwargs or {})
        template = self.template_kwargs.get("chat_template")
        self.is_chat = (template or getattr(tokenizer, "chat_template", None)) is not None
        self.thinking_tags = thinking_tags
        self._show_special = show_special

    @cached_property
    def prefill(self) -> Piece:
        """What the generation prompt puts at the start of a response: `<think>` and a newline, as
        most models that reason have it; mostly nothing."""
        return self._piece(self._prefill)

    def _piece(self, marked: str) -> Piece:
        """Marked text as a verifier is shown it, with the tags in it that are special tokens."""
        if self._show_special:
            return Piece(self._marked.plain(marked))
        opening, closing = map(self._marked.mark, self.thinking_tags)
        piece, done = Piece(""), 0
        for found in MARK.finditer(marked):
            piece.text += marked[done : found.start()]
            done = found.end()
            if found[0] in (opening, closing):
                piece.tags.append((len(piece.text), found[0] == opening))
        piece.text += marked[done:]
        return piece

    @cached_property
    def _marked(self) -> MarkedText:
        return MarkedText(self.tokenizer, self.table)

    @cached_property
    def _prefill(self) -> str:
        if not self.is_chat:
            return ""
        return find_prefill(self._render, self._marked.of_text(self.thinking_tags[0]))

    @cached_property
    def markup(self) -> Markup:
        """What the template writes: found when an environment speaks first, within a second."""
        return Markup(self._render, self._prefill)

    def _render(self, messages: Sequence[Mapping[str, Any]], *, ask: bool) -> str | None:
        """The conversation as marked text; None where the template refuses it."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, **self.template_kwargs
            )
        except Exception:  # templates fail in as many ways as they have authors
            return None
        return self._marked.of_text(text)

    def read(self, ids: NDArray[np.int64], sampled_end: NDArray[np.int64] | None = None) -> Written:
        """What the ids between two runs of sampled tokens say.

        Args:
            ids: those that were not sampled.
            sampled_end: the special tokens that were sampled last before them, from the one on that
                ends the turn. It may say who speaks next: GLM ends a turn with the user's header.

        Raises:
            InputError: where they hold markup that the template does not write there.
        """
        marked = self._marked.of_ids(ids)
        text = MARK.sub("", marked)
        if self.is_chat:
            found = self._messages(marked)
            if found is None and sampled_end is not None and len(sampled_end):
                found = self._messages(self._marked.of_ids(sampled_end) + marked)
            if found is not None:
                messages, prefill = found
                return Written(Piece(text), True, messages, self._piece(prefill))
        sign = self._sign(marked, text)
        if sign is None:
            return Written(self._piece(marked))
        shown = self._marked.plain(marked)
        raise InputError(
            f"cannot read the tokens between two assistant turns as messages: {shown[:200]!r} "
            f"holds {self._marked.plain(sign)!r}, and is not what the chat template of "
            f"{self.tokenizer.name_or_path!r} writes there. Expected {self._expected()}, or text "
            "without special tokens and markup"
        )

    def _sign(self, marked: str, text: str) -> str | None:
        """A sign that this is more than words inside the assistant's turn."""
        signs = self.markup.signs if self.is_chat else set()
        harmless = {
            self._marked.mark(getattr(self.tokenizer, f"{name}_token", None))
            for name in ("pad", "eos", "bos", "unk")
        }
        tags = set(map(self._marked.mark, self.thinking_tags))
        for mark in MARK.findall(marked):
            if mark not in tags and (mark not in harmless or (text.strip() and mark in signs)):
                return mark
        return next((s for s in sorted(signs) if not MARK.match(s) and s in text), None)

    def _expected(self) -> str:
        """What the template does write, to be shown."""
        if not self.is_chat or not self.markup.escapes:
            return "a chat template in which an environment can speak"
        parts = []
        for role in self.markup.escapes:
            opening = min(self.markup.openings[role])
            ending = min(self.markup.endings[role], default="")
            whole = f"{opening.closing}{opening.rest}...{ending}"
            parts.append(f"{self._marked.plain(whole)!r} ({role})")
        return " or ".join(parts)

    @cached_property
    def _patterns(self) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """Compiled: openings of each role, middles, endings, and openings of the next turn."""
        markup = self.markup
        dummy = "(?: )?" if self.table.dummy_prefix else ""
        bos = self._marked.mark(self.tokenizer.bos_token)

        def openings(*roles: str) -> list[tuple[str, re.Pattern[str]]]:
            found = []
            for role in roles:
                for each in sorted(markup.openings.get(role, ())):
                    # A message rendered by itself starts as a conversation does.
                    begin = f"(?:{re.escape(bos)})?" if bos and bos not in each.rest else ""
                    found.append((role, re.compile(f"{dummy}{begin}{starts(each)}")))
            return found

        middles = [
            (a, b, re.compile(literal(text)))
            for (a, b), texts in sorted(markup.between.items())
            for text in sorted(texts)
        ]
        endings = [
            (role, text, re.compile(literal(text.rstrip()) + r"(\s*)\Z"))
            for role in markup.escapes
            for text in sorted(markup.endings[role])
        ]
        return openings(*markup.escapes), middles, endings, openings(END)

    def _messages(self, marked: str) -> tuple[list[dict[str, str]], str] | None:
        """The messages, and what the next one of the assistant starts with; None if unreadable."""
        found = self._best_reading(marked)
        if found is None:
            for _, pattern in self._patterns[-1] if marked.strip() else ():
                if whole := pattern.fullmatch(marked):
                    return [], self._prefilled(whole[0])
            return None
        place, stop, ending = found
        messages: list[dict[str, str]] = []
        while place is not None:
            content = self._marked.plain(marked[place.at : stop])
            try:
                content = self.markup.escapes[place.role].read(content)
            except ValueError:
                return None
            role = "tool" if place.role in TOOL_ROLES else place.role
            messages.append({"role": role, "content": content})
            place, stop = place.before, place.stop
        return messages[::-1], self._prefilled(ending)

    def _prefilled(self, ending: str) -> str:
        prefill = self._prefill
        return prefill if prefill and ending.endswith(prefill) else ""

    def _best_reading(self, marked: str) -> tuple[_Place, int, str] | None:
        """The last message, where its content stops, and what the template wrote after it.

        A sweep over everything that the template may have written, from left to right: the best
        way to a place is the one on which it wrote most.
        """
        openings, middles, endings, _ = self._patterns
        waiting: list[tuple[int, int, _Place]] = []  # places to the right of the sweep
        for role, pattern in openings:
            found = pattern.match(marked)
            if found and found[0].strip():
                place = _Place(found.end(), role, written(found[0]), None, 0)
                waiting.append((place.at, len(waiting), place))
        if not waiting:
            return None
        heapq.heapify(waiting)
        n_places = len(waiting)
        steps = [
            (found.start(), found.end(), a, b, "")
            for a, b, pattern in middles
            for found in pattern.finditer(marked)
        ]
        for role, text, pattern in endings:
            start = _ending(pattern, text, marked)
            if start is not None:
                steps.append((start, len(marked), role, END, text))
        best: dict[str, _Place] = {}
        reading: tuple[int, _Place, int, str] | None = None
        for start, stop, a, b, text in sorted(steps):
            while waiting and waiting[0][0] <= start:
                place = heapq.heappop(waiting)[2]
                if place.role not in best or place.score > best[place.role].score:
                    best[place.role] = place
            if a not in best:
                continue
            score = best[a].score + written(marked[start:stop])
            if b != END:
                n_places += 1
                heapq.heappush(waiting, (stop, n_places, _Place(stop, b, score, best[a], start)))
            elif reading is None or score > reading[0]:
                reading = score, best[a], start, text
        return None if reading is None else reading[1:]


def _ending(pattern: re.Pattern[str], text: str, marked: str) -> int | None:
    """Where `text` begins, if `marked` ends with it, or with all but white space at its end."""
    white = text[len(text.rstrip()) :]
    if not text.strip():
        return len(marked) - len(text) if marked.endswith(text) else None
    found = pattern.search(marked, max(0, len(marked) - len(text) - _NAMES))
    return found.start() if found and white.startswith(found[1]) else None
