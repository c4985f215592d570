"""EM-RL: entropy minimisation by reinforcement, in the paper's two estimates of entropy."""

from __future__ import annotations

import numpy as np

from cme_reward.comparators.base import Call, Comparator, Values


class EMRLToken(Comparator):
    """Negative token-level entropy of the generator (EM-RL-token, arXiv 2505.15134, Eq. 4).

        r(y) = -sum_t H(p_t),    H(p) = -sum_v p(v) log p(v)

    in nats, <= 0, over the sampled tokens; `p_t` is what token t was drawn from. A sum: longer
    responses pay more, unlike in RENT. An empty response counts as one token guessed uniformly,
    `-log V`. The paper subtracts the mean of the other rollouts (RLOO) and adds a KL penalty of
    0.001: `scale="none"` is the former up to the factor G / (G - 1), the latter is the framework's.
    """

    name = "em-rl-token"
    needs = ("entropies",)
    has_parts = True

    def values(self, call: Call) -> Values:
        token_N = -call.statistics["entropies"]
        uniform = -np.log(self.table.vocab_size)
        return Values(np.where(call.counts > 0, call.row_sums(token_N), uniform), token_N)


class EMRLSequence(Comparator):
    """The generator's own log-prob of the response (EM-RL-sequence, arXiv 2505.15134, Eq. 3).

        r(y) = log pi(y) = sum_t log p_t(y_t)

    in nats, <= 0, over the sampled tokens: the negative of one sample's estimate of the entropy
    over whole responses. All else as in EM-RL-token.
    """

    name = "em-rl-sequence"
    needs = ("logprobs",)
    has_parts = True

    def values(self, call: Call) -> Values:
        token_N = call.statistics["logprobs"]
        uniform = -np.log(self.table.vocab_size)
        return Values(np.where(call.counts > 0, call.row_sums(token_N), uniform), token_N)
