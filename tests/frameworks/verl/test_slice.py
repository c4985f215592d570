"""From a batch to advantages through veRL's own reward worker, in this process and without Ray."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import json
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoTokenizer
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.reward import resolve_reward_manager_cls
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl_rig import naive

from cme_reward import ConfigError, InputError
from cme_reward.verl import reward as reward_module
from cme_reward.verl.outputs import KEY, attach, describe, detach
from cme_reward.verl.scorer import Scorer

TEXTS = ["7 plus 8 equals 15.", " The answer is 3", "\n\n 4 apples", "15"]


class Rollouts:
    """Four responses to two prompts, as veRL lays them out for a colocated reward."""

    def __init__(self, policy: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(policy)
        self.content = ["7 plus 8 equals", "Anna has 4 apples."]
        eos = self.tokenizer.eos_token_id
        self.ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
        self.ids[0].append(eos)
        self.ids[3].append(eos)
        self.prompts = [
            self.tokenizer.apply_chat_template(
                self.messages(i), add_generation_prompt=True, return_dict=False
            )
            for i in range(4)
        ]

    def messages(self, i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.content[i // 2]}]

    def output(self, i: int, **fields: Any) -> Any:
        """An agent loop's output, as far as the adapter looks at it."""
        return SimpleNamespace(
            **{
                "prompt_ids": self.prompts[i],
                "response_ids": self.ids[i],
                "response_mask": [1] * len(self.ids[i]),
                "response_logprobs": [-0.5] * len(self.ids[i]),
                "multi_modal_data": None,
                "extra_fields": {},
                **fields,
            }
        )

    def batch(self, notes: bool = True, masks: list[list[int]] | None = None) -> DataProto:
        """Prompts padded on the right, as veRL's colocated route does."""
        pad = self.tokenizer.pad_token_id

        def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
            width = max(map(len, rows))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            attended = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
            return ids, torch.tensor(attended)

        prompts, prompt_mask = padded(self.prompts)
        responses, response_mask = padded(self.ids)
        raw = np.empty(4, dtype=object)
        for i in range(4):
            given = {} if masks is None else {"response_mask": masks[i]}
            told = describe([self.output(i, **given)], validate=False, logprobs=True)
            raw[i] = attach(self.messages(i), told) if notes else self.messages(i)
        return DataProto.from_dict(
            tensors={
                "prompts": prompts,
                "responses": responses,
                "attention_mask": torch.cat([prompt_mask, response_mask], dim=1),
            },
            non_tensors={"raw_prompt": raw, "uid": np.array(["a", "a", "b", "b"], dtype=object)},
        )


@pytest.fixture
def rollouts(policy: Any) -> Rollouts:
    return Rollouts(policy)


def scores(config: Any, batch: DataProto) -> list[dict[str, Any]]:
    return asyncio.run(RewardLoopWorker(config).compute_score_batch(batch))


