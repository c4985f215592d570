"""Samples that a training keeps, and the report that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cme_reward import SpanTable
from cme_reward.cli.app import app
from cme_reward.curves.page import render
from cme_reward.curves.read import Run, Series, read_run
from cme_reward.curves.samples import (
    FILE,
    PROMPTS,
    STEPS,
    Kept,
    Picked,
    Sample,
    beside,
    is_due,
    keep,
    read,
    shown,
)
from cme_reward.heatmap.render import ResponseView, TokenView


def test_ever_fewer_steps() -> None:
    due = [step for step in range(20_001) if is_due(step)]
    assert due[:34] == [*range(33), 34]
    assert len(due) == 180
    for start in (64, 1024, 8192):
        assert len([step for step in due if start <= step < 2 * start]) == 16


def test_the_prompts_with_the_lowest_hashes_in_whatever_order_they_come() -> None:
    # sha256 of the JSON of "a", "b", "c" begins with ac8d83, c100f9 and 879923.
    offers = [("a", 2), ("b", 0), ("c", 1), ("a", 1), ("c", 3), ("b", 1)]
    picked = Picked(2)
    for order in (offers, offers[::-1]):
        for prompt, rank in order:
            picked.offer(prompt, rank, (prompt, rank))
        assert picked.take() == [("c", 1), ("a", 1)]
    assert picked.take() == []


def line(step: int, prompt: Any = "p", text: str = "a", **more: Any) -> str:
    row = {"step": step, "prompt": prompt, "tokens": [text], "token_logprobs": [-1.0]}
    row |= {"mask": [True], "sequence_reward": -1.0, "dropped_nats": 0.0}
    return json.dumps(row | more) + "\n"


def test_what_was_sampled_again_replaces_what_was_there(tmp_path: Path) -> None:
    """A run that was killed in the middle of a line, and went on from an earlier checkpoint."""
    cut = line(3)[:20] + "\n"
    (tmp_path / FILE).write_text(line(1) + line(2, text="old") + cut + line(2, text="new"))
    found = read(tmp_path)
    assert [(one.step, one.view.generator.tokens) for one in found] == [(1, ["a"]), (2, ["new"])]
    (tmp_path / "checkpoint-2").mkdir()
    assert read(tmp_path / "checkpoint-2") == read(tmp_path / "log.jsonl") == found
    assert read(tmp_path.parent) == []


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    file = tmp_path / FILE
    (tmp_path / FILE).write_text(line(1) + line(2)[:20])
    kept = Kept("p", ["a"], [-1.0], [True], -1.0, 0.0)
    keep(file, 3, [kept])
    keep(file, 4, [kept])
    assert [one.step for one in read(tmp_path)] == [1, 3, 4]
    assert file.read_text().count("\n") == 4


def test_samples_are_beside_the_log(tmp_path: Path) -> None:
    """A folder may hold the logs of several runs, or folders with TensorBoard's events."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for log, text in ((one, "first"), (two, "second")):
        log.write_text('{"step": 1, "loss": 0.5}\n')
        beside(log).write_text(line(1, text=text))
    assert [read(log)[0].view.generator.tokens for log in (one, two)] == [["first"], ["second"]]
    two.unlink()
    beside(two).unlink()
    assert read_run(tmp_path).series.keys() == {"loss"}
    assert [sample.view.generator.tokens for sample in read(tmp_path)] == [["first"]]

    events = tmp_path / "board" / "ppo_1127T12:00"
    events.mkdir(parents=True)
    (events / "events.out.tfevents.1").touch()
    (events / FILE).write_text(line(2))
    assert read(tmp_path / "board") == read(events) != []


def test_messages_are_shown_as_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Ask."}]
    (tmp_path / FILE).write_text(line(1, messages))
    (one,) = read(tmp_path)
    assert one.view.prompt == "user: Why?\n\nassistant: Ask."


def sample(step: int, prompt: str) -> Sample:
    view = ResponseView(prompt, f"step {step}", -1.0, TokenView(["a"], [-1.0], [True]))
    return Sample(step, view)


