"""One way to score responses, in a process of its own: time, peak memory and the result as JSON.

`python verifier_variants.py SHAPE VARIANT`, with the fields of `Shape` as JSON; run by
`bench_verifier.py`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A model and what it has to score."""

    prompt: int
    """Tokens of each prompt."""
    lengths: tuple[int, ...]
    """Tokens of the responses to each prompt."""
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    prompts: int = 1
    chunk: int | None = None
    """Logits that exist at once in ours, and wide batches; None for the defaults."""


def memory_bytes(field: str) -> int:
    """A memory figure of this process alone: `ru_maxrss` would start at the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith(field)
    )


def draw(shape: Shape) -> list[tuple[list[int], list[list[int]]]]:
    """Groups of one prompt and its responses; few ids are frequent, as in text."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return (rng.zipf(1.2, size=n) % shape.vocab).tolist()

    return [(ids(shape.prompt), [ids(n) for n in shape.lengths]) for _ in range(shape.prompts)]


def build(shape: Shape) -> tuple[Any, Any]:
    """A Llama with random weights, and a tokenizer for those who ask for one: all score ids."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens(["<eos>"])
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>"
    )


Score = Callable[[list[int], list[list[int]]], list[np.ndarray]]


def naive(model: Any, tokenizer: Any) -> Score:
    """A group as one padded batch, and a log-softmax over everything."""
    import torch

    def score(prompt: list[int], responses: list[list[int]]) -> list[np.ndarray]:
        rows = [torch.tensor(prompt + response) for response in responses]
        ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True)
        logits_BTV = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
        logprobs_BT = logits_BTV.log_softmax(-1)[:, :-1].gather(-1, ids_BT[:, 1:, None])[..., 0]
        start = len(prompt) - 1
        return [
            row[start : start + len(response)].numpy()
            for row, response in zip(logprobs_BT, responses, strict=True)
        ]

    return score


def trl(model: Any, tokenizer: Any) -> Score:
    """As TRL's GRPO trainer does: logits of the completions only, then `selective_log_softmax`."""
    import torch

    selective_log_softmax = import_module("trl.trainer.utils").selective_log_softmax

    def score(prompt: list[int], responses: list[list[int]]) -> list[np.ndarray]:
        rows = [torch.tensor(response) for response in responses]
        completion_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True)
        prompt_BP = torch.tensor(prompt).expand(len(rows), -1)
        keep = completion_BT.shape[1]
        logits_BTV = model(
            input_ids=torch.cat([prompt_BP, completion_BT], 1),
            attention_mask=torch.cat([torch.ones_like(prompt_BP), mask_BT], 1),
            logits_to_keep=keep + 1,
            use_cache=False,
        ).logits[:, -keep - 1 : -1]
        logprobs_BT = selective_log_softmax(logits_BTV, completion_BT)
        return [row[: len(r)].numpy() for row, r in zip(logprobs_BT, responses, strict=True)]

    return score


def lm_eval(batch_size: int) -> Callable[[Any, Any], Score]:
    """What `HFLM.loglikelihood` runs once its texts are ids: sums, one array of one each."""

    def prepare(model: Any, tokenizer: Any) -> Score:
        hflm = import_module("lm_eval.models.huggingface").HFLM
        lm = hflm(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")

        def score(prompt: list[int], responses: list[list[int]]) -> list[np.ndarray]:
            requests = [(("", ""), prompt, response) for response in responses]
            answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
            return [np.array([logprob]) for logprob, _ in answers]

        return score

    return prepare


def ours(model: Any, tokenizer: Any, **options: Any) -> Score:
    from cme_reward.verifiers.hf import TransformersVerifier

    verifier = TransformersVerifier(model, tokenizer, **options)
    return lambda prompt, responses: verifier.logprobs([prompt] * len(responses), responses)


def singly(**options: Any) -> Callable[[Any, Any], Score]:
    """Ours, asked for one response at a time, as rollouts end."""

    def prepare(model: Any, tokenizer: Any) -> Score:
        score = ours(model, tokenizer, **options)
        return lambda prompt, responses: [score(prompt, [row])[0] for row in responses]

    return prepare


VARIANTS: dict[str, Callable[..., Score]] = {
    "naive": naive,
    "trl": trl,
    "lm-eval, batches of 8": lm_eval(8),
    "lm-eval, batches of 1": lm_eval(1),
    "ours": ours,
    "ours, singly": singly(),
    "ours, singly, none kept": singly(prompt_cache_mb=0),
}


def run(shape: Shape, variant: str) -> dict[str, Any]:
    """CPU and wall seconds, extra peak memory in bytes, and the sums of the log-probs."""
    import torch

    groups = draw(shape)
    options = {}
    if shape.chunk:
        options = {"head_rows": shape.chunk // shape.vocab, "batch_tokens": 4096}
    score = VARIANTS[variant](*build(shape), **options)
    with torch.inference_mode():
        score(groups[0][0][:8], [ids[:4] for ids in groups[0][1][:2]])  # what only the first does
        # Building the model had a peak of its own and left free memory; start from here.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_bytes("VmRSS")
        cpu, wall = time.process_time(), time.perf_counter()
        logprobs = [row for group in groups for row in score(*group)]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "extra_bytes": memory_bytes("VmHWM") - before,
        "sums": [float(row.sum()) for row in logprobs],
        "logprobs": np.concatenate(logprobs).tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(run(Shape(**json.loads(sys.argv[1])), sys.argv[2])))
