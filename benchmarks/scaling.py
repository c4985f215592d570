"""What a verifier costs beside the generator: the arithmetic of docs/scaling.md, and its check.

    python benchmarks/scaling.py             # the tables
    python benchmarks/scaling.py --check     # the same formulas against what runs here, two minutes
    python benchmarks/scaling.py --generator qwen2.5-0.5b --verifier gemma-3-1b --response 512

Operations are multiply-adds counted as two, as everywhere in this field.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer with gated feed-forward layers and grouped queries."""

    layers: int
    hidden: int
    feed_forward: int
    queries: int
    """Query heads times their size."""
    keys: int
    """Key heads times their size."""
    vocab: int
    window: int = 0
    """Positions a sliding layer sees; 0 for none of them."""
    full_every: int = 1
    """Each so many-th layer sees everything."""

    @property
    def body(self) -> int:
        """Weights that each token goes through."""
        return (
            self.layers * self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.feed_forward)
        )

    @property
    def head(self) -> int:
        """Weights of the output layer, which only scored positions go through."""
        return self.hidden * self.vocab

    @property
    def cache_bytes(self) -> int:
        """Of one token's keys and values in bf16."""
        return 2 * 2 * self.layers * self.keys


# From the configurations that are published with the models.
SHAPES = {
    "qwen2.5-0.5b": Shape(24, 896, 4864, 896, 128, 151_936),
    "llama-3.2-1b": Shape(16, 2048, 8192, 2048, 512, 128_256),
    "qwen2.5-7b": Shape(28, 3584, 18_944, 3584, 512, 152_064),
    "qwen2.5-32b": Shape(64, 5120, 27_648, 5120, 1024, 152_064),
    "gemma-3-1b": Shape(26, 1152, 6912, 1024, 256, 262_144, 512, 6),
    "gemma-3-4b": Shape(34, 2560, 10_240, 2048, 1024, 262_208, 1024, 6),
    "gemma-3-12b": Shape(48, 3840, 15_360, 4096, 2048, 262_208, 1024, 6),
    "gemma-3-27b": Shape(62, 5376, 21_504, 4096, 2048, 262_208, 1024, 6),
}


@dataclass(frozen=True)
class Step:
    """One training step: prompts, rollouts of each, and their mean lengths in tokens."""

    prompts: int = 16
    group: int = 8
    prompt: int = 200
    response: int = 512

    @property
    def responses(self) -> int:
        return self.prompts * self.group


def attention(shape: Shape, positions: np.ndarray) -> float:
    """Operations in which tokens at these positions look at those before them."""
    seen = positions + 1.0
    full = shape.layers // shape.full_every if shape.full_every > 1 else shape.layers
    near = np.minimum(seen, shape.window) if shape.window else seen
    return 4 * shape.queries * (full * seen.sum() + (shape.layers - full) * near.sum())


def products(shape: Shape, step: Step, *, share_prompts: bool = True) -> float:
    """Operations in the weights: 2 x body for each token, 2 x head for each response token."""
    times = step.prompts if share_prompts else step.responses
    scored = step.responses * step.response
    return 2 * shape.body * (times * step.prompt + scored) + 2 * shape.head * scored


def scoring(shape: Shape, step: Step, *, share_prompts: bool = True) -> float:
    """Operations of a forward pass over the step's responses, a prompt once for its group."""
    before = np.arange(step.prompt)
    after = np.arange(step.prompt, step.prompt + step.response)
    times = step.prompts if share_prompts else step.responses
    seen = times * attention(shape, before) + step.responses * attention(shape, after)
    return products(shape, step, share_prompts=share_prompts) + seen


def generating(shape: Shape, step: Step) -> float:
    """Operations of the rollouts: the same positions, one at a time."""
    return scoring(shape, step)


def updating(shape: Shape, step: Step, *, passes: int = 1, checkpointing: bool = True) -> float:
    """Operations of the policy update.

    Trainers run each rollout with its own prompt: `passes` forward passes without gradient (the
    old policy's log-probs; a reference policy makes 2), then one with gradient, whose backward
    pass is twice as much; checkpointing runs it once more.
    """
    forward = scoring(shape, step, share_prompts=False)
    return (passes + 3 + checkpointing) * forward


