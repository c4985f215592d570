"""Where the characters are in a string of bytes, valid UTF-8 or not."""

from __future__ import annotations

import codecs
import re
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

WHOLE_CHAR = 12  # text positions are twelfths of a character: 1, 2, 3 and 4 bytes divide it
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


_SURROGATE = re.compile(b"\xed[\xa0-\xbf]")


def decode_bytes(
    raw: NDArray[np.uint8],
    n_bytes: NDArray[np.int64],
    is_byte: NDArray[np.bool_],
    *,
    final: bool = False,
) -> tuple[str, NDArray[np.int64], int]:
    """Decode the bytes of one response the way its tokenizer does.

    `n_bytes` and `is_byte` are per token: how many bytes it writes, and whether it is a
    SentencePiece byte token. Invalid bytes become U+FFFD: one for each maximal invalid
    subsequence (byte-level BPE, as `bytes.decode("replace")`), but one for *each byte* of a run of
    byte tokens that is invalid as a whole (SentencePiece). An unfinished character at the end is
    left out, unless `final`.

    Returns the text; for each byte boundary 0..len(raw), its position in the text in twelfths of a
    character (bytes left out sit at its end); and the number of bytes that became text.
    """
    data = raw.tobytes()
    text, shown = codecs.utf_8_decode(data, "replace", final)
    if data[shown:] and _SURROGATE.fullmatch(data[shown:]):
        # Python waits for the third byte of a surrogate half, which no byte makes a character.
        text, shown = codecs.utf_8_decode(data, "replace", True)
    is_start = (raw[:shown] & 0xC0) != 0x80  # not a continuation byte
    if REPLACEMENT in text:
        bad = _invalid_slices(data[:shown])
        if bad and is_byte.any():
            text, is_start = _decode_byte_runs(data[:shown], n_bytes, is_byte)
        else:
            for start, stop in bad:
                is_start[start] = True
                is_start[start + 1 : stop] = False
    chars = np.append(np.flatnonzero(is_start), shown)
    bytes_of_char = np.diff(chars)
    positions = np.full(len(raw) + 1, WHOLE_CHAR * len(bytes_of_char), dtype=np.int64)
    positions[0] = 0
    np.cumsum(np.repeat(WHOLE_CHAR // bytes_of_char, bytes_of_char), out=positions[1 : shown + 1])
    return text, positions, shown


def _invalid_slices(data: bytes) -> list[tuple[int, int]]:
    """The maximal invalid subsequences, each of which decodes to one U+FFFD."""
    slices = []
    start = 0
    while True:
        try:
            data[start:].decode()
        except UnicodeDecodeError as error:
            slices.append((start + error.start, start + error.end))
            start += error.end
        else:
            return slices


def _decode_byte_runs(
    data: bytes, n_bytes: NDArray[np.int64], is_byte: NDArray[np.bool_]
) -> tuple[str, NDArray[np.bool_]]:
    """SentencePiece's rule: a run of byte tokens is valid UTF-8, or one U+FFFD per byte."""
    has_text = n_bytes > 0  # special tokens are skipped before decoding, and do not break a run
    ends = np.minimum(np.cumsum(n_bytes[has_text]), len(data))
    flags = is_byte[has_text]
    changes = np.flatnonzero(np.diff(flags)) + 1
    bounds = [0, *ends[changes - 1].tolist(), len(data)]
    in_run = bool(flags[0])
    is_start = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    text = []
    for start, stop in pairwise(bounds):
        run = data[start:stop]
        if in_run:
            try:
                text.append(run.decode())
            except UnicodeDecodeError:
                text.append(REPLACEMENT * len(run))
                is_start[start:stop] = True
        else:
            text.append(run.decode())
        in_run = not in_run
    return "".join(text), is_start
