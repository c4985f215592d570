"""Token ids as text in which special tokens stay apart from characters that spell them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme_reward.spans.pieces import special_ids
from cme_reward.spans.table import SpanTable

# A special token is two surrogates, which no decoded text contains.
_HIGH, _LOW, _PAGE = 0xD800, 0xDC00, 1024
MARK = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_PRIVATE = re.compile("([\ue000-\uf8ff])")


def is_half(character: str) -> bool:
    """The first half of a mark?"""
    return "\ud800" <= character <= "\udbff"


class MarkedText:
    """One generator's ids as text, special tokens as marks that no text contains.

    So `<|user|>` that a tokenizer reads as a special token is told from the same eight characters
    in the words of an environment. A dummy prefix that the tokenizer puts after special tokens is
    none of the text and is left out.
    """

    def __init__(self, tokenizer: Any, table: SpanTable) -> None:
        self.tokenizer = tokenizer
        self.table = table
        special = special_ids(tokenizer)
        self._marks = {int(i): chr(_HIGH + k // _PAGE) + chr(_LOW + k % _PAGE)
                       for k, i in enumerate(special)}  # fmt: skip
        self._names = {
            self._marks[int(i)]: str(tokenizer.convert_ids_to_tokens(int(i))) for i in special
        }
        self._is_special = np.zeros(table.vocab_size, dtype=bool)
        self._is_special[special[special < table.vocab_size]] = True
        self._dummy_after_special = False
        if table.dummy_prefix and special.size:
            name = self._names[self._marks[int(special[0])]]
            written = self.of_text(f"{name}a")
            self._dummy_after_special = written.endswith(" a")

    def of_ids(self, ids: Sequence[int] | NDArray[np.int64]) -> str:
        """The text of these ids, special tokens as marks."""
        ids_T = np.asarray(ids, dtype=np.int64)
        at = np.flatnonzero(self._is_special[ids_T])
        bounds = [0, *(at + 1).tolist()]
        stops = [*at.tolist(), len(ids_T)]
        texts = self.table.decode_batch(
            [ids_T[i:j] for i, j in zip(bounds, stops, strict=True)]
        ).texts
        parts = [texts[0]]
        for t, text in zip(at.tolist(), texts[1:], strict=True):
            if self._dummy_after_special:
                text = text.removeprefix(" ")
            parts += [self._marks[int(ids_T[t])], text]
        return "".join(parts)

    def of_text(self, text: str) -> str:
        """The same of a text that the tokenizer reads, as trainers tokenise what they render.

        Private-use characters, which stand for what a template is given, stay: where the tokenizer
        has none of them, what is between them is read piece by piece.
        """
        whole = self.of_ids(self.tokenizer.encode(text, add_special_tokens=False))
        if len(_PRIVATE.findall(whole)) == len(_PRIVATE.findall(text)):
            return whole
        parts = _PRIVATE.split(text)
        for k in range(0, len(parts), 2):  # every other one is private
            part = self.of_ids(self.tokenizer.encode(parts[k], add_special_tokens=False))
            # A dummy prefix is put in front of a text, not of its parts.
            parts[k] = part.removeprefix(" ") if k and self.table.dummy_prefix else part
        return "".join(parts)

    def plain(self, marked: str, *, names: bool = True) -> str:
        """The text as characters: special tokens by their names, or left out."""
        return MARK.sub(lambda found: self._names[found[0]] if names else "", marked)

    def mark(self, token: str | None) -> str:
        """The mark of a special token; nothing for what is none."""
        found = (mark for mark, name in self._names.items() if name == token)
        return next(found, "")
