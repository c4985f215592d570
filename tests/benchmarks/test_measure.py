"""What is measured of trained policies: each measure by hand, and the command from end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import trl_tiny as tiny

from benchmarks.real import measure
from cme_reward import CrossModelEntropy, TransformersVerifier


def test_instructions_are_checked_by_ifevals_own_program(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def strict(example: Any, text: str) -> Any:
        asked.append(example)
        if text == "needs data":
            raise LookupError("punkt")
        return SimpleNamespace(follow_all_instructions=text.isupper())

    utils: Any = ModuleType("utils")
    utils.InputExample = lambda *fields: fields
    utils.test_instruction_following_strict = strict
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", utils)
    meta = {"instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]}
    row = {"prompt": "Shout.", "meta": meta}
    assert [measure.followed(row, text) for text in ("AH", "ah", "needs data")] == [1, 0, None]
    assert asked[0] == (0, ["change_case:english_capital"], "Shout.", [{}])
    assert measure.followed({"prompt": "Shout."}, "AH") is None


def test_without_its_program_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", None)
    row = {"prompt": "Shout.", "meta": {"instruction_id_list": ["x"], "kwargs": [{}]}}
    with pytest.raises(SystemExit, match=r"pip install 'lm-eval\[ifeval\]'"):
        measure.followed(row, "AH")


def test_pairs_of_words() -> None:
    assert measure.distinct(["a", "b", "a", "b"]) == pytest.approx(2 / 3)  # ab ba ab
    assert measure.distinct(["a"]) is None


def test_differences_are_paired_by_prompt() -> None:
    nothing: measure.Values = {name: [None] * 4 for name in measure.MEASURES}
    first = nothing | {"tokens": [1.0, 2, 3, None]}
    other = nothing | {"tokens": [2.0, 4, 6, 9]}
    n, mean, half = measure.compared(first, other)["tokens"]
    # 1, 2, 3: mean 2, deviation 1, t 4.303 over sqrt(3).
    assert (n, mean) == (3, 2)
    assert half == pytest.approx(2.4841, abs=1e-4)
    assert set(measure.compared(first)) == {"tokens"}


def test_training_is_read_from_the_last_of_the_checkpoints(tmp_path: Path) -> None:
    assert measure.training(str(tmp_path)) == []
    for at, rewards in ((5, [-3.0]), (10, [-3.0, -2.5])):
        log: list[dict[str, Any]] = [
            {"step": k, "reward": reward, "completions/mean_length": 7.0, "entropy": 2.0}
            for k, reward in enumerate(rewards, 1)
        ]
        log[0]["random/repetition"] = 0.25
        (tmp_path / f"checkpoint-{at}").mkdir()
        state = {"log_history": [*log, {"train_runtime": 1.0}]}
        (tmp_path / f"checkpoint-{at}" / "trainer_state.json").write_text(json.dumps(state))
    first, second = measure.training(str(tmp_path))
    assert first == {"step": 1, "gain": 0.0, "length": 7, "entropy": 2, "repetition": 0.25}
    assert second["gain"] == 0.5
    assert math.isnan(second["repetition"])


@pytest.mark.slow
def test_two_policies_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, scale in (("before", 1.0), ("after", 3.0)):
        policy: Any = tiny.policy()
        with torch.no_grad():
            policy.get_input_embeddings().weight.mul_(scale)
        policy.save_pretrained(name)
        bare = tiny.tokenizer()
        bare.chat_template = None
        bare.save_pretrained(name)
    Path("template.jinja").write_text(tiny.tokenizer().chat_template)
    rows: list[dict[str, Any]] = [{"prompt": text} for text in tiny.QUESTIONS]
    rows[0]["response"] = "An answer by hand."
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = "--model before --model after --prompts prompts.jsonl --tokens 8 --out found"
    command += " --chat-template template.jinja"
    measure.main(command.split())
    shown = capsys.readouterr().out
    assert "after, minus it" in shown
    before = json.loads(Path("found/before.measures.json").read_text())["measures"]
    answers = measure.read_lines(Path("found/before.jsonl"))
    made = {row["prompt"]: row for row in answers}
    texts = [made[row["prompt"]]["response"] for row in rows]
    # By hand, in one pass of the model over each text.
    loaded = TransformersVerifier.from_pretrained("before", dtype="float32")
    tokenizer: Any = loaded.tokenizer
    tokenizer.chat_template = tiny.tokenizer().chat_template
    model: Any = loaded.model
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": rows[0]["prompt"]}], add_generation_prompt=True
    )["input_ids"]

    def next_token(ids: list[int]) -> torch.Tensor:
        """`log p` of every token, at each of these and after the last."""
        return model(torch.tensor([asked + ids])).logits[0, len(asked) - 1 :].log_softmax(-1)

    wanted = tokenizer("An answer by hand.")["input_ids"]
    logp = next_token(wanted)[torch.arange(len(wanted)), torch.tensor(wanted)]
    assert before["reference"][0] == pytest.approx(float(logp.mean()), abs=1e-4)
    assert before["reference"][1:] == [None] * (len(rows) - 1)
    ids = tokenizer(texts[0])["input_ids"]
    assert before["tokens"] == [len(tokenizer(text)["input_ids"]) for text in texts]
    logp = next_token(ids)[:-1]
    entropy = -(logp.exp() * logp).sum(-1).mean()
    assert before["entropy"][0] == pytest.approx(float(entropy), abs=1e-4)
    judge = CrossModelEntropy("embedded", tokenizer)
    ended = made[rows[0]["prompt"]]["stopped"]
    alone = judge.score_texts([rows[0]["prompt"]], texts[:1], ended=ended)
    assert before["judge"][0] == pytest.approx(float(alone.sequence_rewards[0]), abs=1e-4)
    page = Path("found/samples.md").read_text()
    assert page.count("**after**") == len(rows)
    stamp = Path("found/after.measures.json").stat().st_mtime_ns
    measure.main(command.split())
    assert Path("found/after.measures.json").stat().st_mtime_ns == stamp
    assert not Path("found/curves.png").exists()
    command = command.replace("found", "sampled").replace("--model after ", "")
    measure.main([*command.split(), "--temperature", "1"])
    rows = measure.read_lines(Path("sampled/before.jsonl"))
    assert {row["temperature"] for row in rows} == {1.0}
    assert [row["response"] for row in rows] != [row["response"] for row in answers]
