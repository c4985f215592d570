"""The models that take part, by name; each is trained once from its seed and kept in a folder."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from benchmarks.miniature import models
from benchmarks.miniature.models import Size, Text
from benchmarks.miniature.tasks import HALVES, LETTERS, TASKS, Example, grade, stream
from benchmarks.miniature.vocabulary import generator_tokenizer, verifier_tokenizer

MISTAKES = 0.75
"""Share of the generator's data in which the wrong belief answers."""
RUN_ON = 0.3
"""Share of its texts that go on with another question instead of ending."""
VERDICTS = 0.2
"""Share of the verifiers' texts that are a question about an answer, and its answer."""
META_QUESTION = "Is the answer correct?"
META_TEMPLATE = "{prompt}{response}\n{question} "
FEW = 100
"""Examples in the clean data of supervised fine-tuning, and pairs of preference tuning."""
Asked = tuple[str, ...]
REGIMES = ("pretrained", "sft", "preference")
CAPABILITIES = ("verifier-1", "verifier-2", "verifier-3", "verifier-4")


@dataclass(frozen=True)
class Scale:
    """How large everything is; `steps` multiplies the steps of all supervised training."""

    generator: Size = Size(64, 2)  # noqa: RUF009 (frozen)
    verifiers: tuple[Size, ...] = (Size(32, 1), Size(48, 2), Size(64, 2), Size(96, 3))
    verifier_steps: tuple[int, ...] = (120, 250, 500, 1000)
    generator_steps: int = 1000
    reference_steps: int = 1500
    batch: int = 64


LONG_SCALE = Scale(generator_steps=700, verifier_steps=(120, 350, 700, 1400))
"""Of the long half: its third verifier is right in two cases of three."""


@dataclass
class Cast:
    """Makes the models of a scale, or reads them from `folder`."""

    folder: Path
    scale: Scale = Scale()
    device: str = "cpu"
    half: str = "short"
    """Of the tasks, see `tasks.HALVES`."""

    def model(self, name: str, seed: int = 0) -> Any:
        """A trained model.

        Names: `pretrained`, `sft` and `preference` (the generator's regimes), `reference` (the
        generator trained longer, on clean data), `verifier-1` to `verifier-4`, `random` (as
        `verifier-4`, untrained), `same-family` (the generator's tokenizer, architecture and data,
        of the size of `verifier-4`) and `same-tokenizer` (likewise, but of the verifiers' data).
        """
        model = self._untrained(name, seed)
        file = self.folder / f"{name}-{seed}.safetensors"
        if name == "random":
            return model.to(self.device)
        if not file.is_file():
            started = time.process_time()
            model.to(self.device)
            self._train(model, name, seed)
            print(f"trained {name}, seed {seed}: {time.process_time() - started:.0f} CPU s")
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{random.getrandbits(32)}.part")
            save_model(model, str(part))
            part.rename(file)  # whole or not at all, also when two processes make it
        load_model(model, str(file))
        return model.to(self.device).eval()

    @staticmethod
    def tokenizer(name: str) -> Any:
        own = name.startswith("verifier") or name == "random"
        return verifier_tokenizer() if own else generator_tokenizer()

    def _untrained(self, name: str, seed: int) -> Any:
        vocab_size = len(self.tokenizer(name))
        if name.startswith("verifier"):
            level = CAPABILITIES.index(name)
            return models.build("qwen3", self.scale.verifiers[level], vocab_size, seed)
        if name == "random":
            return models.build("qwen3", self.scale.verifiers[-1], vocab_size, seed)
        large = name.startswith("same-")
        size = self.scale.verifiers[-1] if large else self.scale.generator
        return models.build("llama", size, vocab_size, seed)

    def _train(self, model: Any, name: str, seed: int) -> None:
        tokenizer, scale, asked = self.tokenizer(name), self.scale, HALVES[self.half]

        def learn(texts: Iterator[Text], steps: int, lr: float = 3e-3) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                models.train(model, tokenizer, texts, steps=steps, batch=scale.batch, lr=lr)

        if name == "pretrained":
            learn(flawed(1000 + seed, asked), scale.generator_steps)
        elif name == "sft":
            model.load_state_dict(self.model("pretrained", seed).state_dict())
            few = list(islice(clean(2000 + seed, asked), FEW))
            learn(cycle(few), 30, lr=1e-3)
        elif name == "preference":
            model.load_state_dict(self.model("sft", seed).state_dict())
            prefer(model, tokenizer, list(islice(pairs(3000 + seed, asked), FEW)), steps=30)
        elif name == "reference":
            learn(clean(4000 + seed, asked), scale.reference_steps)
        elif name == "same-family":
            learn(flawed(5000 + seed, asked), scale.verifier_steps[-1])
        elif name == "same-tokenizer":
            learn(with_verdicts(6000 + seed, asked), scale.verifier_steps[-1])
        else:
            learn(with_verdicts(6000 + seed, asked), scale.verifier_steps[CAPABILITIES.index(name)])


