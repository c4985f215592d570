"""Every reward in real trainings with TRL, against a computation of its own from the ids."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_tiny as tiny
from datasets import Dataset
from trl.trainer.grpo_trainer import GRPOTrainer

from cme_reward import CMEConfig, ConfigError
from cme_reward.comparators import REWARDS, load_reward, random_verifier, self_verifier
from cme_reward.trl import cme_reward_func

pytestmark = pytest.mark.slow

SCALARS = ["rent", "em-rl-token", "em-rl-sequence", "intuitor", "ttrl", "evol-rl", "format-length",
           "rlme"]  # fmt: skip
VOCABULARY = len(tiny.tokenizer())


def options_of(name: str) -> dict[str, Any]:
    """Of rewards that need some; untrained rollouts hardly agree on an answer."""
    lengths = {"answer": tiny.text_length}
    return {
        "ttrl": lengths,
        "evol-rl": lengths,
        "format-length": {"format": "e.*e", "longest": 20, "best": 0.25},
        "self": {"policy": tiny.policy()},
    }.get(name, {})


def train(made: Any) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """The inputs of every loss, and the policy as it was when it sampled each step's rollouts."""
    policies = []
    generate = made._generate_and_score_completions

    def spy(inputs: Any) -> Any:
        policy = tiny.policy()
        policy.load_state_dict(made.model.state_dict())
        policies.append(policy.eval())
        return generate(inputs)

    made._generate_and_score_completions = spy
    return tiny.train(made, in_order=True), policies


def sharpened(made: Any) -> Any:
    """Untrained, a policy is nearly uniform, and its entropies agree to the third digit."""
    for weight in made.model.parameters():
        if weight.ndim > 1:
            weight.data *= 16
    return made


def own_view(row: dict[str, Any], policy: Any, temperature: float) -> list[torch.Tensor]:
    """The distribution each token was drawn from, as log-probs, by a pass over one completion."""
    prompt = tiny.tokenizer()(row["prompt"] + "\n")["input_ids"]
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + row["ids"]])).logits[0].double() / temperature
    return list(logits.log_softmax(-1)[len(prompt) - 1 : -1])


def yes(row: dict[str, Any]) -> float:
    """The evaluator's log-prob of "Yes"."""
    reader = tiny.verifier().tokenizer
    response = tiny.tokenizer().decode(row["ids"], skip_special_tokens=True)
    content = (
        "Below are a request and a response to it.\n\n# Request\n"
        f"{row['prompt']}\n\n# Response\n{response}\n\n# Question\n"
        "Is the answer correct? Reply with Yes or No, and nothing else."
    )
    prompt = reader.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return sum(tiny.verifier_logprobs(prompt, reader.encode("Yes", add_special_tokens=False)))


def novelties(texts: list[str], agrees: list[bool]) -> list[float]:
    """Evol-RL's reward of rollouts that all have an answer, in loops."""

    def like(a: str, b: str) -> float:
        first, second = ([t[k : k + 3] for k in range(max(1, len(t) - 2))] for t in (a, b))
        shared = sum(first.count(p) * second.count(p) for p in set(first))
        sizes = (math.sqrt(sum(x.count(p) ** 2 for p in set(x))) for x in (first, second))
        return shared / math.prod(sizes)

    def novelty(k: int) -> float:
        others = [j for j in range(len(texts)) if j != k]
        mean = statistics.fmean(like(texts[k], texts[j]) for j in others if agrees[j] == agrees[k])
        return 1 - (mean + max(like(texts[k], texts[j]) for j in others)) / 2

    rewards = []
    for k, agree in enumerate(agrees):
        side = [j for j in range(len(texts)) if agrees[j] == agree]
        share = 1.0
        if len(side) > 1:
            low, high = min(map(novelty, side)), max(map(novelty, side))
            share = (novelty(k) - low) / (high - low) if high - low > 1e-9 else 0.5
        rewards.append((0.5 if agree else -1.0) + share / 2)
    return rewards


