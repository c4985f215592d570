"""The names of vLLM that OpenRLHF uses, over plain sampling on the CPU."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

__version__ = "0.29.0"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = 16
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    include_stop_str_in_output: bool = False


class AsyncEngineArgs:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kwargs = kwargs


class AsyncLLMEngine:
    def __init__(self, model: str, seed: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.float32 if "RIG_FLOAT32" in os.environ else torch.bfloat16
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        stops = self.model.generation_config.eos_token_id
        self.stops = {self.tokenizer.eos_token_id, *([stops] if isinstance(stops, int) else stops)}
        self.random = torch.Generator().manual_seed(seed)
        self.lock = threading.Lock()
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)

    @classmethod
    def from_engine_args(cls, arguments: AsyncEngineArgs) -> AsyncLLMEngine:
        return cls(arguments.kwargs["model"], arguments.kwargs.get("seed", 0))

    async def is_sleeping(self) -> bool:
        return False

    async def reset_prefix_cache(self) -> None: ...

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        yield await asyncio.to_thread(self._sample, list(prompt["prompt_token_ids"]), params)

    def _sample(self, prompt_ids: list[int], params: Any) -> Any:
        import torch

        ids: list[int] = []
        logprobs: list[dict[int, Any]] = []
        with self.lock, torch.no_grad():
            shown, cache = prompt_ids, None
            while len(ids) < params.max_tokens and not self.stops & set(ids[-1:]):
                out = self.model(torch.tensor([shown]), past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[0, -1].float()
                logp = (logits / params.temperature).log_softmax(-1)
                p = logp.exp()
                if len(ids) < params.min_tokens:
                    p[list(self.stops)] = 0
                ids.append(int(torch.multinomial(p, 1, generator=self.random)))
                logprobs.append({ids[-1]: SimpleNamespace(logprob=logp[ids[-1]].item())})
                shown = ids[-1:]
        stopped = ids[-1] in self.stops
        # As in vLLM: the end of a turn is among the ids, and not in the text.
        text = self.tokenizer.decode(
            ids[:-1] if stopped else ids, skip_special_tokens=params.skip_special_tokens
        )
        output = SimpleNamespace(
            token_ids=ids,
            text=text,
            finish_reason="stop" if stopped else "length",
            logprobs=None if params.logprobs is None else logprobs,
        )
        return SimpleNamespace(outputs=[output])

    async def collective_rpc(self, method: str, args: Any = ()) -> None:
        import torch

        if method == "init_process_group":
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
            from vllm.distributed.utils import StatelessProcessGroup

            address, port, rank, world_size, *_ = args
            group = StatelessProcessGroup.create(address, port, rank, world_size)
            self.group = PyNcclCommunicator(group, device="cpu")
        elif method == "update_weight":
            name, dtype, shape, _ = args
            weights = torch.empty(tuple(shape), dtype=dtype)
            await asyncio.to_thread(self.group.broadcast, weights, 0, None)
            dict(self.model.named_parameters())[name].data.copy_(weights)
        else:
            raise NotImplementedError(method)
