"""The training script beside the TRL adapter."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_tiny as tiny
from transformers import AutoModelForCausalLM

from cme_reward import ConfigError, InputError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "adapters" / "trl" / "train.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    tiny.policy().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_defaults_are_the_papers(script: dict[str, Any]) -> None:
    given = script["options"]([])
    args = script["grpo_config"](script["options"](["--precision", "fp32"]))
    assert given.model == "Qwen/Qwen2.5-0.5B"
    assert given.verifier == "hf:google/gemma-3-1b-it"
    assert given.n_prompts == 5000
    assert (given.precision, given.level, given.reward) == ("bf16", "token", "cme")
    assert args.learning_rate == 3e-6
    assert (args.warmup_steps, args.lr_scheduler_type) == (20, "cosine")
    assert args.max_grad_norm == 1.0
    assert args.num_train_epochs == 1
    assert args.generation_batch_size == 128
    assert args.steps_per_generation == args.gradient_accumulation_steps == 16  # one update each
    assert args.num_generations == 8
    assert (args.temperature, args.top_p, args.max_completion_length) == (1.0, 1.0, 2048)
    assert (args.epsilon, args.beta, args.loss_type) == (0.2, 0.0, "grpo")


def test_every_setting_of_trl_can_be_given(script: dict[str, Any]) -> None:
    given = ["--precision", "fp32", "--trl", "save_steps=7", "--trl", "top_k=3"]
    args = script["grpo_config"](script["options"](given))
    assert (args.save_steps, args.top_k) == (7, 3)
    with pytest.raises(ConfigError, match="did you mean loss_type"):
        script["grpo_config"](script["options"](["--trl", "loss_typ=grpo"]))


def test_settings_of_trl_are_read_as_their_type(script: dict[str, Any]) -> None:
    """YAML takes `no` for false wherever it stands, and `1e-3` for a text."""
    given = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "adam_epsilon": "1e-3",
        "bf16": "no",
        "top_k": "5",
        "run_name": "012",
        "hub_model_id": "null",
        "chat_template_kwargs": "{enable_thinking: false}",
        "reward_weights": "[1.0, 0.5]",
    }
    words = [word for key, value in given.items() for word in ("--trl", f"{key}={value}")]
    args = script["grpo_config"](script["options"](words))
    assert (args.save_strategy, args.logging_strategy) == ("no", "no")
    assert (args.adam_epsilon, args.bf16, args.top_k, args.run_name) == (1e-3, False, 5, "012")
    assert args.hub_model_id is None
    assert args.chat_template_kwargs == {"enable_thinking": False}
    assert args.reward_weights == [1.0, 0.5]
    for wrong, message in (
        ("save_steps=often", "--trl save_steps='often' cannot be read; expected float"),
        ("bf16=maybe", "--trl bf16='maybe' cannot be read; expected true or false"),
        ("reward_weights=1", r"--trl reward_weights='1' cannot be read; expected a list such as"),
        ("save_strategy=sometimes", "GRPOConfig refuses: .*sometimes.* not a valid SaveStrategy"),
    ):
        with pytest.raises(ConfigError, match=message):
            script["grpo_config"](script["options"](["--precision", "fp32", "--trl", wrong]))


def test_a_wrong_setting_ends_it_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--trl", "save_steps=often"])
    with pytest.raises(SystemExit, match=r"^train\.py: --trl save_steps='often' cannot be read"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    given = ["--prompts", "nowhere.jsonl", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    with pytest.raises(SystemExit, match=r"^train\.py: .*No such file.*nowhere\.jsonl"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize(
    ("scale", "named"), [("std", "group"), ("batch", "batch"), ("none", "none")]
)
def test_the_scale_is_said_once(script: dict[str, Any], scale: str, named: str) -> None:
    args = script["grpo_config"](script["options"](["--precision", "fp32"]), scale)
    assert args.scale_rewards == named


def test_what_the_trainer_refuses_is_an_error(
    script: dict[str, Any], policy_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", policy_folder, "--verifier", "embedded", "--precision", "fp32"]
    arguments += ["--prompts", str(ROOT / "examples" / "gsm8k.jsonl"), "--set", "credit=return"]
    arguments += ["--set", "scale=batch", "--trl", "scale_rewards=group"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit, match=r"^train\.py: GRPOConfig\(scale_rewards='group'\) would"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_an_update_is_divided_evenly(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="128 is not a multiple of 24"):
        script["grpo_config"](script["options"]([]))


def test_prompts_of_a_file(script: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}, {"prompt": "a"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = script["prompts_of"](script["options"](["--prompts", str(path)]))
    assert sorted(map(json.dumps, found)) == ['"a"', '[{"role": "user", "content": "b"}]']
    assert (
        len(script["prompts_of"](script["options"](["--prompts", str(path), "--n-prompts=1"]))) == 1
    )
    chat = script["for_policy"](found, tiny.tokenizer(), "s")
    assert {row["prompt"][0]["content"] for row in chat} == {"s"}
    bare = tiny.tokenizer()
    bare.chat_template = None
    assert script["for_policy"](["a"], bare, None)["prompt"] == ["a"]
    with pytest.raises(InputError, match="no chat template"):
        script["for_policy"](found, bare, None)
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match="line 2: expected `prompt`"):
        script["prompts_of"](script["options"](["--prompts", str(path)]))
    path.write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 2, is not JSON"):
        script["prompts_of"](script["options"](["--prompts", str(path)]))


def test_the_policy_stops_at_the_end_of_its_turn(script: dict[str, Any], tmp_path: Path) -> None:
    """A base model's EOS is the end of a text; its chat template ends turns with another token."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<bos>{% endfor %}"
    tiny.policy().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = script["load_policy"](str(tmp_path))
    assert model.generation_config.eos_token_id == [1, 2]


