"""In every process of the rig: CUDA calls that do nothing, no compiler, a record of the advantages
and of what the shared verifier is asked.

Modules are changed right after they are loaded, so that processes without them stay quick.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from typing import Any


class _Device(str):
    """What `torch.cuda.current_device()` returns: usable as a device, and as a number in text."""

    def __format__(self, spec: str) -> str:
        return "0"


def _torch(torch: Any) -> None:
    torch.cuda.current_device = lambda: _Device("cpu")
    for name in ("synchronize", "empty_cache", "set_device", "current_stream"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.set_num_threads(1)


def _device_mesh(module: Any) -> None:
    original = module.init_device_mesh
    module.init_device_mesh = lambda device, *args, **kwargs: original(
        "cpu" if device == "cuda" else device, *args, **kwargs
    )


def _deepspeed_ops(module: Any) -> None:
    # Where it cannot be built, DeepSpeed leaves messages to torch.distributed.
    module.__compatible_ops__["deepspeed_shm_comm"] = False


def _deepspeed_engine(module: Any) -> None:
    """`torch_adam`, a setting of DeepSpeed's: torch's AdamW, where its own is compiled with g++."""
    engine = module.DeepSpeedEngine
    inner = engine.get_optimizer_configuration
    engine.get_optimizer_configuration = lambda self, parameters, *args, **kwargs: inner(
        self, {**parameters, "torch_adam": True}, *args, **kwargs
    )


def _float32(module: Any) -> None:
    """Where `RIG_FLOAT32` is set: many CPUs are slow in the two types that OpenRLHF has."""
    import torch

    module.convert_to_torch_dtype = lambda name: torch.float32


def _float32_training(module: Any) -> None:
    inner = module.get_train_ds_config

    def get_train_ds_config(*args: Any, **kwargs: Any) -> Any:
        config = inner(*args, **kwargs)
        config["bf16"]["enabled"] = False
        return config

    module.get_train_ds_config = get_train_ds_config


def _record(module: Any) -> None:
    import torch

    maker = module.RemoteExperienceMaker
    inner = maker.compute_advantages_and_returns
    maker.rig_steps = 0

    def compute_advantages_and_returns(self: Any, experiences: list[Any], *args: Any) -> Any:
        import ray  # pyright: ignore[reportMissingImports]

        kls = [e.kl.clone() for e in experiences]
        rewards = [e.rewards.clone() for e in experiences]
        out = inner(self, experiences, *args)
        rows = []
        for e, kl, reward in zip(out, kls, rewards, strict=True):
            for b, index in enumerate(e.index):
                mask = e.action_mask[b].bool()
                rows.append(
                    {
                        "index": index,
                        "prompt": e.prompts[b],
                        "label": e.labels[b],
                        "ids": e.sequences[b, 1:][mask].tolist(),
                        "sequence": e.sequences[b][e.attention_mask[b].bool()].tolist(),
                        "mask": mask.tolist(),
                        "advantages": e.advantages[b][mask].tolist(),
                        "kl": kl[b][mask].tolist(),
                        "reward": reward[b].item(),
                        "info": {k: v[b].tolist() for k, v in e.info.items()},
                    }
                )
        job = ray.get_runtime_context().get_job_id()
        file = f"{os.environ['CME_RIG']}/step-{job}-{maker.rig_steps:03}.pt"
        maker.rig_steps += 1
        torch.save(rows, f"{file}.part")
        os.rename(f"{file}.part", file)
        return out

    maker.compute_advantages_and_returns = compute_advantages_and_returns


def _asked(module: Any) -> None:
    import json

    inner = module.VerifierHost.logprobs

    async def logprobs(self: Any, prompts: Any, responses: Any) -> Any:
        with open(f"{os.environ['CME_RIG']}/asked.jsonl", "a", encoding="utf-8") as file:
            for prompt, response in zip(prompts, responses, strict=True):
                file.write(json.dumps([int(i) for i in (*prompt, *response)]) + "\n")
        return await inner(self, prompts, responses)

    module.VerifierHost.logprobs = logprobs


_AFTER = {
    "torch": _torch,
    "torch.distributed.device_mesh": _device_mesh,
    "deepspeed.ops": _deepspeed_ops,
    "deepspeed.runtime.engine": _deepspeed_engine,
    "openrlhf.trainer.ppo_trainer": _record,
    "cme_reward.openrlhf.verifier": _asked,
}

if "RIG_FLOAT32" in os.environ:
    _AFTER |= {
        "openrlhf.utils.utils": _float32,
        "openrlhf.utils.deepspeed.deepspeed_utils": _float32_training,
    }


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _AFTER:
            return None
        change = _AFTER.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                change(module)

            spec.loader.exec_module = exec_module
        return spec


if "CME_RIG" in os.environ:
    sys.meta_path.insert(0, _Finder())
