"""Logits by a model's own head, and the log-probs in them.

Many models soft-cap or scale their logits, and ``hidden @ W.T`` is then wrong by whole nats. So
the model's own forward runs, over a body that returns the hidden states it is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# Weights converted at a time where a product of bf16 cannot be had in float32: 64 MB.
CONVERTED_AT_ONCE = 2**24


def head_logits(model: Any, body: Any, output_type: type, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits `[N, V]` of hidden states: the model's own forward over a body that returns them."""

    def given(*args: Any, **kwargs: Any) -> Any:
        return output_type(last_hidden_state=hidden_ND[None])

    with replaced_forward(body, given):
        # One id per hidden state, for models that look at the shape.
        ids_1N = torch.zeros(1, len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
        return model(ids_1N, use_cache=False).logits[0]


def float32_forward(linear: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for a linear layer of bf16 or fp16 weights whose results stay in float32.

    The product of two bf16 numbers is exact in float32, so nothing but the rounding of the
    logits is left out, and no float32 copy of the weights is kept.
    """

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight_VD = linear.weight
        hidden_ND = hidden.flatten(0, -2).to(weight_VD.device)
        if _mixed_product(weight_VD.device, weight_VD.dtype):
            logits_NV = torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
        else:
            hidden_ND = hidden_ND.float()
            logits_NV = hidden_ND.new_empty(len(hidden_ND), len(weight_VD))
            rows = max(1, CONVERTED_AT_ONCE // weight_VD.shape[1])
            for start in range(0, len(weight_VD), rows):
                block_VD = weight_VD[start : start + rows].float()
                logits_NV[:, start : start + rows] = hidden_ND @ block_VD.T
        if linear.bias is not None:
            logits_NV += linear.bias
        return logits_NV.unflatten(0, hidden.shape[:-1])

    return forward


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module compute something else for a while; hooks and wrappers come back."""
    saved = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if saved is None:
            del module.forward
        else:
            module.forward = saved


def gather_logprobs(logits_NV: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """``log_softmax(logits)[n, target[n]]`` in float32; the logits are overwritten.

    Log-softmax in bf16 is off by 0.02 to 0.05 nats a token, hence the conversion first.
    """
    logits_NV = logits_NV.float()
    target_N = target_N.to(logits_NV.device)
    picked_N = logits_NV.gather(-1, target_N[:, None])[:, 0]
    peak_N = logits_NV.amax(-1)
    # In place, because another block of this size would be the peak of memory.
    return picked_N - peak_N - logits_NV.sub_(peak_N[:, None]).exp_().sum(-1).log()


@cache
def _mixed_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies half precision into float32 here: on CUDA, and not in every one."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    one = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError, NotImplementedError):
        return False
