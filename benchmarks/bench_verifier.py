"""The in-process verifier against a padded batch with a full log-softmax.

Two shapes: one where the head dominates (large vocabulary, memory) and one where the body does
(long shared prompt, time). Each variant runs in a process of its own, so that peak memory is its
own, and reports CPU seconds: other work on the machine does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True)
class Shape:
    prompt: int
    lengths: tuple[int, ...]
    vocab: int
    hidden: int
    intermediate: int
    layers: int


SHAPES = {
    # 27.4 million parameters, most of them the head.
    "head-heavy": Shape(256, (256,) * 8, 131_072, 192, 512, 5),
    # 33.7 million parameters; ragged responses to one long prompt.
    "body-heavy": Shape(1000, (300, 287, 251, 204, 178, 133, 96, 41), 16_384, 512, 1376, 8),
}
AGREEMENT = 1e-4


def memory_bytes(field: str) -> int:
    """A memory figure of this process alone: `ru_maxrss` would start at the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith(field)
    )


def run_variant(shape: Shape, variant: str) -> dict[str, float]:
    """CPU seconds, extra peak memory in bytes and the log-probs of one variant, in this process."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cme_reward.verifiers.hf import TransformersVerifier

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    # The verifier wants a tokenizer, but ids are all it scores.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    rng = np.random.default_rng(0)
    prompt = rng.integers(shape.vocab, size=shape.prompt)
    responses = [rng.integers(shape.vocab, size=n) for n in shape.lengths]
    verifier = TransformersVerifier(model, tokenizer)

    @torch.inference_mode()
    def naive() -> list[np.ndarray]:
        rows = [torch.from_numpy(np.concatenate([prompt, r])) for r in responses]
        ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True)
        logits_BTV = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
        logprobs_BT = logits_BTV.log_softmax(-1)[:, :-1].gather(-1, ids_BT[:, 1:, None])[..., 0]
        start = len(prompt) - 1
        return [logprobs_BT[b, start : start + n].numpy() for b, n in enumerate(shape.lengths)]

    def ours() -> list[np.ndarray]:
        return verifier.logprobs([prompt] * len(responses), responses)

    before = memory_bytes("VmRSS")
    start = time.process_time()
    logprobs = {"naive": naive, "ours": ours}[variant]()
    seconds = time.process_time() - start
    return {
        "cpu_seconds": seconds,
        "extra_bytes": memory_bytes("VmHWM") - before,
        "logprobs": np.concatenate(logprobs).tolist(),
    }


def measure(shape_name: str, variant: str) -> dict:
    """`run_variant` in a fresh process."""
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, shape_name, variant],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape_name", SHAPES)
def test_forward(
    benchmark, shape_name: str, ratio_table: Callable[[str, str, str, str, str], None]
) -> None:
    naive = measure(shape_name, "naive")
    ours = benchmark.pedantic(measure, args=(shape_name, "ours"), rounds=1)
    error = np.abs(np.subtract(ours["logprobs"], naive["logprobs"])).max()
    assert error <= AGREEMENT

    cpu = ours["cpu_seconds"] / naive["cpu_seconds"]
    memory = ours["extra_bytes"] / naive["extra_bytes"]
    benchmark.extra_info |= {
        "cpu_seconds": ours["cpu_seconds"],
        "cpu_ratio": cpu,
        "extra_mb": ours["extra_bytes"] / 1e6,
        "memory_ratio": memory,
        "largest_difference": float(error),
        "tokens": sum(SHAPES[shape_name].lengths),
    }
    ratio_table(
        "verifier",
        f"{shape_name}, CPU",
        f"{ours['cpu_seconds']:.2f} s",
        f"{naive['cpu_seconds']:.2f} s",
        f"{cpu:.3f}",
    )
    ratio_table(
        "verifier",
        f"{shape_name}, extra memory",
        f"{ours['extra_bytes'] / 1e6:.0f} MB",
        f"{naive['extra_bytes'] / 1e6:.0f} MB",
        f"{memory:.3f}",
    )


if __name__ == "__main__":
    print(json.dumps(run_variant(SHAPES[sys.argv[1]], sys.argv[2])))
