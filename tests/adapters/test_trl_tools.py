"""TRL's own tool calls, in the chat template of Llama 3.1: two turns, and what a tool said between.

The policy is untrained and calls no tool. A STAND-IN writes the calls of the first turn
(`call_tools`); everything else is TRL's: it parses them, calls the tool, renders what it said, and
samples the second turn from the policy.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import trl_tiny as tiny
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version
from trl.chat_template_utils import llama3_1_chat_template, qwen3_chat_template

from cme_reward.trl import CMEGRPOTrainer, cme_reward_func

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        transformers_version < "5", reason="TRL takes tools with transformers 5 and newer only"
    ),
]
MARKUP = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
OPENING = "<|start_header_id|>ipython<|end_header_id|>\n\n"
CLOSING = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
CALLS = [  # of the four rollouts of a prompt; the third one is the policy's own
    '{"name": "say", "parameters": {"words": "Five."}}',
    '{"name": "say", "parameters": {"words": "One line\\nand \\"another\\"."}}',
    None,
    '{"name": "shout", "parameters": {"words": "no such tool"}}',
]


def say(words: str) -> str:
    """
    Say something.

    Args:
        words: What to say.
    """
    return words


@pytest.fixture(scope="module")
def llama() -> Any:
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKUP})
    made.bos_token, made.eos_token = MARKUP[0], MARKUP[-1]
    made.chat_template = llama3_1_chat_template
    return made


@pytest.fixture
def policy(llama: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(llama),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=llama.eos_token_id,
            pad_token_id=llama.pad_token_id,
            bos_token_id=llama.bos_token_id,
        )
    )


def call_tools(made: Any, tokenizer: Any) -> None:
    """Put calls in the place of what the policy samples first."""
    sample = made._generate_single_turn

    def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        sampled, logprobs = sample(prompt_ids, *args, **kwargs)
        calls = itertools.cycle(CALLS)
        if any(CALLS[0] in tokenizer.decode(ids) for ids in prompt_ids):  # that was the first turn
            calls = itertools.repeat(None)
        ended = [
            None if call is None else tokenizer.encode(call + MARKUP[-1], add_special_tokens=False)
            for _, call in zip(sampled, calls, strict=False)
        ]
        return [call or own for own, call in zip(sampled, ended, strict=True)], logprobs

    made._generate_single_turn = generate


class Shown:
    """A verifier that keeps what it is asked: prompts and responses, as ids."""

    def __init__(self, verifier: Any) -> None:
        self.name, self.tokenizer = verifier.name, verifier.tokenizer
        self.max_length, self.vocab_size = verifier.max_length, verifier.vocab_size
        self.verifier = verifier
        self.asked: list[tuple[list[int], list[int]]] = []

    def logprobs(self, prompts: Any, responses: Any) -> Any:
        pairs = zip(prompts, responses, strict=True)
        self.asked += [(list(prompt), list(response)) for prompt, response in pairs]
        return self.verifier.logprobs(prompts, responses)


def turns(
    tokenizer: Any, question: str, ids: list[int], sampled: list[bool]
) -> list[tuple[slice, list[dict[str, str]]]]:
    """Where each sampled turn is, and the messages before it."""
    messages = [{"role": "user", "content": question}]
    found, start = [], 0
    for own, run in itertools.groupby(sampled):
        stop = start + len(list(run))
        text = tokenizer.decode(ids[start:stop])
        if own:
            found.append((slice(start, stop), list(messages)))
            said = oracle.without_word_space(
                tokenizer.decode(ids[start:stop], skip_special_tokens=True)
            )
            messages.append({"role": "assistant", "content": said})
        else:
            assert text.startswith(OPENING), text
            assert text.endswith(CLOSING), text
            # Llama's template writes what a tool said as JSON.
            words = json.loads(text[len(OPENING) : -len(CLOSING)])
            messages.append({"role": "tool", "content": words})
        start = stop
    return found


def test_two_turns_and_what_a_tool_said(llama: Any, policy: Any, tmp_path: Path) -> None:
    shown = Shown(tiny.verifier())
    made = CMEGRPOTrainer(
        policy,
        cme_reward_func(shown, llama),
        tiny.arguments(
            tmp_path,
            max_completion_length=120,
            generation_kwargs={"sequence_bias": [[[llama.eos_token_id], 5.0]]},
        ),
        Dataset.from_list(tiny.CHAT),
        processing_class=llama,
        tools=[say],
    )
    call_tools(made, llama)
    received = tiny.train(made)
    rows = [row for inputs in received for row in rows_of(llama, inputs)]
    assert len(rows) == 8
    asked, worst, heard = [], 0.0, set()
    for group in tiny.by_prompt(rows):
        rewards = []
        for row in group:
            of_row: list[float | None] = [None] * len(row["ids"])
            for where, messages in turns(llama, row["prompt"], row["ids"], row["sampled"]):
                heard |= {m["content"] for m in messages if m["role"] == "tool"}
                ids = row["ids"][where]
                of_row[where], _ = tiny.naive_rewards(messages, ids, writer=llama)
                asked.append(verifiers_own(messages, llama.decode(ids, skip_special_tokens=True)))
            rewards.append(of_row)
        assert [sum(row["sampled"]) < len(row["ids"]) for row in group].count(True) == 3
        worst = max(worst, tiny.worst_in_nats(group, rewards))
        assert max(abs(a) for row in group for a in row["advantages"]) > 0.5
    assert worst <= 1e-5
    assert heard == {"Five.", 'One line\nand "another".', str({"error": "Tool shout not found."})}
    # The verifier's own chat template over exactly those messages, and nothing of Llama's.
    read = [tiny.verifier().tokenizer.decode(p + r) for p, r in shown.asked]
    assert sorted(text.removesuffix("<|end|>") for text in read) == sorted(asked)
    assert not [mark for mark in ("header_id", "eot_id", "ipython") if mark in "".join(read)]


def test_a_template_is_read_with_what_trl_gives_it(tmp_path: Path) -> None:
    """Qwen3's without thinking, in whose place TRL puts one that leaves earlier turns alone."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", qwen3_chat_template
    reward = cme_reward_func(tiny.verifier(), tokenizer)
    assert reward.scorer.generator.reader.prefill.text == ""
    made = CMEGRPOTrainer(
        tiny.policy(len(tokenizer)),
        reward,
        tiny.arguments(tmp_path, chat_template_kwargs={"enable_thinking": False}),
        Dataset.from_list(tiny.CHAT),
        processing_class=tokenizer,
        tools=[say],
    )
    assert made.chat_template not in (None, qwen3_chat_template)
    ids = made._get_tool_suffix_ids([{"role": "tool", "name": "say", "content": "Five."}])
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    read = made._cme.generator.reader.read(np.array(ids))
    assert read.messages == [{"role": "tool", "content": "Five."}]
    assert read.prefill.text == made._cme.generator.reader.prefill.text == "<think>\n\n</think>\n\n"


def rows_of(tokenizer: Any, inputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One dictionary a completion, as the loss received it."""
    rows = []
    for b, mask in enumerate(inputs["completion_mask"].bool()):
        n = int(mask.sum())
        prompt = tokenizer.decode(inputs["prompt_ids"][b][inputs["prompt_mask"][b].bool()])
        assert not inputs["advantages"][b, n:].any()
        rows.append(
            {
                "prompt": prompt.removesuffix(CLOSING).rpartition("\n\n")[2],
                "ids": inputs["completion_ids"][b, :n].tolist(),
                "sampled": inputs["tool_mask"][b, :n].bool().tolist(),
                "advantages": inputs["advantages"][b, :n].tolist(),
            }
        )
    return rows


def verifiers_own(messages: list[dict[str, str]], said: str) -> str:
    """What the verifier should read: its own template, and the response."""
    reader = tiny.verifier().tokenizer
    prompt = reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt + oracle.without_word_space(said)
