"""A rollout engine that generates with transformers, and the stand-in for a hosted verifier."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


class Generator:
    """Samples token by token. Rollouts are the same in every run, in whatever order they come."""

    def __init__(self, path: str, config: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.config, self.global_steps = config, 0
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.seen: Counter[tuple[int, ...]] = Counter()
        documents = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
        text = "\n".join(document.read_text(encoding="utf-8") for document in documents)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.script: list[int] = self.tokenizer.encode(text, add_special_tokens=False)

    async def generate(
        self, prompt_ids: Any, sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        prompt = [int(i) for i in prompt_ids]
        self.seen[tuple(prompt)] += 1
        seed = zlib.crc32(repr((prompt, self.global_steps, self.seen[tuple(prompt)])).encode())
        random = torch.Generator().manual_seed(seed)
        temperature = sampling_params.get("temperature", 1.0)
        limit = sampling_params.get("max_tokens") or self.config.response_length
        if os.environ.get("VERL_RIG_SCRIPTED"):  # as long as can be, and at no cost
            at = int(torch.randint(len(self.script) - limit, (1,), generator=random))
            words = self.script[at : at + limit]
            return self._output(words, [0.0] * limit, sampling_params)
        if os.environ.get("VERL_RIG_CALLS") and self._may_call(prompt):
            words = self._call(int(torch.randint(1, 9, (1,), generator=random)))
            return self._output(words, [0.0] * len(words), sampling_params)
        ids, logprobs, past, shown = [], [], None, torch.tensor([prompt])
        while len(ids) < limit:
            with torch.no_grad():  # left before the loop can switch to another rollout
                out = self.model(input_ids=shown, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[0, -1]
            logprobs_V = (logits / (temperature or 1.0)).log_softmax(-1)
            choice = torch.multinomial(logprobs_V.exp(), 1, generator=random)
            token = int(choice if temperature else logits.argmax())
            ids.append(token)
            logprobs.append(float(logprobs_V[token]))
            if token == self.model.config.eos_token_id:
                break
            shown = torch.tensor([[token]])
            await asyncio.sleep(0)
        return self._output(ids, logprobs, sampling_params)

    def _may_call(self, prompt: list[int]) -> bool:
        """Whether the prompt offers a tool, and no call has been made."""
        text = self.tokenizer.decode(prompt)
        return '"name": "add"' in text and "</tool_call>" not in text

    def _call(self, number: int) -> list[int]:
        """STAND-IN for a policy that calls its tool: this one is untrained and never would."""
        arguments = f'{{"a": {number}, "b": 2}}'
        call = f' <tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
        return [
            *self.tokenizer.encode(call, add_special_tokens=False), self.tokenizer.eos_token_id
        ]  # fmt: skip

    def _output(
        self, ids: list[int], logprobs: list[float], sampling_params: dict[str, Any]
    ) -> TokenOutput:
        return TokenOutput(
            token_ids=ids,
            log_probs=logprobs if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            num_preempted=0,
            extra_fields={"global_steps": self.global_steps},
        )

    async def load(self, weights: dict[str, np.ndarray]) -> None:
        state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        missing = self.model.load_state_dict(state, strict=False).missing_keys
        assert not [name for name in missing if name != "lm_head.weight"], missing
        self.seen.clear()

    async def set_global_steps(self, steps: int) -> None:
        self.global_steps = steps

    async def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = _nothing


class HostedVerifier:
    """Stand-in for a vLLM or SGLang replica: its protocol, and log-probs of the real model."""

    def __init__(self, path: str, config: Any, engine: str) -> None:
        from verl_rig.server import ModelEngine

        torch.set_num_threads(1)
        self.awake = True
        hosted = self

        class Engine(ModelEngine):
            def _logprobs(self, ids: list[int]) -> list[float]:
                assert hosted.awake, "asked while asleep"
                with (Path(os.environ["VERL_RIG_RECORD"]) / "asked.jsonl").open("a") as file:
                    file.write(json.dumps(ids) + "\n")
                return super()._logprobs(ids)

        self.engine = Engine(engine, path)

    async def address(self) -> str:
        return f"127.0.0.1:{self.engine.port}"

    async def wake_up(self, *args: Any, **kwargs: Any) -> None:
        self.awake = True

    async def sleep(self, *args: Any, **kwargs: Any) -> None:
        self.awake = False


class CPUReplica(RolloutReplica):
    async def launch_servers(self) -> None:
        model = self.model_config
        path = model.get("local_path") or model.get("path")
        name = f"rig_{'verifier' if self.is_reward_model else 'rollout'}_{self.replica_rank}"
        options = {"name": name, "num_cpus": 0, "max_concurrency": 1000}
        if self.is_reward_model:
            actor = ray.remote(HostedVerifier).options(**options)
            server = actor.remote(path, self.config, str(self.config.name))
            self._server_address = await server.address.remote()
        else:
            server = ray.remote(Generator).options(**options).remote(path, self.config)
            self._server_address = name
        self.servers, self._server_handle = [server], server


class WeightSender(BaseRollout):
    """The training worker's side: hands the policy's weights to the generator."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.name = f"rig_rollout_{rank}"

    async def resume(self, tags: Any) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        whole = {
            name: getattr(w, "full_tensor", lambda w=w: w)().detach().float().cpu().numpy()
            for name, w in weights
        }
        server = ray.get_actor(self.name)
        await server.load.remote(whole)
        if global_steps is not None:
            await server.set_global_steps.remote(global_steps)
