"""What form of an answer does a verifier expect, and what does being shown one do for the policy?

`python -m benchmarks.real.form` prints log-probs, in nats, of whole responses with their end, as
the verifier is, told by a system prompt, and shown examples (`CMEConfig.examples`); and how often
the untrained policy is right without and with the same examples in its own prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.real.models import GEMMA, ROOT, SMOLLM2
from benchmarks.real.questions import EXAMPLES, OWN, ShortQuestions, read_questions
from cme_reward import CMEConfig, CrossModelEntropy, TransformersVerifier, Verifier

QUESTION = "What is the capital of Italy?"
RESPONSES = ("", "Rome", "Milan", "The capital of Italy is Rome.")
ASKED_AS = {
    "as it is": CMEConfig(),
    "told: one or two words": CMEConfig(system_prompt="Answer in one or two words."),
    "shown three examples": CMEConfig(examples=EXAMPLES),
}


def whole(verifier: Verifier, config: CMEConfig, responses: Sequence[str]) -> list[float]:
    """Log-prob of each response to QUESTION and of the end of its turn, nats."""
    scorer = CrossModelEntropy(verifier, verifier.tokenizer, config)
    end = verifier.tokenizer.eos_token_id
    ids = [[*verifier.tokenizer.encode(r, add_special_tokens=False), end] for r in responses]
    batch = scorer([QUESTION] * len(responses), ids)
    return [float(logprobs.sum()) for _, logprobs in batch.verifier_tokens]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.form", description=__doc__)
    models = ROOT / "real-models"
    parser.add_argument("--policy", default=str(models / GEMMA.name), help="a base model")
    parser.add_argument("--verifier", default=str(models / SMOLLM2.name), help="who judges")
    parser.add_argument("--questions", type=Path, default=OWN, help="JSON lines, as check's")
    given = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 200)

    verifier = TransformersVerifier.from_pretrained(given.verifier, dtype="float32")
    table = Table(QUESTION, *(response or "(nothing)" for response in RESPONSES))
    for name, config in ASKED_AS.items():
        table.add_row(name, *(f"{nats:.1f}" for nats in whole(verifier, config, RESPONSES)))
    console.print(table)

    loaded = TransformersVerifier.from_pretrained(given.policy, dtype="float32")
    questions = read_questions(given.questions)
    splits = ("trained", "apart")
    heads = [f"{how}, {split}" for how in ("right", "sampled") for split in splits]
    table = Table("the policy itself", *heads)
    for name, examples in (("as it is", ()), ("shown three examples", EXAMPLES)):
        environment = ShortQuestions(loaded.tokenizer, questions, 0, examples=examples)
        found = environment.measure(loaded.model) | environment.sampled(loaded.model, 4, seed=0)
        table.add_row(name, *(f"{found[head]:.3f}" for head in heads))
    console.print(table)


if __name__ == "__main__":
    main()
