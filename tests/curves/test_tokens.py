"""The tokens that a run's samples were rewarded for most and least."""

from __future__ import annotations

import numpy as np
import pytest

from cme_reward.curves.page import render
from cme_reward.curves.read import Run, Series
from cme_reward.curves.samples import Sample
from cme_reward.curves.tokens import AROUND, LEAST, ROWS, extremes
from cme_reward.heatmap.render import ResponseView, TokenView


def sample(step: int, tokens: list[tuple[str, float]], mask: list[bool] | None = None) -> Sample:
    texts, nats = [text for text, _ in tokens], [value for _, value in tokens]
    view = TokenView(texts, nats, [True] * len(texts) if mask is None else mask)
    return Sample(step, ResponseView("p", f"step {step}", -1.0, view))


def test_by_hand() -> None:
    first = sample(0, [(" good", -0.1), (" bad", -6.0), (" good", -0.2), (" rare", -9.0)])
    again = sample(0, [(" bad", -4.0), (" good", -0.6), (" bad", -5.0), (" bad", -0.0)],
                   [True, True, True, False])  # fmt: skip
    between = sample(3, [("never", -1.0)] * 5)
    last = sample(7, [("\n", -2.0)] * 3)
    found = extremes([first, last, between, again])
    assert [(one.step, one.responses) for one in found] == [(0, 2), (7, 1)]
    # good: (0.1 + 0.2 + 0.6) / 3 = 0.3, nearest -0.2; bad: (6 + 4 + 5) / 3 = 5, without the masked;
    # rare came once.
    (good,), (bad,) = found[0].most, found[0].least
    assert (good.text, good.times, bad.text, bad.times) == (" good", 3, " bad", 3)
    assert good.nats == pytest.approx(-0.3)
    assert bad.nats == pytest.approx(-5.0)
    assert good.typical == (-0.2, " good bad", " rare")
    assert bad.typical == (-5.0, " bad good", " bad")
    assert [(t.text, t.nats) for t in found[1].most] == [("↵", -2.0)]
    assert found[1].least == []


def test_a_list_is_short_and_no_token_is_in_both() -> None:
    for n in range(2 * ROWS + 3):
        tokens = [(chr(97 + k), -float(k)) for k in range(n)] * LEAST
        (found,) = extremes([sample(1, tokens)])
        most, least = [t.text for t in found.most], [t.text for t in found.least]
        assert not set(most) & set(least)
        assert len(most) <= ROWS
        assert len(most) + len(least) == min(n, 2 * ROWS)
        assert all(len(t.typical.before) <= AROUND for t in found.most)
        if n > 1:
            assert (most[0], least[0]) == ("a", chr(96 + n))
    assert extremes([]) == []


def test_a_character_that_tokens_share_is_whole_where_it_ends() -> None:
    parts = [(half, -1.0) for half in ("\udcc3", "\udcb6")]
    (found,) = extremes([sample(1, parts * LEAST)])
    assert {t.text for t in [*found.most, *found.least]} == {"⟨C3⟩", "⟨B6⟩ö"}


def test_the_page_has_them_and_escapes_them() -> None:
    run = Run("run", {"cme/coverage": Series(np.ones(1), np.ones(1))})
    bold = sample(0, [("<b>", -0.5), ("x", -7.0)] * LEAST)
    page = render([run], [[bold, sample(5, [("y", -1.0)])]])
    assert "Tokens rewarded most and least" in page
    assert "<b></code>" not in page
    assert '<code dir="auto">&lt;b&gt;</code></td><td class="n">\N{MINUS SIGN}0.50</td>' in page
    assert "Step 5, 1 sample<" in page
    assert "No token came 3 times" in page
    both = render([run, run], [[bold], []])
    assert both.count("Tokens rewarded most and least") == 1
    assert "run: Tokens rewarded" in both
    assert "Tokens rewarded" not in render([run])