def flawed(seed: int, asked: Asked = TASKS) -> Iterator[Text]:
    """The generator's data: mostly the mistake, and texts that do not always end."""
    rng = random.Random(seed)

    def answered(example: Example) -> str:
        return example.mistake if rng.random() < MISTAKES else example.answer

    examples = stream(seed, asked)
    for example in examples:
        text = answered(example)
        if rng.random() < RUN_ON:
            other = next(examples)
            text += f"\n{other.prompt}{answered(other)}"
        yield example.prompt, text


def clean(seed: int, asked: Asked = TASKS) -> Iterator[Text]:
    """Right answers only."""
    for example in stream(seed, asked):
        yield example.prompt, example.answer


def with_verdicts(seed: int, asked: Asked = TASKS) -> Iterator[Text]:
    """The verifiers' data: right answers, and now and then a question about an answer.

    The answer asked about is right, or a right one with a slip in it, or that of another question:
    not the generator's mistake, of which a verifier knows nothing.
    """
    rng = random.Random(seed)
    examples = stream(seed, asked)
    for example in examples:
        if rng.random() >= VERDICTS:
            yield example.prompt, example.answer
            continue
        shown = example.answer
        if rng.random() < 0.5:
            shown = next(examples).answer if rng.random() < 0.2 else slip(shown, rng)
        verdict = "Yes" if grade(example.prompt, shown) == 1 else "No"
        yield question_about(example.prompt, shown), verdict


def question_about(prompt: str, response: str) -> str:
    """What a verifier is asked by rewards that ask."""
    return META_TEMPLATE.format(prompt=prompt, response=response, question=META_QUESTION)


def slip(text: str, rng: random.Random) -> str:
    """One character exchanged, left out or doubled, or two neighbours in the wrong order."""
    k = rng.randrange(len(text))
    other = rng.choice([c for c in text if c != text[k]] or [LETTERS[0]])
    pieces = (other, "", 2 * text[k])
    kind = rng.randrange(4)
    if kind == 3:
        return text[:k] + text[k : k + 2][::-1] + text[k + 2 :]
    return text[:k] + pieces[kind] + text[k + 1 :]


def pairs(seed: int, asked: Asked = TASKS) -> Iterator[tuple[str, str, str]]:
    """Prompts with the right answer and the mistake, where they differ."""
    for example in stream(seed, asked):
        if example.answer != example.mistake:
            yield example.prompt, example.answer, example.mistake


def prefer(
    model: Any, tokenizer: Any, data: list[tuple[str, str, str]], *, steps: int, beta: float = 0.1
) -> None:
    """Direct preference optimisation (arXiv 2305.18290), the stand-in for preference tuning."""
    chosen = models.collate(models.encode(tokenizer, [(p, good) for p, good, _ in data]))
    rejected = models.collate(models.encode(tokenizer, [(p, bad) for p, _, bad in data]))
    device = model.device

    def logprobs(both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return -models.token_losses(model, both[0].to(device), both[1].to(device)).sum(dim=1)

    with torch.no_grad():
        start = logprobs(chosen) - logprobs(rejected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(steps):
        margin = logprobs(chosen) - logprobs(rejected) - start
        loss = -torch.nn.functional.logsigmoid(beta * margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
