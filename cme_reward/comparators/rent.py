"""RENT: the generator's own confidence, as low entropy."""

from __future__ import annotations

import numpy as np

from cme_reward.comparators.base import Call, Comparator, Values


class RENT(Comparator):
    """Negative mean token entropy of the generator (arXiv 2505.22660, "Maximizing Confidence
    Alone Improves Reasoning").

        r(y) = -1/T sum_t H(p_t),    H(p) = -sum_v p(v) log p(v)

    in nats, <= 0, over the sampled tokens; `p_t` is what token t was drawn from. An empty response
    counts as one token guessed uniformly, `-log V`, and not as certainty.
    """

    name = "rent"
    needs = ("entropies",)
    has_parts = True

    def values(self, call: Call) -> Values:
        token_N = -call.statistics["entropies"]
        counts = call.counts
        means_B = call.row_sums(token_N) / np.maximum(counts, 1)
        uniform = -np.log(self.table.vocab_size)
        return Values(np.where(counts > 0, means_B, uniform), token_N)
