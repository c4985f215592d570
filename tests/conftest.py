"""Tokenizers of every kind: small ones trained here, and real ones where CME_SHARED has them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED = Path(os.environ["CME_SHARED"]).resolve() if os.environ.get("CME_SHARED") else None

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
    # Without the rarer scripts, whose characters then fall back to bytes.
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)],
        limit_alphabet=90,
        show_progress=False,
    )
    backend.train_from_iterator([t.replace(" ", "▁") for t in TEXTS[:7]] * 4, trainer)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    state["added_tokens"] = [t for t in state["added_tokens"] if t["special"]]
    return _fast(Tokenizer.from_str(json.dumps(state)), name, bos_token="<s>", eos_token="</s>")


def _unigram(name: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS[:6], trainer)
    return _fast(backend, name, unk_token="<unk>", eos_token="</s>")


def _wordpiece(name: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(TEXTS[:6], trainer)
    return _fast(backend, name, unk_token="[UNK]", sep_token="[SEP]")


def _suffix(name: str) -> PreTrainedTokenizerFast:
    """BPE with an end-of-word suffix: its decoder drops the last space, so no byte table holds."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.pre_tokenizer = pre.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
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


@cache
def load_tokenizer(name: str) -> Any:
    """A tokenizer trained here, or a real one by the name of its folder."""
    if name in BUILDERS:
        return BUILDERS[name](name)
    assert SHARED is not None
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


@cache
def shared_rows(name: str) -> list[dict[str, Any]]:
    """Rows of one of the shared text sets."""
    assert SHARED is not None
    with gzip.open(SHARED / "texts" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tokenizer" in metafunc.fixturenames:
        metafunc.parametrize("tokenizer", [*BUILDERS, *REAL], indirect=True)


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(request.param)


@pytest.fixture(scope="session")
def shared() -> Path | None:
    """The folder of real tokenizers, texts and models, if there is one."""
    return SHARED


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Awkward texts in many scripts."""
    return TEXTS
