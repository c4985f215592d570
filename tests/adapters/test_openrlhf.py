"""The parts of the OpenRLHF adapter that need neither OpenRLHF nor Ray.

The others are in tests/frameworks/openrlhf, which `nox -s openrlhf` runs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer

import cme_reward
from cme_reward import CMEConfig, ConfigError, CrossModelEntropy, InputError, load_verifier
from cme_reward import openrlhf as adapter
from cme_reward.comparators import REWARDS
from cme_reward.curves.samples import FILE
from cme_reward.openrlhf import checks, launch
from cme_reward.openrlhf import reward as reward_module
from cme_reward.openrlhf import samples as samples_module
from cme_reward.openrlhf.score import actions_of, in_unit_interval, make_scorer, score_rollout
from cme_reward.openrlhf.settings import Settings, load_settings, variables
from cme_reward.openrlhf.verifier import open_verifier

ROOT = Path(__file__).parent.parent.parent
ASK = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CME_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(reward_module, "_made", [])


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    tokenizer = load_tokenizer("byte-level")
    tokenizer.save_pretrained(tmp_path / "policy")
    monkeypatch.setenv("CME_VERIFIER", "embedded")
    monkeypatch.setenv("CME_GENERATOR_TOKENIZER", str(tmp_path / "policy"))
    return tokenizer


def rendered(tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)


def test_the_public_names() -> None:
    assert adapter.__all__ == [
        "AgentExecutor",
        "MultiTurnAgentExecutor",
        "install",
        "main",
        "reward_func",
    ]
    with pytest.raises(AttributeError, match="no attribute 'Agent'"):
        adapter.Agent  # noqa: B018
    assert pickle.loads(pickle.dumps(adapter.reward_func)) is adapter.reward_func


def test_the_hook_loads_nothing_but_the_standard_library() -> None:
    """Ray runs it at the start of every worker, of vLLM's too."""
    code = (
        "import sys; before = set(sys.modules); import cme_reward.openrlhf as a; a.install(); "
        "a.install(); print(len(sys.meta_path)); "
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    loaded = set(lines[1].split())
    assert loaded <= {"cme_reward", *sys.stdlib_module_names}


def test_without_openrlhf_the_message_says_how_to_install_it() -> None:
    for use in (lambda: adapter.AgentExecutor, checks.version):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "cme-reward\[openrlhf\]"'):
            use()


def test_settings_from_the_environment_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="set the environment variable CME_VERIFIER"):
        load_settings()
    file = tmp_path / "settings.yaml"
    file.write_text("verifier: embedded\nverifier_gpus: 0.5\ncme:\n  eps: 0.2\n  eos: mask\n")
    monkeypatch.setenv("CME_SETTINGS", str(file))
    monkeypatch.setenv("CME_EPS", "0.3")
    monkeypatch.setenv("CME_VERIFIER_OPTIONS", "{dtype: float32}")
    got = load_settings("sequence")
    assert got == Settings(
        verifier="embedded",
        verifier_options={"dtype": "float32"},
        verifier_gpus=0.5,
        config=CMEConfig(eps=0.3, eos="mask", level="sequence"),
    )
    file.write_text("verifer: embedded\n")
    with pytest.raises(ConfigError, match="unknown setting 'verifer'; did you mean 'verifier'"):
        load_settings()
    monkeypatch.setenv("CME_SETTINGS", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"cannot read the settings in CME_SETTINGS=.*none\.yaml"):
        load_settings()
    monkeypatch.delenv("CME_SETTINGS")
    monkeypatch.setenv("CME_VERIFIER", "embedded")
    monkeypatch.setenv("CME_VERIFIER_PLACEMENT", "everywhere")
    with pytest.raises(ConfigError, match="'everywhere' is unknown; expected one of shared"):
        load_settings()
    monkeypatch.delenv("CME_VERIFIER_PLACEMENT")
    monkeypatch.setenv("CME_VERIFIER_GPUS", "one")
    with pytest.raises(
        ConfigError, match="verifier_gpus='one' cannot be read; expected float or n"
    ):
        load_settings()
    monkeypatch.delenv("CME_VERIFIER_GPUS")
    monkeypatch.setenv("CME_SETTINGS", str(file))
    file.write_text("verifier: embedded\ngenerator_tokenizer: 012\n")  # ten, in YAML
    with pytest.raises(
        ConfigError, match=r"generator_tokenizer=10 .* expected text \(in YAML, in q"
    ):
        load_settings()


