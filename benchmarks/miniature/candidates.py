"""Rewards that might do better than plain cross-model entropy, tried before the package has them.

Each is made of what the package gives: a verifier whose log-probs are changed before alignment, or
a batch whose rewards or advantages are put together otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cme_reward import CMEBatch

Rows = Sequence[Sequence[int] | np.ndarray]


class Changed:
    """A verifier with other log-probs.

    Args:
        verifier: the one to ask.
        power: `(p^power - 1) / power` in place of `log p` (PowerOPD, arXiv 2606.17199): bounded by
            `-1 / power`, so that a few very surprising tokens do not own the group.
        contrast: this many times the log-prob without the prompt is subtracted, so that what is
            likely anywhere (fluent, repeated) earns less.
        astray: a control: a response is read as the answer to the next prompt of the batch.
        others: more verifiers of the same tokenizer.
        spread: of all verifiers, the mean minus this many standard deviations; None: `verifier`.
        minus: this many times the log-prob of the first of `others` is subtracted (G-OPD, arXiv
            2602.12125: what a stronger model knows and a weaker one does not).
    """

    def __init__(
        self,
        verifier: Any,
        power: float = 0.0,
        contrast: float = 0.0,
        astray: bool = False,
        others: Sequence[Any] = (),
        spread: float | None = None,
        minus: float = 0.0,
    ) -> None:
        self.name, self.tokenizer = verifier.name, verifier.tokenizer
        self.max_length, self.vocab_size = verifier.max_length, verifier.vocab_size
        self._verifier, self._power, self._contrast = verifier, power, contrast
        self._astray, self._others = astray, others
        self._spread, self._minus = spread, minus

    def logprobs(self, prompts: Rows, responses: Rows) -> list[np.ndarray]:
        if self._astray:
            prompts = next_prompts(prompts)
        found = self._verifier.logprobs(prompts, responses)
        others = [other.logprobs(prompts, responses) for other in self._others]
        if self._spread is not None:
            members = [np.stack(rows) for rows in zip(found, *others, strict=True)]
            found = [m.mean(axis=0) - self._spread * m.std(axis=0) for m in members]
        elif self._minus:
            found = [a - self._minus * b for a, b in zip(found, others[0], strict=True)]
        if self._power:
            found = [bounded_power(row, self._power) for row in found]
        if self._contrast:
            alone = self._verifier.logprobs([row[:1] for row in prompts], responses)
            found = [a - self._contrast * b for a, b in zip(found, alone, strict=True)]
        return found


@dataclass(frozen=True)
class Candidate:
    """What is changed; nothing, as it stands."""

    power: float = 0.0
    contrast: float = 0.0
    worst: float = 0.0
    """Temperature in nats of a soft minimum over a response's verifier tokens, which takes the
    place of their mean (sequence level). 0: the mean."""
    blend: float = 0.0
    """Share of the sequence level's advantage in that of the token level."""
    gate: bool = False
    """Token advantages count where their sign is that of the response's (SG-OPD, 2606.09304)."""
    centre: bool = False
    """The mean reward of all tokens of the prompt's rollouts is subtracted from each, so that a
    return does not depend on length (the differential return of average-reward learning)."""
    astray: bool = False
    """A control: what a verifier gives that is asked about another prompt."""
    spread: float | None = None
    """Three verifiers alike but for their seeds: their mean minus this many deviations."""
    minus: float = 0.0
    """This many times a weaker verifier's log-prob is subtracted."""
    early: float = 0.0
    """Advantages count more, up to 1 and this, the less of the response's rewards lies before
    them: in nats, without sign (IW-OPD, arXiv 2606.22600)."""
    kept: float = 1.0
    """Share of the prompts that are learnt from: those whose responses' rewards differ most (RLPR,
    arXiv 2506.18254; DRO, 2506.13351)."""
    shorter: float = 0.0
    """The sequence reward as a probability, divided by 1 and this many times the length in units of
    the group's mean (after GR3, arXiv 2603.10535)."""

    def verifier(self, verifier: Any, others: Sequence[Any] = ()) -> Any:
        """The verifier, changed; `others` are the ensemble's, or the weaker one."""
        if not (self.power or self.contrast or self.astray or others):
            return verifier
        return Changed(
            verifier, self.power, self.contrast, self.astray, others, self.spread, self.minus
        )

    def advantages(self, batch: CMEBatch, groups: Sequence[int]) -> torch.Tensor:
        if self.worst:
            batch = replace(batch, sequence_rewards=self._softly_worst(batch))
        if self.centre:
            batch = replace(batch, token_rewards=centred(batch, groups))
        if self.shorter:
            batch = replace(batch, sequence_rewards=shortened(batch, groups, self.shorter))
        own_BT = batch.advantages(groups)
        if self.early:
            own_BT = own_BT * earliness(batch.token_rewards, self.early)
        if self.kept < 1:
            own_BT = own_BT * most_different(batch.sequence_rewards, groups, self.kept)[:, None]
        if not (self.blend or self.gate):
            return own_BT
        whole = replace(batch, config=replace(batch.config, level="sequence", credit="token"))
        whole_BT = replace(whole, mask=batch.sampled).advantages(groups)
        if self.gate:
            return torch.where(own_BT.sign() == whole_BT.sign(), own_BT, 0)
        return (1 - self.blend) * own_BT + self.blend * whole_BT

    def _softly_worst(self, batch: CMEBatch) -> torch.Tensor:
        """`[B]` in nats; a response of which nothing was scored keeps its reward."""
        rows = zip(batch.verifier_tokens, batch.sequence_rewards.tolist(), strict=True)
        return torch.tensor(
            [soft_minimum(logp, self.worst) if len(logp) else own for (_, logp), own in rows]
        )


