"""Two tokenizers of different kinds, the same in every run.

The generator's is a byte-level BPE that cuts words apart, as GPT-2's; the verifier's is a
SentencePiece BPE with byte fallback, as Llama-2's and Gemma's. Merges are learnt here, because the
library's own trainers break ties differently in every run.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from itertools import islice, pairwise

from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from benchmarks.miniature.tasks import LETTERS, stream

PRINTABLE = "".join(map(chr, range(32, 127)))


@cache
def generator_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of words; letters and digits mostly one by one."""
    split = pre.ByteLevel(add_prefix_space=False)
    words = Counter(word for text in _texts(1) for word, _ in split.pre_tokenize_str(text))
    merges = learn_merges(words, 90)
    alphabet = [split.pre_tokenize_str(c)[0][0] for c in PRINTABLE + "\n"]
    backend = Tokenizer(_bpe(["<pad>", "<eos>"], alphabet, merges))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, "miniature-generator")


@cache
def verifier_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback; many pairs of letters are tokens, digits stay alone."""
    pairs = random.Random(3).sample([a + b for a in LETTERS for b in LETTERS], 16)
    words = Counter(
        word for text in _texts(2) for word in re.split(r"[\d\s]+", text.replace(" ", " \u2581"))
    )
    words += Counter(dict.fromkeys(pairs, 400))
    merges = learn_merges(words, 170)
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    alphabet = list(PRINTABLE.replace(" ", "\u2581"))
    backend = Tokenizer(_bpe(["<pad>", "<eos>", "<unk>", *bytes_], alphabet, merges, fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(backend, "miniature-verifier")


def learn_merges(words: Counter[str], n: int) -> list[tuple[str, str]]:
    """The n merges of byte-pair encoding; of equally frequent pairs the first in the alphabet."""
    split = {word: tuple(word) for word in words}
    merges: list[tuple[str, str]] = []
    for _ in range(n):
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = {word: _merge(parts, best) for word, parts in split.items()}
    return merges


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def _texts(seed: int) -> list[str]:
    return [e.prompt + e.answer for e in islice(stream(seed), 2000)]


def _bpe(
    specials: list[str],
    alphabet: list[str],
    merges: list[tuple[str, str]],
    *,
    fallback: bool = False,
) -> models.BPE:
    tokens = dict.fromkeys([*specials, *alphabet, *(a + b for a, b in merges)])
    ids = {token: i for i, token in enumerate(tokens)}
    if fallback:
        return models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return models.BPE(ids, merges)


def _fast(backend: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.name_or_path = name
    return tokenizer
