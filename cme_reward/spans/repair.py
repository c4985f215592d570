"""Spans where no byte table can give them: normalised text, and decoders of their own making.

Slow paths, one response at a time, each ending in a proof or a `TokenizerError`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from cme_reward._ragged import Int64, row_offsets
from cme_reward.errors import TokenizerError
from cme_reward.spans.pieces import Pieces, gather
from cme_reward.spans.utf8 import REPLACEMENT, WHOLE_CHAR, decode_bytes


def offset_spans(
    tokenizer: Any, backend: Tokenizer, pieces: Pieces | None, text: str, encoding: Encoding
) -> tuple[Int64, Int64, Int64]:
    """`(ids, ends, holes)` of a text that the tokenizer normalises, from its own offsets.

    Offsets are not a partition: tokens that split a character all get the whole of it, a dummy
    prefix sits on top of the first character, what normalising joined or removed is left out.
    Tokens whose offsets overlap share their stretch of text by the bytes they write. Characters
    that were joined to the token before them (NFC: `e` + U+0301 -> `é`) belong to that token; what
    was removed is a hole.
    """
    ids = np.array(encoding.ids, dtype=np.int64)
    data, n_bytes = _written(pieces, ids)
    bounds = row_offsets(n_bytes).tolist()
    ends: list[int] = []
    holes: list[tuple[int, int]] = []
    exact: list[int] = []  # tokens that together write their stretch, byte for byte
    groups = _overlapping_groups(encoding.offsets)
    limits = [*(start for _, _, start, _ in groups), len(text)][1:]
    done = 0  # characters placed so far
    for (first, last, start, stop), limit in zip(groups, limits, strict=True):
        if not done <= start < stop <= limit:
            raise _unplaceable(tokenizer, text, f"offsets {encoding.offsets[first:last]}")
        if start > done:
            holes.append((done, start))
        done = stop if stop == limit else _with_joined(backend, text, stop, limit)
        if last - first == 1:
            ends.append(WHOLE_CHAR * done)
        elif done == stop and data[bounds[first] : bounds[last]] == text[start:stop].encode():
            exact += range(first, last)
            ends += [WHOLE_CHAR * start] * (last - first)  # so far
        else:
            ends += _by_weight(WHOLE_CHAR * start, WHOLE_CHAR * done, n_bytes[first:last])
    if done < len(text):
        holes.append((done, len(text)))
    ends_S = np.array(ends, dtype=np.int64)
    if pieces is not None and exact:
        ends_S[exact] += _within_groups(pieces, ids, np.array(exact), ends_S)
    return ids, ends_S, WHOLE_CHAR * np.array(holes, dtype=np.int64).reshape(-1, 2)


def _written(pieces: Pieces | None, ids: Int64) -> tuple[bytes, Int64]:
    """The bytes that the ids write, and how many each; nothing where that is not known."""
    if pieces is None:
        return b"", np.zeros(len(ids), dtype=np.int64)
    raw, n_bytes = gather(pieces, ids)
    return raw.tobytes(), n_bytes


def _within_groups(pieces: Pieces, ids: Int64, at: Int64, starts_S: Int64) -> Int64:
    """Right ends of the tokens `at`, each from its group's start.

    A group's tokens write whole characters, so that all groups are read as one text.
    """
    raw, n_bytes = gather(pieces, ids[at])
    _, positions, _ = decode_bytes(raw, n_bytes, pieces.is_byte[ids[at]], final=True)
    ends = positions[np.cumsum(n_bytes)]
    is_first = np.diff(starts_S[at], prepend=-1) > 0
    before = np.append(0, ends[:-1])[is_first]
    return ends - np.repeat(before, np.diff(np.append(np.flatnonzero(is_first), len(at))))


def _by_weight(start: int, stop: int, n_bytes: Int64) -> list[int]:
    """Right ends of tokens that share a stretch by the bytes they write.

    An unknown token writes none, and yet stands for some of this text.
    """
    weights = np.cumsum(np.maximum(n_bytes, 1))
    return (start + (stop - start) * weights // weights[-1]).tolist()


def _overlapping_groups(offsets: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Maximal runs of tokens that share characters: `(first, last, start, stop)`.

    A token with an empty offset has no place of its own: it joins the tokens before it, or those
    after it where there are none.
    """
    groups: list[tuple[int, int, int, int]] = []
    for t, (start, stop) in enumerate(offsets):
        first, last = t, t + 1
        # NFC reorders combining marks, so a token may reach back over several groups.
        while groups and (start < groups[-1][3] or start == stop or groups[-1][2] == groups[-1][3]):
            first, _, before_start, before_stop = groups.pop()
            if before_start < before_stop:
                if start == stop:
                    start, stop = before_start, before_stop
                else:
                    start, stop = min(before_start, start), max(before_stop, stop)
        groups.append((first, last, start, stop))
    return groups


def _with_joined(backend: Tokenizer, text: str, stop: int, limit: int) -> int:
    """`stop`, moved over the characters before `limit` that the normaliser keeps.

    A kept character without a token of its own went into the one before it (NFC composes and
    reorders combining marks). Dropped ones (BERT's accents and controls) stay behind, and so does
    white space, which splitting into words drops.
    """
    normalizer = backend.normalizer
    while normalizer and stop < limit and normalizer.normalize_str(text[stop]).strip():
        stop += 1
    return stop


def incremental_spans(
    tokenizer: Any, backend: Tokenizer, ids: Int64, special: Int64
) -> tuple[str, Int64]:
    """`(text, ends)` by decoding token after token, checked against decoding them all at once.

    Tokens that only together complete a character share it evenly.
    """
    writing = np.flatnonzero(~np.isin(ids, special))
    writers = ids[writing].tolist()
    text = backend.decode(writers, skip_special_tokens=False)
    widths = np.zeros(len(ids), dtype=np.int64)
    context = first = done = 0  # writers[context:first] are decoded again, as context
    for t in range(len(writers)):
        before = backend.decode(writers[context:first], skip_special_tokens=False)
        after = backend.decode(writers[context : t + 1], skip_special_tokens=False)
        if not after.startswith(before) or (after.endswith(REPLACEMENT) and t + 1 < len(writers)):
            continue
        stop = done + len(after) - len(before)
        if text[done:stop] != after[len(before) :]:
            raise _unplaceable(tokenizer, text, f"token {writing[t]} (id {writers[t]})")
        share = WHOLE_CHAR * (stop - done) * np.arange(t + 2 - first) // (t + 1 - first)
        widths[writing[first : t + 1]] = np.diff(share)
        context, first, done = first, t + 1, stop
    if done != len(text):
        raise _unplaceable(tokenizer, text, f"the text after character {done}")
    return text, np.cumsum(widths)


def _unplaceable(tokenizer: Any, text: str, where: str) -> TokenizerError:
    shown = text if len(text) <= 80 else text[:77] + "..."
    return TokenizerError(
        f"tokenizer {getattr(tokenizer, 'name_or_path', type(tokenizer).__name__)!r} cannot be "
        f"aligned exactly: {where} does not fit the text {shown!r}. Expected tokens that write "
        "the text piece by piece; please report this tokenizer, or use another verifier"
    )
