"""The in-process verifier on a GPU: tokens a second, and how much of the device that is.

    python benchmarks/gpu.py                     # models of Gemma 3's 1B and 4B shape, bf16
    python benchmarks/gpu.py --json gpu.json --compile
    python benchmarks/gpu.py --toy               # tiny ones on a CPU, to see that it runs

Needs no network: weights are random, texts are passages of this repository. What is timed is the
whole call of `CrossModelEntropy`, ids to rewards.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

import cme_reward
from cme_reward import CrossModelEntropy
from cme_reward.loading import load_tokenizer
from cme_reward.verifiers.hf import TransformersVerifier

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Work:
    """Responses to score: groups of rollouts of one prompt, lengths in verifier tokens, about."""

    prompts: int
    group: int
    prompt_tokens: int
    response_tokens: int


@dataclass
class Result:
    model: str
    options: str
    parameters: int
    tokens: int
    """Prompt tokens, once a group, and response tokens."""
    seconds: float
    tokens_per_second: float
    utilisation: float
    """Floating-point operations that the tokens need, as a share of a matrix product's rate."""
    outside_forward: float
    """Share of the call's wall time in which the model does not run."""
    in_alignment: float
    """Share outside the verifier: decoding, encoding, aligning, tensors."""
    weights_gb: float
    peak_gb: float
    """Most memory over the weights; of the device, not measured on a CPU."""


def gemma3(toy: bool) -> dict[str, Gemma3TextConfig]:
    if toy:
        tiny: dict[str, Any] = {
            "vocab_size": 3000,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 16,
            "max_position_embeddings": 2048,
        }
        return {"toy": Gemma3TextConfig(**tiny)}
    common: dict[str, Any] = {
        "vocab_size": 262_144,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32_768,
    }
    return {
        "1B": Gemma3TextConfig(
            **common,
            hidden_size=1152,
            intermediate_size=6912,
            num_hidden_layers=26,
            num_attention_heads=4,
            num_key_value_heads=1,
            sliding_window=512,
        ),
        "4B": Gemma3TextConfig(
            **common,
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=34,
            num_attention_heads=8,
            num_key_value_heads=4,
            sliding_window=1024,
        ),
    }


def flops(config: Gemma3TextConfig, prompts: list[int], responses: list[list[int]]) -> float:
    """Operations of one forward pass over what has to be read, a shared prompt once.

    2 for each weight and token in the body, 2 x hidden x vocabulary for each response token, and
    in attention 4 x heads x head size for each position that a token sees.
    """
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    total = 0.0
    for prompt, lengths in zip(prompts, responses, strict=True):
        tokens = prompt + sum(lengths)
        total += 2 * tokens * layer * config.num_hidden_layers
        total += 2 * sum(lengths) * config.hidden_size * config.vocab_size
        positions = np.concatenate(
            [np.arange(prompt), *(np.arange(prompt, prompt + n) for n in lengths)]
        )
        for kind in config.layer_types or []:
            seen = positions + 1
            if kind == "sliding_attention":
                seen = np.minimum(seen, config.sliding_window or 0)
            total += 4 * q_size * float(seen.sum())
    return total


def matmul_rate(device: torch.device, size: int) -> float:
    """Floating-point operations a second of the best of some bf16 matrix products."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    product = a @ b
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def texts() -> str:
    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cme_reward/**/*.py")])
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """The verifier's: of another vocabulary than the generator's, so that there is work to do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2900,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", name_or_path="made here"
    )


