"""The arithmetic of docs/scaling.md: by hand, counted by torch, and as the page shows it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS, SIZES, build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))


def test_by_hand(script: dict[str, Any]) -> None:
    # Body: 2 layers x 4 x (2 x 4 + 2 x 2 + 3 x 6) = 240 weights; head 4 x 10 = 40.
    shape = script["Shape"](2, 4, 6, 4, 2, 10)
    assert (shape.body, shape.head, shape.cache_bytes) == (240, 40, 16)
    step = script["Step"](prompts=3, group=2, prompt=5, response=4)
    # 3 x 5 prompt tokens and 6 x 4 of responses: 2 x 240 x 39 + 2 x 40 x 24.
    assert script["products"](shape, step) == 18_720 + 1_920
    # Each token sees itself and those before: a prompt 1 + ... + 5 = 15 positions, a response
    # 6 + 7 + 8 + 9 = 30; 4 x 4 operations each in 2 layers: 32 x (3 x 15 + 6 x 30).
    assert script["scoring"](shape, step) == 20_640 + 7_200
    # With a prompt for each rollout: 480 x 54 + 1,920 + 32 x 6 x 45 = 36,480; five passes.
    assert script["updating"](shape, step) == 5 * 36_480
    # One of two layers sees 3 positions at most: 16 x 3 x (1 + 2 + 3 + 3 + 3) for prompts.
    windowed = script["Shape"](2, 4, 6, 4, 2, 10, window=3, full_every=2)
    assert script["scoring"](windowed, step) == 20_640 + 3_600 + 16 * (3 * 12 + 6 * 4 * 3)


def test_torch_counts_the_same(script: dict[str, Any]) -> None:
    shape = script["Shape"](3, 32, 48, 32, 16, SIZES["vocab_size"])
    step = script["Step"](prompts=2, group=4, prompt=40, response=24)
    # A prompt's last token is read with each rollout, and a response's last one not at all.
    assert script["_counted"](build(CONFIGS["gemma3"]), shape, step) == pytest.approx(1, rel=0.02)


def test_the_page_shows_what_the_script_prints(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling.py"])
    script["main"]()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) > 5
    assert "\n".join(table) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
