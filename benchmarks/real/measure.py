"""What became of a policy, by measures that its verifier has no part in.

`python -m benchmarks.real.measure --model google/gemma-3-270m --model run --prompts apart.jsonl`
has every model answer every prompt (`adapters/trl/respond.py`; greedily, or at `--temperature`),
and prints, for the first model as it is and for the others as differences from it, paired by
prompt, with 95 % intervals:

- `ifeval`: share of prompts all of whose instructions are followed, strictly, by the checks that
  come with lm-eval (`pip install 'lm-eval[ifeval]'`), where lines have `meta.instruction_id_list`
  and `meta.kwargs` as IFEval's do;
- `reference`: the policy's mean log-prob, in nats a token, of the text of a line's `response`,
  where it has one; without an end, which policies learn to like or not whatever the text;
- `judge`: cross-model entropy of the answer (Eq. 3) by `--judge`, which must not be the verifier
  that the policy was trained against;
- `tokens`, `stopped`, `repetition` (repeated 4-grams), `distinct` (different pairs of words over
  all), `entropy` of the next token along the answer, in nats.

Answers and measures are kept in `--out`, so that the same command goes on where it stopped;
`samples.md` has twenty prompts with all answers, `curves.png` the training of those models whose
folders have TRL's checkpoints.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.miniature.evaluate import interval
from benchmarks.miniature.pictures import learning_curves
from benchmarks.miniature.runs import file_name
from benchmarks.real.models import ROOT
from benchmarks.real.questions import json_lines
from cme_reward import CMEConfig, CrossModelEntropy, TransformersVerifier
from cme_reward.comparators import policy_statistics
from cme_reward.metrics import repetition

MEASURES = (
    "ifeval",
    "reference",
    "judge",
    "tokens",
    "stopped",
    "repetition",
    "distinct",
    "entropy",
)
SHOWN = 20
Row = dict[str, Any]
Values = dict[str, list[float | None]]
"""Of each measure the value for every prompt; None where it cannot be had."""


def read_lines(path: Path) -> list[Row]:
    """Each different prompt once, as its last line has it."""
    return list({row["prompt"]: row for row in json_lines(path)}.values())


def answered(model: str, rows: Sequence[Row], given: argparse.Namespace) -> list[Row]:
    """The model's answers, in the order of the rows; made where they are not there."""
    prompts, file = given.out / "prompts.jsonl", given.out / f"{file_name(model)}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    script = str(ROOT / "adapters" / "trl" / "respond.py")
    how = ["--response-tokens", str(given.tokens), "--temperature", str(given.temperature)]
    if given.chat_template:
        how += ["--chat-template", str(given.chat_template)]
    command = [sys.executable, script, "--model", model, "--prompts", str(prompts), *how]
    subprocess.run([*command, "--output", str(file)], check=True)
    made = {row["prompt"]: row for row in read_lines(file)}
    return [made[row["prompt"]] for row in rows]


def measured(
    loaded: TransformersVerifier, rows: Sequence[Row], answers: Sequence[Row], judge: Any
) -> Values:
    """Every measure of a model's answers."""
    model, tokenizer = loaded.model, loaded.tokenizer
    own = CMEConfig() if tokenizer.chat_template else CMEConfig(chat_template="none")
    itself = CrossModelEntropy(loaded, tokenizer, own)
    prompts = [row["prompt"] for row in rows]
    texts, stopped = [row["response"] for row in answers], [row["stopped"] for row in answers]
    judged = CrossModelEntropy(judge, tokenizer).score_texts(prompts, texts, ended=stopped)
    given = [k for k, row in enumerate(rows) if row.get("response")]
    wanted = itself.score_texts(
        [prompts[k] for k in given], [rows[k]["response"] for k in given], ended=False
    )
    reference: list[float | None] = [None] * len(rows)
    for k, value in zip(given, wanted.sequence_rewards.tolist(), strict=True):
        reference[k] = value
    ids = [row.tolist() for row in itself.table.encode_batch(texts).ids]
    asked = [_asked(tokenizer, prompt) for prompt in prompts]
    entropies = policy_statistics(model, asked, ids).entropies
    assert entropies is not None
    words = [text.split() for text in texts]
    return {
        "ifeval": [followed(*pair) for pair in zip(rows, texts, strict=True)],
        "reference": reference,
        "judge": judged.sequence_rewards.tolist(),
        "tokens": [float(len(row)) for row in ids],
        "stopped": [float(end) for end in stopped],
        "repetition": [repetition([np.array(row, dtype=np.int64)]) for row in ids],
        "distinct": [distinct(row) for row in words],
        "entropy": [float(torch.as_tensor(e).mean()) if len(e) else None for e in entropies],
    }


