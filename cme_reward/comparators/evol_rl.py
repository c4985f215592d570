"""Evol-RL: agreement with the majority, and difference from the other rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme_reward.comparators.answers import final_answer
from cme_reward.comparators.base import Float64
from cme_reward.comparators.ttrl import TTRL
from cme_reward.config import CMEConfig
from cme_reward.errors import InputError

Similarity = Callable[[Sequence[str]], Any]


def shared_trigrams(texts: Sequence[str]) -> Float64:
    """Cosine similarities `[B, B]`, from 0 to 1, of how often each three characters occur.

    A text of fewer than three characters counts as one piece.
    """
    counts = [Counter(t[k : k + 3] for k in range(max(1, len(t) - 2))) for t in texts]
    known = {piece: k for k, piece in enumerate(set().union(*counts))}
    rows = np.zeros((len(texts), len(known)))
    for row, count in zip(rows, counts, strict=True):
        for piece, n in count.items():
            row[known[piece]] = n
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


class EvolRL(TTRL):
    """Majority vote, and among equals what is unlike the others (Evol-RL, arXiv 2509.15194).

        n_i = 1 - (mean of s_ij over j of i's side + max of s_ij over all j) / 2
        r(y_i) = 1/2 + m_i / 2 on the majority's side,    -1 + m_i / 2 on the other,

    without unit; s is the similarity of two rollouts of a prompt, one side are those who gave the
    most frequent answer, the other the rest, and m is n brought to 0 .. 1 within a side: 1/2 where
    all of a side are alike, 1 for a side of one. A response without an answer has -1 and is
    compared with nobody. From the authors' published code; the entropy bonus and the asymmetric
    clipping that they train with are settings of the trainer.

    Args:
        generator_tokenizer: see `TTRL`.
        config: see `Comparator`.
        answer: see `TTRL`.
        similarity: from B texts to `[B, B]` numbers from 0 to 1. The authors compare embeddings of
            a language model; the default, `shared_trigrams`, needs none and sees the wording only.
    """

    name = "evol-rl"

    def __init__(
        self,
        generator_tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        answer: Callable[[str], Hashable] = final_answer,
        similarity: Similarity = shared_trigrams,
        per_token: bool = False,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        super().__init__(
            generator_tokenizer,
            config,
            answer=answer,
            per_token=per_token,
            eos_token_ids=eos_token_ids,
        )
        self.similarity = similarity

    def judged(
        self, texts: Sequence[str], answers: Sequence[Hashable], agrees: NDArray[np.bool_]
    ) -> Float64:
        rewards = np.full(len(texts), -1.0)
        answered = np.flatnonzero([answer is not None for answer in answers])
        if not len(answered):
            return rewards
        alike = self._alike([texts[b] for b in answered.tolist()])
        np.fill_diagonal(alike, np.nan)
        for side, low in ((agrees[answered], 0.5), (~agrees[answered], -1.0)):
            rewards[answered[side]] = low + 0.5 * _unlike(alike, side)
        return rewards

    def _alike(self, texts: Sequence[str]) -> Float64:
        alike = np.array(self.similarity(texts), dtype=np.float64)
        if alike.shape != (len(texts), len(texts)) or not np.isfinite(alike).all():
            raise InputError(
                f"similarity gave {alike.shape} numbers for {len(texts)} texts; expected "
                f"({len(texts)}, {len(texts)}) finite ones from 0 to 1"
            )
        return alike


def _unlike(alike: Float64, side: NDArray[np.bool_]) -> Float64:
    """Novelty of one side's members from 0 to 1; `alike` has NaN on its diagonal."""
    if side.sum() < 2:
        return np.ones(side.sum())
    unlike = 1 - (np.nanmean(alike[side][:, side], axis=1) + np.nanmax(alike[side], axis=1)) / 2
    low, high = unlike.min(), unlike.max()
    # Not by equality: sums of the same numbers in another order differ in the last bits.
    return (unlike - low) / (high - low) if high - low > 1e-9 else np.full(len(unlike), 0.5)
