"""What the reward server's endpoints do, apart from HTTP."""

from __future__ import annotations

import asyncio
import math
from typing import Any, NamedTuple

from cme_reward import __version__
from cme_reward._together import together
from cme_reward.batch import CMEBatch
from cme_reward.conversation.rendered import RenderedReader, messages_from_label
from cme_reward.errors import InputError
from cme_reward.metrics import names
from cme_reward.reward import CrossModelEntropy
from cme_reward.server.metrics import ServerMetrics
from cme_reward.server.models import RewardRequest, ScoreRequest

LOGGED = names("tokens", "mean", "sum")
"""Of each query, for OpenRLHF's log."""
_CHARACTERS = 10
"""As many take the time of a token to read."""


class _Query(NamedTuple):
    at: int
    query: str
    prompt: str
    label: Any


class Service:
    """What the endpoints do, apart from HTTP."""

    def __init__(self, scorer: CrossModelEntropy, level: str, metrics: ServerMetrics) -> None:
        self.level = level
        self.scorer = scorer
        self.scorer.warns = False  # each reply says it for itself
        self.reader = RenderedReader(scorer.generator_tokenizer)
        self.metrics = metrics

    def health(self) -> dict[str, Any]:
        return {
            "verifier": self.scorer.verifier.name,
            "generator": self.scorer.generator.name,
            "max_length": min(member.max_length for member in self.scorer.members),
            "version": __version__,
        }

    async def score(self, request: ScoreRequest) -> dict[str, Any]:
        n = request.check()
        ids = request.response_ids
        if ids is None:
            ids = await asyncio.to_thread(self._ids, request.responses or [], request.append_eos)
        batch = await self.scorer.score_async(
            request.conversations(n), ids, request.response_masks, request.policy_logprobs
        )
        self.metrics.scored(batch)
        level = request.level or self.level
        reply = {
            "level": level,
            "verifier": self.scorer.verifier.name,
            "sequence_rewards": batch.sequence_rewards.tolist(),
            "token_rewards": None,
            "masks": None,
            "tokens": None,
            "dropped_nats": batch.dropped_nats.tolist(),
            "truncated": int(batch.metrics["truncated"]),
            "metrics": batch.metrics,
        }
        if level == "token":
            reply["token_rewards"] = _rows(batch.token_rewards, ids)
            reply["masks"] = _rows(batch.mask, ids)
        if request.return_tokens:
            reply["tokens"] = [self.scorer.table.tokens(row) for row in ids]
        return reply

    async def get_reward(self, request: RewardRequest) -> dict[str, Any]:
        request.check()
        labels = request.labels or [None] * len(request.query)
        # One by one, for metrics of each; the verifier scores them together.
        batches = await _all(
            self._rollout(_Query(k, *row))
            for k, row in enumerate(zip(request.query, request.prompts, labels, strict=True))
        )
        rewards = [float(batch.sequence_rewards[0]) for batch in batches]
        return {
            "rewards": rewards,
            "scores": [math.exp(reward) for reward in rewards],
            "extra_logs": {
                f"cme_{name}": [batch.metrics[name] for batch in batches]
                for name in (LOGGED if batches else ())
            },
        }

    async def _rollout(self, query: _Query) -> CMEBatch:
        size = (len(query.query) + len(query.prompt)) // _CHARACTERS
        (messages, ids), _ = await together(self._rollouts, query, size)
        batch = await self.scorer.score_async([messages], [ids])
        self.metrics.scored(batch)
        return batch

    def _rollouts(self, queries: list[_Query]) -> list[tuple[Any, list[int]]]:
        """The prompt and the ids of each."""
        prompts, texts, at = [], [], 0
        try:
            for at, query, prompt, label in queries:  # noqa: B007 (where it failed)
                texts.append(self.reader.response(query, prompt))
                prompts.append(messages_from_label(label) or self.reader.prompt(prompt))
            return list(zip(prompts, self.reader.ids_batch(texts), strict=True))
        except InputError as error:  # of the only one, which then asks alone
            raise InputError(f"query {at}: {error}") from error

    def _ids(self, texts: list[str], append_eos: bool) -> list[list[int]]:
        ending = [self.scorer.generator.end_of_turn] if append_eos else []
        return [row.tolist() + ending for row in self.scorer.table.encode_batch(texts).ids]


async def _all(coroutines: Any) -> list[Any]:
    """All results, or the first error and none of the rest left running."""
    coroutines = list(coroutines)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _rows(padded: Any, ids: list[list[int]]) -> list[list[Any]]:
    return [row[: len(i)] for row, i in zip(padded.tolist(), ids, strict=True)]
