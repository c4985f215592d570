"""A verifier that runs in this process: any causal language model of ``transformers``.

Responses to one prompt are scored from one cached pass over it where that saves enough, in later
calls too, the others in padded batches of like length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import numpy as np
import torch

from cme_reward._forks import renew_after_fork
from cme_reward.errors import ConfigError, InputError, TokenizerError, VerifierError
from cme_reward.verifiers import passes
from cme_reward.verifiers.base import Closes, TokenIds
from cme_reward.verifiers.frozen import FrozenModel, compiler_of, input_device, length_limit
from cme_reward.verifiers.offload import OffloadedWeights
from cme_reward.verifiers.prefixes import Prefixes
from cme_reward.verifiers.pretrained import (
    choose_attention,
    load_trained,
    load_untrained,
    warn_of_another_end,
)
from cme_reward.verifiers.whole import check_whole

OWN_OPTIONS = (
    "max_length", "batch_tokens", "head_rows", "head_dtype", "compile", "offload",
    "prompt_cache_mb", "name",
)  # fmt: skip


class TransformersVerifier(Closes):
    """Scores responses with a frozen causal language model, on CPU or GPU.

    Args:
        model: a causal language model of transformers; it is put in eval mode and frozen.
        tokenizer: its fast tokenizer.
        max_length: most tokens of prompt and response together. Default: what the model's
            configuration and the tokenizer allow, whichever is less.
        batch_tokens: most tokens, padding included, in one forward pass (a single response may
            exceed it). Default: 16,384, or 512 on a CPU, where wider batches only add padding.
        head_rows: most positions whose logits exist at once, at 4 bytes x vocabulary each. Default:
            as many as take 512 MB, or 128 MB on a CPU, whatever the vocabulary.
        head_dtype: `"float32"` keeps the logits of a bf16 or fp16 output layer in float32, rather
            than rounding them first; log-softmax is in float32 either way. Default: as the model.
        compile: True to run the body through ``torch.compile``, or the name of a backend of it.
            The first calls then take longer, up to minutes.
        offload: `"between_calls"` keeps the weights in CPU memory while no call is in progress.
            Nothing to do, and harmless, where the model runs on the CPU.
        prompt_cache_mb: most MB of prompts kept between calls, those used last, so that rollouts
            which come one by one share their prompt as those of a batch do; 0, or offloaded
            weights, keep none. Weights that are changed through `.data` are not noticed.
        name: how reports call this verifier.

    Calls from several threads take turns. A process that forks off computes in one thread.

    Raises:
        ConfigError: an option has no such value, or the model does not fit it.
        TokenizerError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        head_rows: int | None = None,
        head_dtype: torch.dtype | str | None = None,
        compile: bool | str = False,
        offload: str | None = None,
        prompt_cache_mb: int = 256,
        name: str | None = None,
    ) -> None:
        self.name = name or f"hf:{model.config.name_or_path or type(model).__name__}"
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(
                f"{self.name}: {type(tokenizer).__name__} is a slow tokenizer, and text positions "
                "need a fast one: use a repository that holds a tokenizer.json, or write one with "
                "transformers.convert_slow_tokenizer.convert_slow_tokenizer(tokenizer).save(path)"
            )
        if any(limit is not None and limit < 1 for limit in (head_rows, batch_tokens)):
            raise ConfigError(f"{batch_tokens=} and {head_rows=} must both be at least 1")
        if prompt_cache_mb < 0:
            raise ConfigError(f"{prompt_cache_mb=}: expected MB, or 0 to keep no prompts")
        if head_dtype not in (None, "float32", torch.float32):
            raise ConfigError(
                f"{head_dtype=}: expected 'float32', or None to compute logits as the model does"
            )
        if offload not in (None, "between_calls"):
            raise ConfigError(
                f"{offload=}: expected 'between_calls', or None to keep the weights where they are"
            )
        check_whole(model, self.name)
        warn_of_another_end(model, tokenizer, self.name)
        choose_attention(model, getattr(model.config, "_attn_implementation", None))
        self.tokenizer = tokenizer
        self.max_length = length_limit(model.config, tokenizer, max_length)
        self.model = model
        self.resident: AbstractContextManager[Any] = nullcontext()
        device = input_device(model)
        if offload and device.type != "cpu":
            self.resident = OffloadedWeights(model, device)
        with self.resident:
            self.frozen = FrozenModel(
                model,
                self.name,
                head_rows=head_rows,
                probe_length=self.max_length,
                float32_head=head_dtype is not None,
                backend=compiler_of(compile),
            )
        self.vocab_size = self.frozen.vocab_size
        batch_tokens = batch_tokens or passes.batch_tokens(self.frozen.device)
        self.batch_tokens = 1 if self.frozen.alone else batch_tokens
        kept = 0 if isinstance(self.resident, OffloadedWeights) else prompt_cache_mb
        self._prefixes = Prefixes(self.frozen, self.batch_tokens, kept * 10**6)
        self._turn = Lock()
        renew_after_fork(self, TransformersVerifier._renew)

    def _renew(self) -> None:
        self._turn = Lock()
        if self.device.type == "cpu":  # its threads are in the other process; torch would wait
            torch.set_num_threads(1)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=Lock())
        renew_after_fork(self, TransformersVerifier._renew)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> TransformersVerifier:
        """Load model and tokenizer from the hub or from a directory.

        `dtype` None keeps the checkpoint's own, `device` None means the GPU if there is one.
        `attn_implementation` None is SDPA, and eager attention where SDPA would leave out a soft
        cap; `"flash_attention_2"` and the others of transformers pass through. Further keywords:
        those of the class, and what ``AutoModelForCausalLM.from_pretrained`` takes, such as
        `device_map` (needs accelerate) and `quantization_config` (``{"load_in_8bit": True}`` needs
        accelerate and bitsandbytes).
        """
        options = {key: kwargs.pop(key) for key in OWN_OPTIONS if key in kwargs}
        model, tokenizer = load_trained(
            name_or_path,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            **kwargs,
        )
        return cls(model, tokenizer, **{"name": f"hf:{name_or_path}", **options})

    @classmethod
    def from_config(
        cls,
        name_or_path: str,
        *,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> TransformersVerifier:
        """The same architecture and tokenizer, untrained: the random-verifier control.

        The weights depend on `seed` alone, and torch's random state is left as it was.
        """
        options = {key: kwargs.pop(key) for key in OWN_OPTIONS if key in kwargs}
        model, tokenizer = load_untrained(
            name_or_path,
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            **kwargs,
        )
        return cls(model, tokenizer, **{"name": f"random:{name_or_path}", **options})

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.frozen.device

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """``log p(response[s] | prompt, response[:s])`` in nats, as float32 arrays `[S]`.

        Results keep the order of the input and do not depend on what else is in the batch. An
        empty response gives an empty array, an empty batch an empty list.

        Raises:
            InputError: as many prompts as responses were expected, or a prompt is empty, an id
                is outside the vocabulary, a response ends beyond `max_length`.
            VerifierError: the model gave a log-probability that is not finite.
        """
        prompts_B, responses_B = self._checked(prompts, responses)
        with self._turn, self.resident, torch.inference_mode():
            return self._logprobs(prompts_B, responses_B)

    def _logprobs(
        self, prompts_B: list[np.ndarray], responses_B: list[np.ndarray]
    ) -> list[np.ndarray]:
        groups: dict[bytes, list[int]] = defaultdict(list)
        for i, response in enumerate(responses_B):
            if len(response):
                groups[prompts_B[i].tobytes()].append(i)

        asked: list[tuple[list[int], torch.Tensor]] = []
        loose: list[int] = []
        for members in groups.values():
            prompt, sizes = prompts_B[members[0]], [len(responses_B[i]) for i in members]
            cache = self._prefixes.of(prompt, sizes, only=len(groups) == 1)
            if cache is not None:
                contexts = dict.fromkeys(members, prompt[-1:])
                asked += self._ask(members, contexts, responses_B, cache)
            else:
                loose += members
        asked += self._ask(loose, prompts_B, responses_B)
        return self._received(asked, responses_B)

    def _ask(
        self,
        members: list[int],
        contexts: Mapping[int, np.ndarray] | list[np.ndarray],
        responses: list[np.ndarray],
        cache: Any = None,
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Responses that continue one cached prefix, or none: those of a pass, and its log-probs
        one response after the other, still on the device."""
        widths = {i: len(contexts[i]) + len(responses[i]) - 1 for i in members}
        for batch in passes.batches(widths, self.batch_tokens):
            pieces = [responses[i] for i in batch]
            yield batch, self.frozen.logprobs([contexts[i] for i in batch], pieces, cache)

    def _received(
        self, asked: list[tuple[list[int], torch.Tensor]], responses: list[np.ndarray]
    ) -> list[np.ndarray]:
        """The log-probs of each response. Not before all passes are asked for: a GPU computes one
        while the next is prepared."""
        results = [np.empty(0, np.float32) for _ in responses]
        for batch, logprobs_N in asked:
            ends = np.cumsum([len(responses[i]) for i in batch])[:-1]
            for i, logprobs_S in zip(batch, np.split(logprobs_N.cpu().numpy(), ends), strict=True):
                for s in np.flatnonzero(~np.isfinite(logprobs_S))[:1]:
                    raise VerifierError(
                        f"{self.name}: log-prob {logprobs_S[s]} for token {s} of response {i}, "
                        "where a finite number was expected: check the checkpoint, or load it "
                        "with dtype float32"
                    )
                results[i] = logprobs_S
        return results

    def _checked(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        if len(prompts) != len(responses):
            raise InputError(
                f"{len(prompts)} prompts for {len(responses)} responses: repeat each prompt for "
                "every one of its rollouts"
            )
        prompts_B = [self._ids("prompt", i, ids) for i, ids in enumerate(prompts)]
        responses_B = [self._ids("response", i, ids) for i, ids in enumerate(responses)]
        for i, (prompt, response) in enumerate(zip(prompts_B, responses_B, strict=True)):
            if not 0 < len(prompt) <= self.max_length - len(response):
                raise InputError(
                    f"prompt {i} has {len(prompt)} tokens and its response {len(response)}: give "
                    f"a prompt at least one, and both together at most {self.max_length}"
                )
        return prompts_B, responses_B

    def _ids(self, what: str, i: int, ids: TokenIds) -> np.ndarray:
        array = np.array(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(
                f"{what} {i} is {array.dtype} of shape {array.shape}: give one flat sequence of "
                "integer token ids"
            )
        for at in np.flatnonzero((array < 0) | (array >= self.vocab_size))[:1]:
            raise InputError(
                f"{what} {i} holds id {array[at]} at position {at}, but {self.name} has ids 0 to "
                f"{self.vocab_size - 1} (vocabulary size {self.vocab_size}): encode the text with "
                "the verifier's own tokenizer"
            )
        return array.astype(np.int64)
