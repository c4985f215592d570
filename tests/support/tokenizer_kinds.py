"""Tokenizers of every kind: small ones trained here, and real ones where CME_SHARED has them."""

from __future__ import annotations

import gzip
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

SHARED = Path(os.environ["CME_SHARED"]).resolve() if os.environ.get("CME_SHARED") else None
if SHARED:
    os.environ["CME_SHARED"] = str(SHARED)  # for processes that are started in other folders

TEXTS = [
    "The unhappiness of one is the happiness of another, said Lily; then she laughed.",
    "def area(r):\n\treturn 3.14159 * r ** 2  # not exact\n\n\nprint(area(2))",
    "Ærlig talt: Größe, façade, naïve, Straße, œuvre. Zażółć gęślą jaźń!",
    "Все счастливые семьи похожи друг на друга.",
    "我喜歡在週末和朋友一起爬山。人人生而自由，在尊嚴和權利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "Mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm.",
    "ok 🤷🏽 and 👩‍👩‍👧‍👦, 🇩🇪; cafe\u0301 nai\u0308ve ẛ̣ (NFD)",
    "  leading, trailing and   inner   space  ",
    "",
    " ",
    "\r\n\t \n",
    "a literal <eos>, a <|im_end|>, a ▁ and a ## sign",
    "x = {'a': [1, 2, 3]}; y -> 12*7=84 <<12*7=84>>",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _fast(backend: Tokenizer, name: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)
    tokenizer.name_or_path = name
    return tokenizer


def _byte_level(name: str, size: int, normalizer: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return _fast(backend, name, eos_token="<|im_end|>", chat_template=CHATML)


def _sentencepiece(name: str, *, dummy_prefix: bool) -> PreTrainedTokenizerFast:
    to_space = normalizers.Replace(" ", "▁")
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), to_space]) if dummy_prefix else to_space
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps
    )
    # Without the rarer characters, which then fall back to bytes. Left to the trainer
    # (`limit_alphabet`), ties between them would fall differently in every run.
    texts = [text.replace(" ", "▁") for text in TEXTS[:7]]
    common = {char for char, _ in Counter("".join(texts)).most_common(90)}
    kept = ["".join(char for char in text if char in common) for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)],
        show_progress=False,
    )
    backend.train_from_iterator(kept * 4, trainer)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    state["added_tokens"] = [t for t in state["added_tokens"] if t["special"]]
    return _fast(Tokenizer.from_str(json.dumps(state)), name, bos_token="<s>", eos_token="</s>")


def _substrings(words: Iterable[str], n: int) -> Counter[str]:
    """All characters of the words and their n most frequent longer substrings, with counts.

    In place of these kinds' own trainers, which make another vocabulary in every run.
    """
    counts = Counter(
        word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)
    )
    longer = Counter({piece: count for piece, count in counts.items() if len(piece) > 1})
    single = Counter({piece: count for piece, count in counts.items() if len(piece) == 1})
    return Counter(single | dict(longer.most_common(n)))


def _unigram(name: str) -> PreTrainedTokenizerFast:
    words = unicodedata.normalize("NFKC", " ".join(TEXTS[:6])).split()
    counts = _substrings((f"▁{word}" for word in words), 300)
    scores = [(piece, math.log(n / counts.total())) for piece, n in counts.items()]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *scores], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return _fast(backend, name, unk_token="<unk>", eos_token="</s>")


def _wordpiece(name: str) -> PreTrainedTokenizerFast:
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre.BertPreTokenizer()
    text = normalizer.normalize_str(" ".join(TEXTS[:6]))
    pieces = _substrings((word for word, _ in pre_tokenizer.pre_tokenize_str(text)), 200)
    vocab = ["[UNK]", "[SEP]", *pieces, *(f"##{piece}" for piece in pieces)]
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return _fast(backend, name, unk_token="[UNK]", sep_token="[SEP]")


def _suffix(name: str) -> PreTrainedTokenizerFast:
    """BPE with an end-of-word suffix: its decoder drops the last space, so no byte table holds."""
    words = " ".join(TEXTS).split()
    pairs = Counter(word[i : i + 2] for word in words for i in range(len(word) - 1))
    common = [pair for pair, _ in pairs.most_common(100)]
    merges = [(a, b + end) for end in ("</w>", "") for a, b in common]
    characters = dict.fromkeys("".join(words))
    vocab = [
        "<unk>", *characters, *(f"{c}</w>" for c in characters),
        *(a + b for a, b in merges),
    ]  # fmt: skip
    model = models.BPE(
        {token: i for i, token in enumerate(vocab)},
        merges,
        end_of_word_suffix="</w>",
        unk_token="<unk>",
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.BPEDecoder("</w>")
    backend.add_special_tokens(["<unk>"])
    return _fast(backend, name, unk_token="<unk>")


BUILDERS: dict[str, Callable[[str], PreTrainedTokenizerFast]] = {
    "byte-level": lambda name: _byte_level(name, 400),
    "byte-level-nfc": lambda name: _byte_level(name, 600, normalizers.NFC()),
    "bytes": lambda name: _byte_level(name, 259),
    "sentencepiece": lambda name: _sentencepiece(name, dummy_prefix=False),
    "sentencepiece-dummy": lambda name: _sentencepiece(name, dummy_prefix=True),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "suffix": _suffix,
}
REAL = sorted(p.name for p in (SHARED / "tokenizers").iterdir() if p.is_dir()) if SHARED else []
QUICK = ("gpt2", "tok512")
"""Of the real ones, those that `-m "not slow"` has as well."""


def by_name(names: Iterable[str]) -> list[Any]:
    """Tokenizers as parameters of a test."""
    return [
        pytest.param(name, marks=pytest.mark.slow if name in REAL and name not in QUICK else ())
        for name in names
    ]


@cache
def load_tokenizer(name: str) -> Any:
    """A tokenizer trained here, or a real one by the name of its folder."""
    if name in BUILDERS:
        return BUILDERS[name](name)
    from transformers import AutoTokenizer  # 3 s, for those kept in CME_SHARED alone

    assert SHARED is not None
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


@cache
def shared_rows(name: str) -> list[dict[str, Any]]:
    """Rows of one of the shared text sets."""
    assert SHARED is not None
    with gzip.open(SHARED / "texts" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
