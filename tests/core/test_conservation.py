"""The promise on everything there is: all ordered pairs of tokenizers, all texts.

    |sum_t aligned - sum_s logp| <= 1e-9 * max(1, |sum_s logp|)    before masking

The real tokenizers and texts of CME_SHARED where there are any, those trained here otherwise.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tokenizer_kinds import BUILDERS, REAL, SHARED, TEXTS, by_name, load_tokenizer, shared_rows

from cme_reward import SpanTable, align_batch
from cme_reward.spans.table import Decoded, Encoded

NAMES = REAL or sorted(BUILDERS)
# Each is paired with all verifiers: minutes, with real texts.
GENERATORS = [pytest.param(name, marks=pytest.mark.slow if SHARED else ()) for name in NAMES]
SETS = ("alpacaeval", "code", "gsm8k", "mtbench", "strings", "tinylm", "udhr")


@cache
def all_texts() -> list[str]:
    if SHARED is None:
        return TEXTS
    texts = [row["response"] for name in SETS for row in shared_rows(f"dev_{name}")]
    assert len(texts) == 7444  # 7,414 and the 30 rollouts of tinylm
    return texts


@cache
def encoded_texts(name: str) -> Encoded:
    return SpanTable(load_tokenizer(name)).encode_batch(all_texts())


def encode(name: str, texts: list[str]) -> Encoded:
    """Encodings, of which most texts have one already."""
    known, table = encoded_texts(name), SpanTable(load_tokenizer(name))
    if len(texts) != len(all_texts()):
        return table.encode_batch(texts)
    new = [b for b, text in enumerate(texts) if text != all_texts()[b]]
    fresh = table.encode_batch([texts[b] for b in new])
    encoded = Encoded(*(list(part) for part in known))
    for b, *row in zip(new, *fresh, strict=True):
        encoded.ids[b], encoded.ends[b], encoded.holes[b] = row
    return encoded


def worst_losses(generator: str, responses: list[list[int]]) -> dict[str, float]:
    """By verifier, the largest relative error of the total over the responses."""
    decoded = SpanTable(load_tokenizer(generator)).decode_batch(responses)
    return {verifier: worst_loss(decoded, verifier) for verifier in NAMES}


def worst_loss(decoded: Decoded, verifier: str) -> float:
    """The same of one verifier, for random log-probs."""
    ids_S, ends_S, _ = encode(verifier, decoded.texts)
    rng = np.random.default_rng(0)
    logprobs = [-rng.exponential(scale=3, size=len(row)).astype(np.float32) for row in ids_S]
    aligned = align_batch(logprobs, ends_S, decoded.ends)
    totals = np.array([row.sum(dtype=np.float64) for row in logprobs])
    errors = np.array([row.sum() for row in aligned]) - totals
    assert all((row <= 1e-9).all() for row in aligned)
    return float((np.abs(errors) / np.maximum(1, np.abs(totals))).max())


@pytest.mark.parametrize("name", by_name(NAMES))
def test_every_text_is_tiled(name: str) -> None:
    """Tokens never go backwards nor past the end, and only dropped text is not theirs."""
    for text, ends, holes in zip(
        all_texts(), encoded_texts(name).ends, encoded_texts(name).holes, strict=True
    ):
        last = max(ends[-1:].sum(), holes[-1:, 1].sum())
        assert last == 12 * len(text)
        assert (np.diff(ends, prepend=0) > 0).all()


@pytest.mark.parametrize("generator", GENERATORS)
def test_all_texts(generator: str) -> None:
    responses = [row.tolist() for row in encoded_texts(generator).ids]
    losses = worst_losses(generator, responses)
    assert max(losses.values()) <= 1e-9, losses


@pytest.mark.parametrize("generator", GENERATORS)
def test_damaged_ids(generator: str) -> None:
    """Cut anywhere, other ids and special tokens put in, tokens taken out or split into bytes."""
    tokenizer = load_tokenizer(generator)
    table = SpanTable(tokenizer)
    vocabulary = tokenizer.get_vocab()
    pieces = [vocabulary.get(f"<0x{byte:02X}>", byte) for byte in range(256)]
    specials = list(tokenizer.all_special_ids) or [0]
    rng = np.random.default_rng(1)
    responses = []
    for ids in encoded_texts(generator).ids[:: max(1, len(all_texts()) // 200)]:
        row = ids[:400].tolist()
        for _ in range(4):
            at = int(rng.integers(0, len(row) + 1))
            action = rng.integers(0, 4)
            if action == 0:
                row = row[:at] or row
            elif action == 1:
                row[at:at] = rng.integers(0, table.vocab_size, 3).tolist()
            elif action == 2:
                row[at:at] = rng.choice(specials, 1).tolist()
            else:
                row[at : at + 2] = rng.choice(pieces, 3).tolist()
        responses.append([i for i in row if i < table.vocab_size])
    losses = worst_losses(generator, responses)
    assert max(losses.values()) <= 1e-9, losses