def test_the_controls_are_verifiers() -> None:
    def verifier(reward: str, **more: str) -> str:
        return load_settings(environ={"CME_REWARD": reward, **more}).verifier

    assert verifier("cme", CME_VERIFIER="hf:v") == "hf:v"
    assert verifier("random", CME_VERIFIER="hf:v+random:w") == "random:v+random:w"
    assert verifier("self", CME_GENERATOR_TOKENIZER="org/p") == "hf:org/p"
    with pytest.raises(ConfigError, match="set CME_GENERATOR_TOKENIZER to what --actor"):
        verifier("self")
    with pytest.raises(ConfigError, match="no untrained 'vllm:http://v'; expected hf:NAME"):
        verifier("random", CME_VERIFIER="vllm:http://v")
    for name in set(REWARDS) - {"cme", "random", "self"}:
        with pytest.raises(ConfigError, match=f"reward='{name}' .*train.py --reward {name}"):
            verifier(name, CME_VERIFIER="hf:v")
        with pytest.raises(ConfigError, match=f"reward='{name}' "):
            verifier(name)  # not that a verifier is missing
    for more in ({}, {"CME_VERIFIER": "hf:v"}):
        with pytest.raises(ConfigError, match="unknown reward 'rant'"):
            verifier("rant", **more)
    with pytest.raises(ConfigError, match="no verifier is named"):
        verifier("random")


def test_ray_is_not_told_the_api_key() -> None:
    environ = {"CME_VERIFIER": "vllm:http://v", "CME_API_KEY": "secret", "HOME": "/h"}
    assert variables(environ) == {"CME_VERIFIER": "vllm:http://v"}


def test_the_reward_function(generator: Any) -> None:
    """Against the reward of the ids, from text and with a label of any kind."""
    scorer = CrossModelEntropy(load_verifier("embedded"), generator)
    prompt = rendered(generator)
    for text in ("The answer is 5.", "5", "naïve café 🤷"):
        for end in ("", "<|im_end|>"):
            ids = generator(text + end, add_special_tokens=False)["input_ids"]
            want = scorer([ASK], [ids]).sequence_rewards
            for label in ("5", None, ASK):
                got = adapter.reward_func([prompt + text + end], [prompt], [label])
                assert set(got) == {"rewards", "scores", "extra_logs"}
                assert torch.allclose(got["rewards"], want, atol=1e-5)
                assert got["rewards"].shape == got["scores"].shape == (1,)
                assert torch.allclose(got["scores"], want.exp(), atol=1e-5)
                assert all(v.shape == (1,) for v in got["extra_logs"].values())
    empty = adapter.reward_func([], [], [])
    assert empty["rewards"].shape == empty["scores"].shape == (0,)


