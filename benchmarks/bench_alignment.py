"""The alignment kernel against the ways people align tokens, correctness beside every time.

All inputs stand ready in the form that each way likes best: right ends for ours, character offsets
for offset mapping, token texts for `spacy-alignments`. Nothing here encodes or decodes, unless its
name says so. All of it runs on one core.
"""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import spacy_alignments

from cme_reward import SpanTable, align_batch
from cme_reward.spans.table import UNFINISHED

PAIRS = ["llama -> qwen", "qwen -> gemma"]
ALL = [*PAIRS, *(f"{pair}, unicode" for pair in PAIRS)]
NAIVE_RESPONSES = 24  # the double loop is quadratic in a response's length


def naive_double_loop(logp_S: Sequence[float], ends_S: list[int], ends_T: list[int]) -> list[float]:
    """The definition: every verifier token against every generator token."""
    aligned = []
    for start_t, end_t in pairwise([0, *ends_T]):
        total = 0.0
        for logp, (start_s, end_s) in zip(logp_S, pairwise([0, *ends_S]), strict=True):
            overlap = min(end_t, end_s) - max(start_t, start_s)
            if overlap > 0:
                total += logp * overlap / (end_s - start_s)
        aligned.append(total)
    return aligned


Spans = list[tuple[int, int]]


def offset_mapping(logp_S: Sequence[float], spans_S: Spans, spans_T: Spans) -> list[float]:
    """The usual recipe: two pointers over the character offsets of both tokenizers."""
    aligned = [0.0] * len(spans_T)
    first = 0
    for logp, (start_s, end_s) in zip(logp_S, spans_S, strict=True):
        while first < len(spans_T) and spans_T[first][1] <= start_s:
            first += 1
        t = first
        while t < len(spans_T) and spans_T[t][0] < end_s:
            overlap = min(end_s, spans_T[t][1]) - max(start_s, spans_T[t][0])
            if overlap > 0:
                aligned[t] += logp * overlap / (end_s - start_s)
            t += 1
    return aligned


def spacy_average(logp_S: Sequence[float], tokens_S: list[str], tokens_T: list[str]) -> list[float]:
    """Each verifier token's log-prob, in equal parts, to the tokens that a diff aligns it with."""
    aligned = [0.0] * len(tokens_T)
    _, partners = spacy_alignments.get_alignments(tokens_T, tokens_S)
    for logp, ts in zip(logp_S, partners, strict=True):
        for t in ts:
            aligned[t] += logp / len(ts)
    return aligned


@cache
def widths_by_id(table: SpanTable) -> tuple[np.ndarray, np.ndarray]:
    """Of each id, decoded alone: its width in twelfths, and whether it is whole characters."""
    alone = table.decode_batch([[i] for i in range(table.vocab_size)])
    widths = np.array([row[-1] for row in alone.ends])
    unfinished = np.array([row[-1] == UNFINISHED for row in alone.kinds])
    return widths, ~unfinished & np.array(["\ufffd" not in text for text in alone.texts])


def ends_of_lists(table: SpanTable, rows: list[list[int]]) -> list[np.ndarray]:
    """Right ends as cheap as they can be: copied ids, widths looked up, no text where none is
    needed. The package has no such way; it is the floor under `decode_batch`."""
    numbers = array("I")
    for row in rows:
        numbers.fromlist(row)
    ids = np.frombuffer(numbers, dtype=np.uint32)
    widths, whole = widths_by_id(table)
    total = np.cumsum(widths[ids])
    stops = np.cumsum([len(row) for row in rows])
    ends = [total[i:j] - (total[i - 1] if i else 0) for i, j in pairwise([0, *stops.tolist()])]
    at = np.flatnonzero(~whole[ids])  # parts of characters: look at bytes
    partial = np.unique(np.searchsorted(stops, at, side="right")).tolist()
    for b, row in zip(partial, table.decode_batch([rows[b] for b in partial]).ends, strict=True):
        ends[b] = row
    return ends


