"""`cme-reward report`: logs of every kind, signs of trouble, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cme_reward.cli.app import app
from cme_reward.curves.page import BINS, HEIGHT, WIDTH, binned, chart, render
from cme_reward.curves.read import Run, Series, read_run
from cme_reward.curves.signs import RULES, signs
from cme_reward.errors import InputError
from cme_reward.metrics import METRICS


def series(values: Any, start: int = 1) -> Series:
    values = np.asarray(values, dtype=float)
    return Series(np.arange(start, start + len(values), dtype=float), values)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"step": n, "cme/coverage": 1.0, "loss": n / 10, "note": "x"} for n in (1, 2, 3)]


def test_json_lines_flat_and_verls(tmp_path: Path) -> None:
    flat = read_run(write(tmp_path / "a.jsonl", ROWS))
    nested = [
        {"step": r["step"], "data": {k: r[k] for k in ("cme/coverage", "loss")}} for r in ROWS
    ]
    verls = read_run(write(tmp_path / "b.jsonl", nested))
    for run in (flat, verls):
        assert set(run.series) == {"cme/coverage", "loss"}
        assert run.series["loss"].steps.tolist() == [1, 2, 3]
        assert run.series["loss"].values.tolist() == [0.1, 0.2, 0.3]
    without = read_run(write(tmp_path / "c.jsonl", [{"loss": 1}, {"loss": 2}, {"loss": None}]))
    assert without.series["loss"].steps.tolist() == [1, 2]


def test_a_resumed_step_has_its_last_value(tmp_path: Path) -> None:
    rows = [*ROWS, {"step": 2, "loss": 9.0}, {"step": 3, "loss": float("nan")}]
    assert read_run(write(tmp_path / "a.jsonl", rows)).series["loss"].values.tolist() == [
        0.1, 9.0, 0.3,
    ]  # fmt: skip


def test_the_last_checkpoint_is_the_one_that_went_furthest(tmp_path: Path) -> None:
    """Not the one that was copied last."""
    for at in (10, 40, 9, 0):
        state = {"log_history": [{"step": n, "loss": 1.0} for n in range(1, at + 1)]}
        (tmp_path / f"checkpoint-{at}").mkdir()
        (tmp_path / f"checkpoint-{at}" / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(tmp_path).series["loss"].steps[-1] == 40


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file nor a folder"):
        read_run(tmp_path / "no")
    with pytest.raises(InputError, match=r"0 \.jsonl files"):
        read_run(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"step": 1}\n{"step"')
    with pytest.raises(InputError, match=r"line 2, is not JSON"):
        read_run(tmp_path)
    write(tmp_path / "x.jsonl", [{"step": 1, "note": "x"}])
    with pytest.raises(InputError, match="holds no metric"):
        read_run(tmp_path)
    write(tmp_path / "x.jsonl", [[1]])
    with pytest.raises(InputError, match="line 1, is no object"):
        read_run(tmp_path)
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    with pytest.raises(InputError, match=r"tensorboard|holds no metric"):
        read_run(tmp_path)
    for text, says in (("{}", "no log_history"), ("[1]", "no log_history"), ("{", "is not JSON")):
        (tmp_path / "some.json").write_text(text)
        with pytest.raises(InputError, match=says):
            read_run(tmp_path / "some.json")


@pytest.mark.slow
def test_a_real_run_of_trl(tmp_path: Path) -> None:
    import trl_tiny as tiny

    made = tiny.trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    tiny.train(made)
    run = read_run(tmp_path)
    steps = [entry["step"] for entry in made.state.log_history if "cme/coverage" in entry]
    assert run.series["cme/coverage"].steps.tolist() == steps
    assert {f"cme/{name}" for name in METRICS} <= set(run.series)
    found = {chart(name, [run]).says != "" for name in run.series if name.startswith("cme/")}
    assert True in found
    for pattern in ("completions/mean_length", "completions/clipped_ratio", "entropy"):
        assert any(re.search(rule, pattern) for rule, _ in RULES)
        assert pattern in run.series


HEALTHY = {
    "completions/mean_length": [100, 110, 95, 120],
    "completions/clipped_ratio": [1.0, 0.8, 0.5, 0.4],
    "cme/repetition": [0.02, 0.03, 0.04, 0.03],
    "cme/whitespace": [0.12, 0.15, 0.2, 0.21],
    "entropy": [2.0, 1.8, 1.6, 1.4],
    "cme/token_reward_std": [3, 2.5, 2, 2],
    "cme/credited": [0.9, 0.8, 0.9, 0.8],
    "cme/token_reward_mean": [-1.5, -0.8, 0.3, 0.4],
    "cme/coverage": [1.0, 0.995, 1.0, 1.0],
    "cme/truncated": [0, 0, 0, 0],
    "cme/length_correlation": [0.5, -0.6, 0.7, -0.8],
    "cme/thinking_unclosed": [0.5, 0.4, 0.5, 0.55],
}
ILL = {
    "completions/mean_length": ([100, 60, 20, 10], "from 100 to 10 tokens"),
    "response_length/mean": ([10, 12, 15, 16], "from 10 to 16 tokens"),
    "completions/clipped_ratio": ([0.9, 1.0, 1.0, 1.0], "100% of the responses were cut off"),
    "response_length/clip_ratio": ([0.1, 0.2, 0.5, 0.6], "60% of the responses were cut off"),
    "cme/repetition": ([0.02, 0.1, 0.2, 0.3], "from 2.0% to 30.0%"),
    "cme/whitespace": ([0.1, 0.2, 0.5, 0.8], "from 10% to 80%"),
    "actor/entropy": ([2.0, 1.0, 0.6, 0.5], "from 2 to 0.5 nats"),
    "cme/token_reward_std": ([3, 1, 0.5, 0.1], "nothing is learnt"),
    "cme/credited": ([0.9, 0.5, 0.1, 0.05], "nothing is learnt"),
    "cme/token_reward_mean": ([4.0, 6.0, 6.2, 9.0], "median is 6.1 nats"),
    "cme/coverage": ([1.0, 0.5, 1.0, 1.0], "fell to 0.500"),
    "cme/truncated": ([0, 3, 1, 0], "In 2 of 4 steps"),
    "cme/length_correlation": ([0.1, -0.5, -0.9, -0.95], "ends at -0.95"),
    "cme/thinking_unclosed": ([0.1, 0.1, 0.2, 0.4], "from 10% to 40%"),
}


def test_signs_of_trouble_one_by_one() -> None:
    assert signs(Run("well", {name: series(v) for name, v in HEALTHY.items()})) == []
    for name, (values, says) in ILL.items():
        (sign,) = signs(Run("ill", {name: series(values)}))
        assert sign.metric == name
        assert says in sign.says, sign
        assert signs(Run("well", {f"val-{name}": series(values)})) == []


def test_one_bad_step_is_no_drift() -> None:
    """Medians of the first and last tenth."""
    values = np.full(100, 50.0)
    values[[0, 99]] = 500
    assert signs(Run("r", {"completions/mean_length": series(values)})) == []


@pytest.mark.parametrize("n", [1, 20, 20_000])
def test_any_number_of_steps_fits(n: int) -> None:
    values = np.random.default_rng(0).normal(size=n).cumsum()
    steps, mean, low, high = binned(series(values))
    assert len(steps) == min(n, BINS)
    assert low.min() == values.min()
    assert high.max() == values.max()
    assert mean.mean() == pytest.approx(values.mean(), abs=0.05 * max(np.ptp(values), 1))
    run = Run("run", {"cme/coverage": series(values), "entropy": series(np.ones(n))})
    page = render([run])
    assert len(page) < 100_000
    drawn = chart("cme/coverage", [run]).lines[0]
    assert drawn is not None
    assert (drawn.band != "") == (n > BINS)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", drawn.mean + " " + drawn.band):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT


def test_two_runs_share_their_axes() -> None:
    first = Run("<b>one</b>", {"cme/coverage": series([0, 1]), "only/mine": series([1])})
    second = Run("two", {"cme/coverage": series([2, 4], start=3)})
    both = chart("cme/coverage", [first, second])
    assert (both.low, both.high, both.to) == (0, 4, 4)
    assert chart("only/mine", [first, second]).lines[1] is None
    page = render([first, second])
    assert "<b>one</b>" not in page
    assert "&lt;b&gt;one&lt;/b&gt;" in page
    assert page.count('<polyline class="r1"') == 1
    assert METRICS["coverage"].meaning in page


def test_the_command(tmp_path: Path) -> None:
    well = write(tmp_path / "well.jsonl", ROWS)
    ill = write(tmp_path / "ill.jsonl", [{**row, "cme/coverage": 0.5} for row in ROWS])
    page = tmp_path / "page.html"
    run = CliRunner().invoke(app, ["report", str(well), "--html", str(page)])
    assert run.exit_code == 0, run.output
    assert "0 signs of trouble" in run.stderr
    run = CliRunner().invoke(app, ["report", str(well), str(ill), "--html", str(page)])
    assert run.exit_code == 1
    assert "ill.jsonl, cme/coverage: It fell to 0.500" in run.stderr
    assert "ill.jsonl" in page.read_text()
    run = CliRunner().invoke(app, ["report", str(tmp_path / "no"), "--html", str(page)])
    assert run.exit_code == 2
    assert "neither a file nor a folder" in run.stderr
