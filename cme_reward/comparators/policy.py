"""What a policy says of its own next tokens, for the rewards that are made of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from cme_reward.errors import ConfigError, InputError
from cme_reward.verifiers import passes
from cme_reward.verifiers.base import TokenIds
from cme_reward.verifiers.frozen import input_device
from cme_reward.verifiers.head import head_logits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyStatistics:
    """The generator's next-token distributions at the positions of its responses, in nats.

    Each field has the rows of `response_ids`, of any length or as a `[B, T]` tensor; None where an
    adapter does not have it. `p_t` is the distribution that token t was drawn from.
    """

    logprobs: Sequence[Any] | torch.Tensor | None = None
    """`log p_t(y_t)`: of the tokens that were sampled."""

    entropies: Sequence[Any] | torch.Tensor | None = None
    """`-sum_v p_t(v) log p_t(v)`."""

    self_certainties: Sequence[Any] | torch.Tensor | None = None
    """`KL(U || p_t) = -1/V sum_v log(V p_t(v))`, from the uniform distribution U to p_t."""


STATISTICS = tuple(field.name for field in fields(PolicyStatistics))


@torch.no_grad()
def policy_statistics(
    model: Any,
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    temperature: float = 1.0,
    batch_tokens: int | None = None,
    head_rows: int | None = None,
) -> PolicyStatistics:
    """All fields of `PolicyStatistics` by one forward pass over a policy's own samples.

    No gradients, dropout off, and the model is left as it was. Logits exist for `head_rows`
    positions at a time, so that memory does not grow with vocabulary x length.

    Args:
        model: a causal language model of transformers, bare or in DDP or PEFT.
        prompts: B sequences of the policy's token ids, none of them empty.
        responses: B sequences of the ids it sampled; one may be empty.
        temperature: that of sampling; logits are divided by it.
        batch_tokens: most tokens, padding included, in one pass (one row may exceed it). Default:
            16,384, or 512 on a CPU.
        head_rows: most positions whose logits exist at once. Default: as many as take 256 MB in
            float32, or 64 MB on a CPU; two more tensors of that size come with them.

    Returns:
        Lists of B float32 CPU tensors `[T]`; an empty batch gives empty lists.

    Raises:
        InputError: if lengths disagree, a prompt is empty, or the temperature is not positive.
        ConfigError: if the model's weights are sharded (FSDP, ZeRO-3).
    """
    if len(prompts) != len(responses) or not all(map(len, prompts)):
        raise InputError(
            f"got {len(prompts)} prompts of {[len(p) for p in prompts][:8]} tokens for "
            f"{len(responses)} responses; expected one prompt, not empty, for each response"
        )
    if not temperature > 0:
        raise InputError(f"temperature={temperature!r}; expected the positive one of sampling")
    _refuse_shards(model)
    device = input_device(getattr(model, "module", model))
    budget = batch_tokens or passes.batch_tokens(device)
    rows = [
        torch.tensor([*p, *r], dtype=torch.int64) for p, r in zip(prompts, responses, strict=True)
    ]
    found = [torch.zeros(3, 0)] * len(rows)
    with _dropout_off(model):
        body = _body(model, device)
        budget = 1 if body is None else budget
        widths = {b: len(row) for b, row in enumerate(rows) if len(responses[b])}
        for batch in passes.batches(widths, budget):
            # Causal attention never looks right, so padding on the right needs no mask.
            ids_BT = torch.nn.utils.rnn.pad_sequence([rows[b] for b in batch], batch_first=True)
            states, output_type = _states(model, body, ids_BT.to(device))
            starts = [len(prompts[b]) - 1 for b in batch]
            lengths = [len(responses[b]) for b in batch]
            states_ND = torch.cat(
                [x[i : i + n] for x, i, n in zip(states, starts, lengths, strict=True)]
            )
            target_N = torch.cat([rows[b][-n:] for b, n in zip(batch, lengths, strict=True)])
            size = head_rows or passes.head_rows(device, _vocabulary(model), tensors=2)
            parts = [
                _measure(
                    states if body is None else head_logits(model, body, output_type, states),
                    target,
                    temperature,
                )
                for states, target in zip(states_ND.split(size), target_N.split(size), strict=True)
            ]
            measured = torch.cat(parts, dim=1).cpu().split(lengths, dim=1)
            for b, values in zip(batch, measured, strict=True):
                found[b] = values
    return PolicyStatistics(*([values[k] for values in found] for k in range(3)))


def _measure(logits_NV: torch.Tensor, target_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-prob, entropy and self-certainty, `[3, N]`."""
    logp_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    logprobs_N = logp_NV.gather(-1, target_N.to(logp_NV.device)[:, None])[:, 0]
    certainties_N = -logp_NV.mean(-1) - float(np.log(logp_NV.shape[-1]))
    # entr(p) = -p log p, which is 0 at p = 0.
    entropies_N = torch.special.entr(logp_NV.exp_()).sum(-1)
    return torch.stack([logprobs_N, entropies_N, certainties_N])


def _states(model: Any, body: Any, ids_BT: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What the head is to read, `[B, T, D]`, and the type it comes in; without a body, logits."""
    if body is None:
        return model(ids_BT, use_cache=False).logits, None
    seen: list[Any] = []
    # Through the whole model, so that whatever wraps it takes part.
    handle = body.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(ids_BT, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return seen[0].last_hidden_state, type(seen[0])


_BODIES: WeakKeyDictionary[Any, tuple[Any]] = WeakKeyDictionary()


def _body(model: Any, device: torch.device) -> Any:
    """The part below the head, shown to give the model's own logits; None where there is none."""
    if model not in _BODIES:
        ids_1T = torch.arange(8, device=device)[None] * 7919 % _vocabulary(model)
        expected_TV = model(ids_1T, use_cache=False).logits[0].float()
        _BODIES[model] = (None,)
        inner = getattr(model, "module", model)  # DDP
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT
        for body in passes.bodies(inner):
            try:
                states, output_type = _states(model, body, ids_1T)
                got_TV = head_logits(model, body, output_type, states[0]).float()
            except Exception as error:  # model code may object in any way it likes
                logger.info("%s as the body of %s: %r", type(body), type(model), error)
                continue
            if passes.logits_agree(got_TV, expected_TV, 1e-2):  # under autocast both are rounded
                _BODIES[model] = (body,)
                break
        else:
            logger.warning("%s: all logits of a response in memory at once", type(model).__name__)
    return _BODIES[model][0]


def _vocabulary(model: Any) -> int:
    return getattr(model, "module", model).get_input_embeddings().weight.shape[0]


def _refuse_shards(model: Any) -> None:
    for name, weight in model.named_parameters():
        if hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") or "_fsdp_" in name:
            raise ConfigError(
                f"the policy's weight {name!r} is sharded over processes (FSDP or ZeRO-3), and "
                "they would have to take part in each other's passes: train with DDP or ZeRO-2, "
                "or have the framework supply PolicyStatistics"
            )


@contextmanager
def _dropout_off(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
