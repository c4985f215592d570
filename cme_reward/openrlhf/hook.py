"""Carry per-token advantages into OpenRLHF's trainer process, which Ray starts.

Ray runs `install` at the start of every worker of a job, vLLM's too, so that this imports nothing
but the standard library until a process loads the trainer's module.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PATCHES = {
    "openrlhf.trainer.ppo_utils.experience_maker": "cme_reward.openrlhf.trainer",
    "openrlhf.trainer.ppo_trainer": "cme_reward.openrlhf.samples",
}
"""Modules of OpenRLHF, and whose `patch` each is given to once it is loaded."""


def install() -> None:
    """Make OpenRLHF's trainer take per-token advantages, and keep samples, in this process.

    To be named as Ray's `worker_process_setup_hook`: `"cme_reward.openrlhf.install"`. Harmless in
    processes that never load the trainer, and when called twice.
    """
    for name in PATCHES:
        if name in sys.modules:
            _patch(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _patch(module: ModuleType) -> None:
    importlib.import_module(PATCHES[module.__name__]).patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a module as the others after it would, and patches it once it is loaded."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader)
        return spec


def _run_after(loader: Any) -> None:
    """Have a loader, which is one module's own, patch what it has loaded."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        _patch(module)

    loader.exec_module = exec_module
