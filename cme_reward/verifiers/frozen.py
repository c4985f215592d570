"""Exact response log-probs of a frozen causal language model, without its waste.

A cached prefix continues in several responses, the head sees response positions only, and it
sees them a few hundred rows at a time, so that no tensor grows with vocabulary x length. What
cannot be shown to agree with a plain forward pass when the model is loaded is not used.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from cme_reward.errors import ConfigError
from cme_reward.verifiers import passes
from cme_reward.verifiers.head import (
    float32_forward,
    gather_logprobs,
    head_logits,
    replaced_forward,
)

logger = logging.getLogger(__name__)

# Each kind of pass (prefix or not, one row or several, windows full or not) is compiled by itself,
# and with a limit shared by all models of the process the second one would not be compiled.
_LIMITS: dict[str, Any] = {
    key: value
    for key, value in {"recompile_limit": 64, "isolate_recompiles": True}.items()
    if key in inspect.signature(torch.compile).parameters
}


class FrozenModel:
    """A causal language model of transformers that scores batches of responses.

    Call it under ``torch.inference_mode()``. `vocab_size` is the number of ids it knows,
    `shares` tells whether responses may continue a cached prefix, and `alone` whether each
    response needs a forward pass of its own.

    `float32_head` leaves out the rounding of half-precision logits, and `backend` is the
    compiler of ``torch.compile`` for the body, None for none: both are asked for, so that a
    model that they do not fit is a ConfigError. So is one whose log-probs depend on what follows.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        head_rows: int | None,
        probe_length: int,
        float32_head: bool = False,
        backend: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.float32_head = False
        self.device = input_device(model)
        with torch.inference_mode():
            probe = np.arange(min(12, probe_length))[None] * 7919
            ids_1T = self._tensor(probe % model.get_input_embeddings().weight.shape[0])
            self._choose_shortcuts(ids_1T)
            self.head_rows = head_rows or passes.head_rows(self.device, self.vocab_size)
            if float32_head:
                self._use_float32_head(ids_1T)
            if backend is not None:
                self._compile(backend, ids_1T)

    def prefix(self, ids: np.ndarray) -> Any:
        """The cache after reading `ids`, for `logprobs`, which leaves it as it is."""
        output = self.run_body(self._tensor(ids[None]), use_cache=True)
        return getattr(output, self.cache_name)

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
            with self._head_in_use():
                logits_TV = self.model(self._tensor(ids_BT), use_cache=False).logits[0]
            logits_NV = logits_TV[-len(target_N) :]
            blocks = zip(*(x.split(self.head_rows) for x in (logits_NV, target_N)), strict=True)
            return torch.cat([gather_logprobs(*block) for block in blocks])

        output = self.run_body(
            self._tensor(ids_BT),
            use_cache=cache is not None,
            **{self.cache_name: None if cache is None else self._copies(cache, len(inputs))},
        )
        b_N = np.repeat(np.arange(len(inputs)), [len(r) for r in responses])
        t_N = np.concatenate(
            [np.arange(len(c) - 1, len(ids)) for c, ids in zip(contexts, inputs, strict=True)]
        )
        # The body may end on another device than the one it starts on.
        hidden_BTD = output.last_hidden_state
        hidden_ND = hidden_BTD[to_device(b_N, hidden_BTD.device), to_device(t_N, hidden_BTD.device)]
        blocks = zip(*(x.split(self.head_rows) for x in (hidden_ND, target_N)), strict=True)
        # Nobody but the call in progress may hold on to logits: two blocks double the peak.
        with self._head_in_use():
            return torch.cat(
                [
                    gather_logprobs(
                        head_logits(self.model, self.body, type(output), hidden), target
                    )
                    for hidden, target in blocks
                ]
            )

    def _choose_shortcuts(self, ids_1T: torch.Tensor) -> None:
        expected_TV = self.model(ids_1T, use_cache=False).logits[0]
        rows = self.model.get_input_embeddings().weight.shape[0]
        self.vocab_size = min(rows, expected_TV.shape[-1])
        self._require_causal(ids_1T, expected_TV)

        def head_agrees(body: Any) -> bool:
            output = body(ids_1T, use_cache=False)
            chunks = output.last_hidden_state[0].split(5)
            got_TV = torch.cat(
                [head_logits(self.model, body, type(output), chunk) for chunk in chunks]
            )
            return passes.logits_agree(got_TV, expected_TV)

        def cache_agrees() -> bool:
            whole_TD = self.body(ids_1T, use_cache=False).last_hidden_state[0]
            return self._cache_agrees(ids_1T, whole_TD)

        model = self.model
        found = (b for b in passes.bodies(model) if self._holds(head_agrees, b))
        self.body: Any = next(found, model)
        self.run_body = self.body
        # transformers 5.24 has renamed it, and warns of the old name.
        parameters = inspect.signature(self.body.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.splits = self.body is not model
        # Where positions are encoded by the length of the pass, companions change the result.
        self.alone = not self.splits or _length_dependent(model.config.get_text_config())
        self.shares = not self.alone and self._holds(cache_agrees)
        if not self.splits:
            logger.warning("%s: one response at a time, all its logits in memory", self.name)
        elif not self.shares:
            logger.warning("%s: a prompt is run again for each of its responses", self.name)

    def _require_causal(self, ids_1T: torch.Tensor, expected_TV: torch.Tensor) -> None:
        """transformers loads BERT as a causal model too, and lets it see both ways."""
        if ids_1T.shape[1] < 2:
            return
        other_1T = ids_1T.clone()
        other_1T[0, -1] = (other_1T[0, -1] + 1) % self.vocab_size
        got_TV = self.model(other_1T, use_cache=False).logits[0]
        if not passes.logits_agree(got_TV[:-1], expected_TV[:-1]):
            raise ConfigError(
                f"{self.name} is no causal language model: what it predicts depends on the tokens "
                "that follow. Expected a decoder, which reads from left to right; a BERT is one "
                "with is_decoder=True in its configuration, if it was trained so"
            )

    def _cache_agrees(self, ids_1T: torch.Tensor, whole_TD: torch.Tensor) -> bool:
        """Whether the body gives the hidden states of `whole_TD` after a cached prefix too."""
        start = ids_1T.shape[1] // 2
        cache = getattr(self.run_body(ids_1T[:, :start], use_cache=True), self.cache_name)
        for copies in (2, 1):
            ids = ids_1T[:, start:].expand(copies, -1)
            given = {self.cache_name: self._copies(cache, copies)}
            output = self.run_body(ids, use_cache=True, **given)
            if not self._hidden_agree(output.last_hidden_state[-1], whole_TD[start:]):
                return False
        return True

    def _hidden_agree(self, got_TD: torch.Tensor, expected_TD: torch.Tensor) -> bool:
        """Both are rounded differently, by much in 8 or 16 bits; wrong ones are far off."""
        quantized = getattr(self.model, "is_quantized", False)
        eps = torch.finfo(torch.bfloat16 if quantized else got_TD.dtype).eps
        error = (got_TD.float() - expected_TD.float()).norm() / expected_TD.float().norm()
        return bool(error <= eps**0.5)

    def _use_float32_head(self, ids_1T: torch.Tensor) -> None:
        head = self.model.get_output_embeddings()
        remedy = "leave head_dtype out; log-softmax is in float32 in any case"
        plain = isinstance(head, torch.nn.Linear) and head.weight.is_floating_point()
        if not plain or head.weight.is_meta:
            raise ConfigError(
                f"head_dtype='float32' needs an output layer of plain weights, and that of "
                f"{self.name} is {type(head).__name__}: {remedy}"
            )
        expected_TV = self.model(ids_1T, use_cache=False).logits[0]
        self.float32_head = True
        with self._head_in_use():
            got_TV = self.model(ids_1T, use_cache=False).logits[0]
        if got_TV.dtype != torch.float32 or not passes.logits_agree(got_TV, expected_TV):
            raise ConfigError(
                f"head_dtype='float32': {self.name} does not take its logits from its output "
                f"layer as they are (they come as {got_TV.dtype}): {remedy}"
            )

    def _head_in_use(self) -> AbstractContextManager[None]:
        if not self.float32_head:
            return nullcontext()
        head = self.model.get_output_embeddings()
        return replaced_forward(head, float32_forward(head))

    def _compile(self, backend: str, ids_1T: torch.Tensor) -> None:
        remedy = "leave compile out; everything else works without it"
        if not self.splits:
            raise ConfigError(f"compile: {self.name} has no body apart from its head: {remedy}")
        whole_1TD = self.body(ids_1T, use_cache=False).last_hidden_state
        try:
            self.run_body = torch.compile(self.body, dynamic=True, backend=backend, **_LIMITS)
            got_1TD = self.run_body(ids_1T, use_cache=False).last_hidden_state
            agrees = self._hidden_agree(got_1TD, whole_1TD)
            agrees = agrees and (not self.shares or self._cache_agrees(ids_1T, whole_1TD[0]))
        except Exception as error:  # of many kinds, the compiler's and the C++ compiler's too
            raise ConfigError(
                f"compile: torch.compile(backend={backend!r}) fails on {self.name}: {remedy}. "
                f"torch says: {str(error).strip().partition(chr(10))[0]}"
            ) from error
        if not agrees:
            raise ConfigError(
                f"compile: torch.compile(backend={backend!r}) changes the hidden states of "
                f"{self.name} by more than rounding does: {remedy}"
            )

    def _holds(self, check: Callable[..., bool], *args: Any) -> bool:
        """Whether a shortcut runs and agrees; model code may object to it in any way it likes."""
        try:
            return check(*args)
        except Exception as error:
            logger.info("%s: %s: %r", self.name, check.__name__, error)
            return False

    def _copies(self, cache: Any, copies: int) -> Any:
        """The cache repeated, apart from the original: cropping fails on a full sliding window."""
        cache = copy.deepcopy(cache)
        if copies > 1:
            cache.reorder_cache(torch.zeros(copies, dtype=torch.int64, device=self.device))
        return cache

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the array, or on a CPU the array itself.

    From ordinary memory a copy to a GPU waits until it has done all that was asked of it, and the
    next pass could not be prepared meanwhile.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def input_device(model: Any) -> torch.device:
    """Where token ids go: weights that are elsewhere until they are used say "meta"."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


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


def _length_dependent(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return any(kind in str(rope) for kind in ("dynamic", "longrope"))


def compiler_of(compile: bool | str) -> str | None:
    """The backend of ``torch.compile`` that is meant; None for none."""
    if not isinstance(compile, str):
        return "inductor" if compile else None
    known = torch.compiler.list_backends(exclude_tags=())
    if compile not in known:
        raise ConfigError(f"{compile=}: expected True, False or one of {known}")
    return compile
