"""TTRL: agreement with the majority of the rollouts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme_reward._keys import prompt_key
from cme_reward.comparators.answers import final_answer
from cme_reward.comparators.base import Call, Comparator, Float64, Values
from cme_reward.config import CMEConfig


class TTRL(Comparator):
    """Majority vote over the rollouts of a prompt (TTRL, arXiv 2504.16084).

        r(y_i) = 1 if a_i = argmax_a #{j : a_j = a}, else 0,    a_j = answer(text of y_j)

    without unit. Responses to equal prompts are one group, so that all of them have to be in one
    call. Of answers with equally many votes, the one that comes first wins. A response without an
    answer (None) has no vote and reward 0.

    Args:
        generator_tokenizer: the sampler's fast tokenizer.
        config: see `Comparator`.
        answer: the answer in a response's text (without special tokens), anything hashable, or None
            where there is none. Default: `final_answer`.
    """

    name = "ttrl"
    compares_rollouts = True

    def __init__(
        self,
        generator_tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        answer: Callable[[str], Hashable] = final_answer,
        per_token: bool = False,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        super().__init__(
            generator_tokenizer, config, per_token=per_token, eos_token_ids=eos_token_ids
        )
        self.answer = answer

    def values(self, call: Call) -> Values:
        texts = self.table.decode_batch(call.sampled_ids).texts
        answers = [self.answer(text) for text in texts]
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for b, prompt in enumerate(call.prompts):
            groups[prompt_key(prompt)].append(b)
        rewards_B, shares = np.zeros(len(answers)), []
        for members in groups.values():
            mine = [answers[b] for b in members]
            votes = Counter(answer for answer in mine if answer is not None)
            winner, count = votes.most_common(1)[0] if votes else (None, 0)
            shares.append(count / len(members))
            agrees = np.array([answer is not None and answer == winner for answer in mine])
            rewards_B[members] = self.judged([texts[b] for b in members], mine, agrees)
        unanswered = sum(answer is None for answer in answers)
        metrics = {
            "majority_share": float(np.mean(shares)) if shares else 0.0,
            "answered": 1 - unanswered / len(answers) if answers else 0.0,
        }
        return Values(rewards_B, None, metrics)

    def judged(
        self, texts: Sequence[str], answers: Sequence[Hashable], agrees: NDArray[np.bool_]
    ) -> Float64:
        """Rewards of one prompt's rollouts, of which some agree with the most frequent answer."""
        return agrees.astype(np.float64)
