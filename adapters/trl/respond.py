"""Write a policy's responses to a file of prompts, for `cme-reward evaluate`, `rank` and `score`.

`python adapters/trl/respond.py --model cme-run --prompts heldout.jsonl --output tuned.jsonl`: one
greedy response to each prompt. `--rollouts 8 --temperature 1`: what training would sample. Prompts
are put to the policy, and its responses end, as in `train.py`. A line is written as soon as its
batch is done; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from train import Prompt, for_policy, load_policy, prompts_of

from cme_reward import InputError


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="the policy: a name on the hub or a folder")
    add("--prompts", required=True, help="as train.py's: a .jsonl file, or a dataset on the hub")
    add("--split", default="train", help="of a dataset on the hub")
    add("--n-prompts", type=int, help="at most so many, drawn with the seed; default: all")
    add("--chat-template", type=Path, help="as in training; a policy trained with it has it")
    add("--system-prompt", help="as in training")
    add("--output", type=Path, required=True, help="JSON lines; what is there is kept")
    add("--name", help="the field `model` of each line; default: --model")
    add("--rollouts", type=int, default=1, help="responses to each prompt")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--response-tokens", type=int, default=512, help="at most; longer responses are cut")
    add("--at-once", type=int, default=16, help="responses generated together")
    add("--seed", type=int, default=42)
    given = parser.parse_args(arguments)
    if given.rollouts > 1 and given.temperature == 0:
        parser.error("--rollouts above 1 are all alike at --temperature 0; give --temperature 1")
    return given


def already(file: Path, settings: dict[str, Any]) -> Counter[str]:
    """How many responses each prompt has in `file`; a line cut off by a crash is taken out.

    Raises:
        InputError: where the file holds responses made otherwise.
    """
    if not file.is_file():
        return Counter()
    kept = file.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    there: Counter[str] = Counter()
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {n}, is not JSON: {error}") from None
        for key, value in settings.items():
            if row.get(key) != value:
                raise InputError(
                    f"{file}, line {n}, has {key} {row.get(key)!r}, and this command {value!r}; "
                    "give another --output"
                )
        there[json.dumps(row["prompt"])] += 1
    if whole != kept:
        file.write_bytes(whole)
    return there


def respond(model: Any, tokenizer: Any, prompts: list[Any], given: argparse.Namespace) -> list[Any]:
    """Text of a response to each prompt, and whether the policy ended it."""
    if tokenizer.chat_template is None:
        asked = tokenizer(prompts, padding=True, return_tensors="pt")
    else:
        asked = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
    asked = asked.to(model.device)
    sampled = given.temperature > 0
    how = {"temperature": given.temperature, "top_p": 1.0, "top_k": 0} if sampled else {}
    with torch.inference_mode():
        ids = model.generate(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            do_sample=sampled,
            max_new_tokens=given.response_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **how,
        )[:, asked["input_ids"].shape[1] :]
    stops = set(model.generation_config.eos_token_id)
    return [
        (tokenizer.decode(row, skip_special_tokens=True), not stops.isdisjoint(row))
        for row in ids.tolist()
    ]


def main() -> None:
    given = options()
    settings = {
        "model": given.name or given.model,
        "temperature": given.temperature,
        "response_tokens": given.response_tokens,
    }
    try:
        prompts = prompts_of(given)
        there = already(given.output, settings)
    except (InputError, OSError) as error:
        raise SystemExit(f"respond.py: {error}") from None
    missing: list[Prompt] = []
    for prompt in prompts:
        missing += [prompt] * (given.rollouts - there[json.dumps(prompt)])
    if not missing:
        return
    model, tokenizer = load_policy(given.model, given.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    shown = for_policy(missing, tokenizer, given.system_prompt)["prompt"]
    # Another seed where it goes on: the responses that are there must not come again.
    torch.manual_seed(given.seed + sum(there.values()))
    with given.output.open("a", encoding="utf-8") as output:
        starts = range(0, len(missing), given.at_once)
        for start in track(starts, "responses", console=Console(stderr=True)):
            some = slice(start, start + given.at_once)
            answers = respond(model, tokenizer, list(shown[some]), given)
            for prompt, (text, stopped) in zip(missing[some], answers, strict=True):
                row = {"prompt": prompt, "response": text, "stopped": stopped, **settings}
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