def test_a_base_model_is_given_a_template(script: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tiny.policy().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "question.jinja"
    file.write_text("{% for m in messages %}Question: {{ m.content }}<bos>{% endfor %}")
    given = script["options"](["--chat-template", str(file)])
    model, tokenizer = script["load_policy"](str(tmp_path), given.chat_template)
    assert model.generation_config.eos_token_id == [1, 2]
    (row,) = script["for_policy"](["a"], tokenizer, None)
    assert tokenizer.apply_chat_template(row["prompt"], tokenize=False) == "Question: a<bos>"


def test_it_trains(policy_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    small = "--steps 2 --completions-per-update 8 --completions-at-once 4 --rollouts 4"
    arguments = [
        *("--model", policy_folder, "--verifier", "embedded", "--output", str(output)),
        *("--prompts", str(ROOT / "examples" / "gsm8k.jsonl"), "--precision", "fp32"),
        *("--set", "eos=mask", "--trl", "gradient_checkpointing=no", "--trl", "save_steps=1"),
        *(*small.split(), "--response-tokens", "8", "--learning-rate", "0.01"),
    ]
    for more in ([], ["--resume", "--steps", "3"]):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    states = [json.loads(p.read_text()) for p in sorted(output.glob("*/trainer_state.json"))]
    assert [state["global_step"] for state in states] == [1, 2, 3]
    assert "cme/dropped_nats" in states[-1]["log_history"][-1]
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()["lm_head.weight"]
        for folder in (policy_folder, output)
    )
    assert not torch.equal(before, after)


def test_another_reward_is_one_option(
    script: dict[str, Any], policy_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "--steps 1 --completions-per-update 8 --completions-at-once 4 --rollouts 4"
    arguments = [
        *("--model", policy_folder, "--verifier", "embedded", "--precision", "fp32"),
        *("--prompts", str(ROOT / "examples" / "gsm8k.jsonl"), "--trl", "save_steps=1"),
        *(*small.split(), "--response-tokens", "8", "--trl", "gradient_checkpointing=false"),
    ]
    for name, more in (
        ("rent", ["--reward-set", "per_token=true"]),
        ("rlme", ["--reward-set", "questions=['Is it true?', 'Is it polite?']"]),
        ("self", []),
    ):
        output = tmp_path / name
        given = ["--reward", name, "--output", str(output), *more]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, *given])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        (state,) = output.glob("checkpoint-1/trainer_state.json")
        log = json.loads(state.read_text())["log_history"][-1]
        assert f"{name}/repetition" in log
        assert ("rlme/positive_1" in log) == (name == "rlme")
        assert ("self/coverage" in log) == (name == "self")
    for wrong, message in (
        ("per_token", "'per_token': expected KEY=VALUE with a value in YAML"),
        (
            "questions=[Is it true?, Is it polite?]",
            "questions='.*' cannot be read; expected a value",
        ),
        ("question=no", "question='no' cannot be read; expected a value in YAML, a text in quotes"),
    ):
        with pytest.raises(ConfigError, match=message):
            script["reward_options"](script["options"](["--reward-set", wrong]))


