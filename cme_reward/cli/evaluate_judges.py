"""The judges that a command names, with each one's model, key and price."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cme_reward.errors import ConfigError
from cme_reward.evaluation.http_judge import HttpJudge
from cme_reward.evaluation.judge import Judge, PythonJudge

KEY = "OPENAI_API_KEY"
T = TypeVar("T")


def load_judges(
    specs: Sequence[str],
    models: Sequence[str],
    keys: Sequence[str],
    *,
    timeout: float,
    retries: int,
    concurrency: int,
    logprobs: bool = False,
) -> list[Judge]:
    """The judges of `--judge`.

    Args:
        specs: `http://host/v1` or `python:module:function`, each once.
        models: of those behind HTTP: one for all, or one for each.
        keys: environment variables with their keys, likewise; by default KEY, which may be unset.
        timeout: seconds for one attempt.
        retries: further attempts.
        concurrency: most questions at a time.
        logprobs: whether to ask for them; of judges behind HTTP alone.

    Raises:
        ConfigError: for anything else.
    """
    behind = [spec for spec in specs if spec.startswith(("http://", "https://"))]
    if behind and not models:
        raise ConfigError(
            f"--judge {behind[0]} needs --judge-model NAME, as the server calls its model"
        )
    if (logprobs and len(behind) < len(specs)) or (logprobs and not specs):
        raise ConfigError("--judge-logprobs needs each --judge behind HTTP: nobody else is asked")
    models = _each(models, len(behind), "--judge-model")
    for name in keys:
        if not os.environ.get(name):
            raise ConfigError(f"--api-key-env {name}: the environment has no such variable")
    named = iter(zip(models, _each(keys or [KEY], len(behind), "--api-key-env"), strict=True))
    judges: list[Judge] = []
    for spec in specs:
        if spec.startswith("python:"):
            judges.append(PythonJudge.load(spec))
        elif spec in behind:
            model, key = next(named)
            judges.append(
                HttpJudge(
                    spec,
                    model,
                    os.environ.get(key, "").strip(),
                    timeout=timeout,
                    retries=retries,
                    connections=concurrency,
                    logprobs=logprobs,
                )
            )
        else:
            raise ConfigError(
                f"--judge {spec!r} is no judge; expected http://host/v1 or python:module:function"
            )
    if len({judge.name for judge in judges}) < len(judges):
        raise ConfigError("two judges are the same; name each --judge once")
    return judges


@dataclass(frozen=True)
class Prices:
    """USD per million tokens of each judge, in and out."""

    of: Mapping[str, tuple[float, float]]

    @staticmethod
    def read(judges: Sequence[Judge], into: Sequence[float], out: Sequence[float]) -> Prices:
        """From `--price-in` and `--price-out`: one for all judges, or one for each."""
        n = len(judges)
        ins = _each(into or [0.0], n, "--price-in")
        outs = _each(out or [0.0], n, "--price-out")
        pairs = zip(ins, outs, strict=True)
        known = bool(into or out)
        return Prices(dict(zip((one.name for one in judges), pairs, strict=True)) if known else {})

    def cost(self, judgment: Mapping[str, Any]) -> float:
        """USD of a judgment; 0 where the tokens are not known."""
        prices = self.of.get(judgment["judge"], (0.0, 0.0))
        return sum(p * n for p, n in zip(prices, judgment.get("tokens", (0, 0)), strict=True)) / 1e6


def _each(values: Sequence[T], n: int, option: str) -> list[T]:
    if len(values) not in (1, n) and n:
        raise ConfigError(f"{option} is given {len(values)} times; expected once, or {n} times")
    return list(values) * n if len(values) == 1 else list(values)
