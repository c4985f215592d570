"""The tasks as something to train on, see `benchmarks.grpo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.grpo import Ids
from benchmarks.miniature import evaluate, models
from benchmarks.miniature.sampling import sample
from benchmarks.miniature.tasks import HALVES, MAX_NEW, Example, stream


class Tasks:
    """Questions in the order of a seed.

    Args:
        tokenizer: the generator's.
        test: held-out questions to measure on.
        seed: of the questions that are asked.
        half: of the tasks, see `tasks.HALVES`.
    """

    def __init__(
        self, tokenizer: Any, test: Sequence[Example], seed: int, half: str = "short"
    ) -> None:
        self._tokenizer, self._test, self._max_new = tokenizer, test, MAX_NEW[half]
        self._examples = stream(10_000 + seed, HALVES[half])

    def ask(self, n: int) -> list[str]:
        return [next(self._examples).prompt for _ in range(n)]

    def encode(self, prompts: Sequence[str]) -> Ids:
        return self._tokenizer(prompts, add_special_tokens=False)["input_ids"]

    def sample(self, policy: Any, prompt_ids: Ids, draws: torch.Generator) -> Ids:
        return sample(policy, prompt_ids, draws, self._max_new)

    def logprobs(self, policy: Any, prompt_ids: Ids, response_ids: Ids) -> list[torch.Tensor]:
        both = list(zip(prompt_ids, response_ids, strict=True))
        ids_BT, target_BT = models.collate([(p + r, len(p)) for p, r in both])
        device = policy.device
        logp_BT = -models.token_losses(policy, ids_BT.to(device), target_BT.to(device))
        # Row b's response begins where its prompt ends.
        return [logp_BT[b, len(p) - 1 : len(p) - 1 + len(r)] for b, (p, r) in enumerate(both)]

    def measure(self, policy: Any) -> dict[str, Any]:
        return evaluate.measure(policy, self._tokenizer, self._test)