def test_a_prompt_that_cannot_be_read_back_is_not_scored(
    generator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenRLHF swallows the error, so that it is also logged where it is seen."""
    odd = "<|im_start|>narrator\nOnce upon a time<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="cannot read the prompt"), caplog.at_level(logging.ERROR):
        adapter.reward_func([odd + "5"], [odd], [""])
    assert "the reward function failed" in caplog.text
    assert "cannot read the prompt" in caplog.text
    told = adapter.reward_func([odd + "5"], [odd], [ASK])
    assert told["rewards"].isfinite().all()
    answered = [*ASK, {"role": "assistant", "content": "5"}]
    with pytest.raises(InputError, match="end with the assistant's"):
        adapter.reward_func([odd + "5"], [odd], [answered])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CME_LEVEL", "token", "level='token' needs the sampled ids"),
        ("CME_BASELINE", "policy", "baseline='policy' needs the sampled ids"),
        ("CME_GENERATOR_TOKENIZER", None, "set CME_GENERATOR_TOKENIZER"),
        ("CME_SAMPLES", "4", "samples=4 is for the trainer with per-token rewards"),
        ("CME_SAMPLES", "-1", "samples=-1; expected how many"),
    ],
)
def test_settings_that_text_is_not_enough_for(
    generator: Any, name: str, value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        adapter.reward_func(["q"], ["q"], [""])


@pytest.mark.parametrize("reward", [-1e9, -200.0, -1.0, -1e-12, 0.0, 3.0])
def test_scores_pass_a_filter_between_0_and_1(reward: float) -> None:
    score = torch.tensor([in_unit_interval(reward)]).item()  # float32, as OpenRLHF keeps it
    assert 0 < score < 1
    if -10 < reward < -0.1:
        assert score == pytest.approx(math.exp(reward))


def test_what_was_sampled() -> None:
    output = {
        "observation_tokens": [9, 8, 1, 2, 7, 7, 3, 4, 5],
        "action_ranges": [(2, 4), (6, 9)],
        "rollout_log_probs": [0, 0, -1, -2, 0, 0, -3, -4, -5],
    }
    masks = [True, True, False, False, True, True, True]
    all_of_it = 2, [1, 2, 7, 7, 3, 4, 5], masks, [-1, -2, 0, 0, -3, -4, -5], []
    assert actions_of(output, 100) == all_of_it
    # As OpenRLHF cuts at 7 and at 5 tokens: 1 2 . . 3 and 1 2.
    assert actions_of(output, 7) == (2, [1, 2, 7, 7, 3], masks[:5], [-1, -2, 0, 0, -3], [])
    assert actions_of(output, 5) == (2, [1, 2], masks[:2], [-1, -2], [])
    silent = {"observation_tokens": [9, 1, 2, 3, 4], "action_ranges": [(1, 3), (3, 5)]}
    assert actions_of(silent, 100) == (1, [1, 2, 3, 4], [True] * 4, None, [2])
    none = {"observation_tokens": [9, 8], "action_ranges": []}
    assert actions_of(none, 100) == (2, [], [], None, [])


def test_an_id_beyond_the_vocabulary_is_not_scored() -> None:
    """Models pad theirs; a run should not end when one of those ids is drawn."""
    tokenizer = load_tokenizer("byte-level")
    scorer = make_scorer(Settings(verifier="here"), TableVerifier(tokenizer), tokenizer)
    ids = tokenizer("five", add_special_tokens=False)["input_ids"]
    output = {
        "observation_tokens": [5, 5, *ids, len(tokenizer) + 3],
        "action_ranges": [(2, 3 + len(ids))],
        "extra_logs": {"turns": 2.0},
        "reward": None,
    }
    got = asyncio.run(score_rollout(scorer, ASK, output, 100, 1.0))
    row = got["extra_logs"][checks.KEY]
    assert len(row) == len(ids) + 2
    assert math.isnan(row[0])
    assert math.isnan(row[-1])
    assert all(map(math.isfinite, row[1:-1]))
    assert got["extra_logs"]["turns"] == 2.0
    assert got["reward"] == pytest.approx(got["extra_logs"]["cme/sequence_reward"])


def test_samples_of_a_step(tmp_path: Path) -> None:
    """The first rollout of a prompt; what the environment pays is in no log-prob."""
    tokenizer = load_tokenizer("byte-level")
    verifier = TableVerifier(tokenizer)
    masking = Settings(verifier="here", samples=1, config=CMEConfig(whitespace="mask"))
    scorer = make_scorer(masking, verifier, tokenizer)
    prompt = tokenizer(rendered(tokenizer), add_special_tokens=False)["input_ids"]
    texts = ["five\n 5", "six", "", "seven"]
    rollouts, wanted = [], []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        output = {
            "observation_tokens": [*prompt, *ids],
            "action_ranges": [(len(prompt), len(prompt) + len(ids))] if ids else [],
            "reward": 3.0,
        }
        got = asyncio.run(score_rollout(scorer, ASK, output, 100, 1.0, samples=True))
        info = {key: torch.tensor([value]) for key, value in got["extra_logs"].items()}
        given = {"prompts": [rendered(tokenizer)], "labels": ["5"], "info": info}
        rollouts.append(SimpleNamespace(sequences=torch.tensor([[*prompt, *ids]]), **given))
        wanted.append(scorer([ASK], [ids]))
    told: list[tuple[list[Any], int]] = []

    class Trainer:
        experience_maker = SimpleNamespace(_cme_settings=masking)
        tensorboard_logger: Any = None
        args = SimpleNamespace(ckpt=SimpleNamespace(output_dir=str(tmp_path / "out")))

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def train_step(self, rollouts: list[Any], global_step: int) -> str:
            told.append(([*rollouts], global_step))
            return "done"

    module: Any = SimpleNamespace(BasePPOTrainer=Trainer)
    for _ in range(2):  # a second time changes nothing
        samples_module.patch(module)
    for k, step in enumerate((0, 1, 33)):  # of step 33 none are kept
        assert Trainer().train_step(rollouts[k:], step) == "done"
        assert told[-1] == (rollouts[k:], step)
        for rollout, batch in zip(rollouts, wanted, strict=True):
            rollout.info[checks.LOGPROBS] = row_of(batch, len(prompt))
    assert all(checks.KEY in rollout.info for rollout in rollouts)
    rows = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    for row, text, batch in zip(rows, texts, wanted, strict=False):
        assert row["prompt"] == ASK
        assert "".join(row["tokens"]) == text
        assert row["mask"] == batch.mask[0].tolist()
        assert row["token_logprobs"] == pytest.approx(batch.token_logprobs[0].tolist(), abs=1e-6)
        assert row["sequence_reward"] == pytest.approx(batch.sequence_rewards.item())
        assert row["dropped_nats"] == pytest.approx(batch.dropped_nats.item())
    assert rows[0]["dropped_nats"] > 0
    assert False in rows[0]["mask"]

    Trainer.tensorboard_logger = SimpleNamespace(
        writer=SimpleNamespace(log_dir=str(tmp_path / "events"))
    )
    Trainer().train_step(rollouts[2:], 2)  # a rollout without a token
    (row,) = map(json.loads, (tmp_path / "events" / FILE).read_text().splitlines())
    assert (row["tokens"], row["prompt"]) == ([], ASK)
    Trainer().train_step([SimpleNamespace(info={})], 3)  # another agent's: the step refuses it
    assert told[-1][1] == 3


def row_of(batch: Any, start: int) -> torch.Tensor:
    """A response's log-probs on the axis of actions."""
    before = torch.full((1, start - 1), math.nan)
    return torch.cat([before, batch.token_logprobs], dim=1)


def test_nothing_more_is_carried_where_no_samples_are_kept() -> None:
    tokenizer = load_tokenizer("byte-level")
    scorer = make_scorer(Settings(verifier="here"), TableVerifier(tokenizer), tokenizer)
    output = {"observation_tokens": [5, 5, 6], "action_ranges": [(2, 3)]}
    got = asyncio.run(score_rollout(scorer, ASK, output, 100, 1.0))
    assert checks.LOGPROBS not in got["extra_logs"]


def test_arguments_in_either_style(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = SimpleNamespace(advantage_estimator="rloo", reward_clip_range=(-1, 1))
    dotted = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="rloo")),
        reward=SimpleNamespace(clip_range=(-1, 1)),
    )
    for version, args in (("0.9.1", flat), ("0.10.1.post2", flat), ("0.10.2", dotted)):
        monkeypatch.setattr(metadata, "version", lambda _, version=version: version)
        assert checks.argument(args, "algo.advantage.estimator") == "rloo"
        assert checks.argument(args, "reward.clip_range") == (-1, 1)
        assert checks.argument(args, "actor.policy_loss_type", "ppo") == "ppo"
        name = "advantage_estimator" if args is flat else "algo.advantage.estimator"
        with pytest.raises(ConfigError, match=rf"--{name} rloo is not what"):
            checks.check_arguments(args)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("0.9.0", r"OpenRLHF 0\.9\.0 has no agent executors: expected >= 0\.9\.1, < 0\.12"),
        ("0.12", r"OpenRLHF 0\.12 is outside the range .* expected >= 0\.9\.1, < 0\.12"),
        ("0.12.0rc1", r"outside the range .* pip install \"openrlhf>=0\.9\.1,<0\.12\""),
        ("1.0.0", "outside the range"),
    ],
)
def test_other_versions_are_refused(
    monkeypatch: pytest.MonkeyPatch, found: str, message: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: found)
    for use in (checks.version, lambda: checks.check_arguments(SimpleNamespace())):
        with pytest.raises(ConfigError, match=message):
            use()


