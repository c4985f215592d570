"""What a token is to the reward, by the text that it writes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import Int64, row_offsets
from cme_reward.spans.utf8 import WHOLE_CHAR

NO_TEXT, TEXT, BLANK = 0, 1, 2
"""A special token; a token with text; one of white space alone."""
UNFINISHED = 3
"""Bytes of a character that the response ends before completing."""
THOUGHT = 4
"""A token of a thought that is not scored."""

# By code point; U+3000 is the last white space there is.
_IS_INK = np.array([not chr(code).isspace() for code in range(0x3002)])


def kinds_of(text: str, ends: Int64, written: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Kinds of tokens by the characters they touch; `written` is False for special tokens."""
    starts = np.concatenate([ends[:1] * 0, ends[:-1]])
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    inked = row_offsets(_IS_INK[np.minimum(codes, len(_IS_INK) - 1)])
    touched = inked[-(-ends // WHOLE_CHAR)] - inked[starts // WHOLE_CHAR]
    return np.select([~written, touched > 0], [NO_TEXT, TEXT], BLANK).astype(np.uint8)
