"""Prompts as veRL reads them: UltraFeedback's, or those of any JSONL file, as parquet.

Without options: 5,000 prompts of UltraFeedback and 64 others for validation (arXiv 2605.29009,
Appendix E). A `.jsonl` has `prompt` (text or messages) or `messages` in each line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cme_reward import InputError
from cme_reward.conversation.messages import as_messages, plain_content

Messages = list[dict[str, str]]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--prompts",
        default="HuggingFaceH4/ultrafeedback_binarized",
        help="a .jsonl file, or a dataset on the hub with a column `prompt` or `messages`",
    )
    add("--split", default="train_prefs", help="of a dataset on the hub")
    add("--n-prompts", type=int, default=5000, help="at most so many, drawn with the seed")
    add("--n-validation", type=int, default=64, help="besides those")
    add("--system-prompt", help="in front of prompts that have none (not in the paper)")
    add("--seed", type=int, default=42, help="(not in the paper)")
    add("--output", type=Path, default=Path("data"), help="folder for train.parquet, val.parquet")
    return parser.parse_args(arguments)


def rows(prompts: str, split: str) -> Iterator[dict[str, Any]]:
    if prompts.endswith(".jsonl"):
        with open(prompts, encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    else:
        from datasets import load_dataset

        yield from load_dataset(prompts, split=split)  # type: ignore[misc]


def conversation(row: dict[str, Any], number: int) -> Messages:
    """The messages of a row up to the last one of the user."""
    given = row.get("prompt") or row.get("messages")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise SystemExit(
            f"row {number} has the keys {', '.join(row)}; expected `prompt`, a text or messages, "
            "or `messages`"
        )
    try:
        # A column of tables cannot hold tool calls, each with arguments of its own.
        messages = [
            {"role": m["role"], "content": plain_content(k, m, "a data set's column")}
            for k, m in enumerate(as_messages(given))
        ]
    except InputError as error:
        raise SystemExit(f"row {number}: {error}") from None
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise SystemExit(f"row {number} has no message of a user; expected at least one")
    return messages


def draw(args: argparse.Namespace) -> list[Messages]:
    """Different prompts in a random order, the same for the same seed."""
    different: dict[str, Messages] = {}
    for number, row in enumerate(rows(args.prompts, args.split)):
        messages = conversation(row, number)
        if args.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": args.system_prompt}, *messages]
        different.setdefault(json.dumps(messages), messages)
    prompts = list(different.values())
    random.Random(args.seed).shuffle(prompts)
    return prompts


def write(prompts: list[Messages], path: Path, source: str, split: str) -> None:
    import pandas

    table = [
        {
            "data_source": source,
            "prompt": messages,
            "ability": "text",
            # veRL asks for a ground truth; nothing reads it.
            "reward_model": {"style": "cme", "ground_truth": ""},
            "extra_info": {"index": index, "split": split},
        }
        for index, messages in enumerate(prompts)
    ]
    pandas.DataFrame(table).to_parquet(path)
    print(f"{path}: {len(prompts)} prompts")


def main(arguments: list[str] | None = None) -> int:
    args = options(arguments)
    prompts = draw(args)
    if len(prompts) <= args.n_validation:
        print(
            f"error: {args.prompts} has {len(prompts)} different prompts; expected more than "
            f"--n-validation={args.n_validation}",
            file=sys.stderr,
        )
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    held, rest = prompts[: args.n_validation], prompts[args.n_validation :]
    source = Path(args.prompts).stem if args.prompts.endswith(".jsonl") else args.prompts
    write(rest[: args.n_prompts], args.output / "train.parquet", source, "train")
    write(held or rest[:1], args.output / "val.parquet", source, "val")
    return 0


if __name__ == "__main__":
    sys.exit(main())