def table(rows: Sequence[tuple[str, str]], step: Step) -> list[str]:
    """Verifier against generator, a line for each pair of names, as Markdown."""
    lines = [
        "| generator | verifier | verifier's weights | verifier | rollouts | update "
        "| verifier's share | at 400 TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for generator, verifier in rows:
        g, v = SHAPES[generator], SHAPES[verifier]
        cost, rollouts, update = scoring(v, step), generating(g, step), updating(g, step)
        share = cost / (cost + rollouts + update)
        weights = 2 * (v.body + v.head) / 1e9
        lines.append(
            f"| {generator} | {verifier} | {weights:.1f} GB | {cost / 1e12:,.0f} T | "
            f"{rollouts / 1e12:,.0f} T | {update / 1e12:,.0f} T | {share:.0%} | "
            f"{cost / 400e12:.1f} s |"
        )
    return lines


PAIRS = [
    ("qwen2.5-0.5b", "gemma-3-1b"),
    ("llama-3.2-1b", "gemma-3-1b"),
    ("qwen2.5-7b", "gemma-3-1b"),
    ("qwen2.5-7b", "gemma-3-4b"),
    ("qwen2.5-7b", "gemma-3-27b"),
    ("qwen2.5-32b", "gemma-3-27b"),
]


# ---- the check


def check(scale: int = 1) -> dict[str, float]:
    """The formulas against models that run here, in float32 on one core."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    v = Shape(12, 256 * scale, 1024 * scale, 256 * scale, 128 * scale, 16_384, 128, 6)
    g = Shape(8, 192 * scale, 768 * scale, 192 * scale, 96 * scale, 8192)
    common: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    verifier = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=v.vocab,
            hidden_size=v.hidden,
            intermediate_size=v.feed_forward,
            num_hidden_layers=v.layers,
            head_dim=v.queries // 4,
            query_pre_attn_scalar=v.queries // 4,
            sliding_window=v.window,
            max_position_embeddings=4096,
            **common,
        )
    ).eval()
    policy = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=g.vocab,
            hidden_size=g.hidden,
            intermediate_size=g.feed_forward,
            num_hidden_layers=g.layers,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            **common,
        )
    )
    step = Step(prompts=2, group=8, prompt=256, response=192)
    results = {"counted operations / formula": _counted(verifier, v, step)}
    matmul = _matmul_rate()
    seconds = _seconds(lambda: _score(verifier, v, step))
    results["verifier: share of the matrix product's rate"] = scoring(v, step) / seconds / matmul
    update = _seconds(lambda: _update(policy, g, step))
    expected = scoring(v, step) / updating(g, step, checkpointing=False)
    results["verifier / update, by operations"] = expected
    results["verifier / update, measured"] = seconds / update
    return results


def _ids(shape: Shape, step: Step) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, shape.vocab, step.prompt) for _ in range(step.prompts)]
    responses = [rng.integers(0, shape.vocab, step.response) for _ in range(step.responses)]
    return [prompts[k // step.group] for k in range(step.responses)], responses


def _verifier(model: Any, shape: Shape) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from cme_reward.verifiers.hf import TransformersVerifier

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(shape.vocab)}, unk_token="0"))
    return TransformersVerifier(model, PreTrainedTokenizerFast(tokenizer_object=backend))


def _score(model: Any, shape: Shape, step: Step) -> None:
    _verifier(model, shape).logprobs(*_ids(shape, step))


def _counted(model: Any, shape: Shape, step: Step) -> float:
    """Operations that torch counts in the matrix products, without attention's, over ours."""
    from torch.utils.flop_counter import FlopCounterMode

    verifier = _verifier(model, shape)
    with FlopCounterMode(display=False) as counter:
        verifier.logprobs(*_ids(shape, step))
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    return counted / products(shape, step)


def _update(model: Any, shape: Shape, step: Step) -> None:
    """What a trainer does: old log-probs, then forward and backward, prompt included."""
    import torch

    prompts, responses = _ids(shape, step)
    rows = np.stack([np.concatenate(pair) for pair in zip(prompts, responses, strict=True)])
    for batch in torch.from_numpy(rows).split(2):
        keep = step.response + 1
        with torch.no_grad():
            model(batch, use_cache=False, logits_to_keep=keep)
        logits = model(batch, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        labels = batch[:, step.prompt :]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()


def _matmul_rate(size: int = 1024) -> float:
    """Operations a second of a float32 matrix product."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b), repeats=10)


def _seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """CPU seconds of the best of some runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(SHAPES)
    parser.add_argument("--generator", choices=SHAPES, metavar="NAME", help=f"one of {names}")
    parser.add_argument("--verifier", choices=SHAPES, metavar="NAME", help="the same")
    for name, value in vars(Step()).items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N")
    parser.add_argument("--check", action="store_true", help="run small models and compare")
    args = parser.parse_args()
    if args.check:
        print(json.dumps(check(), indent=2))
        return
    if (args.generator is None) != (args.verifier is None):
        parser.error("give both --generator and --verifier, or neither for the table of docs")
    pairs = PAIRS if args.generator is None else [(args.generator, args.verifier)]
    step = Step(args.prompts, args.group, args.prompt, args.response)
    print(
        f"{step.prompts} prompts of {step.prompt} tokens, {step.group} rollouts each, "
        f"{step.response} tokens a response\n"
    )
    print("\n".join(table(pairs, step)))


if __name__ == "__main__":
    main()