def test_the_handle_that_keeps_the_scorer_alive_is_kept(
    config: Any, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends a named actor with the handle of who made it; those who find it do not keep it."""
    made = []

    class Handle:
        def __init__(self) -> None:
            made.append(self)
            self.score = SimpleNamespace(remote=self._score)

        async def _score(self, request: Any) -> dict[str, Any]:
            rewards = np.zeros(len(request.ids), np.float32)
            return {"rewards": rewards, "sequence": 0.0, "info": {}}

    async def ready(handle: Handle, settings: Any) -> None:
        await asyncio.sleep(0.01)  # long enough for all to have asked

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(reward_module, "scorer_actor", lambda *_: Handle())
    monkeypatch.setattr(reward_module, "ready", ready)
    manager = reward_module.CMEReward(config, rollouts.tokenizer)
    batch = rollouts.batch()

    async def main() -> None:
        await asyncio.gather(*(manager.run_single(batch[i : i + 1]) for i in range(4)))

    asyncio.run(main())
    assert len(made) == 1
    assert manager._scorer is made[0]


def test_rewards_and_advantages_are_those_computed_by_hand(config: Any, rollouts: Rollouts) -> None:
    batch = rollouts.batch()
    outputs = scores(config, batch)
    rm_scores = resolve_reward_manager_cls(config).assemble_rm_scores(
        batch, [out["reward_score"] for out in outputs]
    )
    verifier = naive.NaiveVerifier()
    expected = [
        naive.token_rewards(
            verifier, rollouts.tokenizer, rollouts.content[i // 2], ids, [1] * len(ids)
        )
        for i, ids in enumerate(rollouts.ids)
    ]
    for row, (rewards, _) in zip(rm_scores, expected, strict=True):
        np.testing.assert_allclose(row[: len(rewards)], rewards, atol=1e-5)
        assert not row[len(rewards) :].any()

    batch.batch["token_level_rewards"] = batch.batch["token_level_scores"] = rm_scores
    batch.batch["response_mask"] = batch.batch["attention_mask"][:, -rm_scores.shape[1] :]
    got = compute_advantage(batch, adv_estimator="cme_grpo", config=config.algorithm)
    wanted = naive.advantages(
        [rewards for rewards, _ in expected], [mask for _, mask in expected], list("aabb"), 0.1
    )
    for row, want in zip(got.batch["advantages"], wanted, strict=True):
        np.testing.assert_allclose(row[: len(want)], want, atol=1e-5)
    assert (got.batch["advantages"] != 0).sum() >= 6

    info = outputs[0]["reward_extra_info"]
    assert info["cme_coverage"] == 1.0
    assert all(type(value) is float for value in info.values())
    assert len({tuple(out["reward_extra_info"]) for out in outputs}) == 1  # veRL needs equal keys


def test_tool_tokens_are_conditioned_on_and_not_scored(config: Any, rollouts: Rollouts) -> None:
    masks = [[1] * len(ids) for ids in rollouts.ids]
    masks[0][2:4] = [0, 0]
    first = scores(config, rollouts.batch(masks=masks))[0]["reward_score"]
    verifier = naive.NaiveVerifier()
    want, _ = naive.token_rewards(
        verifier, rollouts.tokenizer, rollouts.content[0], rollouts.ids[0], masks[0]
    )
    np.testing.assert_allclose(first, want, atol=1e-5)
    assert first[2:4] == [0, 0]
    assert first[4] != 0


def test_sequence_level_is_one_number_on_the_last_token(config: Any, rollouts: Rollouts) -> None:
    config.algorithm.adv_estimator = "grpo"
    config.reward.cme.level = "sequence"
    for i, out in enumerate(scores(config, rollouts.batch())):
        rewards = out["reward_score"]
        assert len(rewards) == len(rollouts.ids[i])
        assert [t for t, r in enumerate(rewards) if r] == [len(rewards) - 1]
        assert rewards[-1] == pytest.approx(out["reward_extra_info"]["cme_sequence_reward"])


def test_policy_baseline_subtracts_the_samplers_logprobs(config: Any, rollouts: Rollouts) -> None:
    plain = scores(config, rollouts.batch())[0]["reward_score"]
    config.reward.cme.baseline = "policy"
    less = scores(config, rollouts.batch())[0]["reward_score"]
    scored = [r != 0 for r in plain]
    np.testing.assert_allclose(less, np.where(scored, np.array(plain) + 0.5, 0), atol=1e-6)


def test_an_id_that_the_tokenizer_lacks_is_masked(config: Any, rollouts: Rollouts) -> None:
    """Models pad their vocabulary; such an id must not end a run."""
    rollouts.ids[1][1] = len(rollouts.tokenizer) + 3
    rewards = scores(config, rollouts.batch())[1]["reward_score"]
    assert rewards[1] == 0
    assert np.isfinite(rewards).all()


def test_turns_without_a_mask_are_refused(config: Any, rollouts: Rollouts) -> None:
    batch = rollouts.batch(notes=False)
    assert len(scores(config, batch)) == 4  # one turn: all of it was sampled
    batch.non_tensor_batch["__num_turns__"] = np.array([4, 4, 4, 4])
    with pytest.raises(InputError, match="CMEAgentLoopManager"):
        scores(config, batch)


def test_later_outputs_at_the_sequence_level_less_the_policys_own(
    config: Any, rollouts: Rollouts
) -> None:
    """The mean over both turns of what the verifier gives them beyond the policy."""
    config.algorithm.adv_estimator = "grpo"
    config.reward.cme.level, config.reward.cme.baseline = "sequence", "policy"
    said, tool = rollouts.ids[1], rollouts.tokenizer.encode(" tool says 7")
    first = rollouts.output(0, response_ids=said, response_mask=[1] * len(said),
                            response_logprobs=[-0.25] * len(said))  # fmt: skip
    rollouts.prompts[0] = rollouts.prompts[0] + said + tool
    notes = describe([first, rollouts.output(0)], validate=False, logprobs=True)
    batch = rollouts.batch()
    batch.non_tensor_batch["raw_prompt"][0] = attach(rollouts.messages(0), notes)
    got = scores(config, batch)[0]["reward_score"][-1]
    verifier, content = naive.NaiveVerifier(), rollouts.content[0]
    said_first = TEXTS[1].removeprefix(" ")
    _, one = verifier.logprobs(content, "", said_first, end=False)
    _, two = verifier.logprobs(content, said_first + " tool says 7", TEXTS[0], end=True)
    own = -0.25 * len(said) - 0.5 * len(rollouts.ids[0])
    want = (one.sum() + two.sum() - own) / (len(one) + len(two))
    assert got == pytest.approx(want, abs=1e-5)


def test_the_policys_template_is_the_one_that_verl_gives_it(config: Any) -> None:
    config.data.apply_chat_template_kwargs = {"mood": "(calm) "}
    config.actor_rollout_ref.model.custom_chat_template = (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {{ mood }}{% endif %}"
    )
    reader = Scorer(config)._cme.generator.reader
    assert reader.prefill.text == "(calm) "
    ids = reader.tokenizer.encode("<|im_end|>\nTOOL: 7<|im_end|>\nASSISTANT: (calm) ")
    assert reader.read(np.array(ids)).messages == [{"role": "tool", "content": "7"}]


def test_a_row_that_is_none_of_the_outputs_is_refused(config: Any, rollouts: Rollouts) -> None:
    batch = rollouts.batch()
    batch.batch["responses"][0, 0] += 1
    with pytest.raises(InputError, match="none of its trajectory's 1 outputs"):
        scores(config, batch)


def test_a_number_per_response_cannot_be_assembled(config: Any, rollouts: Rollouts) -> None:
    batch = rollouts.batch()
    with pytest.raises(InputError, match="one reward for each token"):
        resolve_reward_manager_cls(config).assemble_rm_scores(batch, [0.5] * 4)


def test_the_manager_pickles(config: Any, rollouts: Rollouts) -> None:
    manager = RewardLoopWorker(config).reward_manager
    again = pickle.loads(pickle.dumps(manager))
    batch = rollouts.batch()
    both = [asyncio.run(m.run_single(batch[:1]))["reward_score"] for m in (manager, again)]
    assert both[0] == both[1]


def test_the_manager_refuses_a_bad_configuration(config: Any) -> None:
    config.algorithm.adv_estimator = "rloo"
    with pytest.raises(ConfigError, match="credit per token is lost"):
        RewardLoopWorker(config)


def test_later_outputs_are_read_after_the_earlier_ones(rollouts: Rollouts) -> None:
    prompt, said = rollouts.prompts[0], rollouts.ids[1]
    tool = rollouts.tokenizer.encode(" tool says 7", add_special_tokens=False)
    first = rollouts.output(0, response_ids=said, response_mask=[1] * len(said))
    second = rollouts.output(0, prompt_ids=prompt + said + tool)
    notes = describe([first, second], validate=True, logprobs=False)
    assert notes[0]["context"] == []
    assert notes[1]["context"] == said + tool
    assert notes[1]["sampled"] == [1] * len(said) + [0] * len(tool)
    assert notes[1]["validate"] is True
    assert "logprobs" not in notes[1]
    # An output's rewards are those of the trajectory up to its end, and so is what is subtracted.
    first.response_logprobs, second.response_logprobs = [-0.25] * len(said), [-0.5] * 3
    logprobs = describe([first, second], validate=False, logprobs=True)[1]["logprobs"]
    assert logprobs == [-0.25] * len(said) + [0.0] * len(tool) + [-0.5] * 3

    other = rollouts.output(2)
    with pytest.raises(InputError, match=r"output 1 .* extra_fields\['cme_prompt'\]"):
        describe([first, other], validate=False, logprobs=False)
    other.extra_fields["cme_prompt"] = "Anna has 4 apples."
    assert describe([first, other], validate=False, logprobs=False)[1]["prompt"]
    picture = rollouts.output(0, multi_modal_data={"images": ["x"]})
    with pytest.raises(InputError, match="images"):
        describe([picture], validate=False, logprobs=False)


def test_notes_leave_the_messages_as_they_were(rollouts: Rollouts) -> None:
    messages = [{"role": "system", "content": "s"}, *rollouts.messages(0)]
    notes = describe([rollouts.output(0)], validate=False, logprobs=True)
    carried = attach(messages, notes)
    assert json.loads(carried[-1][KEY]) == notes
    assert detach(carried) == (messages, notes)
    assert detach(messages) == (messages, [])


def test_a_tool_call_in_the_chat_template_as_verls_tool_agent_writes_it(
    config: Any, rollouts: Rollouts
) -> None:
    """Tokens and mask from veRL's own builder; what the verifier reads, in its own template."""
    tokenizer, messages = rollouts.tokenizer, rollouts.messages(0)
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen2")
    call = ' <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    turns = [
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        for text in (call, " The answer is 15.")
    ]
    prompt = builder.build_initial_tokens(messages, tools=None)
    merged = builder.merge_assistant_tokens(prompt, turns[0])
    mask, _ = builder.align_response_metadata(merged, [], None)
    said = [*messages, {"role": "assistant", "content": call}]
    answered = [*said, {"role": "tool", "content": "15"}]
    merged = builder.merge_context_tokens(said, answered, merged.token_ids, tools=None)
    mask, _ = builder.align_response_metadata(merged, mask, None)
    merged = builder.merge_assistant_tokens(merged.token_ids, turns[1])
    mask, _ = builder.align_response_metadata(merged, mask, None)
    assert merged.token_ids[: len(prompt)] == prompt == rollouts.prompts[0]
    rollouts.ids[0] = merged.token_ids[len(prompt) :]
    assert sum(mask) == len(turns[0]) + len(turns[1]) < len(mask)

    masks = [mask, *([1] * len(ids) for ids in rollouts.ids[1:])]
    rewards = np.array(scores(config, rollouts.batch(masks=masks))[0]["reward_score"])
    assert not rewards[np.array(mask) == 0].any()
    verifier = naive.NaiveVerifier()
    said = ""
    for text, at in (
        (call.removeprefix(" "), slice(0, len(turns[0]))),
        ("The answer is 15.", slice(len(mask) - len(turns[1]), None)),
    ):
        _, logp = verifier.logprobs(rollouts.content[0], said, text, end=True)
        scored = rewards[at]
        assert scored[-1] == pytest.approx(logp[-1], abs=1e-5)
        assert scored.sum() == pytest.approx(logp.sum(), abs=1e-4)
        said += f"{text}<|end|><|user|>15<|assistant|>"
