"""Text in a prompt as text: what a message spells never becomes a control token.

A template writes special tokens, and what is said between them may spell one (`<|im_end|>`), which
a tokenizer reads as the token. Here only those that the template itself writes count. Where a text
spells one, the tokenizer's twin encodes the prompt: its special tokens have other names, which are
put in place of those that the template wrote. All else about it is the same, so that the ids are
those of ordinary encoding but for the text that is no token any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from cme_reward.spans.pieces import rename_special, special_ids

_PRIVATE = range(0x100000, 0x10FFFE)
"""Code points that no script uses."""

Change = Callable[[str], str]


class Names(NamedTuple):
    """How special tokens are spelt."""

    tokens: list[str]
    pattern: re.Pattern[str]
    starts: frozenset[str]
    """Their beginnings, which what follows a text may complete."""
    ends: frozenset[str]
    """Their ends, which what is before a text may have begun."""
    longest: int


class _Twin(NamedTuple):
    backend: Any
    real: dict[int, int]
    """Ids of its added tokens -> the tokenizer's."""


_TWINS: WeakKeyDictionary[Any, dict[Any, _Twin]] = WeakKeyDictionary()


def encode_literally(
    tokenizer: Any, write: Callable[[Change], str], names: Names | None = None
) -> list[int]:
    """Token ids of a prompt, without tokens of the tokenizer's own around it.

    Args:
        tokenizer: a fast tokenizer.
        write: gives the prompt, with its argument applied to each text of others in it.
        names: `special_names(tokenizer)`, where they are at hand.
    """
    names = special_names(tokenizer) if names is None else names
    texts: list[str] = []
    plain = write(lambda text: texts.append(text) or text)
    if all(text == _broken(text, names, {}) for text in texts):
        return tokenizer.encode(plain, add_special_tokens=False)
    unused = _unused(plain, *texts)
    breakers = {char: chr(next(unused)) for char in {c for t in names.tokens for c in t}}
    broken = write(lambda text: _broken(text, names, breakers))
    if names.pattern.findall(broken) == names.pattern.findall(plain):
        return tokenizer.encode(plain, add_special_tokens=False)
    marker = chr(next(unused))
    twin = _twin(tokenizer, names.tokens, marker)
    prompt = names.pattern.sub(lambda found: marker + found[0], broken)
    prompt = prompt.translate({ord(breaker): char for char, breaker in breakers.items()})
    ids: list[int] = twin.backend.encode(prompt, add_special_tokens=False).ids
    return [twin.real.get(i, i) for i in ids]


def special_names(tokenizer: Any) -> Names:
    """How a tokenizer's special tokens are spelt."""
    special = set(special_ids(tokenizer).tolist())
    tokens = [str(t) for i, t in tokenizer.added_tokens_decoder.items() if i in special]
    # The longest first, as tokenizers match them. Without any, a pattern that matches nothing.
    spelt = sorted(filter(None, tokens), key=len, reverse=True)
    return Names(
        spelt,
        re.compile("|".join(map(re.escape, spelt)) or r"(?!)"),
        frozenset(token[:n] for token in spelt for n in range(1, len(token))),
        frozenset(token[n:] for token in spelt for n in range(1, len(token))),
        max(map(len, spelt), default=0),
    )


def _broken(text: str, names: Names, breakers: dict[str, str]) -> str:
    """The text with a character changed in all that is, begins or ends a special token's name."""

    def instead(char: str) -> str:
        return breakers.get(char, "\0")

    while found := names.pattern.search(text):
        at = found.start() + len(found[0]) - len(found[0].lstrip())
        text = text[:at] + instead(text[at]) + text[at + 1 :]
    # Templates trim what they write.
    head, tail = len(text) - len(text.lstrip()), len(text.rstrip())
    for n in range(min(names.longest, tail - head), 0, -1):
        if text[tail - n : tail] in names.starts:
            text = text[: tail - n] + instead(text[tail - n]) + text[tail - n + 1 :]
        if text[head : head + n] in names.ends:
            text = text[: head + n - 1] + instead(text[head + n - 1]) + text[head + n :]
    return text


def _unused(*texts: str) -> Iterator[int]:
    """Private code points that are in none of the texts."""
    used = {ord(char) for text in texts for char in text if ord(char) >= _PRIVATE.start}
    return (code for code in _PRIVATE if code not in used)


def _twin(tokenizer: Any, tokens: list[str], marker: str) -> _Twin:
    twins = _TWINS.setdefault(tokenizer, {})
    key = marker, tuple(tokens)
    if key not in twins:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        real = {token["content"]: token["id"] for token in state["added_tokens"]}
        names = {token: marker + token for token in tokens}
        rename_special(state, names)
        backend = Tokenizer.from_str(json.dumps(state))
        backend.no_padding()
        backend.no_truncation()
        ids = [(backend.token_to_id(names.get(token, token)), i) for token, i in real.items()]
        twins[key] = _Twin(backend, {own: i for own, i in ids if own is not None})
    return twins[key]