def followed(row: Row, text: str) -> float | None:
    """1 where the answer follows all of IFEval's instructions, 0 where it does not; None where the
    line has none, or one that cannot be checked without nltk's data."""
    meta = row.get("meta") or {}
    if not meta.get("instruction_id_list"):
        return None
    try:
        utils: Any = importlib.import_module("lm_eval.tasks.ifeval.utils")
    except ImportError as error:
        raise SystemExit(
            f"measure: the prompts have IFEval's instructions, and their checks do not load "
            f"({error}): pip install 'lm-eval[ifeval]'"
        ) from error
    kinds, kwargs = meta["instruction_id_list"], meta["kwargs"]
    asked = utils.InputExample(0, kinds, row["prompt"], kwargs)
    try:
        return float(utils.test_instruction_following_strict(asked, text).follow_all_instructions)
    except LookupError:
        return None


def distinct(words: Sequence[str]) -> float | None:
    """Different pairs of neighbours over all; None for fewer than two words."""
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else None


def compared(first: Values, other: Values | None = None) -> dict[str, tuple[int, float, float]]:
    """Of each measure: prompts, mean, half of the 95 % interval; with another model, of the
    difference, other minus first."""
    found = {}
    for name in MEASURES:
        ones = first[name]
        pairs = zip(ones, ones if other is None else other[name], strict=True)
        values = [
            b if other is None else b - a for a, b in pairs if a is not None and b is not None
        ]
        if values:
            found[name] = (len(values), *interval(values))
    return found


def report(measures: dict[str, Values], console: Console) -> None:
    table = Table("model", *MEASURES)
    (base, first), *others = measures.items()
    of = {base: compared(first), **{f"{m}, minus it": compared(first, v) for m, v in others}}
    for name, found in of.items():
        sign = "" if name == base else "+"
        cells = [
            f"{found[m][1]:{sign}.3f} ± {found[m][2]:.3f}" if m in found else "" for m in MEASURES
        ]
        table.add_row(name, *cells)
    table.add_row("prompts", *(str(of[base][m][0]) if m in of[base] else "" for m in MEASURES))
    console.print(table)


def samples(rows: Sequence[Row], answers: dict[str, list[Row]]) -> str:
    """Twenty prompts, evenly, with all answers, as Markdown."""
    lines = []
    for k in np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int).tolist():
        lines.append(f"## {k + 1}\n\n{_quoted(rows[k]['prompt'])}\n")
        for model, made in answers.items():
            ended = "" if made[k]["stopped"] else " (cut off)"
            lines.append(f"**{model}**{ended}\n\n{_quoted(made[k]['response'])}\n")
    return "\n".join(lines)


def training(model: str) -> list[Row]:
    """Reward (less that of the first update), length, entropy and repetition of each update, as
    TRL logged them in a run's last checkpoint; empty where the folder has none."""
    states = Path(model).glob("checkpoint-*/trainer_state.json")
    states = sorted(states, key=lambda file: int(file.parent.name.rpartition("-")[2]))
    if not states:
        return []
    logged = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    logged = [at for at in logged if "reward" in at]
    # Under the name of the reward: `cme/repetition`, `random/repetition`.
    repeated = next((key for key in logged[0] if key.endswith("/repetition")), "") if logged else ""
    return [
        {
            "step": at["step"],
            "gain": at["reward"] - logged[0]["reward"],
            "length": at["completions/mean_length"],
            "entropy": at["entropy"],
            "repetition": at.get(repeated, float("nan")),
        }
        for at in logged
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.measure",
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", action="append", required=True, help="a folder or a hub name; the first is the "
        "one to compare with")  # fmt: skip
    add("--prompts", type=Path, required=True, help="JSON lines, also .gz: `prompt`, perhaps "
        "`response` (a reference) and `meta` (IFEval's)")  # fmt: skip
    add("--n-prompts", type=int, help="the first so many; default: all")
    add("--judge", default="embedded", help="a spec of load_verifier: not the one trained against")
    add("--chat-template", type=Path, help="of train.py, for a base model that has none")
    add("--tokens", type=int, default=128, help="most tokens of an answer")
    add("--temperature", type=float, default=0.0, help="0: greedy; 1: what training samples")
    add("--out", type=Path, required=True, help="folder; what is there is not done again")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    rows = read_lines(given.prompts)[: given.n_prompts]
    answers = {model: answered(model, rows, given) for model in given.model}
    judge = CrossModelEntropy(given.judge).verifier
    measures = {}
    for model, made in answers.items():
        file = given.out / f"{file_name(model)}.measures.json"
        key = [given.judge, [[row["prompt"], row["response"]] for row in made]]
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("of") != key:
            loaded = TransformersVerifier.from_pretrained(model, dtype="float32")
            if given.chat_template:
                loaded.tokenizer.chat_template = given.chat_template.read_text(encoding="utf-8")
            kept = {"of": key, "measures": measured(loaded, rows, made, judge)}
            file.write_text(json.dumps(kept))
        measures[model] = kept["measures"]
    (given.out / "samples.md").write_text(samples(rows, answers))
    curves = {model: [points] for model in given.model if (points := training(model))}
    if curves:
        learning_curves(curves, given.out / "curves.png", "Training, batch by batch", "gain")
    report(measures, Console(width=None if Console().is_terminal else 200))
    print(given.out / "samples.md")


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as `respond.py` puts it."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.split("\n"))


if __name__ == "__main__":
    main()
