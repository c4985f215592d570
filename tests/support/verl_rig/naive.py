"""The rewards and advantages of a run, computed again from ids: loops, for ASCII text alone."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import torch
from tokenizer_kinds import SHARED
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import cme_reward.verifiers

EMBEDDED = Path(cme_reward.verifiers.__file__).parent / "embedded"
TRAINED = SHARED / "models" / "stories260K" if SHARED else EMBEDDED
"""A base model that others trained, with a SentencePiece tokenizer; the embedded chat model where
there is none."""

Message = dict[str, str]


class NaiveVerifier:
    """A small model, asked by one plain forward pass per response.

    In float64, as the runs compared with: one forward pass in float32 is some 1e-5 from another.
    """

    def __init__(self, path: Path = EMBEDDED) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.asked: list[list[int]] = []
        """Prompts and responses, as ids."""
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        # A text that goes on has no space of SentencePiece's in front of it.
        self.going_on: Any = AutoTokenizer.from_pretrained(path)
        backend = json.loads(self.going_on.backend_tokenizer.to_str())
        steps = (backend["normalizer"] or {}).get("normalizers", [])
        steps[:] = [step for step in steps if step["type"] != "Prepend"]
        self.going_on._tokenizer = Tokenizer.from_str(json.dumps(backend))

    @torch.no_grad()
    def logprobs(
        self, content: str | list[Message], said: str, text: str, *, end: bool
    ) -> tuple[list[tuple[int, int]], Any]:
        """Character spans of the text's tokens, and log-probs: one more for the end of turn."""
        if self.tokenizer.chat_template:
            messages = content if isinstance(content, list) else [user(content)]
            chat = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            prompt = self.tokenizer.encode(chat, add_special_tokens=False)
        else:
            prompt = self.tokenizer.encode(content)
        prompt += self.going_on.encode(said, add_special_tokens=False)
        encoded = self.going_on(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"] + ([self.tokenizer.eos_token_id] if end else [])
        self.asked.append(prompt + ids)
        logits_SV = self.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        found = [float(logits_SV[len(prompt) - 1 + s, i]) for s, i in enumerate(ids)]
        return encoded["offset_mapping"], np.array(found)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def token_rewards(
    verifier: NaiveVerifier,
    policy: Any,
    content: str,
    ids: list[int],
    sampled: list[int],
    observe: Callable[[str], Message] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and mask of one response.

    What was not sampled is plain text inside the turn, or, where `observe` is given, a message: the
    one with which the environment answers what was said.
    """
    messages = [user(content)]
    rewards, mask = np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
    special = {i for i, token in policy.added_tokens_decoder.items() if token.special}
    texts = ["" if i >= len(policy) or i in special else policy.decode([i]) for i in ids]
    said, t = "", 0
    while t < len(ids):
        stop = t
        while stop < len(ids) and sampled[stop] == sampled[t]:
            stop += 1
        text = "".join(texts[t:stop])
        is_chat = bool(verifier.tokenizer.chat_template)
        shown = oracle.without_word_space(text, said) if is_chat else text
        if sampled[t]:
            last = stop - 1
            end = ids[last] == policy.eos_token_id
            before = content if observe is None else messages
            spans, logp = verifier.logprobs(before, said, shown, end=end)
            start = 0
            for k in range(t, stop):
                # Of the text that is shown; a space that is not has no width.
                width = max(len("".join(texts[t : k + 1])) - len(text) + len(shown), 0)
                for (a, b), value in zip(spans, logp, strict=False):
                    overlap = min(b, width) - max(a, start)
                    if overlap > 0:
                        rewards[k] += value * overlap / (b - a)
                mask[k] = width > start
                start = width
            if end:
                rewards[last], mask[last] = logp[-1], True
        if sampled[t] or observe is None:
            said += shown
        else:
            messages = [*messages, {"role": "assistant", "content": said}, observe(said)]
            assert policy.decode(ids[t:stop]).count(messages[-1]["content"]) == 1
            said = ""
        t = stop
    return np.where(mask, rewards, 0), mask


def sequence_rewards(
    verifier: NaiveVerifier, policy: Any, content: str, ids: list[int], sampled: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The mean log-prob of a response's verifier tokens on its last token; all tokens count."""
    assert all(sampled)
    special = {i for i, token in policy.added_tokens_decoder.items() if token.special}
    text = "".join("" if i >= len(policy) or i in special else policy.decode([i]) for i in ids)
    shown = oracle.without_word_space(text)  # to a chat model
    _, logp = verifier.logprobs(content, "", shown, end=ids[-1] == policy.eos_token_id)
    rewards = np.zeros(len(ids))
    rewards[-1] = logp.mean()
    return rewards, np.ones(len(ids), dtype=bool)


def grpo(
    rewards: list[np.ndarray], masks: list[np.ndarray], groups: list[str], eps: float
) -> list[np.ndarray]:
    """One number for a response: its reward normalised over its group."""
    totals = np.array([row.sum() for row in rewards])
    out = []
    for total, mask, group in zip(totals, masks, groups, strict=True):
        values = totals[[k for k, other in enumerate(groups) if other == group]]
        out.append(mask * (total - values.mean()) / (values.std(ddof=1) + eps))
    return out


def advantages(
    rewards: list[np.ndarray], masks: list[np.ndarray], groups: list[str], eps: float
) -> list[np.ndarray]:
    """One number at a time: mean and sample deviation over a group's unmasked at a position."""
    out = [np.zeros(len(row)) for row in rewards]
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    for rows in members.values():
        for t in range(max(len(rewards[i]) for i in rows)):
            there = [i for i in rows if t < len(masks[i]) and masks[i][t]]
            values = [rewards[i][t] for i in there]
            if len(there) < 2:
                continue
            mean = sum(values) / len(values)
            deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
            for i in there:
                out[i][t] = (rewards[i][t] - mean) / (deviation + eps)
    return out


def content_of(policy: Any, prompt_ids: Any) -> str:
    """The user's words in a prompt of `make_prompts`."""
    found = re.search(r"\d+ plus \d+ equals", policy.decode(prompt_ids))
    assert found, policy.decode(prompt_ids)
    return found[0]


def largest_difference(
    calls: list[dict[str, Any]],
    rows_per_step: int,
    policy: Any,
    score: Callable[[str, list[int], list[int]], tuple[np.ndarray, np.ndarray]],
    eps: float = 0.1,
    normalise: Callable[..., list[np.ndarray]] = advantages,
    content: Callable[[Any, Any], str] = content_of,
) -> float:
    """Between what the actor received and what is computed here, over all steps."""
    rows = [
        dict(zip(call["rows"], row, strict=True))
        for call in calls
        for row in zip(*call["rows"].values(), strict=True)
    ]
    assert rows
    assert len(rows) % rows_per_step == 0, (len(rows), rows_per_step)
    worst, some = 0.0, 0
    for first in range(0, len(rows), rows_per_step):
        step = rows[first : first + rows_per_step]
        assert all(row["response_mask"].any() for row in step), "veRL filled up the batch"
        groups = [content(policy, row["prompts"]) for row in step]
        scored = [
            score(group, row["responses"].tolist(), row["response_mask"].tolist())
            for group, row in zip(groups, step, strict=True)
        ]
        expected = normalise([r for r, _ in scored], [m for _, m in scored], groups, eps)
        for row, want in zip(step, expected, strict=True):
            got = row["advantages"][: len(want)].double().numpy()
            assert got.shape == want.shape
            worst = max(worst, float(np.abs(got - want).max(initial=0)))
            some += int((np.abs(want) > 0.1).sum())
    assert some > rows_per_step, "hardly any advantages to compare"
    return worst
