"""Short questions with known answers, as something to train on (`benchmarks.grpo`) and to mark.

A base model is asked `Question: ...` / `Answer:`, and its answer ends with the line.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.grpo import Ids
from cme_reward.metrics import repetition

ASKED = "Question: {prompt}\nAnswer:"
OWN = Path(__file__).with_name("short_questions.jsonl")
"""202 of them, half kept apart: capitals, sums, opposites, plurals, names, where a base model of
270 million parameters knows some."""
EXAMPLES = (
    {"prompt": "What is the capital of Mexico?", "response": "Mexico City"},
    {"prompt": "How many strings does a violin have?", "response": "four"},
    {"prompt": "What is the past tense of sing?", "response": "sang"},
)
"""None of them is among the questions: they show a verifier how long an answer is wanted."""
AT_ONCE = 64
"""Questions answered or read in one batch: a vocabulary of 262,144 takes a megabyte a token."""


@dataclass(frozen=True)
class Question:
    prompt: str
    answers: tuple[str, ...]
    apart: bool
    """Never trained on."""


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, zipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode().splitlines() if line.strip()]


def read_questions(path: Path) -> list[Question]:
    """JSON lines with `prompt`, `answers` and perhaps `split`, of which "train" is trained on."""
    return [
        Question(row["prompt"], tuple(row["answers"]), row.get("split", "train") != "train")
        for row in json_lines(path)
    ]


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text, as words of its own."""
    return any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", text, re.IGNORECASE) for a in answers)


def is_copied(text: str, question: str) -> bool:
    """Whether the text says something, and nothing but words of the question."""
    said, asked = (set(re.findall(r"\w+", some.lower())) for some in (text, question))
    return bool(said) and said <= asked


