"""The reward's metrics on their way into veRL's loggers."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cme_reward.metrics import length_correlation, mean, names, spread

_noted: dict[str, float] = {}


class BusyClock:
    """Wall seconds in which at least one call was in progress: overlapping calls count once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._since = 0.0
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._lock:
            if not self._calls:
                self._since = time.perf_counter()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """The seconds since the last call of this, calls in progress included."""
        with self._lock:
            now = time.perf_counter()
            seconds, self._seconds = self._seconds, 0.0
            if self._calls:
                seconds += now - self._since
                self._since = now
            return seconds


class Tally:
    """Metrics of responses that were scored one at a time, since the last `take`."""

    MEANS = names("mean")
    SUMS = (*names("sum"), "alignment_seconds")  # the verifier's: see BusyClock

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._rewards: list[np.ndarray] = []

    def add(
        self, metrics: dict[str, float], rewards: np.ndarray, sequence: float, n_tokens: int
    ) -> None:
        """One response: its metrics, its scored tokens' rewards, its sequence reward, its size."""
        row = {key: metrics[key] for key in (*self.MEANS, *self.SUMS)}
        self._rows.append({**row, "sequence_reward": sequence, "tokens": float(n_tokens)})
        self._rewards.append(rewards)

    def take(self) -> dict[str, float]:
        """The metrics of `CrossModelEntropy` for all of them together; none, if there were none."""
        rows, self._rows = self._rows, []
        rewards, self._rewards = np.concatenate([np.zeros(0), *self._rewards]), []
        if not rows:
            return {}
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        sequence, tokens = columns["sequence_reward"], columns["tokens"]
        return {
            "token_reward_mean": mean(rewards),
            "token_reward_std": spread(rewards),
            "sequence_reward_mean": mean(sequence),
            **{key: float(columns[key].mean()) for key in self.MEANS},
            **{key: float(columns[key].sum()) for key in self.SUMS},
            "length_correlation": length_correlation(sequence, tokens),
            "responses": float(len(rows)),
        }


def note(**metrics: float) -> None:
    """Numbers of this process, for the next entry in the log."""
    _noted.update({f"cme/{name}": value for name, value in metrics.items()})


def log_along(
    tracking: Any,
    metrics: Callable[[], dict[str, float]],
    keep: Callable[[Any, int], None] | None = None,
) -> None:
    """Add `metrics()`, and what was noted, to everything that veRL's `Tracking` logs.

    veRL lets nothing but a validation's rewards add to its own metrics, and one entry per step is
    what its loggers expect; hence in front of `Tracking.log`, in the trainer's process alone.
    `keep` is called with the `Tracking` and the step of each entry.
    """
    original = getattr(tracking.log, "__wrapped__", tracking.log)

    @functools.wraps(original)
    def log(self: Any, data: dict[str, Any], step: int, backend: Any = None) -> Any:
        added = {**metrics(), **_noted}
        _noted.clear()
        if keep is not None:
            keep(self, step)
        return original(self, data={**data, **added}, step=step, backend=backend)

    tracking.log = log