def scalar(name: str, group: list[dict[str, Any]], policy: Any, temperature: float) -> list[float]:
    """The rewards of the rollouts of one prompt."""
    if name == "rlme":
        return [yes(row) for row in group]
    if name == "format-length":
        rewards = []
        for row in group:
            x = len(row["ids"]) / 20
            share = 1 - (1 - 4 * x) ** 2 if x <= 0.25 else 1 - 2 * ((x - 0.25) / 0.75) ** 2
            has = tiny.tokenizer().decode(row["ids"], skip_special_tokens=True).count("e") > 1
            rewards.append(1 + share if has else min(0.0, share))
        return rewards
    if name in ("ttrl", "evol-rl"):
        texts = [tiny.tokenizer().decode(r["ids"], skip_special_tokens=True) for r in group]
        votes = [tiny.text_length(text) for text in texts]
        most = max(votes.count(vote) for vote in votes)
        as_sampled = sorted(range(len(group)), key=lambda k: group[k]["position"])
        winner = next(votes[k] for k in as_sampled if votes.count(votes[k]) == most)
        agrees = [vote == winner for vote in votes]
        return novelties(texts, agrees) if name == "evol-rl" else [float(a) for a in agrees]
    rewards = []
    for row in group:
        views = own_view(row, policy, temperature)
        entropies = [-(x.exp() * x).sum().item() for x in views]
        own = [x[i].item() for x, i in zip(views, row["ids"], strict=True)]
        rewards.append(
            {
                "rent": -statistics.fmean(entropies),
                "em-rl-token": -math.fsum(entropies),
                "em-rl-sequence": math.fsum(own),
                "intuitor": statistics.fmean(
                    -(x + math.log(VOCABULARY)).mean().item() for x in views
                ),
            }[name]
        )
    return rewards


@pytest.mark.parametrize(
    ("name", "temperature"), [*((name, 1.0) for name in SCALARS), ("rent", 0.8), ("intuitor", 0.8)]
)
def test_two_steps(name: str, temperature: float, tmp_path: Path) -> None:
    made = tiny.trainer(
        tmp_path,
        reward=name,
        reward_options=options_of(name),
        max_steps=2,
        temperature=temperature,
    )
    received, policies = train(sharpened(made))
    assert len(received) == 4
    assert len(policies) == 2
    for step, log in enumerate(made.state.log_history[:2]):
        rows = tiny.rows_of(received[2 * step : 2 * step + 2])
        rewards, largest = [], 0.0
        for group in tiny.by_prompt(rows):
            found = scalar(name, group, policies[step], temperature)
            rewards += found
            expected = tiny.normalised(found, scale="std", eps=0.1)  # type: ignore[arg-type]
            largest = max([largest, *map(abs, expected)])
            for row, advantage in zip(group, expected, strict=True):
                # One number for every token of the response, as GRPO gives it.
                assert row["advantages"] == pytest.approx([advantage] * len(row["ids"]), abs=1e-3)
        assert largest > 0.3
        assert log[f"rewards/{name}/mean"] == pytest.approx(statistics.fmean(rewards), abs=1e-4)
        assert log["reward_std"] == pytest.approx(statistics.stdev(rewards), abs=1e-4)
        assert f"{name}/repetition" in log


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["self", "random"])
def test_controls(name: str, level: Any, tmp_path: Path) -> None:
    """Cross-model entropy with another verifier: the policy's first weights, or untrained ones."""
    made = tiny.trainer(
        tmp_path,
        CMEConfig(level=level),
        reward=name,
        reward_options=options_of(name),
        max_steps=2,
    )
    received, policies = train(made)
    by = (
        self_verifier(policies[0], tiny.tokenizer())
        if name == "self"
        else random_verifier(tiny.verifier())
    )
    for step in (received[:2], received[2:]):
        rows = tiny.rows_of(step)
        expected = tiny.expected_advantages(rows, CMEConfig(level=level), by)
        assert tiny.worst_error(rows, expected) <= 1e-4
        assert max(abs(value) for row in expected for value in row) > 0.1


def test_parts_per_token(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, reward="rent", reward_options={"per_token": True})
    received, (policy,) = train(sharpened(made))
    rows = tiny.rows_of(received)
    for group in tiny.by_prompt(rows):
        parts = [[(x.exp() * x).sum().item() for x in own_view(row, policy, 1.0)] for row in group]
        for t in range(max(map(len, parts))):
            column = [row[t] if t < len(row) else None for row in parts]
            expected = tiny.normalised(column, scale="std", eps=0.1)
            for row, advantage in zip(group, expected, strict=True):
                if t < len(row["ids"]):
                    assert row["advantages"][t] == pytest.approx(advantage, abs=1e-3)