def next_prompts(prompts: Rows) -> Rows:
    """For every prompt the next other one of the batch, the first for the last."""
    keys = [tuple(map(int, row)) for row in prompts]
    kinds = list(dict.fromkeys(keys))
    if len(kinds) < 2:
        raise ValueError(f"{len(kinds)} different prompts in a batch; expected two at least")
    after = dict(zip(kinds, [*kinds[1:], kinds[0]], strict=True))
    return [after[key] for key in keys]


def centred(batch: CMEBatch, groups: Sequence[int]) -> torch.Tensor:
    """Token rewards `[B, T]` in nats less their mean over the group's tokens; 0 where masked."""
    group_B = torch.tensor(groups)
    sums_G = torch.zeros(int(group_B.max()) + 1, 2, dtype=torch.float64)
    own_B2 = torch.stack([batch.token_rewards.sum(1), batch.mask.sum(1)], dim=1)
    sums_G = sums_G.index_add(0, group_B, own_B2.double())
    mean_B1 = (sums_G[:, 0] / sums_G[:, 1].clamp(min=1))[group_B][:, None]
    return torch.where(batch.mask, batch.token_rewards - mean_B1, 0).to(batch.token_rewards.dtype)


def earliness(rewards_BT: torch.Tensor, more: float) -> torch.Tensor:
    """`1 + more * (1 - sum of |r| up to the token / sum of |r|)`, `[B, T]`; nowhere rewarded: 1."""
    size_BT = rewards_BT.abs()
    whole_B1 = size_BT.sum(1, keepdim=True)
    gone_BT = torch.where(whole_B1 > 0, size_BT.cumsum(1) / whole_B1, 1)
    return 1 + more * (1 - gone_BT)


def most_different(rewards_B: torch.Tensor, groups: Sequence[int], share: float) -> torch.Tensor:
    """`[B]` bool: in the groups, so many of them, whose rewards have the largest deviations."""
    group_B = torch.tensor(groups)
    spread_G = torch.stack([rewards_B[group_B == g].std() for g in group_B.unique()])
    best = spread_G.argsort(descending=True)[: max(1, round(share * len(spread_G)))]
    return torch.isin(group_B, group_B.unique()[best])


def shortened(batch: CMEBatch, groups: Sequence[int], more: float) -> torch.Tensor:
    """`exp(reward) / (1 + more * length / the group's mean length)`, `[B]`."""
    group_B, length_B = torch.tensor(groups), batch.sampled.sum(1).float()
    mean_B = torch.stack([length_B[group_B == g].mean() for g in groups])
    return batch.sequence_rewards.exp() / (1 + more * length_B / mean_B.clamp(min=1))


def bounded_power(logp: np.ndarray, power: float) -> np.ndarray:
    """`(p^power - 1) / power`, from log-probs."""
    return np.expm1(power * logp) / power


def soft_minimum(logp: np.ndarray, temperature: float) -> float:
    """`-T log mean_s exp(-logp_s / T)`, in nats: the worst for T near 0, the mean for a large T."""
    rows = torch.from_numpy(-logp / temperature)
    return temperature * float(np.log(len(logp)) - torch.logsumexp(rows, 0))
