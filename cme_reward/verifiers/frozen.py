"""Exact response log-probs of a frozen causal language model, without its waste.

A cached prefix continues in several responses, the head sees response positions only, and it
sees them a few hundred rows at a time, so that no tensor grows with vocabulary x length. Logits
always come out of the model's own head code: many models soft-cap or scale them, and
``hidden @ W.T`` is then wrong by whole nats. What cannot be shown to agree with a plain forward
pass when the model is loaded is not used.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cme_reward.errors import ConfigError

logger = logging.getLogger(__name__)


class FrozenModel:
    """A causal language model of transformers that scores batches of responses.

    Call it under ``torch.inference_mode()``. `vocab_size` is the number of ids it knows,
    `shares` tells whether responses may continue a cached prefix, and `alone` whether each
    response needs a forward pass of its own.
    """

    def __init__(self, model: Any, name: str, *, head_rows: int, probe_length: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.head_rows = head_rows
        self.device = model.get_input_embeddings().weight.device
        with torch.inference_mode():
            self._choose_shortcuts(min(12, probe_length))

    def prefix(self, ids: np.ndarray) -> Any:
        """The cache after reading `ids`, for `logprobs`, which leaves it as it is."""
        return self.body(self._tensor(ids[None]), use_cache=True).past_key_values

    def logprobs(
        self, contexts: Sequence[np.ndarray], responses: Sequence[np.ndarray], cache: Any = None
    ) -> torch.Tensor:
        """Log-probs in nats of the N tokens of all responses, one response after the other.

        Response token s is predicted from the cached prefix, the whole context (one token at
        least) and the response before s; float32 `[N]`.
        """
        target_N = self._tensor(np.concatenate(responses))
        # The last token of a response predicts nothing.
        inputs = [np.concatenate([c, r[:-1]]) for c, r in zip(contexts, responses, strict=True)]
        # Causal attention never looks right, so padding on the right needs no mask.
        ids_BT = np.zeros((len(inputs), max(map(len, inputs))), np.int64)
        for b, ids in enumerate(inputs):
            ids_BT[b, : len(ids)] = ids
        if not self.splits:
            logits_NV = self.model(self._tensor(ids_BT), use_cache=False).logits[
                0, -len(target_N) :
            ]
            blocks = zip(*(x.split(self.head_rows) for x in (logits_NV, target_N)), strict=True)
            return torch.cat([gather_logprobs(*block) for block in blocks])

        output = self.body(
            self._tensor(ids_BT),
            past_key_values=None if cache is None else _copies(cache, len(inputs)),
            use_cache=cache is not None,
        )
        b_N = np.repeat(np.arange(len(inputs)), [len(r) for r in responses])
        t_N = np.concatenate(
            [np.arange(len(c) - 1, len(ids)) for c, ids in zip(contexts, inputs, strict=True)]
        )
        hidden_ND = output.last_hidden_state[self._tensor(b_N), self._tensor(t_N)]
        blocks = zip(*(x.split(self.head_rows) for x in (hidden_ND, target_N)), strict=True)
        # Nobody but the call in progress may hold on to logits: two blocks double the peak.
        return torch.cat(
            [
                gather_logprobs(_head(self.model, self.body, type(output), hidden), target)
                for hidden, target in blocks
            ]
        )

    def _choose_shortcuts(self, probe_length: int) -> None:
        ids_1T = self._tensor(np.arange(probe_length)[None] * 7919)
        ids_1T %= (rows := self.model.get_input_embeddings().weight.shape[0])
        expected_TV = self.model(ids_1T, use_cache=False).logits[0]
        self.vocab_size = min(rows, expected_TV.shape[-1])

        def head_agrees(body: Any) -> bool:
            output = body(ids_1T, use_cache=False)
            chunks = output.last_hidden_state[0].split(5)
            got_TV = torch.cat([_head(self.model, body, type(output), chunk) for chunk in chunks])
            tolerance = max(1e-5, 4 * torch.finfo(got_TV.dtype).eps)
            error = (got_TV.float() - expected_TV.float()).abs().max()
            return bool(error <= tolerance * expected_TV.abs().max())

        def cache_agrees() -> bool:
            whole_TD = self.body(ids_1T, use_cache=False).last_hidden_state[0].float()
            start = probe_length // 2
            cache = self.body(ids_1T[:, :start], use_cache=True).past_key_values
            for copies in (2, 1):
                ids = ids_1T[:, start:].expand(copies, -1)
                output = self.body(ids, past_key_values=_copies(cache, copies), use_cache=True)
                tail_TD = output.last_hidden_state[-1]
                # Both are rounded differently, by much in bf16; a wrong cache is off by far more.
                error = (tail_TD.float() - whole_TD[start:]).norm() / whole_TD[start:].norm()
                if not error <= torch.finfo(tail_TD.dtype).eps ** 0.5:
                    return False
            return True

        # Which of these names the body differs between models and versions of transformers.
        model = self.model
        bodies = (model.base_model, model.get_decoder(), getattr(model, "model", None))
        self.body: Any = next((b for b in bodies if self._holds(head_agrees, b)), model)
        self.splits = self.body is not model
        # Where positions are encoded by the length of the pass, companions change the result.
        self.alone = not self.splits or _length_dependent(model.config.get_text_config())
        self.shares = not self.alone and self._holds(cache_agrees)
        if not self.splits:
            logger.warning("%s: one response at a time, all its logits in memory", self.name)
        elif not self.shares:
            logger.warning("%s: a prompt is run again for each of its responses", self.name)

    def _holds(self, check: Callable[..., bool], *args: Any) -> bool:
        """Whether a shortcut runs and agrees; model code may object to it in any way it likes."""
        try:
            return check(*args)
        except Exception as error:
            logger.info("%s: %s: %r", self.name, check.__name__, error)
            return False

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


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


def length_limit(config: Any, tokenizer: Any, asked: int | None) -> int:
    """Most tokens of prompt and response: what was asked for, else what the model allows."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next((n for key in names if (n := getattr(config, key, None))), None)
    # Tokenizers without a limit of their own say 1e30.
    limits = [n for n in (positions, tokenizer.model_max_length) if n and n < 1e9]
    if asked is None:
        return int(min(limits, default=2**31 - 1))
    if asked < 2 or (positions and asked > positions):
        raise ConfigError(
            f"max_length={asked}: expected 2 to {positions or 'any length'}, the positions the "
            "model was made for; to go beyond, change its configuration"
        )
    return asked


def _head(model: Any, body: Any, output_type: type, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits `[N, V]` of hidden states: the model's own forward over a body that returns them."""
    saved = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: output_type(last_hidden_state=hidden_ND[None])
    try:
        # One id per hidden state, for models that look at the shape.
        ids_1N = torch.zeros(1, len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
        return model(ids_1N, use_cache=False).logits[0]
    finally:
        if saved is None:
            del body.forward
        else:
            body.forward = saved


def _copies(cache: Any, copies: int) -> Any:
    """The cache repeated, apart from the original: cropping fails on a full sliding window."""
    cache = copy.deepcopy(cache)
    if copies > 1:
        cache.reorder_cache(torch.zeros(copies, dtype=torch.int64))
    return cache


def _length_dependent(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return any(kind in str(rope) for kind in ("dynamic", "longrope"))