def test_the_newest_version_that_is_declared_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.11.9.post1")
    assert checks.version() == (0, 11, 9)


def test_what_the_launcher_reads_of_the_command_line() -> None:
    words = ["--pretrain", "old", "--reward.remote_url=a.py", "--actor.model_name_or_path", "new"]
    assert launch._value(words, "reward.remote_url") == "a.py"
    assert launch._value(words, "train.agent_func_path") is None
    assert launch._value(words[:2], "actor.model_name_or_path") == "old"


def test_the_launcher_names_the_packages_own_agent(
    generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.11.2")
    for name in ("_check_when_parsed", "_carry_into_workers"):  # they reach for OpenRLHF and Ray
        monkeypatch.setattr(launch, name, lambda *_, **__: None)
    monkeypatch.setattr(launch.runpy, "run_module", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", [])
    launch.main(["--actor.model_name_or_path", "policy"])
    assert sys.argv[1] == "--train.agent_func_path"
    assert adapter.__file__ is not None
    assert Path(sys.argv[2]).samefile(Path(adapter.__file__).with_name("agent.py"))
    assert sys.argv[3:] == ["--actor.model_name_or_path", "policy"]


def test_the_launcher_refuses_samples_of_one_reward_per_response(
    generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.11.2")
    monkeypatch.setenv("CME_SAMPLES", "4")
    with pytest.raises(ConfigError, match=r"samples=4 and --reward\.remote_url do not"):
        launch.main(["--reward.remote_url", "reward_func.py"])


def test_outside_of_ray_a_verifier_is_loaded_here() -> None:
    verifier = open_verifier(Settings(verifier="embedded"))
    assert type(verifier).__name__ == "BatchingVerifier"
    verifier.close()  # type: ignore[union-attr]
    both = open_verifier(Settings(verifier="embedded+embedded"))
    assert isinstance(both, cme_reward.Ensemble)


def test_the_files_of_the_adapter_are_one_import_each() -> None:
    for name, what in (("reward_func", "reward_func"), ("agent", "AgentExecutor")):
        lines = (ROOT / "adapters" / "openrlhf" / f"{name}.py").read_text().splitlines()
        code = [line for line in lines if line and not line.startswith('"""')]
        assert code == [f"from cme_reward.openrlhf import {what} as {what}"]
