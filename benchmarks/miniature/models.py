"""Language models small enough to train on the spot: generators and verifiers of two families."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

PAD, EOS = 0, 1
MAX_LENGTH = 256


@dataclass(frozen=True)
class Size:
    """Width and depth of a model."""

    hidden: int
    layers: int


def build(family: str, size: Size, vocab_size: int, seed: int) -> Any:
    """An untrained model: "llama" for generators, "qwen3" for verifiers of another family."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": size.hidden // 4,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**settings))
        return Qwen3ForCausalLM(Qwen3Config(**settings))


def parameters_of(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


Text = tuple[str, str]
"""What is conditioned on, and what is learnt."""


def encode(tokenizer: Any, texts: Sequence[Text]) -> list[tuple[list[int], int]]:
    """Ids of each text with EOS, and how many of them the loss leaves out."""
    prompts = tokenizer([p for p, _ in texts], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a for _, a in texts], add_special_tokens=False)["input_ids"]
    return [(p + a + [EOS], len(p)) for p, a in zip(prompts, answers, strict=True)]


def collate(rows: Sequence[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[B, T]` padded on the right, and the targets, -100 where there is nothing to learn."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), width), PAD)
    target_BT = torch.full((len(rows), width), -100)
    for b, (ids, skip) in enumerate(rows):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        target_BT[b, skip : len(ids)] = torch.tensor(ids[skip:])
    return ids_BT, target_BT


def token_losses(model: Any, ids_BT: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
    """`-log p(target[t] | ids[:t])` in nats, `[B, T - 1]`; 0 where there is no target."""
    # Causal attention never looks right, so padding on the right needs no mask.
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    target = target_BT[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return losses.view_as(target)


def train(
    model: Any,
    tokenizer: Any,
    texts: Iterator[Text],
    *,
    steps: int,
    batch: int = 64,
    lr: float = 3e-3,
) -> float:
    """Minimise the loss of the texts; returns the mean loss of the last tenth of the steps."""
    optimizers = _optimizers(model, lr)
    model.train()
    last: list[float] = []
    groups: list[list[tuple[list[int], int]]] = []
    for step in range(steps):
        # Rows of like length together waste nothing on padding.
        if step % 8 == 0:
            pool = encode(tokenizer, [next(texts) for _ in range(8 * batch)])
            pool.sort(key=lambda row: len(row[0]))
            groups = [pool[k : k + batch] for k in range(0, len(pool), batch)]
            random.Random(step).shuffle(groups)
        ids_BT, target_BT = collate(groups[step % 8])
        device = model.device
        losses = token_losses(model, ids_BT.to(device), target_BT.to(device))
        loss = losses.sum() / (target_BT[:, 1:] != -100).sum()
        scale = min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        step_all(optimizers, model, loss, scale)
        if step >= 0.9 * steps:
            last.append(float(loss.detach()))
    return sum(last) / max(1, len(last))


def step_all(
    optimizers: list[torch.optim.Optimizer], model: Any, loss: torch.Tensor, scale: float
) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=4 * lr, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made
