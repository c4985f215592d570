"""Format and length: how a response looks, whatever it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from cme_reward.comparators.base import Call, Comparator, Float64, Values
from cme_reward.config import CMEConfig
from cme_reward.errors import ConfigError

BOXED = r"\\boxed\{.+\}"


class FormatLength(Comparator):
    """A right format and a middling length, no answer known (arXiv 2505.19439).

        r(y) = 1 + f(x) with the format, min(0, f(x)) without,    x = T / longest
        f(x) = 1 - (1 - x / best)^2                     for x <= best
               1 - 2 ((x - best) / (1 - best))^2        beyond

    without unit; T counts sampled tokens, the EOS included. f rises from 0 to 1 at `best` and falls
    to -1 at `longest`, and further beyond it. An empty response has 0. From the authors' published
    code, where half of the format's 1 is for thoughts in tags, and an answer has to parse as
    mathematics.

    Args:
        generator_tokenizer: the sampler's fast tokenizer.
        config: see `Comparator`.
        format: a regular expression found anywhere in a response of the right format (without
            special tokens; `.` also stands for a line's end), or a function of the text that tells.
        longest: tokens of the longest response that training allows.
        best: share of it that is the best length, between 0 and 1.

    Raises:
        ConfigError: for a regular expression that is none, `longest` below 1, or `best` outside
            0 to 1.
    """

    name = "format-length"

    def __init__(
        self,
        generator_tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        format: str | Callable[[str], bool] = BOXED,
        longest: int = 3072,
        best: float = 0.5,
        per_token: bool = False,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        super().__init__(
            generator_tokenizer, config, per_token=per_token, eos_token_ids=eos_token_ids
        )
        if longest < 1:
            raise ConfigError(f"{longest=}: expected the longest response in tokens, 1 or more")
        if not 0 < best < 1:
            raise ConfigError(f"{best=}: expected a share of the longest length, between 0 and 1")
        self.longest, self.best = longest, best
        self.has_format = format if callable(format) else _finder(format)

    def values(self, call: Call) -> Values:
        texts = self.table.decode_batch(call.sampled_ids).texts
        right_B = np.array([bool(self.has_format(text)) for text in texts], dtype=bool)
        of_length_B = self.of_length(call.counts / self.longest)
        rewards_B = np.where(right_B, 1 + of_length_B, np.minimum(0, of_length_B))
        share = float(right_B.mean()) if len(texts) else 0.0
        return Values(rewards_B, None, {"right_format": share})

    def of_length(self, x: Float64) -> Float64:
        """f, of lengths as shares of the longest."""
        short = 1 - (1 - x / self.best) ** 2
        long = 1 - 2 * ((x - self.best) / (1 - self.best)) ** 2
        return np.where(x <= self.best, short, long)


def _finder(pattern: str) -> Callable[[str], bool]:
    try:
        found = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"format={pattern!r} is no regular expression: {error}; expected one, or a function of "
            "a response's text"
        ) from error
    return lambda text: found.search(text) is not None
