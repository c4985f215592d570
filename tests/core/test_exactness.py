"""A few of the random conversations that `tests/support/exactness.py` checks a million of."""

from __future__ import annotations

import exactness
import pytest


@pytest.mark.parametrize("seed", range(12))
def test_random_conversations_are_scored_as_the_loops_do(seed: int) -> None:
    found = exactness.run(seed, 50)
    assert found["complaints"] == []
    assert found["counts"]["cases"] == 50
    assert found["counts"]["tokens"] > 500


def test_the_loops_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward a billionth off, text that nobody sampled: the check would tell."""
    from cme_reward import scoring

    assert exactness.off(-1.5 - 3e-7, -1.5)
    assert not exactness.off(float(exactness.np.float32(-1 / 3)), -1 / 3)
    place = scoring._place

    def one_off(*args: object) -> object:
        aligned, covered, shares = place(*args)  # type: ignore[arg-type]
        for row in aligned:
            row[:1] += 1e-6
        return aligned, covered, shares

    monkeypatch.setattr(scoring, "_place", one_off)
    assert "wanted" in str(exactness.run(1, 50)["complaints"])
