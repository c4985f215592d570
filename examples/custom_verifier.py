"""A verifier of one's own, and what a program does with the package: public names only.

`python examples/custom_verifier.py`; type-checked by `sh scripts/check`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cme_reward import (
    BatchingVerifier,
    CMEBatch,
    CMEConfig,
    CrossModelEntropy,
    Ensemble,
    Verifier,
    group_advantages,
)


class Unigram:
    """How usual a token is in a text, whatever stands before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        self.name = "unigram"
        self.tokenizer = tokenizer
        self.max_length = 100_000
        self.vocab_size = len(tokenizer)
        seen = tokenizer.encode(text, add_special_tokens=False)
        counts = 1 + np.bincount(seen, minlength=self.vocab_size)
        self._logprobs_V = np.log(counts / counts.sum()).astype(np.float32)

    def logprobs(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        responses: Sequence[Sequence[int] | np.ndarray],
    ) -> list[np.ndarray]:
        """Log-probs `[S]` of each response's ids, in nats."""
        return [self._logprobs_V[np.asarray(ids, dtype=np.int64)] for ids in responses]


def score(prompts: list[str], answers: list[str]) -> CMEBatch:
    folder = Path(__file__).parent / "generator"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    usual: Verifier = Unigram(tokenizer, "The answer is seven. She has seven apples.")
    shared = BatchingVerifier(usual)  # for many threads at a time
    config = CMEConfig(eos="mask")
    with CrossModelEntropy(Ensemble([shared, usual]), str(folder), config) as reward:
        return reward.score_texts(prompts, answers, ended=False)


def main() -> None:
    question = "Lily has 3 apples and buys 4 more. How many does she have?"
    batch = score([question] * 2, ["She has seven apples.", "Zebras xylophone quickly."])
    print(batch)
    print(batch.sequence_rewards.tolist())
    advantages = group_advantages(batch.token_rewards, batch.mask, [question] * 2)
    assert advantages.shape == batch.mask.shape
    assert advantages.equal(batch.to("cpu").advantages([question] * 2))


if __name__ == "__main__":
    main()
