"""Two real pretrained models for the frameworks' real trainers, and their rewards computed again.

The policy is gemma-3-270m and the verifier SmolLM2-135M-Instruct, where
`python -m benchmarks.real.models` puts them. Rewards and masks come from ids by bytes, fractions
and one plain forward pass a response: none of the package's code.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import oracle
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path(__file__).resolve().parents[2] / "real-models"
POLICY, VERIFIER = MODELS / "gemma-3-270m", MODELS / "SmolLM2-135M-Instruct"
NEEDED = "python -m benchmarks.real.models"
ASKED = (MODELS.parent / "benchmarks" / "real" / "question.jinja").read_text(encoding="utf-8")
"""A base model has no chat template; this one it answers to."""
QUESTIONS = [
    "What is the capital of Italy?",
    "How many legs does a spider have?",
    "Who wrote Hamlet?",
    "What colour is the sky on a clear day?",
    "What is the largest planet?",
    "Which language is spoken in Brazil?",
]


def there() -> bool:
    return POLICY.is_dir() and VERIFIER.is_dir()


def make_policy(folder: Path) -> Path:
    """The policy with a chat template, stopped by its own end of a text."""
    shutil.copytree(POLICY, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template, tokenizer.eos_token = ASKED, "<eos>"
    tokenizer.save_pretrained(folder)
    return folder


def question_of(prompt: str) -> str:
    """The user's words in a prompt as the policy has it."""
    start, _, rest = prompt.partition("Question: ")
    question, _, end = rest.partition("\nAnswer:")
    assert (start.removeprefix("<bos>"), end) == ("", ""), prompt
    return question


@cache
def reader() -> Any:
    return AutoTokenizer.from_pretrained(VERIFIER)


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float64).eval()


@cache
def letters() -> dict[str, int]:
    """GPT-2's letters for bytes: what can be printed is itself, the others follow after 255."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + k): b for k, b in enumerate(others)}


def policy_bytes(writer: Any, ids: Sequence[int]) -> list[bytes]:
    """What SentencePiece's tokens write; special ones write nothing."""
    special = {i for i, token in writer.added_tokens_decoder.items() if token.special}
    pieces = writer.convert_ids_to_tokens(list(ids))
    made = []
    for i, piece in zip(ids, pieces, strict=True):
        if i in special:
            made.append(b"")
        elif len(piece) == 6 and piece.startswith("<0x"):
            made.append(bytes([int(piece[3:5], 16)]))
        else:
            made.append(piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())
    return made


@torch.no_grad()
def scores(question: str, writer: Any, ids: list[int]) -> tuple[list[float | None], list[float]]:
    """Reward of each token (None where it has none), and the log-probs of the verifier's."""
    text, ends = oracle.byte_cells(policy_bytes(writer, ids))
    shown = oracle.without_word_space(text)
    ends = [max(end - (len(text) - len(shown)), Fraction(0)) for end in ends]
    messages = [{"role": "user", "content": question}]
    chat = reader().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = reader().encode(chat, add_special_tokens=False)
    response_ids = reader().encode(shown, add_special_tokens=False)
    pieces = reader().convert_ids_to_tokens(response_ids)
    as_bytes = [bytes(letters()[letter] for letter in piece) for piece in pieces]
    again, verifier_ends = oracle.byte_cells(as_bytes)
    assert again == shown, (again, shown)
    ended = ids[-1] == writer.eos_token_id
    asked = response_ids + [reader().eos_token_id] * ended
    logits = model()(torch.tensor([prompt_ids + asked])).logits[0, len(prompt_ids) - 1 : -1]
    logp = logits.log_softmax(-1)[range(len(asked)), asked].tolist()
    aligned = oracle.align(
        [Fraction(value) for value in logp[: len(response_ids)]], verifier_ends, ends
    )
    starts = [Fraction(0), *ends]
    rewards: list[float | None] = [
        None if end == start else float(value)
        for value, start, end in zip(aligned, starts, ends, strict=False)
    ]
    if ended:
        rewards[-1] = logp[-1]
    return rewards, logp


class Memory:
    """The most that a run's processes held together, and which of them, by what they call
    themselves: megabytes, a page that several share counted in parts."""

    def __init__(self) -> None:
        self.total = 0.0
        self.parts: dict[str, float] = {}

    def look(self, mark: str) -> None:
        parts: dict[str, float] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark.encode() not in (process / "environ").read_bytes():
                    continue
                name = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
                name = name if name.startswith("ray::") else "others"
                lines = (process / "smaps_rollup").read_text().splitlines()
                kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                parts[name.split(".")[0]] = parts.get(name.split(".")[0], 0.0) + kilobytes / 1024
        if sum(parts.values()) > self.total:
            self.total, self.parts = sum(parts.values()), parts

    def __str__(self) -> str:
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:6]
        held = ", ".join(f"{name} {size:,.0f}" for name, size in largest)
        return f"{self.total:,.0f} MB at most ({held})"


@contextmanager
def watched(mark: str) -> Iterator[Memory]:
    """Memory, every few seconds, of the processes with `mark` in their environment."""
    memory, done = Memory(), threading.Event()

    def watch() -> None:
        while not done.wait(3):
            memory.look(mark)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def show(
    name: str, memory: Memory, parts: dict[str, list[float]], worst: float, since: float
) -> None:
    """One line for a run: seconds a step by part, without the first step."""
    means = {part: sum(values[1:]) / max(len(values) - 1, 1) for part, values in parts.items()}
    split = ", ".join(f"{part} {seconds:.2f}" for part, seconds in means.items())
    steps = len(next(iter(parts.values())))
    print(
        f"\n{name}: {steps} steps in {time.perf_counter() - since:.0f} s with all that begins and "
        f"ends; seconds a step: {split}; {memory}; largest difference of an advantage {worst:.1e}",
        f"(load {os.getloadavg()[0]:.1f})",
        flush=True,
    )
