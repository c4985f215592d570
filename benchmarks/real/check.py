"""The quick real check: does a reward help a real policy, or ruin it? Minutes a run.

`python -m benchmarks.real.check --condition oracle --lr 3e-6` trains a base
model on short questions with known answers, which only the judge and the oracle know, and measures
it on them and on questions kept apart. A run is a file in `--out`; one that is there is not done
again. Without `--condition`, the runs that are there as a table.

The verifier has to be asked in its own way, the policy is not: see `benchmarks.real.questions`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import grpo
from benchmarks.miniature.candidates import Candidate
from benchmarks.miniature.evaluate import interval
from benchmarks.miniature.rewards import PAPER, Advantages, given_by, of_marks
from benchmarks.miniature.runs import file_name
from benchmarks.real.models import GEMMA, ROOT, SMOLLM2
from benchmarks.real.questions import EXAMPLES, OWN, ShortQuestions, read_questions
from cme_reward import CMEConfig, TransformersVerifier
from cme_reward.comparators import load_reward

RETURNS = {"credit": "return", "scale": "batch"}
POLICY = {"baseline": "policy"}
CONDITIONS: dict[str, tuple[str, dict[str, Any], Candidate]] = {
    "oracle": ("oracle", {}, Candidate()),
    "random": ("random", {}, Candidate()),
    "rent": ("rent", {}, Candidate()),
    "token": ("cme", {}, Candidate()),
    "sequence": ("cme", {"level": "sequence"}, Candidate()),
    "return": ("cme", {**RETURNS}, Candidate()),
    "return, policy baseline": ("cme", {**RETURNS, **POLICY}, Candidate()),
    "token, white space kept": ("cme", {"whitespace": "keep"}, Candidate()),
    "token, policy baseline": ("cme", {**POLICY}, Candidate()),
    "sequence, policy baseline": ("cme", {"level": "sequence", **POLICY}, Candidate()),
    "return, another question": ("cme", {**RETURNS}, Candidate(astray=True)),
    "token, EOS masked": ("cme", {"eos": "mask"}, Candidate()),
    "sequence, EOS masked": ("cme", {"level": "sequence", "eos": "mask"}, Candidate()),
    "return, policy baseline, EOS masked": (
        "cme", {**RETURNS, **POLICY, "eos": "mask"}, Candidate()),
    "sequence, contrast 0.5, EOS masked": (
        "cme", {"level": "sequence", "eos": "mask"}, Candidate(contrast=0.5)),
    "sequence, soft minimum, EOS masked": (
        "cme", {"level": "sequence", "eos": "mask"}, Candidate(worst=1.0)),
}  # fmt: skip
"""Name -> reward, settings of `CMEConfig`, and what is tried besides."""
CONDITIONS |= {
    f"{name}, examples": (reward, {**config, "examples": EXAMPLES}, candidate)
    for name, (reward, config, candidate) in CONDITIONS.items()
    if name in ("token", "token, white space kept", "sequence", "return", "return, policy baseline",
                "sequence, policy baseline", "return, another question", "random")
}  # fmt: skip


def advantages_of(name: str, environment: ShortQuestions, policy: Any, tokenizer: Any,
                  verifier: Any) -> Advantages:  # fmt: skip
    reward, config, candidate = CONDITIONS[name]
    if reward != "oracle":
        judge = candidate.verifier(verifier) if reward == "cme" else verifier
        options = {} if reward == "rent" else {"verifier": judge}
        return given_by(
            load_reward(
                reward, tokenizer, CMEConfig(**{**PAPER, **config}), policy=policy, **options
            ),
            candidate,
            policy,
            environment.with_eos,
        )

    def oracle(prompts: Sequence[str], _: Any, response_ids: Any, groups: Any) -> torch.Tensor:
        right = environment.marks(prompts, environment.texts(response_ids))
        return of_marks(right, groups, max(map(len, response_ids)))

    return oracle


def run(given: argparse.Namespace, name: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one policy and write its measurements, or read them."""
    file = given.out / f"{file_name(name)}.{lr:g}.{given.steps}.{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    loaded = TransformersVerifier.from_pretrained(given.policy, dtype="float32")
    policy, tokenizer = loaded.model.requires_grad_(True), loaded.tokenizer
    verifier = TransformersVerifier.from_pretrained(given.verifier, dtype="float32")
    environment = ShortQuestions(tokenizer, read_questions(given.questions), seed, given.tokens)
    settings = grpo.Settings(
        given.steps, given.prompts, given.rollouts, lr, warmup=2, cosine=False, every=given.every
    )
    started, cpu = time.perf_counter(), time.process_time()

    def log(point: dict[str, Any]) -> None:
        shown = {k: round(v, 3) for k, v in point.items() if isinstance(v, float | int)}
        print(f"{name}, lr {lr:g}, seed {seed}: {shown}; {point['texts'][0]!r}", flush=True)

    give = advantages_of(name, environment, policy, tokenizer, verifier)
    curve = grpo.train(policy, environment, give, settings, seed, log)
    result = {
        "condition": name,
        "lr": lr,
        "seed": seed,
        "curve": curve,
        **environment.sampled(policy, 4, seed=0),
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(file)
    return result


def report(folder: Path, console: Console) -> None:
    """What each condition became, mean and 95 % interval over seeds."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    columns = ("right, trained", "right, apart", "reference, trained", "reference, apart",
               "length", "stopped", "repetition", "copied", "entropy")  # fmt: skip
    sampled = ("sampled, trained", "sampled, apart")
    table = Table("reward", "lr", "updates", "seeds", *columns, *sampled)
    by: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for found in runs:
        last = found["curve"][-1]
        by.setdefault((found["condition"], found["lr"], last["step"]), []).append(found)
    for (name, lr, steps), group in sorted(by.items(), key=lambda item: item[0][1:]):
        ends = [{**g["curve"][-1], **{k: g[k] for k in sampled}} for g in group]
        cells = [interval([end[c] for end in ends]) for c in (*columns, *sampled)]
        shown = [f"{m:.3f}" + (f" ± {h:.3f}" if h == h else "") for m, h in cells]
        table.add_row(name, f"{lr:g}", str(steps), str(len(group)), *shown)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.check", description=__doc__)
    add, models = parser.add_argument, ROOT / "real-models"
    add("--questions", type=Path, default=OWN,
        help="JSON lines with prompt, answers and split; default: 202 of our own")  # fmt: skip
    add("--condition", action="append", choices=CONDITIONS, default=[], metavar="NAME",
        help=f"the reward, several times for several: {'; '.join(CONDITIONS)}")  # fmt: skip
    add("--policy", default=str(models / GEMMA.name), help="a base model: a folder, or a hub name")
    add("--verifier", default=str(models / SMOLLM2.name), help="the model that judges")
    add("--lr", type=float, action="append", help="learning rate after two steps of warm-up")
    add("--steps", type=int, default=12, help="updates")
    add("--prompts", type=int, default=4, help="questions of an update")
    add("--rollouts", type=int, default=8, help="answers to each")
    add("--tokens", type=int, default=20, help="most tokens of an answer")
    add("--every", type=int, default=6, help="updates between two measurements")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--out", type=Path, default=models / "check", help="folder; runs in it are kept")
    given = parser.parse_args(arguments)
    for seed in given.seeds:
        for name in given.condition:
            for lr in given.lr or [1e-5]:
                run(given, name, lr, seed)
    report(given.out, Console(width=None if Console().is_terminal else 200))


if __name__ == "__main__":
    main()
