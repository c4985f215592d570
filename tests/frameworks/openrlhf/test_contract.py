"""OpenRLHF's own code from an executor to the advantages, in process, on several versions.

The version is the installed one, or an older one that PYTHONPATH puts in front of it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import runs
import torch
from vllm import SamplingParams

from cme_reward import CMEConfig, ConfigError, InputError
from cme_reward import openrlhf as adapter
from cme_reward.openrlhf import checks
from cme_reward.openrlhf import reward as reward_module

ADAPTERS = Path(__file__).parent.parent.parent.parent / "adapters" / "openrlhf"
LIMIT = 80
FLAT = checks.FLAT | {
    "train.dynamic_batch_enable": "use_dynamic_batch",
    "rollout.micro_batch_size": "micro_rollout_batch_size",
    "rollout.max_tokens_per_gpu": "rollout_max_tokens_per_gpu",
    "rollout.max_new_tokens": "generate_max_len",
    "actor.num_nodes": "actor_num_nodes",
    "actor.num_gpus_per_node": "actor_num_gpus_per_node",
    "ds.ring_attn_size": "ring_attn_size",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "reward.overlong_buffer_len": "overlong_buffer_len",
    "reward.overlong_penalty_factor": "overlong_penalty_factor",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.lambd": "lambd",
    "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "algo.kl.use_loss": "use_kl_loss",
}


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, policy: Path) -> None:
    for name in [name for name in os.environ if name.startswith("CME_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CME_VERIFIER", "embedded")
    monkeypatch.setenv("CME_GENERATOR_TOKENIZER", str(policy))
    monkeypatch.setattr(reward_module, "_made", [])


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def modules() -> SimpleNamespace:
    adapter.install()
    base = "openrlhf.trainer.ppo_utils"
    maker = importlib.import_module(f"{base}.experience_maker")
    try:
        samples = importlib.import_module(f"{base}.samples_generator")
    except ModuleNotFoundError:  # 0.9
        samples = maker
    kl = importlib.import_module(f"{base}.kl_controller")
    agent = importlib.import_module("openrlhf.utils.agent")
    return SimpleNamespace(
        maker=maker.RemoteExperienceMaker,
        samples=samples.SamplesGenerator,
        kl=kl.FixedKLController,
        agent=agent,
    )


def arguments(**changes: Any) -> SimpleNamespace:
    """As the command line of this version gives them."""
    values: dict[str, Any] = {
        "train.dynamic_batch_enable": False,
        "train.agent_func_path": "agent.py",
        "rollout.micro_batch_size": 3,
        "rollout.n_samples_per_prompt": runs.GROUP,
        "rollout.max_tokens_per_gpu": 100,
        "rollout.max_new_tokens": 10,
        "actor.num_nodes": 1,
        "actor.num_gpus_per_node": 1,
        "actor.policy_loss_type": "ppo",
        "ds.ring_attn_size": 1,
        "ds.tensor_parallel_size": 1,
        "reward.clip_range": (-10.0, 10.0),
        "reward.overlong_buffer_len": None,
        "reward.overlong_penalty_factor": 1.0,
        "reward.stop_properly_penalty_coef": None,
        "algo.advantage.estimator": "group_norm",
        "algo.advantage.gamma": 1.0,
        "algo.advantage.lambd": 1.0,
        "algo.advantage.no_std_norm": False,
        "algo.kl.use_loss": False,
        **changes,
    }
    if checks.version() < checks.DOTTED:
        return SimpleNamespace(**{FLAT[name]: value for name, value in values.items()})
    root = SimpleNamespace()
    for name, value in values.items():
        node = root
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(node, parent):
                setattr(node, parent, SimpleNamespace())
            node = getattr(node, parent)
        setattr(node, last, value)
    return root


class Engine:
    """Answers with ids drawn at random; every second response ends, the others are cut."""

    def __init__(self, *, whole: bool = False) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.calls = 0
        # Without special tokens, and if so asked without parts of characters.
        last = len(runs.tokenizer()) - 1
        banned = set(runs.parts()) if whole else set()
        self.ids = torch.tensor([i for i in range(3, last) if i not in banned])

    async def generate(self, ids: Any, params: Any, multi_modal_data: Any = None) -> Any:
        tokenizer = runs.tokenizer()
        n = int(torch.randint(1, 9, (1,), generator=self.random))
        drawn = self.ids[torch.randint(len(self.ids), (n,), generator=self.random)].tolist()
        self.calls += 1
        ended = self.calls % 2 == 0
        drawn += [tokenizer.eos_token_id] * ended
        text = tokenizer.decode(drawn[:-1] if ended else drawn, skip_special_tokens=False)
        logprobs = [{i: SimpleNamespace(logprob=-1.0 - k)} for k, i in enumerate(drawn)]
        output = SimpleNamespace(
            token_ids=drawn,
            text=text,
            finish_reason="stop" if ended else "length",
            logprobs=logprobs if params.logprobs else None,
        )
        return SimpleNamespace(outputs=[output])


def rendered(question: str, writer: Any = None) -> str:
    return (writer or runs.tokenizer()).apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def roll_out(
    executor: Any, *, label: Any = "5", logprobs: int | None = None, whole: bool = False
) -> list[Any]:
    """Two prompts, a group of rollouts each, all at the same time."""
    engine = Engine(whole=whole)
    params = SamplingParams(max_tokens=10, skip_special_tokens=False, logprobs=logprobs)

    async def run() -> list[Any]:
        return await asyncio.gather(
            *(
                executor.execute(
                    prompt=rendered(question),
                    label=label,
                    sampling_params=params,
                    max_length=LIMIT,
                    hf_tokenizer=runs.tokenizer(),
                    llm_engine=engine,
                )
                for question in runs.QUESTIONS[:2]
                for _ in range(runs.GROUP)
            )
        )

    return asyncio.run(run())


def experiences_of(modules: SimpleNamespace, outputs: list[Any]) -> list[Any]:
    generator = object.__new__(modules.samples)
    return [
        generator._process_response_into_experience(
            output, max_len=LIMIT, truncate_length=LIMIT, max_length=LIMIT
        )
        for output in outputs
    ]


def maker_of(modules: SimpleNamespace, beta: float = 0.0, **changes: Any) -> Any:
    strategy = SimpleNamespace(args=arguments(**changes))
    return modules.maker(None, None, None, None, modules.kl(beta), strategy, runs.tokenizer())


def advantages(maker: Any, experiences: list[Any], kl: float = 0.0) -> list[dict[str, Any]]:
    """One row a rollout, as the rig records them."""
    batches = maker.split_rollout_samples(experiences)
    for batch in batches:
        batch.action_log_probs = torch.zeros(batch.action_mask.shape)
        batch.kl = torch.full(batch.action_mask.shape, kl) * batch.action_mask
    rows = []
    for batch in maker.compute_advantages_and_returns(batches):
        assert checks.KEY not in batch.info
        assert batch.advantages.dtype == torch.float32
        assert torch.equal(batch.advantages, batch.returns)
        for b, index in enumerate(batch.index):
            mask = batch.action_mask[b].bool()
            rows.append(
                {
                    "index": index,
                    "prompt": batch.prompts[b],
                    "ids": batch.sequences[b, 1:][mask].tolist(),
                    "advantages": batch.advantages[b][mask].tolist(),
                    "kl": [kl] * int(mask.sum()),
                }
            )
    return rows


def test_the_version_is_the_one_asked_for() -> None:
    asked = os.environ.get("OPENRLHF_VERSION", "0.11.2")
    assert ".".join(map(str, checks.version())) == asked


@pytest.mark.parametrize(
    ("environ", "changes", "expected"),
    [
        ({}, {}, {}),
        ({}, {"rollout.micro_batch_size": 1}, {}),
        ({}, {"train.dynamic_batch_enable": True}, {}),
        ({"CME_SCALE": "none"}, {}, {"config": CMEConfig(scale="none")}),
        ({"CME_EPS": "0.01"}, {}, {"config": CMEConfig(eps=0.01)}),
        ({"CME_LEVEL": "sequence"}, {}, {"config": CMEConfig(level="sequence")}),
        ({}, {"reward.clip_range": (-0.5, 0.5)}, {"limits": (-0.5, 0.5)}),
        ({}, {"reward.overlong_buffer_len": 6.0}, {"buffer": 6.0}),
        ({"CME_LEVEL": "sequence"}, {"reward.overlong_buffer_len": 6.0},
         {"config": CMEConfig(level="sequence"), "buffer": 6.0}),
        ({}, {"beta": 0.05}, {"beta": 0.05}),
    ],
    ids=["plain", "one", "dynamic", "unscaled", "eps", "sequence", "clip", "overlong",
         "overlong-sequence", "kl"],
)  # fmt: skip
def test_token_level(
    modules: SimpleNamespace,
    environ: dict[str, str],
    changes: dict[str, Any],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    maker = maker_of(modules, **changes)
    outputs = roll_out(adapter.AgentExecutor())
    rows = advantages(maker, experiences_of(modules, outputs), kl=0.3)
    buffer = expected.get("buffer")

    def penalty(row: dict[str, Any]) -> float:
        # At most 10 tokens, of which the last 6 cost: -1 * (n - 4) / 6.
        return -max(len(row["ids"]) - (10 - buffer), 0) / buffer if buffer else 0.0

    want = runs.expected_advantages(
        rows,
        expected.get("config", CMEConfig()),
        beta=expected.get("beta", 0.0),
        limits=expected.get("limits", (-10.0, 10.0)),
        penalty=penalty,
    )
    assert len({len(row["ids"]) for row in rows}) > 2
    assert runs.worst_error(rows, want) <= 1e-5
    assert max(abs(a) for row in rows for a in row["advantages"]) > 0.4


def test_rewards_scores_and_metrics_of_a_rollout(modules: SimpleNamespace) -> None:
    for output, experience in zip(
        outputs := roll_out(adapter.AgentExecutor()), experiences_of(modules, outputs), strict=True
    ):
        ((start, stop),) = output["action_ranges"]
        ids = output["observation_tokens"][start:stop]
        rewards, sequence = runs.naive_rewards(runs.question_of(output["prompt"]), ids)
        assert experience.rewards.shape == (1,)
        assert experience.rewards.item() == pytest.approx(sequence, abs=1e-4)
        assert 0 < experience.scores.item() < 1
        row = experience.info[checks.KEY][0]
        assert row.shape == experience.action_mask[0].shape
        assert not row[~experience.action_mask[0].bool()].isfinite().any()
        got = [None if r != r else r for r in row[experience.action_mask[0].bool()].tolist()]
        assert got == [r if r is None else pytest.approx(r, abs=1e-4) for r in rewards]
        assert experience.info["cme/coverage"].item() == 1.0
        assert experience.info["cme/sequence_reward"].shape == (1,)


def test_a_label_may_carry_the_messages(modules: SimpleNamespace) -> None:
    """What the policy was shown is then of no account to the verifier."""
    other = [{"role": "user", "content": runs.QUESTIONS[3]}]
    for label in (other, json.dumps(other)):
        for output in roll_out(adapter.AgentExecutor(), label=label):
            ((start, stop),) = output["action_ranges"]
            ids = output["observation_tokens"][start:stop]
            assert output["reward"] == pytest.approx(
                runs.naive_rewards(runs.QUESTIONS[3], ids)[1], abs=1e-4
            )


def test_the_policys_log_probs_are_subtracted(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CME_BASELINE", "policy")
    for output in roll_out(adapter.AgentExecutor(), logprobs=1):
        ((start, stop),) = output["action_ranges"]
        ids = output["observation_tokens"][start:stop]
        rewards, _ = runs.naive_rewards(runs.question_of(output["prompt"]), ids)
        got = output["extra_logs"][checks.KEY][start - 1 : stop - 1]
        for t, reward in enumerate(rewards):  # token t was sampled with log-prob -1 - t
            assert got[t] == pytest.approx(
                float("nan") if reward is None else reward + 1 + t, abs=1e-4, nan_ok=True
            )
        assert 0 < output["scores"] < 1
    with pytest.raises(ConfigError, match="is_correction"):
        roll_out(adapter.AgentExecutor())


def test_a_batch_without_token_rewards_is_refused(modules: SimpleNamespace) -> None:
    experiences = experiences_of(modules, roll_out(adapter.AgentExecutor()))
    for experience in experiences:
        del experience.info[checks.KEY]
    with pytest.raises(ConfigError, match="without token rewards"):
        advantages(maker_of(modules), experiences)
    experiences = experiences_of(modules, roll_out(adapter.AgentExecutor()))
    del experiences[1].info[checks.KEY]
    with pytest.raises(InputError, match=r"has shape .* for actions of shape"):
        advantages(maker_of(modules), experiences)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo.advantage.estimator": "rloo"}, "rloo is not what .* Expected group_norm"),
        ({"algo.advantage.estimator": "gae"}, "gae is not what"),
        ({"train.agent_func_path": None}, "no --.*agent_func_path is given"),
        ({"rollout.n_samples_per_prompt": 1}, "n_samples_per_prompt 1 leaves nothing"),
        ({"actor.policy_loss_type": "gspo"}, "gspo multiplies .* credit per token is lost"),
        ({"reward.stop_properly_penalty_coef": 0.5}, "coef 0.5 .* being cut off"),
        ({"reward.stop_properly_penalty_coef": -0.5}, "coef -0.5 .* being cut off"),
    ],
)
def test_what_would_lose_the_credit_is_refused_at_the_start(
    modules: SimpleNamespace, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        maker_of(modules, **changes)


def test_the_reward_function_by_its_file(modules: SimpleNamespace) -> None:
    """Loaded as OpenRLHF loads it; what comes out are tensors of one element."""
    executor = modules.agent.SingleTurnAgentExecutor([str(ADAPTERS / "reward_func.py")])
    outputs = roll_out(executor, whole=True)  # text cannot tell parts of characters apart
    for output, experience in zip(outputs, experiences_of(modules, outputs), strict=True):
        ((start, stop),) = output["action_ranges"]
        ids = output["observation_tokens"][start:stop]
        _, sequence = runs.naive_rewards(runs.question_of(output["prompt"]), ids)
        assert experience.rewards.shape == experience.scores.shape == (1,)
        assert experience.rewards.item() == pytest.approx(sequence, abs=1e-4)
        assert 0 < experience.scores.item() < 1
        assert experience.info["cme/coverage"].tolist() == [1.0]


def test_the_agent_by_its_file(modules: SimpleNamespace) -> None:
    engine = importlib.import_module("openrlhf.trainer.ray.vllm_engine")
    executor = engine._load_agent_executor(str(ADAPTERS / "agent.py"))
    assert isinstance(executor, adapter.AgentExecutor)


@pytest.mark.parametrize(
    ("writer", "end_of_turn", "feedback"),
    [
        (
            runs.tokenizer(),
            "<|im_end|>",
            "\n<|im_start|>user\nAgain, please.<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            runs.gemma(),
            "<end_of_turn>",
            "\n<start_of_turn>user\nAgain, please.<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
    ids=["chatml", "gemma"],
)
@pytest.mark.parametrize("silent", [False, True])
def test_several_turns_with_an_environment(
    modules: SimpleNamespace,
    writer: Any,
    end_of_turn: str,
    feedback: str,
    silent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Feedback is shown to the verifier and not scored; its reward is on every scored token.

    An environment that says nothing leaves two turns next to each other.
    """
    monkeypatch.setenv("CME_ENVIRONMENT_WEIGHT", "0.5")
    feedback = "" if silent else feedback

    class Twice(modules.agent.AgentInstanceBase):
        def __init__(self) -> None:
            self.turns = 0

        async def step(self, states: dict[str, Any], **_: Any) -> dict[str, Any]:
            self.turns += 1
            done = self.turns % 2 == 0
            return {
                "rewards": torch.tensor(3.0 * done),
                "environment_feedback": "" if done else feedback,
                "done": done,
            }

    class EndingEngine(Engine):
        async def generate(self, ids: Any, params: Any, multi_modal_data: Any = None) -> Any:
            self.calls = 1  # every turn ends by itself
            answer = await super().generate(ids, params, multi_modal_data)
            answer.outputs[0].token_ids[-1] = writer.convert_tokens_to_ids(end_of_turn)
            return answer

    executor = adapter.MultiTurnAgentExecutor(Twice)
    question = runs.QUESTIONS[0]
    output = asyncio.run(
        executor.execute(
            prompt=rendered(question, writer),
            label="5",
            sampling_params=SamplingParams(max_tokens=10, skip_special_tokens=False),
            max_length=LIMIT,
            hf_tokenizer=writer,
            llm_engine=EndingEngine(),
        )
    )
    first, second = output["action_ranges"]
    ids = output["observation_tokens"]
    row = [float("nan"), *output["extra_logs"][checks.KEY]]
    asked = [{"role": "user", "content": question}]
    rewards = runs.naive_scores(asked, ids[slice(*first)], writer, end_of_turn)[1]
    want = [float("nan") if r is None else r + 1.5 for r in rewards]  # 0.5 * 3 nats
    assert row[slice(*first)] == pytest.approx(want, abs=1e-4, nan_ok=True)
    assert all(value != value for value in row[first[1] : second[0]])
    said = oracle.without_word_space(runs.SpanTable(writer).decode(ids[slice(*first)])[0])
    conversation = [
        *asked,
        {"role": "assistant", "content": said},
        *([] if silent else [{"role": "user", "content": "Again, please."}]),
    ]
    rewards = runs.naive_scores(conversation, ids[slice(*second)], writer, end_of_turn)[1]
    want = [float("nan") if r is None else r + 1.5 for r in rewards]
    assert row[slice(*second)] == pytest.approx(want, abs=1e-4, nan_ok=True)
    (experience,) = experiences_of(modules, [output])
    assert experience.rewards.item() == pytest.approx(
        experience.info["cme/sequence_reward"].item() + 1.5, abs=1e-5
    )