def aligned_ends(corpus: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return (
        corpus.verifier.encode_batch(corpus.texts).ends,
        corpus.generator.decode_batch(corpus.generator_ids).ends,
    )


def error(aligned: Sequence[Any], exact: Sequence[np.ndarray], logp: Sequence[np.ndarray]) -> str:
    """How wrong a way is: log-likelihood it loses or counts twice, and the mean slip per token."""
    drift = sum(abs(np.sum(a) - lp.sum()) for a, lp in zip(aligned, logp, strict=True))
    slips = np.abs(np.concatenate([np.subtract(a, e) for a, e in zip(aligned, exact, strict=True)]))
    total = -sum(lp.sum() for lp in logp)
    return f"{drift / total:.2%} of nats, {slips.mean():.3f} nats/token off"


def rate(tokens: int, seconds: float) -> str:
    per_second = tokens / seconds
    amount = f"{per_second / 1e6:.1f} M" if per_second >= 1e5 else f"{per_second / 1e3:.1f} k"
    return f"{seconds * 1e3:.2f} ms ({amount} tokens/s)"


def assert_exact(
    aligned: Sequence[np.ndarray], ends_S: Any, ends_T: Any, logp: Sequence[np.ndarray]
) -> None:
    """Every response keeps its log-likelihood, and some are compared with the definition."""
    for row, lp in zip(aligned, logp, strict=True):
        assert abs(row.sum() - lp.sum()) <= 1e-9 * max(1, abs(lp.sum()))
    for b in range(0, len(aligned), max(1, len(aligned) // 6)):
        naive = naive_double_loop(logp[b].tolist(), ends_S[b].tolist(), ends_T[b].tolist())
        np.testing.assert_allclose(aligned[b], naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_kernel_on_arrays(
    name: str, corpora: dict[str, Any], paired: Any, ratio_table: Any
) -> None:
    """`align_batch` of int64 ends and float64 log-probs; the double loop on its first responses."""
    corpus = corpora[name]
    ends_S, ends_T = aligned_ends(corpus)
    logp = corpus.verifier_logprobs
    assert_exact(align_batch(logp, ends_S, ends_T), ends_S, ends_T, logp)

    n = min(NAIVE_RESPONSES, len(logp))
    few = [[row.tolist() for row in rows[:n]] for rows in (logp, ends_S, ends_T)]
    few_tokens = sum(map(len, few[2]))
    timing = paired(
        lambda: align_batch(logp, ends_S, ends_T),
        lambda: [naive_double_loop(*rows) for rows in zip(*few, strict=True)],
        rounds=5,
    )
    if timing:
        naive = timing.baseline * corpus.n_tokens / few_tokens
        ratio_table(
            "kernel",
            f"{name}: arrays -> aligned, {corpus.n_tokens:,} tokens",
            rate(corpus.n_tokens, timing.ours),
            f"double loop: {rate(corpus.n_tokens, naive)}, from {n} responses",
            f"1 / {naive / timing.ours:,.0f}",
        )


@pytest.mark.parametrize("way", ["look-ups", "texts"])
@pytest.mark.parametrize("name", PAIRS)
def test_kernel_on_id_lists(
    name: str, way: str, corpora: dict[str, Any], paired: Any, ratio_table: Any
) -> None:
    """Python id lists of both sides -> ends through both tables -> aligned.

    "look-ups" takes ends alone; "texts" is `decode_batch`, which also makes the texts. Left out
    are rows that the verifier's normaliser changed: their ids write another text.
    """
    corpus = corpora[name]
    encoded, ends_T = corpus.verifier.encode_batch(corpus.texts), aligned_ends(corpus)[1]
    ids_S = [row.tolist() for row in encoded.ids]
    same = corpus.verifier.decode_batch(ids_S)
    kept = [b for b, text in enumerate(corpus.texts) if same.texts[b] == text]
    lists_S, lists_T = [ids_S[b] for b in kept], [corpus.generator_ids[b] for b in kept]
    logp = [corpus.verifier_logprobs[b] for b in kept]
    n_tokens = sum(map(len, lists_T))

    def ends(table: SpanTable, rows: list[list[int]]) -> list[np.ndarray]:
        return ends_of_lists(table, rows) if way == "look-ups" else table.decode_batch(rows).ends

    def ours() -> list[np.ndarray]:
        return align_batch(logp, ends(corpus.verifier, lists_S), ends(corpus.generator, lists_T))

    kept_S, kept_T = [encoded.ends[b] for b in kept], [ends_T[b] for b in kept]
    for made, expected in zip(ends(corpus.generator, lists_T), kept_T, strict=True):
        np.testing.assert_array_equal(made, expected)
    assert_exact(ours(), kept_S, kept_T, logp)
    timing = paired(ours, lambda: align_batch(logp, kept_S, kept_T), rounds=15)
    if timing:
        ratio_table(
            "kernel",
            f"{name}: id lists -> {way} -> aligned",
            rate(n_tokens, timing.ours),
            f"arrays -> aligned: {rate(n_tokens, timing.baseline)}",
            f"{timing.ratio:.2f}",
        )


@pytest.mark.parametrize("name", ALL)
def test_offset_mapping(name: str, corpora: dict[str, Any], paired: Any, ratio_table: Any) -> None:
    corpus = corpora[name]
    ends_S, ends_T = aligned_ends(corpus)
    logp, lists = corpus.verifier_logprobs, [row.tolist() for row in corpus.verifier_logprobs]
    ids_S, spans_S = _offsets(corpus.verifier, corpus.texts)
    ids_T, spans_T = _offsets(corpus.generator, corpus.texts)
    # It re-encodes the text; where that gives other ids than the ones scored, it has no answer.
    encoded = corpus.verifier.encode_batch(corpus.texts).ids
    kept = [
        b
        for b, row in enumerate(corpus.generator_ids)
        if ids_T[b] == row and ids_S[b] == encoded[b].tolist()
    ]

    def baseline() -> list[list[float]]:
        return [offset_mapping(lists[b], spans_S[b], spans_T[b]) for b in kept]

    exact = align_batch(logp, ends_S, ends_T)
    assert_exact(exact, ends_S, ends_T, logp)
    few = [[rows[b] for b in kept] for rows in (logp, ends_S, ends_T)]
    wrong = error(baseline(), [exact[b] for b in kept], few[0])
    timing = paired(lambda: align_batch(*few), baseline, rounds=5)
    if len(kept) < len(logp):
        wrong += f", no answer for {len(logp) - len(kept)} of {len(logp)}"
    _compare(ratio_table, "offset mapping", name, sum(map(len, few[2])), timing, wrong)


@pytest.mark.parametrize("name", ALL)
def test_spacy_alignments(
    name: str, corpora: dict[str, Any], paired: Any, ratio_table: Any
) -> None:
    corpus = corpora[name]
    ends_S, ends_T = aligned_ends(corpus)
    logp, lists = corpus.verifier_logprobs, [row.tolist() for row in corpus.verifier_logprobs]
    tokens_S = _token_texts(corpus.verifier, corpus.verifier.encode_batch(corpus.texts).ids)
    tokens_T = _token_texts(corpus.generator, corpus.generator_ids)

    def baseline() -> list[list[float]]:
        return [spacy_average(*rows) for rows in zip(lists, tokens_S, tokens_T, strict=True)]

    exact = align_batch(logp, ends_S, ends_T)
    assert_exact(exact, ends_S, ends_T, logp)
    wrong = error(baseline(), exact, logp)
    timing = paired(lambda: align_batch(logp, ends_S, ends_T), baseline, rounds=3)
    _compare(ratio_table, "spacy-alignments", name, corpus.n_tokens, timing, wrong)


def _compare(
    ratio_table: Callable[..., None], way: str, name: str, tokens: int, timing: Any, wrong: str
) -> None:
    if timing:
        ratio_table(
            f"against {way}",
            name,
            f"{rate(tokens, timing.ours)}, exact",
            f"{rate(tokens, timing.baseline)}, {wrong}",
            f"1 / {1 / timing.ratio:,.0f}",
        )


def _offsets(table: SpanTable, texts: list[str]) -> tuple[list[list[int]], list[Spans]]:
    encoded = table.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _token_texts(table: SpanTable, rows: Sequence[Any]) -> list[list[str]]:
    return [table.tokenizer.batch_decode([[int(i)] for i in row]) for row in rows]


def _made_up(
    n_rows: int, length: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Log-probs, verifier ends and generator ends of texts of 48 units for every token."""
    rng = np.random.default_rng(length * 1000 + n_rows)

    def ends() -> np.ndarray:
        cuts = rng.choice(48 * length - 1, size=length - 1, replace=False) + 1
        return np.append(np.sort(cuts), 48 * length)

    logp = list(-rng.exponential(size=(n_rows, length)))
    return logp, [ends() for _ in range(n_rows)], [ends() for _ in range(n_rows)]


def test_no_dense_matrix(benchmark: Any, ratio_table: Any) -> None:
    """Peak memory of one response of 32,768 tokens on both sides is a few times its inputs."""
    length = 32_768
    inputs = _made_up(1, length)
    benchmark.pedantic(align_batch, args=inputs, rounds=3)
    tracemalloc.start()
    align_batch(*inputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    given = sum(rows[0].nbytes for rows in inputs)
    assert peak <= 8 * given
    dense = 8 * length * length
    benchmark.extra_info |= {"peak_bytes": peak, "input_bytes": given}
    ratio_table(
        "kernel, peak memory",
        f"{length:,} x {length:,} tokens",
        f"{peak / 1e6:.1f} MB ({peak / given:.1f} x the inputs)",
        f"dense float64 [T, S], by its size: {dense / 1e6:,.0f} MB",
        f"1 / {dense / peak:,.0f}",
    )


@pytest.mark.parametrize(
    ("what", "sizes"),
    [
        ("length, one response", [256 * 2**k for k in range(8)]),
        ("batch, 320 tokens each", [2**k for k in range(10)]),
    ],
)
def test_growth(what: str, sizes: list[int], growth: Any, ratio_table: Any) -> None:
    """Linear in tokens: an exponent near 1."""

    def prepare(size: int) -> Callable[[], Any]:
        inputs = _made_up(1, size) if "one response" in what else _made_up(size, 320)
        for row, logp in zip(align_batch(*inputs), inputs[0], strict=True):
            assert abs(row.sum() - logp.sum()) <= 1e-9 * abs(logp.sum())
        return lambda: align_batch(*inputs)

    exponent, seconds = growth(prepare, sizes, rounds=25)
    if len(seconds) == len(sizes):
        ratio_table(
            "kernel, growth",
            f"{what}: {sizes[0]} -> {sizes[-1]:,}",
            f"{seconds[0] * 1e3:.3f} -> {seconds[-1] * 1e3:.3f} ms",
            f"linear: x {sizes[-1] / sizes[0]:,.0f}",
            f"x {seconds[-1] / seconds[0]:,.1f}, exponent {exponent:.2f}",
        )
