"""What each token id writes: a table of bytes, built once per tokenizer and checked against it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cme_reward._ragged import row_offsets
from cme_reward.errors import TokenizerError
from cme_reward.spans.kinds import BLANK, NO_TEXT, TEXT
from cme_reward.spans.utf8 import WHOLE_CHAR, decode_bytes


@dataclass(frozen=True)
class Pieces:
    """The bytes of every id. `blob[starts[i]:starts[i + 1]]` are those of id i.

    `width[i]` is the piece's width in twelfths of a character, `kind[i]` what it is; both hold
    only for pieces of whole characters, for the others `whole[i]` is False and width depends on
    the neighbours. `is_byte[i]` marks SentencePiece byte tokens (`<0x0A>`), whose runs decode
    together or not at all.
    """

    blob: NDArray[np.uint8]
    starts: NDArray[np.int64]
    width: NDArray[np.int64]
    kind: NDArray[np.uint8]
    whole: NDArray[np.bool_]
    is_byte: NDArray[np.bool_]
    by_bytes: bool  # the decoder joins bytes, so that every byte sequence decodes


def plain_backend(backend: Tokenizer) -> Tokenizer:
    """A private copy of a Rust tokenizer that treats text as the continuation of a prompt.

    No dummy prefix is added or stripped, `"<eos>"` in a text is five characters and not a special
    token, and the padding and truncation that a caller may have left switched on are off. A copy,
    because all of these are mutable state of the caller's object.
    """
    parts = {
        name: json.loads(part.__getstate__()) if part is not None else None
        for name, part in (
            ("normalizer", backend.normalizer),
            ("pre_tokenizer", backend.pre_tokenizer),
            ("decoder", backend.decoder),
        )
    }
    edited = {name: _without_dummy_prefix(part, name) for name, part in parts.items()}
    is_unigram = type(backend.model).__name__ == "Unigram"  # it knows special tokens as words too
    if edited == parts and not is_unigram:
        backend = copy.deepcopy(backend)
    else:
        state = json.loads(backend.to_str()) | edited
        if is_unigram:
            names = [token["content"] for token in state["added_tokens"] if token["special"]]
            rename_special(state, {name: f"\U0010fffd{name}" for name in names})
        backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


def _without_dummy_prefix(part: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """One component's JSON, without what it does only at the start of a text."""
    if part is None:
        return None
    kind = part["type"]
    if kind == "Prepend" or (kind == "Strip" and part.get("start") and not part.get("stop")):
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel" and name == "pre_tokenizer":
        return part | {"add_prefix_space": False}
    if kind == "Sequence":
        key = next(k for k in ("normalizers", "pretokenizers", "decoders") if k in part)
        if key == "pretokenizers" and any(p["type"] == "WhitespaceSplit" for p in part[key]):
            # T5 writes a word's leading space through Metaspace's prefix; there is no other.
            return part
        kept = [_without_dummy_prefix(step, name) for step in part[key]]
        return part | {key: [step for step in kept if step is not None]}
    return part


def rename_special(state: dict[str, Any], names: dict[str, str]) -> None:
    """Give special tokens other names in a tokenizer's JSON, so that text cannot spell them."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


def special_ids(tokenizer: Any) -> NDArray[np.int64]:
    """Ids that write no text: those the tokenizer's own decode skips as special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return np.array(sorted(added | set(tokenizer.all_special_ids)), dtype=np.int64)


def vocabulary_sizes(tokenizer: Any) -> tuple[int, int]:
    """What adding tokens changes: how many the model has, and how many were added.

    `len(tokenizer)` counts a copy of the whole vocabulary, a tenth of a second for Gemma's.
    """
    return tokenizer.vocab_size, len(tokenizer.added_tokens_decoder)


def build_pieces(tokenizer: Any, backend: Tokenizer) -> Pieces | None:
    """The table, or None where no table can explain how this tokenizer decodes."""
    tokens = backend.get_vocab(with_added_tokens=True)
    vocab_size = max(tokens.values(), default=-1) + 1
    decoder = backend.decoder
    steps = steps_of(decoder)
    by_bytes = "ByteLevel" in steps or "ByteFallback" in steps
    is_byte = np.zeros(vocab_size, dtype=bool)
    if "ByteLevel" in steps:
        pieces = [b""] * vocab_size
        for token, i in tokens.items():
            pieces[i] = _byte_level_piece(token)
    else:
        anchored = _anchored_pieces(backend, tokens, vocab_size)
        if anchored is None:
            return None
        pieces = anchored
        if "ByteFallback" in steps:
            for value in range(256):
                i = tokens.get(f"<0x{value:02X}>")
                if i is not None:
                    pieces[i], is_byte[i] = bytes([value]), True
    every_id = [[i] for i in range(vocab_size)]
    if by_bytes and any(
        piece.decode(errors="replace") != text
        for piece, text in zip(
            pieces, backend.decode_batch(every_id, skip_special_tokens=False), strict=True
        )
    ):
        return None
    for i in special_ids(tokenizer).tolist():
        pieces[i], is_byte[i] = b"", False
    table = _tabulate(pieces, is_byte, by_bytes=by_bytes)
    return table if _explains(table, backend) else None