def test_two_processes_vote_together(tmp_path: Path) -> None:
    of_ranks = tiny.two_processes(tmp_path, "ttrl")
    rows = [row for received, _ in of_ranks for row in tiny.rows_of(received)]
    for k, row in enumerate(rows):
        row["position"] += k // 2 * 2  # two of each process
    (group,) = tiny.by_prompt(rows)
    assert len(group) == 4
    rewards = scalar("ttrl", group, None, 1.0)
    # Each process by itself would have found other majorities.
    halves = [scalar("ttrl", half, None, 1.0) for half in (group[:2], group[2:])]
    assert rewards != halves[0] + halves[1]
    expected = tiny.normalised(rewards, scale="std", eps=0.1)  # type: ignore[arg-type]
    for row, advantage in zip(group, expected, strict=True):
        assert row["advantages"] == pytest.approx([advantage] * len(row["ids"]), abs=1e-5)
    for _, (log,) in of_ranks[:1]:
        assert log["rewards/ttrl/mean"] == pytest.approx(statistics.fmean(rewards), abs=1e-5)


@pytest.mark.parametrize("name", ["ttrl", "rlme"])
def test_the_stock_trainer_takes_what_needs_no_policy(name: str, tmp_path: Path) -> None:
    reward = cme_reward_func(tiny.verifier(), tiny.tokenizer(), reward=name, **options_of(name))
    stock = GRPOTrainer(
        tiny.policy(),
        reward,  # type: ignore[arg-type]
        tiny.arguments(tmp_path),
        Dataset.from_list(tiny.CHAT),
        processing_class=tiny.tokenizer(),
    )
    rows = tiny.rows_of(tiny.train(stock, in_order=True))
    rewards = [r for group in tiny.by_prompt(rows) for r in scalar(name, group, None, 1.0)]
    log = stock.state.log_history[0]
    assert log[f"rewards/{name}/mean"] == pytest.approx(statistics.fmean(rewards), abs=1e-4)


@pytest.mark.parametrize("name", ["rent", "em-rl-token", "em-rl-sequence", "intuitor"])
def test_the_stock_trainer_hands_over_no_distributions(name: str) -> None:
    reward = cme_reward_func(None, tiny.tokenizer(), reward=name)
    with pytest.raises(ConfigError, match=f"the reward '{name}' is made of the policy's"):
        reward(prompts=["p"], completion_ids=[[400]])


def test_a_comparator_beside_other_rewards(tmp_path: Path) -> None:
    """A = w A_rent + V A_trl, as with cross-model entropy."""

    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    made = tiny.trainer(tmp_path, reward="rent", after=(length,), reward_weights=[2.0, 0.5])
    received, (policy,) = train(sharpened(made))
    rows = tiny.rows_of(received)
    for group in tiny.by_prompt(rows):
        own = tiny.normalised(
            scalar("rent", group, policy, 1.0),  # type: ignore[arg-type]
            scale="std",
            eps=0.1,
        )
        lengths = [len(row["ids"]) for row in group]
        spread = statistics.stdev(lengths) * 0.5 + 1e-4
        for row, a in zip(group, own, strict=True):
            other = 0.5 * (len(row["ids"]) - statistics.fmean(lengths)) * 0.5 / spread
            assert row["advantages"] == pytest.approx([2 * a + other] * len(row["ids"]), abs=1e-3)


def test_an_id_that_only_the_model_has_is_left_out() -> None:
    size = len(tiny.tokenizer())
    reward = cme_reward_func(None, tiny.tokenizer(), reward="ttrl", answer=len)
    assert reward(["p"] * 3, [[400, size + 3], [400], [500, 501, 502]])[0] == 1.0


def test_all_rewards_are_covered_here() -> None:
    assert set(REWARDS) == {"cme", *SCALARS, "self", "random"}
    for name in SCALARS:
        assert load_reward(name, tiny.tokenizer(), verifier=tiny.verifier()).config == CMEConfig(
            level="sequence"
        )
