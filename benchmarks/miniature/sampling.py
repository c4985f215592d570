"""Responses of a policy to prompts, sampled or greedy.

A model this small spends nearly all of a token's time in layers of Python, so Llama, which policies
are, and Qwen3, which verifiers are, are written out here in as few calls as there are. Tests hold
them against `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.miniature.models import EOS, PAD
from benchmarks.miniature.tasks import MAX_NEW


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    generator: torch.Generator | None = None,
    max_new: int = MAX_NEW["short"],
) -> list[list[int]]:
    """One response a prompt, EOS included where the policy stopped.

    Args:
        model: a Llama or a Qwen3 with tied embeddings.
        prompts: B prompts as ids.
        generator: draws at temperature 1 without top-p or top-k; None: the likeliest token.
        max_new: responses are cut after so many tokens.
    """
    width = max(map(len, prompts))
    device = model.device
    ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts], device=device)
    padding_B = torch.tensor([width - len(p) for p in prompts], device=device)
    reader = _Reader(model, padding_B, width + max_new)
    responses: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for _ in range(max_new):
        logits = reader.read(ids)
        if generator is None:
            token = logits.argmax(dim=-1)
        else:
            # On the CPU, so that a seed means the same on every device.
            token = torch.multinomial(logits.float().softmax(dim=-1).cpu(), 1, generator=generator)
            token = token[:, 0].to(device)
        stopped = token == EOS
        for row, drawn in zip(rows, token.tolist(), strict=True):
            responses[row].append(drawn)
        if stopped.any():
            kept = (~stopped).nonzero()[:, 0]
            if not len(kept):
                break
            rows = [rows[k] for k in kept.tolist()]
            token = token[kept]
            reader.keep(kept)
        ids = token[:, None]
    return responses


class _Reader:
    """A model that reads B rows, padded on the left, a few tokens at a time."""

    def __init__(self, model: Any, padding_B: torch.Tensor, length: int) -> None:
        config = model.config
        self.eps, self.heads = config.rms_norm_eps, config.num_attention_heads
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.layers = [
            {
                "before": layer.input_layernorm.weight,
                "qkv": torch.cat([getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv"]),
                # Qwen3 has these and Llama has not.
                "heads": [
                    norm.weight
                    for name in ("q_norm", "k_norm")
                    if (norm := getattr(layer.self_attn, name, None)) is not None
                ],
                "out": layer.self_attn.o_proj.weight,
                "between": layer.post_attention_layernorm.weight,
                "wide": torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                "narrow": layer.mlp.down_proj.weight,
            }
            for layer in model.model.layers
        ]
        position = (torch.arange(length, device=model.device) - padding_B[:, None]).clamp(min=0)
        angle = position[:, None, :, None] * model.model.rotary_emb.inv_freq
        self.cos, self.sin = angle.cos(), angle.sin()
        shape = (2, len(padding_B), self.heads, length, config.head_dim)
        self.caches = [torch.zeros(shape, device=model.device) for _ in self.layers]
        self.visible = torch.arange(length, device=model.device) >= padding_B[:, None]
        self.start = 0

    def read(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits `[B, V]` after the last of these tokens."""
        start, stop = self.start, self.start + ids_BT.shape[1]
        self.start = stop
        order = torch.arange(stop, device=ids_BT.device)
        mask = self.visible[:, None, None, :stop] & (order <= order[start:, None])
        # A padding row sees itself, or its softmax would be over nothing.
        mask = mask | (order == order[start:, None])
        x = self.embedding[ids_BT]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = F.linear(self._normed(x, layer["before"]), layer["qkv"])
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if layer["heads"]:
                q, k = (self._normed(y, w) for y, w in zip((q, k), layer["heads"], strict=True))
            cache[0, :, :, start:stop] = self._turned(k, start, stop)
            cache[1, :, :, start:stop] = v
            seen = F.scaled_dot_product_attention(
                self._turned(q, start, stop), cache[0, :, :, :stop], cache[1, :, :, :stop], mask
            )
            x = x + F.linear(seen.transpose(1, 2).flatten(2), layer["out"])
            gate, up = F.linear(self._normed(x, layer["between"]), layer["wide"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["narrow"])
        return F.linear(self._normed(x[:, -1], self.norm), self.embedding)

    def keep(self, rows: torch.Tensor) -> None:
        """Read on in these rows only."""
        self.caches = [cache[:, rows] for cache in self.caches]
        self.visible, self.cos, self.sin = self.visible[rows], self.cos[rows], self.sin[rows]

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _turned(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rotary positions: the two halves of each head are the parts of complex numbers."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[:, :, start:stop], self.sin[:, :, start:stop]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
