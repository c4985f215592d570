"""Token ids -> text and the exact place of every token in it.

Positions are integers in twelfths of a character, so that a token holding one byte of a 2-, 3- or
4-byte character has an exact width (6, 4 or 3) and widths add up with no rounding. The tokens of a
text tile it: token t covers `[ends[t - 1], ends[t])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import Int64, flatten, flatten_ids, row_offsets, split, sums
from cme_reward.errors import InputError
from cme_reward.spans.fidelity import require_faithful
from cme_reward.spans.kinds import BLANK, NO_TEXT, TEXT, THOUGHT, UNFINISHED, kinds_of
from cme_reward.spans.pieces import (
    build_pieces,
    gather,
    plain_backend,
    require_fast,
    special_ids,
    vocabulary_sizes,
    with_pieces,
)
from cme_reward.spans.repair import incremental_spans, offset_spans
from cme_reward.spans.utf8 import decode_bytes

__all__ = ["BLANK", "NO_TEXT", "TEXT", "THOUGHT", "UNFINISHED", "Decoded", "Encoded", "SpanTable"]


class Decoded(NamedTuple):
    """Texts that token ids write. Per response: a string, and one array entry per token."""

    texts: list[str]
    ends: list[Int64]
    """Right end of each token, in twelfths of a character."""
    kinds: list[NDArray[np.uint8]]
    """NO_TEXT (special token), TEXT, BLANK (whitespace only) or UNFINISHED (bytes of a character
    that the response ends before completing; not part of the text)."""


class Encoded(NamedTuple):
    """Token ids of texts. Per text: one array entry per token."""

    ids: list[Int64]
    ends: list[Int64]
    """Right end of each token, in twelfths of a character of the text given."""
    holes: list[Int64]
    """`[n, 2]`: the stretches of text that the tokenizer drops (BERT's accents, T5's second
    space). Nearly always empty. Tokens and holes together tile the text."""


_NO_HOLES = np.zeros((0, 2), dtype=np.int64)


class _Tables(NamedTuple):
    about: tuple[tuple[int, int], list[int]]
    vocab_size: int
    backend: Any
    pieces: Any


_CACHE: WeakKeyDictionary[Any, _Tables] = WeakKeyDictionary()


def _tables(tokenizer: Any) -> _Tables:
    require_fast(tokenizer)
    tables = _CACHE.get(tokenizer)
    about = vocabulary_sizes(tokenizer), special_ids(tokenizer).tolist()
    if tables is None or tables.about != about:  # tokens were added, or made special, since
        backend = plain_backend(tokenizer.backend_tokenizer)
        require_faithful(tokenizer, backend)
        tables = _Tables(about, len(tokenizer), backend, build_pieces(tokenizer, backend))
        _CACHE[tokenizer] = tables
    return tables


class SpanTable:
    """Exact token spans of one fast tokenizer, in both directions.

    Built from the *sampled ids* through a table of each id's bytes (byte-level BPE; SentencePiece
    with byte fallback; Unigram; WordPiece; added tokens), checked against the tokenizer's own
    decode when it is built. On the way back, every encoding whose bytes are not those of the text
    (a normaliser changed it) is placed by the tokenizer's offsets, repaired to a partition. What
    fits neither way raises `TokenizerError`. The tables are built once per tokenizer object.

    Text is always taken as the continuation of a prompt: a SentencePiece dummy prefix is neither
    added nor stripped, and `"<eos>"` in a text is five characters, not a special token.

    Args:
        tokenizer: a fast tokenizer of transformers.
        shown: special tokens that write their names; others write nothing.
        padded: `vocab_size` stands for an id that the tokenizer lacks, and writes nothing.

    Raises:
        TokenizerError: if the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, shown: Sequence[int] = (), *, padded: bool = False) -> None:
        self.tokenizer = tokenizer
        self.shown = tuple(shown)
        self.padded = padded
        _, self.vocab_size, self._backend, self._pieces = _tables(tokenizer)
        if (shown or padded) and self._pieces is not None:
            names = tokenizer.convert_ids_to_tokens(list(shown))
            named = {i: str(name).encode() for i, name in zip(shown, names, strict=True)}
            self._pieces = with_pieces(self._pieces, named, padded=padded)
        # Does the tokenizer write a space before a text of its own that decode takes away again?
        self.dummy_prefix = (
            self._backend.encode("a", add_special_tokens=False).ids
            != tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
        )

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return partial(SpanTable, padded=self.padded), (self.tokenizer, self.shown)

    def __repr__(self) -> str:
        return f"SpanTable({getattr(self.tokenizer, 'name_or_path', '')!r})"

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> tuple[str, Int64]:
        """`(text, ends)` of one response; `ends` is int64 `[T]`. See `decode_batch`."""
        decoded = self.decode_batch([ids])
        return decoded.texts[0], decoded.ends[0]

    def encode(self, text: str) -> tuple[Int64, Int64]:
        """`(ids, ends)` of one text, both int64 `[S]`. See `encode_batch`."""
        encoded = self.encode_batch([text])
        return encoded.ids[0], encoded.ends[0]

    def tokens(self, ids: Sequence[int] | NDArray[Any]) -> list[str]:
        """What each id writes, to look at: special tokens by name, parts of characters as bytes.

        `" Hello"`, `"<|im_end|>"`, `"<0xF0><0x9F>"`; nothing for padding that is no id.
        """
        known = [0 <= i < self.vocab_size for i in ids]
        if not all(known):
            shown = iter(self.tokens([i for i, k in zip(ids, known, strict=True) if k]))
            return [next(shown) if k else "" for k in known]
        names = self.tokenizer.convert_ids_to_tokens(list(map(int, ids)))
        if self._pieces is None:
            return names
        blob, starts = self._pieces.blob.tobytes(), self._pieces.starts
        pieces = [blob[starts[i] : starts[i + 1]] for i in ids]
        return [_legible(piece) or name for piece, name in zip(pieces, names, strict=True)]

    def decode_batch(self, batch: Sequence[Sequence[int] | NDArray[Any]]) -> Decoded:
        """Texts, right ends and kinds of a ragged batch of sampled ids.

        Invalid bytes are U+FFFD as the tokenizer decodes them, shared by the tokens that wrote
        them. Bytes of a character left unfinished at the end of a response are not in the text;
        the tokens holding them are `UNFINISHED`. No ids give `""` and an empty array.

        Raises:
            InputError: for an id outside the vocabulary, naming the response and position.
            TokenizerError: if this tokenizer's decode cannot be split into tokens exactly.
        """
        ids, offsets = flatten_ids(batch, self.vocab_size + self.padded, "response")
        if self._pieces is None:
            return self._decode_incrementally(ids, offsets)
        pieces = self._pieces
        raw, n_bytes = gather(pieces, ids)
        ends = _row_cumsum(pieces.width[ids], offsets)
        kinds = pieces.kind[ids]
        byte_offsets = _boundaries(n_bytes, offsets)
        texts = []
        awkward = _rows_with(~pieces.whole[ids], offsets)
        bounds, byte_bounds = offsets.tolist(), byte_offsets.tolist()
        data = raw.tobytes()
        for b in range(len(batch)):
            try:
                texts.append(data[byte_bounds[b] : byte_bounds[b + 1]].decode())
                continue
            except UnicodeDecodeError:
                awkward.discard(b)
            row = slice(bounds[b], bounds[b + 1])
            text, positions, shown = decode_bytes(
                raw[byte_bounds[b] : byte_bounds[b + 1]], n_bytes[row], pieces.is_byte[ids[row]]
            )
            byte_ends = np.cumsum(n_bytes[row])
            ends[row] = positions[byte_ends]
            kinds[row] = kinds_of(text, ends[row], n_bytes[row] > 0)
            kinds[row][(byte_ends > shown) & (n_bytes[row] > 0)] = UNFINISHED
            texts.append(text)
        if awkward:  # parts of characters, all of which are completed
            at, row_starts = _entries_of(sorted(awkward), offsets)
            own, _ = _entries_of(sorted(awkward), byte_offsets)
            text, along = _along(raw[own], n_bytes[at], pieces.is_byte[ids[at]])
            ends[at] = _row_cumsum(np.diff(along, prepend=0), row_starts)
            kinds[at] = kinds_of(text, along, n_bytes[at] > 0)
        return Decoded(texts, split(ends, offsets), split(kinds, offsets))

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Token ids, right ends and holes of texts, without special tokens.

        Every row is proved: the bytes its ids write are compared with the bytes of the text. Rows
        that differ were normalised, and are placed by offsets into the original text.

        Raises:
            InputError: for a text with a lone surrogate, which no tokenizer can read.
            TokenizerError: if the tokens cannot be placed in the text.
        """
        texts = list(texts)
        raw_texts = [_utf8(text, b) for b, text in enumerate(texts)]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ids, offsets = flatten([encoding.ids for encoding in encodings], np.int64)
        del encodings
        pieces = self._pieces
        if pieces is None or not pieces.by_bytes:
            proved = np.zeros(len(texts), dtype=bool)
            ends = np.zeros_like(ids)
        else:
            raw, n_bytes = gather(pieces, ids)
            byte_offsets = _boundaries(n_bytes, offsets)
            proved = _same_rows(raw.tobytes(), byte_offsets, raw_texts)
            ends = _row_cumsum(pieces.width[ids], offsets)
            awkward = [b for b in sorted(_rows_with(~pieces.whole[ids], offsets)) if proved[b]]
            if awkward:
                at, row_starts = _entries_of(awkward, offsets)
                own, _ = _entries_of(awkward, byte_offsets)
                _, along = _along(raw[own], n_bytes[at], pieces.is_byte[ids[at]])
                ends[at] = _row_cumsum(np.diff(along, prepend=0), row_starts)
        encoded = Encoded(split(ids, offsets), split(ends, offsets), [_NO_HOLES] * len(texts))
        unproved = [b for b, row_proved in enumerate(proved) if not row_proved]
        with_offsets = self._backend.encode_batch(
            [texts[b] for b in unproved], add_special_tokens=False
        )
        for b, encoding in zip(unproved, with_offsets, strict=True):
            row = offset_spans(self.tokenizer, self._backend, pieces, texts[b], encoding)
            encoded.ids[b], encoded.ends[b], encoded.holes[b] = row
        return encoded

    def _decode_incrementally(self, ids: Int64, offsets: Int64) -> Decoded:
        decoded = Decoded([], [], [])
        textless = np.append(special_ids(self.tokenizer), self.vocab_size)
        special = np.setdiff1d(textless, self.shown)
        for row in split(ids, offsets):
            text, ends = incremental_spans(self.tokenizer, self._backend, row, special)
            decoded.texts.append(text)
            decoded.ends.append(ends)
            decoded.kinds.append(kinds_of(text, ends, np.diff(ends, prepend=0) > 0))
        return decoded


def _legible(piece: bytes) -> str:
    text = piece.decode(errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


def _utf8(text: str, b: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text {b} holds the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which is not a Unicode character; expected valid text. Replace it, for example with "
            'text.encode("utf-8", "replace").decode()'
        ) from None


def _boundaries(lengths: Int64, offsets: Int64) -> Int64:
    """Row offsets of the things of which each token has `lengths`."""
    return row_offsets(lengths)[offsets]


def _row_cumsum(widths: Int64, offsets: Int64) -> Int64:
    """Cumulative sum within each row of a flat ragged array."""
    total = row_offsets(widths)
    return total[1:] - np.repeat(total[offsets[:-1]], np.diff(offsets))


def _entries_of(rows: list[int], offsets: Int64) -> tuple[Int64, Int64]:
    """Flat positions of the tokens, or bytes, of these rows, and the row offsets among them."""
    lengths = np.diff(offsets)[rows]
    starts = row_offsets(lengths)
    return np.arange(starts[-1]) + np.repeat(offsets[rows] - starts[:-1], lengths), starts


def _along(raw: NDArray[np.uint8], n_bytes: Int64, is_byte: NDArray[np.bool_]) -> tuple[str, Int64]:
    """Text and right ends of rows of whole characters, one row after the other."""
    text, positions, _ = decode_bytes(raw, n_bytes, is_byte)
    return text, positions[np.cumsum(n_bytes)]


def _rows_with(flags: NDArray[np.bool_], offsets: Int64) -> set[int]:
    return set(np.flatnonzero(sums(flags, offsets)).tolist())


def _same_rows(data: bytes, byte_offsets: Int64, raw_texts: list[bytes]) -> NDArray[np.bool_]:
    """Which rows of `data` are these texts, byte for byte?"""
    text_offsets = row_offsets([len(raw) for raw in raw_texts])
    if np.array_equal(byte_offsets, text_offsets) and data == b"".join(raw_texts):
        return np.ones(len(raw_texts), dtype=bool)
    bounds = byte_offsets.tolist()
    return np.array(
        [data[bounds[b] : bounds[b + 1]] == raw for b, raw in enumerate(raw_texts)], dtype=bool
    )
