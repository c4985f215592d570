"""A generator's rendered prompt and decoded text, turned back into messages and sampled ids.

Trainers that hand over text alone (OpenRLHF) hand over the prompt as the generator's chat template
wrote it. That markup is the generator's; a verifier of another family must see the messages in its
own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from cme_reward._lru import LRU
from cme_reward.conversation.format import PROMPTS_KEPT
from cme_reward.conversation.messages import Message, Prompt, plain_messages
from cme_reward.errors import InputError
from cme_reward.spans.pieces import special_ids
from cme_reward.spans.table import SpanTable

# Private-use characters stand for what a template is given: no template writes them by itself.
_HOLE = "\ue000{}\ue001"
_HOLES = re.compile("\ue000(.*?)\ue001", re.DOTALL)
_BRACKETED = re.compile(r"[^\s\w]*[<\[|｜][^\s]*")
# In front of a template: dates from `cme_dates`, or holes where there are none. Not a function in
# place of the renderer's own `strftime_now`: newer releases of transformers hand on data only.
_DATES = (
    "{%- macro strftime_now(format) -%}"
    "{{ cme_dates[format] if cme_dates is mapping else '\ue000' + format + '\ue001' }}"
    "{%- endmacro %}\n"
)
_MOST_TURNS = 100
_TAIL = 32  # characters by which the end of a prompt is recognised


class _Pattern(NamedTuple):
    """What the template writes around the contents of one sequence of roles."""

    roles: tuple[str, ...]
    literals: list[str]
    """Before, between and after the holes."""
    holes: list[str]
    """Numbers of messages, or formats of dates."""


class RenderedReader:
    """Reads what one generator's chat template and tokenizer have written.

    Args:
        tokenizer: the generator's fast tokenizer.
        chat_template_kwargs: what else the prompts were rendered with, such as
            `{"enable_thinking": False}`.
    """

    def __init__(
        self, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.table = SpanTable(tokenizer)
        self.template_kwargs = dict(chat_template_kwargs or {})
        own = getattr(tokenizer, "chat_template", None)
        template = self.template_kwargs.get("chat_template") or own
        self._is_chat = template is not None
        self._dated = self._is_chat and "strftime_now" in str(template)
        self._patterns: dict[tuple[int, bool], _Pattern | None] = {}
        self._special: dict[str, int] = {
            tokenizer.convert_ids_to_tokens(int(i)): int(i) for i in special_ids(tokenizer)
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._marks = self._markup()
        self._read: LRU[Prompt] = LRU(*PROMPTS_KEPT)

    def prompt(self, rendered: str) -> Prompt:
        """The messages that the generator's template renders as `rendered`, to the character.

        The answer is checked by rendering it again (dates apart, which are taken from the prompt).
        Where several conversations render alike, it is the one of which the template writes most
        itself. Text without any of the template's markup is a prompt in plain text, and comes back
        as a string without BOS.

        Raises:
            InputError: if the prompt has markup and is not what the template writes for an
                optional system message and user and assistant messages in turn.
        """
        return self._read.get(rendered, lambda: self._prompt(rendered), len(rendered))

    def _prompt(self, rendered: str) -> Prompt:
        bos = self.tokenizer.bos_token or ""
        found = None
        if self._is_chat:
            for text in dict.fromkeys((rendered, bos + rendered)):
                found = found or self._messages(text)
        plain = rendered.removeprefix(bos)
        contents = [plain] if found is None else [m["content"] for m in found]
        for content in contents:
            mark = next((m for m in self._marks if m in content), None)
            if mark is not None:
                raise InputError(
                    f"cannot read the prompt {_short(rendered)} as messages: {mark!r} in it is "
                    f"markup of {self.tokenizer.name_or_path!r}, and the whole is not what its "
                    "chat template writes for a system message (if any) and user and assistant "
                    "messages in turn. Expected a prompt rendered by that template, or the "
                    "messages themselves (in OpenRLHF as JSON in the label: --data.label_key)"
                )
        return plain if found is None else found

    def response(self, query: str, rendered: str) -> str:
        """The text after the prompt in `query`, the decoded ids of prompt and response.

        `query` starts with the prompt, or with what is left of it after tokenising and decoding,
        or with the end of it, if the trainer cut it on the left.

        Raises:
            InputError: if it starts with none of these.
        """
        if query.startswith(rendered):
            return query[len(rendered) :]
        ids = self.tokenizer.encode(rendered, add_special_tokens=False)
        decoded = self.tokenizer.decode(ids, skip_special_tokens=False)
        if query.startswith(decoded):
            return query[len(decoded) :]
        for prompt in (rendered, decoded):
            tail = prompt[-_TAIL:]
            at = query.rfind(tail, 0, len(prompt))
            for _ in range(_MOST_TURNS):
                if at < 0 or not tail:
                    break
                if prompt.endswith(query[: at + len(tail)]):
                    return query[at + len(tail) :]
                at = query.rfind(tail, 0, at + len(tail) - 1)
        raise InputError(
            f"the query {_short(query)} does not start with its prompt {_short(rendered)}, nor "
            f"with the end of it, as {self.tokenizer.name_or_path!r} decodes it. Expected the "
            "decoded ids of prompt and response, special tokens included"
        )

    def ids(self, response: str) -> list[int]:
        """`ids_batch` of one response."""
        return self.ids_batch([response])[0]

    def ids_batch(self, responses: Sequence[str]) -> list[list[int]]:
        """Ids that write each response: special tokens as such, all else as text.

        They need not be the sampled ones, but have the same text. U+FFFD at the very end is what
        is left of a character that was cut off, and is not part of it.
        """
        split = [self._split.split(response.rstrip("\ufffd")) for response in responses]
        # Without the empty ones: of two texts, tokenizers would wake other threads.
        texts = [piece for pieces in split for piece in pieces[::2] if piece]
        rows = iter(self.table.encode_batch(texts).ids)
        found: list[list[int]] = []
        for pieces in split:
            ids: list[int] = []
            for k, piece in enumerate(pieces):
                if k % 2:
                    ids.append(self._special[piece])
                elif piece:
                    ids += next(rows).tolist()
            found.append(ids)
        return found

    def _messages(self, rendered: str) -> list[Message] | None:
        turns = 1
        two = self._pattern(2, False)
        if two is not None and len(two.holes) >= 3:
            turns += min(rendered.count(two.literals[-2]), _MOST_TURNS - 1)
        for n in range(turns, 0, -1):
            readings = []
            for with_system in (False, True):
                pattern = self._pattern(n, with_system)
                holes = None if pattern is None else _match(pattern, rendered)
                if pattern is None or holes is None:
                    continue
                messages: list[Message] = [
                    {"role": role, "content": holes[str(k)]} for k, role in enumerate(pattern.roles)
                ]
                if self._render(messages, holes) == rendered:
                    written = sum(len("".join(part.split())) for part in pattern.literals)
                    readings.append((-written, len(messages), messages))
            if readings:
                return min(readings, key=lambda reading: reading[:2])[2]
        return None

    def _pattern(self, turns: int, with_system: bool) -> _Pattern | None:
        key = turns, with_system
        if key not in self._patterns:
            self._patterns[key] = self._find_pattern(*key)
        return self._patterns[key]

    def _find_pattern(self, turns: int, with_system: bool) -> _Pattern | None:
        roles = ("system",) * with_system + ("user", "assistant") * (turns - 1) + ("user",)
        written = self._render(
            [{"role": role, "content": _HOLE.format(k)} for k, role in enumerate(roles)], None
        )
        if written is None:
            return None
        pieces = _HOLES.split(written)
        literals, holes = pieces[::2], pieces[1::2]
        numbers = sorted(int(hole) for hole in holes if hole.isdecimal())
        # Every message once, and something between any two.
        if numbers != list(range(len(roles))) or not all(literals[1:-1]):
            return None
        return _Pattern(roles, literals, holes)

    def _render(self, messages: list[Message], dates: Mapping[str, str] | None) -> str | None:
        """The messages in the template; None if it refuses them. No dates: holes in their place."""
        options = dict(self.template_kwargs)
        if self._dated:
            own = self.tokenizer.get_chat_template(
                options.get("chat_template"), options.get("tools")
            )
            options |= {"chat_template": _DATES + own, "cme_dates": dates}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except TemplateError:
            return None

    def _markup(self) -> list[str]:
        """What only the template may write: its special tokens, or else its words in brackets."""
        tokenizer = self.tokenizer
        common = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
        common |= {tokenizer.pad_token, getattr(tokenizer, "mask_token", None), None}
        marks = dict.fromkeys(token for token in self._special if token and token not in common)
        for key in ((2, False), (1, True)):
            pattern = self._pattern(*key) if self._is_chat else None
            for literal in pattern.literals if pattern is not None else ():
                for word in self._split.sub(" ", literal).split():
                    if _BRACKETED.fullmatch(word):
                        marks[word] = None
        return list(marks)


def messages_from_label(label: Any) -> list[Message] | None:
    """The prompt's messages where a label carries them: a list of messages, or that as JSON.

    Any other label (an answer, nothing) gives None.

    Raises:
        InputError: if the messages end with the assistant's, which would show the verifier an
            answer, or one of them is none.
    """
    if isinstance(label, str) and label.lstrip()[:1] == "[":
        try:
            label = json.loads(label)
        except (ValueError, RecursionError):
            return None
    if not isinstance(label, Sequence) or isinstance(label, str) or not label:
        return None
    said = {"content", "tool_calls"}
    if not all(isinstance(m, Mapping) and "role" in m and said & m.keys() for m in label):
        return None
    if label[-1]["role"] == "assistant":
        answer = _short(label[-1].get("content"))
        raise InputError(
            f"the messages in the label end with the assistant's {answer}; "
            "expected the conversation before the response"
        )
    return plain_messages(label, "the label")


def _match(pattern: _Pattern, text: str) -> dict[str, str] | None:
    """What stands in the holes, each as short as can be; None where the text does not fit."""
    first, *between, last = pattern.literals
    stop = len(text) - len(last)
    if not text.startswith(first) or not text.endswith(last) or stop < len(first):
        return None
    found: dict[str, str] = {}
    at = len(first)
    for hole, literal in zip(pattern.holes, [*between, None], strict=True):
        end = stop if literal is None else text.find(literal, at, stop)
        if end < 0:
            return None
        found[hole] = text[at:end]
        if not hole.isdecimal() and not _is_date(found[hole], hole):
            return None
        at = end + len(literal or "")
    return found


def _is_date(text: str, form: str) -> bool:
    try:
        datetime.strptime(text, form)
    except ValueError:
        return False
    return True


def _short(text: Any) -> str:
    text = repr(text)
    return text if len(text) <= 160 else f"{text[:80]} ... {text[-70:]}"