def steps_of(component: Any) -> list[str]:
    """The types of what a pre-tokenizer or decoder does, one after the other; none of None."""

    def types(part: dict[str, Any]) -> list[str]:
        steps = part.get("decoders", part.get("pretokenizers"))
        return [part["type"]] if steps is None else [t for step in steps for t in types(step)]

    return [] if component is None else types(json.loads(component.__getstate__()))


def _byte_of_char() -> dict[int, int]:
    """GPT-2's printable stand-in for each byte, inverted: code point -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


CHAR_OF_BYTE = {byte: chr(code) for code, byte in _BYTE_OF_CHAR.items()}


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[ord(char)] for char in token])
    except KeyError:
        return token.encode()  # an added token with a character outside the byte alphabet


def _anchor(tokens: dict[str, int]) -> int:
    """An ordinary token to stand before others: the shortest that is a lower-case letter or so."""
    return tokens[min(tokens, key=lambda token: (not token.islower(), len(token), token))]


def _anchored_pieces(
    backend: Tokenizer, tokens: dict[str, int], vocab_size: int
) -> list[bytes] | None:
    """What each id adds after an ordinary token, from the tokenizer's own decode."""
    anchor = _anchor(tokens)
    before = backend.decode([anchor], skip_special_tokens=False)
    pieces = []
    for text in backend.decode_batch(
        [[anchor, i] for i in range(vocab_size)], skip_special_tokens=False
    ):
        if not text.startswith(before):
            return None
        pieces.append(text[len(before) :].encode())
    return pieces


def _tabulate(pieces: list[bytes], is_byte: NDArray[np.bool_], *, by_bytes: bool) -> Pieces:
    starts = row_offsets([len(piece) for piece in pieces])
    blob = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    width = np.zeros(len(pieces), dtype=np.int64)
    kind = np.full(len(pieces), NO_TEXT, dtype=np.uint8)
    whole = np.ones(len(pieces), dtype=bool)
    for i, piece in enumerate(pieces):
        if piece:
            try:
                text = piece.decode()
            except UnicodeDecodeError:
                whole[i] = False
            else:
                width[i] = WHOLE_CHAR * len(text)
                kind[i] = BLANK if text.isspace() else TEXT
    return Pieces(blob, starts, width, kind, whole, is_byte, by_bytes)


def with_pieces(table: Pieces, named: dict[int, bytes], *, padded: bool = False) -> Pieces:
    """The table in which these ids write something else, and one beyond the last writes nothing."""
    blob, bounds = table.blob.tobytes(), table.starts.tolist()
    pieces = [blob[i:j] for i, j in pairwise(bounds)] + [b""] * padded
    is_byte = np.append(table.is_byte, np.zeros(int(padded), dtype=bool))
    for i, piece in named.items():
        pieces[i], is_byte[i] = piece, False
    return _tabulate(pieces, is_byte, by_bytes=table.by_bytes)


def gather(pieces: Pieces, ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes that the ids write, concatenated, and the number of bytes of each."""
    first, last = pieces.starts[ids], pieces.starts[ids + 1]
    n_bytes = last - first
    out = row_offsets(n_bytes)
    # Where each byte comes from, by steps of 1 and a jump at each token: cheaper than repeating.
    jumps = first.copy()
    jumps[1:] -= last[:-1]
    source = np.ones(int(out[-1]) + 1, dtype=np.int64)
    source[0] = 0
    np.add.at(source, out[:-1], jumps)
    np.cumsum(source, out=source)
    return pieces.blob[source[:-1]], n_bytes


def _explains(pieces: Pieces, backend: Tokenizer) -> bool:
    """Does the table write random sequences as the tokenizer's own decode does?

    Half of them are rich in ids that hold parts of characters.
    """
    vocab_size = len(pieces.kind)
    rng = np.random.default_rng(0)
    partial = np.flatnonzero(~pieces.whole | pieces.is_byte)
    rows = [rng.integers(0, vocab_size, size=48) for _ in range(64)]
    if partial.size:
        rows += [rng.choice(partial, size=24) for _ in range(32)]
        rows += [np.where(rng.random(48) < 0.5, row, rng.choice(partial, 48)) for row in rows[:32]]
    before = []  # some decoders treat a first token differently: WordPiece writes no space
    if not pieces.by_bytes:
        before = [_anchor(backend.get_vocab(with_added_tokens=True))]
    own = backend.decode_batch([before + row.tolist() for row in rows], skip_special_tokens=True)
    prefix = backend.decode(before)
    return all(text == prefix + _text(pieces, row) for row, text in zip(rows, own, strict=True))


def _text(pieces: Pieces, ids: NDArray[np.int64]) -> str:
    raw, n_bytes = gather(pieces, ids)
    return decode_bytes(raw, n_bytes, pieces.is_byte[ids], final=True)[0]


def require_fast(tokenizer: Any) -> None:
    """Raise `TokenizerError` for anything that is not a fast tokenizer of transformers."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TokenizerError(
            f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')!r} is not a fast "
            "tokenizer; expected one backed by the tokenizers library (`tokenizer.is_fast`). Load "
            "it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it once to a "
            "tokenizer.json"
        )
