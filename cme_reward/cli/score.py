"""Rows of a file -> their rewards, as a line of output or as a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cme_reward.cli.jsonl import Bad, Good, whole_file
from cme_reward.conversation.messages import as_text
from cme_reward.errors import InputError

if TYPE_CHECKING:
    from cme_reward.heatmap.render import ResponseView
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.spans.table import SpanTable


T = TypeVar("T")
Row = TypeVar("Row", bound=Good)


@dataclass
class Scored:
    """A row and its rewards: one list entry per generator token."""

    row: Good
    tokens: list[str]
    token_rewards: list[float]
    token_logprobs: list[float]
    mask: list[bool]
    sequence_reward: float
    dropped_nats: float
    verifier_tokens: tuple[Any, Any]
    """The verifier's ids and log-probs, as arrays."""


def score_rows(
    scorer: CrossModelEntropy,
    rows: Sequence[Good],
    counts: Counter[str],
    eos_id: int | None = None,
) -> Iterator[Scored | Bad]:
    """Score rows in one call; where that fails, in halves, until the row to blame stands alone.

    Args:
        scorer: the reward.
        rows: what to score.
        counts: `truncated`, the responses that do not fit the verifier's context, is added to.
        eos_id: put after responses given as text. None: nothing is.
    """
    return in_halves(rows, lambda part: _score(scorer, part, counts, eos_id))


def in_halves(
    rows: Sequence[Row], work: Callable[[Sequence[Row]], Sequence[T]]
) -> Iterator[T | Bad]:
    """What `work` makes of rows, one for each; where it fails, the row to blame is Bad."""
    try:
        yield from work(rows) if rows else ()
    except Exception as error:  # whatever a template, a tokenizer or a model raises for one row
        if len(rows) == 1:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            yield Bad(rows[0].line, f"{kind}{error}")
        else:
            half = len(rows) // 2
            yield from in_halves(rows[:half], work)
            yield from in_halves(rows[half:], work)


def row_ids(table: SpanTable, rows: Sequence[Good], eos_id: int | None) -> list[list[int]]:
    """The generator's ids of rows; `eos_id`, where there is one, behind those given as texts."""
    texts = [row.response for row in rows if row.response is not None]
    encoded = iter(table.encode_batch(texts).ids)
    ending = [] if eos_id is None else [eos_id]
    return [
        next(encoded).tolist() + ending if row.response_ids is None else row.response_ids
        for row in rows
    ]


def _score(
    scorer: CrossModelEntropy, rows: Sequence[Good], counts: Counter[str], eos_id: int | None
) -> list[Scored]:
    ids = row_ids(scorer.table, rows, eos_id)
    batch = scorer(
        [row.prompt for row in rows],
        ids,
        [row.response_mask for row in rows],
        [row.policy_logprobs for row in rows] if scorer.config.baseline == "policy" else None,
    )
    counts["truncated"] += int(batch.metrics["truncated"])
    return [
        Scored(
            row=row,
            tokens=scorer.table.tokens(i),
            token_rewards=batch.token_rewards[b, : len(i)].tolist(),
            token_logprobs=batch.token_logprobs[b, : len(i)].tolist(),
            mask=batch.mask[b, : len(i)].tolist(),
            sequence_reward=float(batch.sequence_rewards[b]),
            dropped_nats=float(batch.dropped_nats[b]),
            verifier_tokens=batch.verifier_tokens[b],
        )
        for b, (row, i) in enumerate(zip(rows, ids, strict=True))
    ]


def dump(scored: Scored) -> bytes:
    """A line of output: the fields of the input, with the rewards after or in place of them."""
    fields = {
        **scored.row.fields,
        "sequence_reward": rounded(scored.sequence_reward),
        "token_rewards": [rounded(reward) for reward in scored.token_rewards],
        "mask": scored.mask,
        "tokens": scored.tokens,
        "dropped_nats": rounded(scored.dropped_nats),
    }
    return as_line(fields)


def as_line(fields: dict[str, Any]) -> bytes:
    """A row as a line of JSON; text as text."""
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in a field that is only passed on
        return json.dumps(fields, allow_nan=False).encode() + b"\n"


def rounded(value: float) -> float:
    """To six decimals, about what float32 holds; never a negative zero."""
    return round(value, 6) + 0.0


def as_view(scored: Scored, scorer: CrossModelEntropy) -> ResponseView:
    from cme_reward.heatmap.render import ResponseView, TokenView

    name = scored.row.fields.get("id")
    ids, logprobs = scored.verifier_tokens
    texts = scorer.members[0].table.tokens(ids)
    return ResponseView(
        prompt=as_text(scored.row.prompt),
        label=str(name) if isinstance(name, str | int) else f"line {scored.row.line}",
        sequence_reward=scored.sequence_reward,
        generator=TokenView(scored.tokens, scored.token_logprobs, scored.mask),
        verifier=TokenView(texts, logprobs.tolist(), [True] * len(texts)),
        dropped_nats=scored.dropped_nats,
    )


def write_html(
    path: Path, views: list[ResponseView], file: str, verifier: str, generator: str | None
) -> None:
    from cme_reward.heatmap.render import render_html

    page = render_html(
        views,
        title=f"Cross-model entropy of {'standard input' if file == '-' else Path(file).name}",
        verifier_name=verifier,
        generator_name=generator or f"{verifier} (tokenizer)",
    )
    with whole_file(path) as stream:
        stream.write(page.encode())


def summary(counts: Counter[str], reward_sum: float, seconds: float) -> str:
    """What a run came to, in a line."""
    scored, tokens = counts["scored"], counts["tokens"]
    parts = [f"{scored:,} scored, {counts['bad']:,} bad{' (left out)' * (counts['bad'] > 0)}"]
    if scored:
        parts.append(f"mean sequence reward {reward_sum / scored:.3f} nats")
    if tokens:
        parts.append(f"{counts['rewarded'] / tokens:.1%} of {tokens:,} tokens have a reward")
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
    if counts["truncated"]:
        parts.append(f"{counts['truncated']:,} cut off at the verifier's context length")
    return "; ".join(parts)
