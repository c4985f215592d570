"""Does a verifier rank a policy's own rollouts rightly? The question to ask before training.

`python -m benchmarks.real.rollouts` samples answers of the policy to short questions with known
answers, marks them, scores them by cross-model entropy
put together in several ways, and prints how often each puts a right answer above a wrong one to the
same question: 0.5 is chance. Intervals are 95 %, by bootstrap over questions.

A column holds the pairs whose two answers differ by no more than one verifier token: there, length
explains nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.miniature.candidates import Changed, bounded_power, soft_minimum
from benchmarks.real.models import GEMMA, ROOT, SMOLLM2
from benchmarks.real.questions import ASKED, EXAMPLES, OWN, Question, is_right, read_questions
from cme_reward import CMEConfig, CrossModelEntropy, TransformersVerifier
from cme_reward.comparators import policy_statistics


@dataclass
class Rollout:
    question: int
    text: str
    right: bool
    scores: dict[str, float] = field(default_factory=dict)


def sample(policy: Any, tokenizer: Any, prompt: str, n: int, tokens: int) -> list[str]:
    """The first lines of n answers at temperature 1."""
    given = tokenizer(ASKED.format(prompt=prompt), return_tensors="pt").to(policy.device)
    with torch.inference_mode():
        ids = policy.generate(
            **given, max_new_tokens=tokens, do_sample=True, top_k=0, num_return_sequences=n
        )
    texts = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().partition("\n")[0].strip() for text in texts]


OF_TOKENS: dict[str, Callable[[np.ndarray], float]] = {
    "mean log-prob (Eq. 3)": lambda logp: float(logp.mean()),
    "sum": lambda logp: float(logp.sum()),
    "worst token": lambda logp: float(logp.min()),
    "soft minimum, 1 nat": lambda logp: soft_minimum(logp, 1.0),
    "soft minimum, 3 nats": lambda logp: soft_minimum(logp, 3.0),
    "mean of the worst 3": lambda logp: float(np.sort(logp)[:3].mean()),
    "median token": lambda logp: float(np.median(logp)),
    "bounded power 0.5": lambda logp: float(bounded_power(logp, 0.5).mean()),
    "bounded power 1": lambda logp: float(bounded_power(logp, 1.0).mean()),
}


def score(rollouts: list[Rollout], questions: list[Question], verifier: Any, tokenizer: Any,
          policy: Any) -> None:  # fmt: skip
    """Fill in all scores; each text is read once with its prompt and once without."""
    prompts = [questions[r.question].prompt for r in rollouts]
    texts = [r.text for r in rollouts]
    ways = {
        "": CMEConfig(),
        ", EOS masked": CMEConfig(eos="mask"),
        ", examples": CMEConfig(examples=EXAMPLES),
    }
    for name, config in ways.items():
        batch = CrossModelEntropy(verifier, tokenizer, config).score_texts(prompts, texts)
        for rollout, (_, logp) in zip(rollouts, batch.verifier_tokens, strict=True):
            for of, value in OF_TOKENS.items():
                rollout.scores[of + name] = value(logp)
            if not name:
                rollout.scores["shorter"] = -float(len(logp))
    for weight in (0.5, 1.0):
        changed = Changed(verifier, contrast=weight)
        batch = CrossModelEntropy(changed, tokenizer, CMEConfig()).score_texts(prompts, texts)
        for rollout, value in zip(rollouts, batch.sequence_rewards.tolist(), strict=True):
            rollout.scores[f"mean - {weight:g} of it without the prompt"] = value
    ids = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in texts]
    asked = [tokenizer(ASKED.format(prompt=prompt))["input_ids"] for prompt in prompts]
    own = policy_statistics(policy, asked, ids).logprobs or []
    for rollout, logp in zip(rollouts, own, strict=True):
        total = float(torch.as_tensor(logp).sum())
        # Of one text on both sides: the policy's first line has no end of its own.
        verifiers = rollout.scores["sum, EOS masked"]
        rollout.scores["sum - policy's own (reverse KL), EOS masked"] = verifiers - total
        rollout.scores["policy's own sum"] = total


def pairs_of(rollouts: list[Rollout]) -> list[tuple[Rollout, Rollout]]:
    """A right and a wrong answer to one question, all there are; equal texts are counted once."""
    kept = list({(r.question, r.text): r for r in rollouts}.values())
    return [
        (good, bad)
        for good in kept
        for bad in kept
        if good.right and not bad.right and good.question == bad.question
    ]


def accuracy(
    pairs: list[tuple[Rollout, Rollout]], name: str, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Share of pairs the right way round (ties half), and its 95 % interval over questions."""
    if not pairs:
        return float("nan"), float("nan"), float("nan")
    wins = np.array(
        [(np.sign(good.scores[name] - bad.scores[name]) + 1) / 2 for good, bad in pairs]
    )
    of = np.array([good.question for good, _ in pairs])
    names = np.unique(of)
    sums = np.array([[wins[of == q].sum(), (of == q).sum()] for q in names])
    draws = sums[rng.integers(0, len(names), (4000, len(names)))].sum(axis=1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    return float(wins.mean()), float(low), float(high)


def report(rollouts: list[Rollout], console: Console) -> dict[str, Any]:
    pairs = pairs_of(rollouts)
    alike = [p for p in pairs if abs(p[0].scores["shorter"] - p[1].scores["shorter"]) <= 1]
    console.print(
        f"{len(rollouts)} rollouts, {sum(r.right for r in rollouts)} right; {len(pairs)} pairs of "
        f"{len({g.question for g, _ in pairs})} questions, {len(alike)} of equal length"
    )
    table = Table("score", "right above wrong", "95 %", "at equal length", "95 %")
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name in rollouts[0].scores if rollouts else ():
        every, same = accuracy(pairs, name, rng), accuracy(alike, name, rng)
        found[name] = {"all": every, "equal length": same}
        cells = [f"{every[0]:.3f}", f"{every[1]:.2f} to {every[2]:.2f}"]
        table.add_row(name, *cells, f"{same[0]:.3f}", f"{same[1]:.2f} to {same[2]:.2f}")
    console.print(table)
    return {"rollouts": len(rollouts), "pairs": len(pairs), "scores": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.rollouts", description=__doc__)
    add = parser.add_argument
    models = ROOT / "real-models"
    add("--questions", type=Path, default=OWN,
        help="JSON lines with prompt and answers; default: 202 of our own")  # fmt: skip
    add("--policy", default=str(models / GEMMA.name), help="a base model: a folder, or a hub name")
    add("--verifier", default=str(models / SMOLLM2.name), help="the model that judges")
    add("--rollouts", type=int, default=8, help="of each question")
    add("--tokens", type=int, default=20, help="most tokens of an answer")
    add("--seed", type=int, default=0)
    add(
        "--out",
        type=Path,
        default=models / "rollouts.json",
        help="rollouts, marks and scores; beside it the same as .jsonl, for cme-reward rank",
    )
    given = parser.parse_args(arguments)
    ranked = given.out.with_suffix(".jsonl")
    if ranked.resolve() == given.questions.resolve():
        parser.error(f"--out {given.out}: {ranked} holds the questions; name another file")
    questions = read_questions(given.questions)
    policy = TransformersVerifier.from_pretrained(given.policy, dtype="float32")
    torch.manual_seed(given.seed)
    rollouts = [
        Rollout(q, text, is_right(text, question.answers))
        for q, question in enumerate(track(questions, "sampling", transient=True))
        for text in sample(
            policy.model, policy.tokenizer, question.prompt, given.rollouts, given.tokens
        )
        if text
    ]
    verifier = TransformersVerifier.from_pretrained(given.verifier, dtype="float32")
    score(rollouts, questions, verifier, policy.tokenizer, policy.model)
    found = report(rollouts, Console(width=110))
    rows = [vars(rollout) for rollout in rollouts]
    given.out.write_text(json.dumps({**found, "rows": rows}, indent=1))
    lines = [
        {"prompt": questions[r.question].prompt, "response": f" {r.text}", "right": r.right}
        for r in rollouts
    ]
    ranked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{given.out}, and for cme-reward rank --label right: {ranked}")


if __name__ == "__main__":
    main()
