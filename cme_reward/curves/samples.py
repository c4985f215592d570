"""A few responses of a run, kept as it trains, and read again for its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cme_reward.batch import CMEBatch
from cme_reward.conversation.messages import Prompt, as_text
from cme_reward.heatmap.render import ResponseView, TokenView

FILE = "cme-samples.jsonl"
PER_DOUBLING = 16
PROMPTS, STEPS = 24, 8
"""Most prompts on a page, and most steps of each."""


def is_due(step: int) -> bool:
    """Whether samples of a step are kept: every step below 32, then 16 in each doubling.

    A run of 20,000 steps keeps 180 of them, close together where a policy changes most.
    """
    return step % max(1, 1 << max(0, step.bit_length() - PER_DOUBLING.bit_length())) == 0


def keep(folder: Path, step: int, prompts: Sequence[Prompt], response_ids: Sequence[Sequence[int]],
         batch: CMEBatch, scorer: Any, n: int) -> None:  # fmt: skip
    """Append the first response to each of `n` prompts to the file in `folder`.

    The prompts are those with the lowest hashes: of the same ones, as in every evaluation and
    every epoch of a small file, the same are taken, so that a report sets their responses beside
    each other.

    Args:
        folder: the run's.
        step: updates before these responses were sampled.
        prompts: B of them.
        response_ids: B lists of sampled ids.
        batch: their rewards.
        scorer: gave them; its `table` has the tokens' texts.
        n: how many prompts.
    """
    first: dict[str, int] = {}
    for b, prompt in enumerate(prompts):
        first.setdefault(json.dumps(prompt, sort_keys=True, default=str), b)
    chosen = sorted(first, key=lambda key: hashlib.sha256(key.encode()).digest())[:n]
    lines = []
    for b in (first[key] for key in chosen):
        size = len(response_ids[b])
        lines.append({
            "step": step,
            "prompt": prompts[b],
            "tokens": scorer.table.tokens(response_ids[b]),
            "token_logprobs": batch.token_logprobs[b, :size].tolist(),
            "mask": batch.mask[b, :size].tolist(),
            "sequence_reward": float(batch.sequence_rewards[b]),
            "dropped_nats": float(batch.dropped_nats[b]),
        })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("ab") as stream:
        stream.write("".join(json.dumps(line, default=str) + "\n" for line in lines).encode())


@dataclass(frozen=True)
class Sample:
    """One response, and how many updates came before it."""

    step: int
    view: ResponseView


def read(run: Path) -> list[Sample]:
    """The samples beside a run's log, in order of steps; none where none were kept.

    What was sampled again after a run went on from a checkpoint replaces what was there. A line
    that a kill has cut off is left out.
    """
    folder = run if run.is_dir() else run.parent
    if folder.name.startswith("checkpoint-"):
        folder = folder.parent
    found: dict[tuple[int, str], Sample] = {}
    if (folder / FILE).is_file():
        for sample in _of_lines((folder / FILE).read_bytes().splitlines()):
            found[sample.step, sample.view.prompt] = sample
    return sorted(found.values(), key=lambda sample: sample.step)


def _of_lines(lines: list[bytes]) -> Iterator[Sample]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        tokens = TokenView(row["tokens"], row["token_logprobs"], row["mask"])
        view = ResponseView(
            prompt=as_text(row["prompt"]),
            label=f"step {row['step']:,}",
            sequence_reward=row["sequence_reward"],
            generator=tokens,
            dropped_nats=row["dropped_nats"],
        )
        yield Sample(row["step"], view)


def shown(samples: Sequence[Sample]) -> list[ResponseView]:
    """Those that a page has room for: prompts that come back first, each over its steps; of many
    prompts and steps some, evenly, the first and the last among them."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.view.prompt, []).append(sample)
    again = [group for group in by_prompt.values() if len(group) > 1]
    once = [group for group in by_prompt.values() if len(group) == 1]
    groups = [*_evenly(again, PROMPTS), *_evenly(once, max(0, PROMPTS - len(again)))]
    return [sample.view for group in groups for sample in _evenly(group, STEPS)]


def _evenly(items: list[Any], n: int) -> list[Any]:
    if len(items) <= n:
        return items
    return [items[k] for k in np.linspace(0, len(items) - 1, n).round().astype(int)]
