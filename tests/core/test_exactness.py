"""A few of the random conversations that `tests/support/exactness.py` checks a million of."""

from __future__ import annotations

from typing import Any

import exactness
import numpy as np
import pytest
from stubs import TableVerifier


@pytest.mark.parametrize("seed", range(12))
def test_random_conversations_are_scored_as_the_loops_do(seed: int) -> None:
    found = exactness.run(seed, 50)
    assert found["complaints"] == []
    assert found["counts"]["cases"] == 50
    assert found["counts"]["tokens"] > 500


def test_the_loops_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-prob a millionth off: the check would tell."""
    assert exactness.off(-1.5 - 3e-7, -1.5)
    assert not exactness.off(float(exactness.np.float32(-1 / 3)), -1 / 3)
    answer = TableVerifier.logprobs

    def one_off(*args: Any) -> list[np.ndarray]:
        return [row + np.float32(1e-6) for row in answer(*args)]

    monkeypatch.setattr(TableVerifier, "logprobs", one_off)
    assert "wanted" in str(exactness.run(1, 50)["complaints"])