class ShortQuestions:
    """Questions in the order of a seed.

    Args:
        tokenizer: the policy's.
        questions: those to train on and those kept apart.
        seed: of their order.
        tokens: most tokens of an answer.
        examples: prompts with responses that the policy reads in front of every question.
    """

    def __init__(
        self,
        tokenizer: Any,
        questions: Sequence[Question],
        seed: int,
        tokens: int = 20,
        examples: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self._before = "".join(
            f"{ASKED.format(prompt=one['prompt'])} {one['response']}\n\n" for one in examples
        )
        self.questions = list(questions)
        self._by_prompt = {question.prompt: question for question in questions}
        self._tokenizer, self._tokens = tokenizer, tokens
        self._asked = [q.prompt for q in questions if not q.apart]
        self._order = random.Random(seed)
        self._queue: list[str] = []
        # The vocabulary writes a line's end in several lengths.
        self._stops = [tokenizer.encode("\n" * n, add_special_tokens=False) for n in (1, 2, 3)]
        self._stops = [ids[0] for ids in self._stops if len(ids) == 1] + [tokenizer.eos_token_id]

    def ask(self, n: int) -> list[str]:
        while len(self._queue) < n:
            self._queue += self._order.sample(self._asked, len(self._asked))
        asked, self._queue = self._queue[:n], self._queue[n:]
        return asked

    def encode(self, prompts: Sequence[str]) -> Ids:
        return self._tokenizer([self._before + ASKED.format(prompt=p) for p in prompts])[
            "input_ids"
        ]

    def sample(self, policy: Any, prompt_ids: Ids, draws: torch.Generator | None) -> Ids:
        """What the policy wrote, its line's end included. Without `draws`, the likeliest tokens."""
        width, pad = max(map(len, prompt_ids)), self._tokenizer.pad_token_id
        ids_BT = torch.tensor([[pad] * (width - len(p)) + p for p in prompt_ids])
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids])
        if draws is not None:
            torch.manual_seed(int(torch.randint(2**31, (), generator=draws)))
        with torch.inference_mode():
            out_BT = policy.generate(
                ids_BT.to(policy.device),
                attention_mask=mask_BT.to(policy.device),
                max_new_tokens=self._tokens,
                do_sample=draws is not None,
                top_k=0 if draws is not None else None,
                top_p=1.0 if draws is not None else None,
                eos_token_id=self._stops,
                pad_token_id=pad,
            )[:, width:]
        return [self._line(row) for row in out_BT.tolist()]

    def _line(self, row: list[int]) -> list[int]:
        end = next((t for t, i in enumerate(row) if i in self._stops), len(row))
        return row[: end + 1]

    def with_eos(self, response_ids: Sequence[Sequence[int]]) -> Ids:
        """What a reward is to read: EOS in place of the line's end, which is no special token."""
        eos = self._tokenizer.eos_token_id
        return [[eos if i in self._stops else i for i in row] for row in response_ids]

    def logprobs(self, policy: Any, prompt_ids: Ids, response_ids: Ids) -> list[torch.Tensor]:
        return self._read(policy, prompt_ids, response_ids, lambda logits, target: -F.cross_entropy(
            logits, target, reduction="none"))  # fmt: skip

    def _read(
        self,
        policy: Any,
        prompt_ids: Ids,
        response_ids: Ids,
        value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> list[torch.Tensor]:
        """A value of the logits in front of each response's tokens; no others are computed."""
        rows = [p + r for p, r in zip(prompt_ids, response_ids, strict=True)]
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        before_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        for b, (row, response) in enumerate(zip(rows, response_ids, strict=True)):
            ids_BT[b, : len(row)] = torch.tensor(row)
            before_BT[b, len(row) - len(response) - 1 : len(row) - 1] = True
        # Causal attention never looks right, so padding on the right needs no mask.
        hidden = policy.model(ids_BT.to(policy.device), use_cache=False).last_hidden_state
        logits = policy.lm_head(hidden[before_BT.to(policy.device)]).float()
        if cap := getattr(policy.config, "final_logit_softcapping", None):  # Gemma's
            logits = cap * torch.tanh(logits / cap)
        target = torch.tensor([i for row in response_ids for i in row], device=policy.device)
        return list(value(logits, target).split([len(row) for row in response_ids]))

    @torch.no_grad()
    def measure(self, policy: Any) -> dict[str, Any]:
        """Greedy answers: accuracy on questions trained on and on those kept apart, and the signs
        of collapse. `reference` is the mean log-prob in nats of a question's first answer."""
        prompts = [q.prompt for q in self.questions]
        prompt_ids = self.encode(prompts)
        answers = self._tokenizer(
            [f" {q.answers[0]}" for q in self.questions], add_special_tokens=False
        )["input_ids"]
        response_ids: Ids = []
        entropy: list[torch.Tensor] = []
        known: list[torch.Tensor] = []
        for k in range(0, len(prompt_ids), AT_ONCE):
            some = slice(k, k + AT_ONCE)
            response_ids += self.sample(policy, prompt_ids[some], None)
            entropy += self._read(policy, prompt_ids[some], response_ids[some], lambda logits, _: (
                torch.distributions.Categorical(logits=logits).entropy()))  # fmt: skip
            known += self.logprobs(policy, prompt_ids[some], answers[some])
        texts = self.texts(response_ids)
        return {
            **_by_split("right", self.questions, self.marks(prompts, texts)),
            **_by_split("reference", self.questions, [float(row.sum()) for row in known]),
            "length": statistics.mean(map(len, response_ids)),
            "stopped": statistics.mean(r[-1] in self._stops for r in response_ids),
            "repetition": repetition([np.array(row, dtype=np.int64) for row in response_ids]),
            "copied": statistics.mean(map(is_copied, texts, prompts)),
            "entropy": float(torch.cat(entropy).mean()),
            "texts": texts,
        }

    @torch.no_grad()
    def sampled(self, policy: Any, n: int, seed: int) -> dict[str, float]:
        """Accuracy of n answers at temperature 1 to each question."""
        prompts = [q.prompt for q in self.questions for _ in range(n)]
        draws = torch.Generator().manual_seed(seed)
        prompt_ids, marks = self.encode(prompts), []
        for k in range(0, len(prompts), AT_ONCE):
            ids = self.sample(policy, prompt_ids[k : k + AT_ONCE], draws)
            marks += self.marks(prompts[k : k + AT_ONCE], self.texts(ids))
        return _by_split("sampled", [q for q in self.questions for _ in range(n)], marks)

    def texts(self, response_ids: Ids) -> list[str]:
        found = self._tokenizer.batch_decode(response_ids, skip_special_tokens=True)
        return [text.strip() for text in found]

    def marks(self, prompts: Sequence[str], texts: Sequence[str]) -> list[bool]:
        return [
            is_right(text, self._by_prompt[prompt].answers)
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def _by_split(
    name: str, questions: Sequence[Question], values: Sequence[float]
) -> dict[str, float]:
    found = {}
    for split, apart in (("trained", False), ("apart", True)):
        chosen = [v for v, q in zip(values, questions, strict=True) if q.apart == apart]
        if chosen:
            found[f"{name}, {split}"] = statistics.mean(chosen)
    return found
