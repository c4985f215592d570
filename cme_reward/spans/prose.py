"""Does a tokenizer give back plain English? What it may change of a text, and what it may not."""

from __future__ import annotations

import re
import unicodedata
from itertools import takewhile

from tokenizers import Tokenizer

from cme_reward.spans.pieces import CHAR_OF_BYTE, steps_of

PROSE = (
    "Lily had 12 red pens, and she gave 7 of them to Tom's sister.",
    "Why? Because (as he said) 3 + 4 = 7; unreasonableness is nothing.",
    "The first line ends here.\nThe second one has  two spaces.\n\n\tA tab, then 60% of 2.5.",
)
NOBODYS = "\U00012031"  # cuneiform: what a vocabulary without bytes writes for it is its [UNK]


def lost_prose(backend: Tokenizer) -> str | None:
    """What becomes of plain English, in words for an error; None if it comes back.

    A normaliser may change case and Unicode form, and make one space of several or of a line break
    (BERT, T5). Letters, digits and punctuation have to come back, words apart that were apart, and
    whole that were whole. A vocabulary of bytes can write every text: all that its normaliser
    leaves has to come back, white space included.

    What a small vocabulary does not have is left out: an [UNK] is no secret.

    Args:
        backend: takes text as the continuation of another, see `plain_backend`.
    """
    try:
        texts = _writable(backend)
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        read = backend.decode_batch([encoding.ids for encoding in encodings])
    except Exception as error:  # the library raises no narrower one
        return f"it cannot be encoded at all: {error}"
    steps = {*steps_of(backend.pre_tokenizer), *steps_of(backend.decoder)}
    of_bytes = bool(steps & {"ByteLevel", "ByteFallback"})
    as_t5 = steps >= {"WhitespaceSplit", "Metaspace"}
    for text, encoding, back in zip(texts, encodings, read, strict=True):
        kept = text
        if of_bytes and not as_t5:
            if backend.normalizer is not None:
                kept = backend.normalizer.normalize_str(text).replace("▁", " ")
            if _folded(back) != _folded(kept):
                return _change(kept, back)
        if not _keeps_words(text, back):
            return _change(text, back)
        if "<0x20>" in encoding.tokens and backend.token_to_id("▁") is not None:
            return "its spaces become the byte <0x20>, though the vocabulary writes them as ▁"
    return None


def _writable(backend: Tokenizer) -> list[str]:
    """`PROSE`, as far as the vocabulary has it; its single words for one that has no space."""
    unknown = set(backend.encode(NOBODYS, add_special_tokens=False).ids[-1:])

    def known(texts: list[str]) -> list[str]:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        return [text for text, e in zip(texts, encodings, strict=True) if not unknown & set(e.ids)]

    words = known(sorted({word for text in PROSE for word in text.split()}))
    words = [word for word in words if all(_has(backend, char) for char in word)]
    if not _has(backend, " "):
        return words
    texts = [
        "".join(_kept(backend, part, words) for part in re.findall(r"\s|\S+", text))
        for text in PROSE
    ]
    # A vocabulary of whole words may have none for white space, and nothing that splits there.
    return known(texts) if type(backend.model).__name__ == "WordLevel" else texts


def _kept(backend: Tokenizer, part: str, words: list[str]) -> str:
    if part.isspace():
        return part if _has(backend, part) else " "
    return part if part in words else ""


def _has(backend: Tokenizer, char: str) -> bool:
    """May words be made of it? Without a token, and without an [UNK], BPE drops it in silence."""
    if type(backend.model).__name__ not in ("BPE", "Unigram"):
        return True  # a vocabulary of words
    normalizer = backend.normalizer
    form = normalizer.normalize_str(char) if normalizer is not None else char
    byte = ord(char)
    tokens = (form or char, "▁" if char == " " else char, CHAR_OF_BYTE[byte], f"<0x{byte:02X}>")
    return any(backend.token_to_id(token) is not None for token in tokens)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _keeps_words(text: str, back: str) -> bool:
    """The same characters, apart where they were; a space more only at punctuation (BERT's)."""
    (chars, gaps), (chars_back, gaps_back) = _apart(text), _apart(back)
    return (
        chars == chars_back
        and gaps <= gaps_back
        and not any(chars[at - 1].isalnum() and chars[at].isalnum() for at in gaps_back - gaps)
    )


def _apart(text: str) -> tuple[str, set[int]]:
    """The characters that are no white space, and before which of them there is some."""
    words = _folded(text).split()
    at, gaps = 0, set()
    for word in words[:-1]:
        at += len(word)
        gaps.add(at)
    return "".join(words), gaps


def _change(text: str, back: str) -> str:
    """The two from where they first differ, and a little before it."""
    pairs = zip(text.lower(), back.lower(), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    first = text.rfind(" ", 0, max(same - 8, 0)) + 1
    return f"{text[first : first + 32]!r} becomes {back[first : first + 32]!r}"
