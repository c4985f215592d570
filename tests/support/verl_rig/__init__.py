"""veRL's real trainer on a machine without a GPU, for tests.

Loaded into every process of a run by `VERL_USE_EXTERNAL_MODULES=verl_rig`, with
`VERL_PLATFORM=cpu`. It registers a CPU platform, FSDP on the CPU, `hfcpu` (a rollout engine that
generates with transformers), and under the names `vllm` and `sglang` a STAND-IN for the engines
that veRL hosts a verifier with: the protocols of fake_engines.py, log-probs of a real model.
Everything else is veRL's own. What reaches the actor's loss is written to `VERL_RIG_RECORD`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed

from verl_rig import platform  # noqa: F401  (registers itself)


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module once that is imported: most processes never import it."""

    def __init__(self, actions: dict[str, Callable[[Any], None]]) -> None:
        self.actions = actions

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        action = self.actions.pop(name, None)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if action else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            assert action is not None
            action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def fsdp_on_cpu(module: Any) -> None:
    from verl.workers.engine.base import EngineRegistry

    for strategy in ("fsdp", "fsdp2"):
        engines = EngineRegistry._engines["language_model"][strategy]
        engines.setdefault("cpu", module.FSDPEngineWithLMHead)
    policy = module.CPUOffloadPolicy
    # A reference policy is offloaded to pinned memory, of which there is none without a GPU.
    module.CPUOffloadPolicy = lambda pin_memory: policy(pin_memory=False)


def rollout_worker(module: Any) -> None:
    for engine in ("hfcpu", "vllm", "sglang"):
        module._ROLLOUT_REGISTRY[(engine, "async")] = "verl_rig.rollout.WeightSender"


def rollout_replica(module: Any) -> None:
    def load() -> Any:
        from verl_rig.rollout import CPUReplica

        return CPUReplica

    for engine in ("hfcpu", "vllm", "sglang"):
        module.RolloutReplicaRegistry.register(engine, load)


def recorded_loss(module: Any) -> None:
    from verl_rig.record import recorded

    if os.environ.get("VERL_RIG_RECORD"):
        module.ppo_loss = recorded(module.ppo_loss)


sys.meta_path.insert(
    0,
    AfterImport(
        {
            "verl.workers.engine.fsdp.transformer_impl": fsdp_on_cpu,
            "verl.workers.rollout.base": rollout_worker,
            "verl.workers.rollout.replica": rollout_replica,
            "verl.workers.engine_workers": recorded_loss,
        }
    ),
)

_init = torch.distributed.init_process_group


@functools.wraps(_init)
def _init_on_cpu(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
    """VeRL asks for gloo on the CPU and gloo on the device, which are one here."""
    return _init("cpu:gloo" if "gloo" in str(backend) else backend, *args, **kwargs)


torch.distributed.init_process_group = _init_on_cpu
