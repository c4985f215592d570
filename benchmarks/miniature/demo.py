"""One real CME-GRPO training with TRL on a CPU: `python -m benchmarks.miniature.demo FOLDER`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from benchmarks.grpo import Settings
from benchmarks.miniature import evaluate, pictures, rewards, ship, trl_run
from benchmarks.miniature.cast import Cast
from benchmarks.miniature.conditions import STRONGEST, Condition
from benchmarks.miniature.tasks import TASKS, Example, held_out_set
from cme_reward import CMEConfig, CrossModelEntropy
from cme_reward.heatmap.render import ResponseView, TokenView, print_heat_map, render_html

CONDITION = Condition("CME, token, in TRL", trainer="trl", config={"whitespace": "keep"})


def main(
    folder: Path,
    cast: Cast = Cast(ship.FOLDER),  # noqa: B008 (only read)
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    questions: int = 35 * len(TASKS),
) -> None:
    """Train the generator by the verifier, both of `cast`; print and draw what changed."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    console = Console()
    policy, tokenizer = cast.model("pretrained"), cast.tokenizer("pretrained")
    test = held_out_set(questions)
    verifier = rewards.verifier(cast, STRONGEST)

    scorer = CrossModelEntropy(verifier, tokenizer, CMEConfig(**CONDITION.config))
    example = first_wrong(policy, tokenizer, test)
    before = view(policy, tokenizer, scorer, example, "before")
    console.print(
        "A generator that has mostly seen wrong answers, trained with CMEGRPOTrainer and no labels:"
    )
    print_heat_map(before, console)
    torch.manual_seed(0)
    bar = Progress(
        "update", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with bar:
        task = bar.add_task("", total=settings.steps)
        curve = trl_run.train(
            policy, tokenizer, CONDITION, cast, settings, test, 0,
            log=bar.console.print,
            on_step=lambda step: bar.update(task, completed=step),
        )  # fmt: skip
    after = view(policy, tokenizer, scorer, example, "after")

    table = Table(title="Accuracy, checked by a program")
    for column in ("task", "before", "after"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for key in (*TASKS, "accuracy"):
        name = "all" if key == "accuracy" else key
        table.add_row(name, f"{curve[0][key]:.2f}", f"{curve[-1][key]:.2f}")
    console.print(table)
    print_heat_map(after, console)
    pictures.learning_curves(
        {CONDITION.name: [curve]}, folder / "training.png", "CME-GRPO in TRL, on a CPU"
    )
    page = render_html(
        [before, after],
        title="One question before and after CME-GRPO",
        verifier_name=STRONGEST,
        generator_name="miniature generator",
    )
    (folder / "before-after.html").write_text(page, encoding="utf-8")
    console.print(f"The curves: {folder / 'training.png'}", soft_wrap=True)
    console.print(f"The heat maps: {folder / 'before-after.html'}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} seconds")


def first_wrong(policy: Any, tokenizer: Any, test: Sequence[Example]) -> Example:
    """The first question that the policy gets wrong; the first one if it gets all right."""
    marks = evaluate.grades(tokenizer, test, evaluate.answers(policy, tokenizer, test))
    return next((e for e, mark in zip(test, marks, strict=True) if mark < 1), test[0])


def view(
    policy: Any, tokenizer: Any, scorer: CrossModelEntropy, example: Example, label: str
) -> ResponseView:
    """The policy's greedy response, shaded by the verifier's surprise."""
    ids = evaluate.answers(policy, tokenizer, [example])
    batch = scorer([example.prompt], ids)
    verifier_ids, logprobs = batch.verifier_tokens[0]
    texts = scorer.members[0].table.tokens(verifier_ids)
    return ResponseView(
        prompt=example.prompt,
        label=f"{label}: {evaluate.text_of(tokenizer, ids[0])}",
        sequence_reward=float(batch.sequence_rewards[0]),
        generator=TokenView(
            scorer.table.tokens(ids[0]), batch.token_logprobs[0].tolist(), batch.mask[0].tolist()
        ),
        verifier=TokenView(texts, logprobs.tolist(), [True] * len(texts)),
        dropped_nats=float(batch.dropped_nats[0]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