def test_responses_to_a_file_of_prompts(
    policy_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Greedy ones are the model's own; what is there stays; other settings are refused."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as Python does for a program
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in tiny.QUESTIONS)
    )
    output = tmp_path / "out.jsonl"

    def respond(*more: str) -> None:
        given = ["--model", policy_folder, "--prompts", str(tmp_path / "prompts.jsonl")]
        given += ["--output", str(output), "--response-tokens", "9", "--at-once", "3", *more]
        monkeypatch.setattr(sys, "argv", ["respond.py", *given])
        runpy.run_path(str(SCRIPT.with_name("respond.py")), run_name="__main__")

    respond("--name", "tiny")
    whole = output.read_text()
    rows = {row["prompt"]: row for row in map(json.loads, whole.splitlines())}
    assert sorted(rows) == sorted(tiny.QUESTIONS)
    tokenizer, policy = tiny.tokenizer(), tiny.policy()
    greedy_of: dict[str, list[int]] = {}
    for question, row in rows.items():
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            for _ in range(9):  # one response by itself, without a cache or padding
                following = policy(asked).logits[:, -1].argmax(-1, keepdim=True)
                asked = torch.cat([asked, following], dim=1)
        assert tokenizer.decode(asked[0, -9:], skip_special_tokens=True) == row["response"]
        assert row["stopped"] is False
        assert row["model"] == "tiny"
        greedy_of[question] = asked[0, -9:].tolist()

    # Had its third token been an end, the policy would have stopped there.
    question = tiny.QUESTIONS[0]
    greedy = greedy_of[question]
    ends: Any = tiny.policy()
    ends.generation_config.eos_token_id = [tiny.EOS, greedy[2]]
    ends.save_pretrained(tmp_path / "ends")
    tokenizer.save_pretrained(tmp_path / "ends")
    respond("--model", str(tmp_path / "ends"), "--output", str(tmp_path / "ended.jsonl"))
    ended = [json.loads(line) for line in (tmp_path / "ended.jsonl").read_text().splitlines()]
    (row,) = [row for row in ended if row["prompt"] == question]
    upto = greedy[: greedy.index(greedy[2]) + 1]
    assert row["stopped"] is True
    assert row["response"] == tokenizer.decode(upto, skip_special_tokens=True)

    # A crash in the middle of a line costs that line.
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:20])
    respond("--name", "tiny")
    assert output.read_text() == whole

    with pytest.raises(SystemExit, match=r"'tiny', and this command 'other'; give another --out"):
        respond("--name", "other")
    assert output.read_text() == whole
    with pytest.raises(
        SystemExit, match=r"^respond\.py: .*test_trl_script\.py, line 1, is not JSON"
    ):
        respond("--output", __file__)
    with pytest.raises(SystemExit):
        respond("--rollouts", "2")
    assert "--temperature 1" in capsys.readouterr().err

    output.unlink()
    respond("--rollouts", "3", "--temperature", "1")
    counted = Counter(json.loads(line)["prompt"] for line in output.read_text().splitlines())
    assert counted == dict.fromkeys(tiny.QUESTIONS, 3)
    assert len({json.loads(line)["response"] for line in output.read_text().splitlines()}) > 8
