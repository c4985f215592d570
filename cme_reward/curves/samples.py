"""A few responses of a run, kept as it trains, and read again for its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from os import SEEK_END
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


@dataclass(frozen=True)
class Kept:
    """A response, as a line of the file has it."""

    prompt: Prompt
    tokens: list[str]
    token_logprobs: list[float]
    """The verifier's, aligned, in nats; one for each token."""
    mask: list[bool]
    """True where a token has a reward."""
    sequence_reward: float
    dropped_nats: float


def of_batch(prompt: Prompt, ids: Sequence[int], batch: CMEBatch, b: int, table: Any) -> Kept:
    """The response `b` of a batch, whose sampled ids have their texts in `table`."""
    return Kept(
        prompt,
        table.tokens(ids),
        batch.token_logprobs[b, : len(ids)].tolist(),
        batch.mask[b, : len(ids)].tolist(),
        float(batch.sequence_rewards[b]),
        float(batch.dropped_nats[b]),
    )


class Picked:
    """One response to each of `n` prompts, of responses that come one at a time.

    The prompts are those with the lowest hashes: of the same ones, as in every evaluation and
    every epoch of a small file, the same are taken, so that a report sets their responses beside
    each other.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._best: dict[bytes, tuple[Any, Any]] = {}

    def offer(self, prompt: Prompt, order: Any, response: Any) -> None:
        """Of the responses to a prompt, that of the lowest `order` is picked."""
        text = json.dumps(prompt, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).digest()
        if key not in self._best or order < self._best[key][0]:
            self._best[key] = order, response
        if len(self._best) > self.n:
            del self._best[max(self._best)]

    def take(self) -> list[Any]:
        """The responses picked since the last call."""
        best, self._best = self._best, {}
        return [best[key][1] for key in sorted(best)]


def keep(file: Path, step: int, responses: Sequence[Kept]) -> None:
    """Append responses to a file, which is made where there is none, folders included.

    Args:
        file: `FILE` in the folder of a run, or what `beside` says.
        step: updates before these responses were sampled.
        responses: of one process alone, so that no lines mix.
    """
    lines = [json.dumps({"step": step, **asdict(kept)}, default=str) + "\n" for kept in responses]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        if stream.seek(0, SEEK_END):
            stream.seek(-1, SEEK_END)
            if stream.read() != b"\n":  # a kill cut the last line off
                lines.insert(0, "\n")
        stream.write("".join(lines).encode())


def beside(log: Path) -> Path:
    """The samples of a run whose log is a file among those of other runs."""
    return log.with_name(f"{log.stem}.{FILE}")


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
    found: dict[tuple[int, str], Sample] = {}
    for file in sorted(set(_files(run))):
        for sample in _of_lines(file.read_bytes().splitlines()):
            found[sample.step, sample.view.prompt] = sample
    return sorted(found.values(), key=lambda sample: sample.step)


def _files(run: Path) -> Iterator[Path]:
    """As `read_run` looks for logs: a file's own, a folder's, those beside TensorBoard's events."""
    if run.is_file() and beside(run).is_file():
        yield beside(run)
        return
    folder = run if run.is_dir() else run.parent
    if folder.name.startswith("checkpoint-"):
        folder = folder.parent
    if (folder / FILE).is_file():
        yield folder / FILE
    if run.is_dir():
        yield from folder.glob(f"*.{FILE}")
        places = {events.parent / FILE for events in folder.rglob("*tfevents*")}
        yield from (file for file in places if file.is_file())


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