def draw(work: Work, generator: Any, text: str) -> tuple[list[str], list[list[int]]]:
    """Passages as prompts, each repeated for its group, and the generator's ids of others."""
    rng = np.random.default_rng(0)
    ids = generator.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def passage(n: int) -> list[int]:
        start = int(rng.integers(max(1, len(ids) - n)))
        return ids[start : start + n]

    prompts, responses = [], []
    for _ in range(work.prompts):
        prompts += [generator.decode(passage(work.prompt_tokens))] * work.group
        # Ragged, as rollouts are: half to all of the length.
        lengths = rng.integers(work.response_tokens // 2, work.response_tokens + 1, work.group)
        responses += [passage(int(n)) for n in lengths]
    return prompts, responses


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def forward_timer(verifier: TransformersVerifier) -> Iterator[list[float]]:
    """Seconds of each pass through the model, the device waited for before and after."""
    frozen: Any = verifier.frozen
    seconds: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            synchronize(frozen.device)
            start = time.perf_counter()
            result = method(*args)
            synchronize(frozen.device)
            seconds.append(time.perf_counter() - start)
            return result

        return run

    frozen.prefix, frozen.logprobs = timed(frozen.prefix), timed(frozen.logprobs)
    try:
        yield seconds
    finally:
        del frozen.prefix, frozen.logprobs


def measure(
    name: str,
    config: Gemma3TextConfig,
    work: Work,
    options: dict[str, Any],
    device: torch.device,
    rate: float,
    rounds: int,
) -> Result:
    text = texts()
    generator, tokenizer = load_tokenizer("embedded"), make_tokenizer(text)
    prompts, responses = draw(work, generator, text)
    torch.manual_seed(0)
    attention = options.get("attn_implementation", "sdpa")
    own = {key: value for key, value in options.items() if key != "attn_implementation"}
    with device:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    # The same prompts are read again in every round, as those of new updates would be.
    verifier = TransformersVerifier(model, tokenizer, name=name, prompt_cache_mb=0, **own)
    if not verifier.frozen.shares:
        raise SystemExit(f"{name} {options}: prompts are not shared; see the warning above")
    cme = CrossModelEntropy(verifier, generator)

    # What the verifier is asked decides how much there is to compute.
    asked: list[tuple[list[int], list[int]]] = []
    score = verifier.logprobs

    def spy(prompts: Any, responses: Any) -> Any:
        asked.append(([len(p) for p in prompts], [len(r) for r in responses]))
        return score(prompts, responses)

    verifier.logprobs = spy
    cme(prompts, responses)  # also the warm-up
    verifier.logprobs = score
    ((prompt_lengths, response_lengths),) = asked
    groups = range(0, len(prompts), work.group)
    once = [prompt_lengths[i] for i in groups]
    lengths = [response_lengths[i : i + work.group] for i in groups]
    tokens = sum(once) + sum(response_lengths)

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, alignment = [], []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        batch = cme(prompts, responses)
        seconds.append(time.perf_counter() - start)
        alignment.append(batch.metrics["alignment_seconds"])
        assert torch.isfinite(batch.token_rewards).all()
    best = int(np.argmin(seconds))
    peak = torch.cuda.max_memory_allocated(device) - weights if device.type == "cuda" else 0
    with forward_timer(verifier) as passes:
        start = time.perf_counter()
        cme(prompts, responses)
        whole = time.perf_counter() - start
    return Result(
        model=name,
        options=", ".join(f"{key}={value}" for key, value in options.items()) or "defaults",
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=tokens,
        seconds=seconds[best],
        tokens_per_second=tokens / seconds[best],
        utilisation=flops(config, once, lengths) / seconds[best] / rate,
        outside_forward=1 - sum(passes) / whole,
        in_alignment=alignment[best] / seconds[best],
        weights_gb=weights / 1e9,
        peak_gb=peak / 1e9,
    )


def print_table(results: list[Result]) -> None:
    head = ["model", "options", "parameters", "tokens/s", "utilisation", "outside the forward"]
    rows = [[*head, "alignment", "weights", "peak over them"]]
    for r in results:
        rows.append(
            [
                r.model,
                r.options,
                f"{r.parameters / 1e6:,.1f} M",
                f"{r.tokens_per_second:,.0f}",
                f"{r.utilisation:.1%}",
                f"{r.outside_forward:.2%}",
                f"{r.in_alignment:.2%}",
                f"{r.weights_gb:.2f} GB",
                f"{r.peak_gb:.2f} GB" if r.peak_gb else "not measured",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the in-process verifier on a GPU.")
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes on a CPU: shows that it runs"
    )
    parser.add_argument("--models", nargs="+", choices=["1B", "4B"], default=["1B", "4B"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--response-tokens", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, help="default: the verifier's own")
    parser.add_argument("--attn", metavar="NAME", help="such as flash_attention_2; default: sdpa")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile; minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if not args.toy and not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a CUDA device and torch sees none: run it on a machine with "
            "a GPU and a CUDA build of torch, or with --toy to see that it runs"
        )
    device = torch.device("cpu" if args.toy else "cuda")
    if args.toy:
        torch.set_num_threads(1)
    work = (
        Work(2, 3, 40, 60)
        if args.toy
        else Work(args.prompts, args.group, args.prompt_tokens, args.response_tokens)
    )
    configs = gemma3(args.toy)
    given = {"batch_tokens": args.batch_tokens, "attn_implementation": args.attn}
    base = {key: value for key, value in given.items() if value is not None}
    variants = [base, base | {"head_dtype": "float32"}]
    if args.compile:
        variants.append(base | {"compile": "eager" if args.toy else True})

    rate = matmul_rate(device, 256 if args.toy else 8192)
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (toy)",
        "bf16 matrix product": f"{rate / 1e12:.4g} TFLOP/s",
        "software": f"Python {platform.python_version()}, cme-reward {cme_reward.__version__}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers")),
        "work": ", ".join(f"{key} {value}" for key, value in asdict(work).items()),
    }
    for key, value in machine.items():
        print(f"{key}: {value}")
    results = []
    for name in ["toy"] if args.toy else args.models:
        for options in variants:
            rounds = 1 if args.toy else args.rounds
            results.append(measure(name, configs[name], work, options, device, rate, rounds))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print()
    print_table(results)
    if args.json:
        report = {"machine": machine, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
