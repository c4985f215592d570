"""INTUITOR: the generator's own confidence, as distance from a uniform guess."""

from __future__ import annotations

import numpy as np

from cme_reward.comparators.base import Call, Comparator, Values


class Intuitor(Comparator):
    """Self-certainty of the generator (INTUITOR, arXiv 2505.19590; measure of 2502.18581).

        r(y) = 1/T sum_t KL(U || p_t) = -1/(T V) sum_t sum_v log(V p_t(v))

    in nats, >= 0, over the sampled tokens; U is uniform over the V tokens that the model chooses
    between, `p_t` is what token t was drawn from. An empty response has 0, as a uniform guess has.
    """

    name = "intuitor"
    needs = ("self_certainties",)
    has_parts = True

    def values(self, call: Call) -> Values:
        token_N = call.statistics["self_certainties"]
        return Values(call.row_sums(token_N) / np.maximum(call.counts, 1), token_N)