def test_a_page_has_room_for_some() -> None:
    """Of those that come back the steps, first and last among them; of the others a few."""
    again = [sample(step, "again") for step in range(100)]
    once = [sample(step, f"once {step}") for step in range(100)]
    views = shown(sorted([*once, *again], key=lambda one: one.step))
    assert [view.prompt for view in views[:STEPS]] == ["again"] * STEPS
    assert [views[0].label, views[STEPS - 1].label] == ["step 0", "step 99"]
    others = [view.prompt for view in views[STEPS:]]
    assert len(others) == PROMPTS - 1
    assert (others[0], others[-1]) == ("once 0", "once 99")
    assert shown([]) == []


def test_two_runs_are_told_apart_and_stand_by_steps() -> None:
    import numpy as np

    steps = np.arange(1.0, 3.0)
    runs = [Run(name, {"cme/coverage": Series(steps, steps)}) for name in ("<one>", "two")]
    kept = [[sample(1, "p"), sample(3, "p")], [sample(2, "p")]]
    page = render(runs, kept)
    places = [page.index(f"{name}, step {n}") for name, n in (("&lt;one&gt;", 1), ("two", 2))]
    assert places == sorted(places)
    assert "<one>" not in page
    assert "Samples over the steps" in page
    assert "None were kept" in render(runs)
    assert "step 3" in render(runs[:1], kept[:1])


@pytest.mark.slow
def test_a_training_keeps_them(tmp_path: Path) -> None:
    """In the real trainer: those of the loss, on the first batch of a step and of an evaluation."""
    import trl_tiny as tiny
    from datasets import Dataset

    from cme_reward.trl import CMEGRPOTrainer, cme_reward_func

    made = CMEGRPOTrainer(
        tiny.policy(),
        cme_reward_func(tiny.verifier(), tiny.tokenizer(), samples=1),
        tiny.arguments(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            num_generations_eval=2,
            per_device_eval_batch_size=2,
            save_strategy="steps",
            save_steps=4,
        ),
        Dataset.from_list(tiny.CHAT),
        eval_dataset=Dataset.from_list(tiny.CHAT[:2]),
        processing_class=tiny.tokenizer(),
    )
    sampled, take = [], made._cme_calls.take

    def taken() -> Any:
        sampled.append(take())
        return sampled[-1]

    made._cme_calls.take = taken
    tiny.train(made)
    rows = [json.loads(text) for text in (tmp_path / FILE).read_text().splitlines()]
    assert sorted(row["step"] for row in rows) == [0, 1, 2, 2, 3, 4]  # 2 and 4 evaluated as well
    table = SpanTable(tiny.tokenizer())
    for row in rows:
        # The first response to one of a batch's prompts, whichever that prompt is.
        firsts = [
            next(ids for p, ids in zip(*call, strict=True) if p == row["prompt"])
            for call in sampled
            if row["prompt"] in call[0]
        ]
        ids = next(ids for ids in firsts if table.tokens(ids) == row["tokens"])
        naive, sequence = tiny.naive_rewards(row["prompt"][0]["content"], ids)
        assert row["sequence_reward"] == pytest.approx(sequence, abs=1e-4)
        assert row["mask"] == [value is not None for value in naive]
        for got, wanted in zip(row["token_logprobs"], naive, strict=True):
            assert wanted is None or got == pytest.approx(wanted, abs=1e-4)
    kept = read(tmp_path)
    evaluated = [one.view.prompt for one in kept if one.step in (2, 4)]
    assert len(set(evaluated)) < len(evaluated)  # an evaluation comes back to its prompts
    assert read_run(tmp_path).series
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--html", str(page)])
    assert done.exit_code in (0, 1), done.output  # an untrained policy may show a sign
    assert page.read_text().count("<article>") == len(kept)


def test_a_run_without_samples_writes_no_file(tmp_path: Path) -> None:
    import trl_tiny as tiny

    tiny.train(tiny.trainer(tmp_path))
    assert not (tmp_path / FILE).exists()


def test_the_stock_trainer_cannot_keep_them() -> None:
    from cme_reward import CMEConfig, ConfigError
    from cme_reward.trl import RewardFunction

    class Scorer:
        config = CMEConfig(level="sequence")

    with pytest.raises(ConfigError, match="samples=2 needs CMEGRPOTrainer"):
        RewardFunction(Scorer(), samples=2)(["p"], [[1]])
    with pytest.raises(ConfigError, match="samples is -1"):
        RewardFunction(Scorer(), samples=-1)
