"""Whole weights where a trainer has asked transformers for less of its own models.

With DeepSpeed's ZeRO-3, ``from_pretrained`` leaves each process a part of each weight. With FSDP's
`cpu_ram_efficient_loading`, all processes but the first get zeros. The trainer fills in its own
models later; nobody would fill in a verifier's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, get_ident
from typing import Any

from transformers import modeling_utils

from cme_reward.errors import ConfigError

_QUESTIONS = ("is_deepspeed_zero3_enabled", "is_fsdp_enabled")
_one_load = Lock()


@contextmanager
def whole_weights() -> Iterator[None]:
    """What this thread loads meanwhile is whole; what others load is as their trainer asked.

    Raises:
        ConfigError: inside deepspeed.zero.Init, where all models of the process are partitioned.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if getattr(zero, "zero_init_context", 0):
        raise ConfigError(
            "a verifier cannot be loaded while deepspeed.zero.Init partitions all models of this "
            "process: load it before, or after"
        )
    if not any(getattr(modeling_utils, name)() for name in _QUESTIONS):
        yield
        return
    with _one_load, ExitStack() as replaced:
        for name in _QUESTIONS:
            replaced.enter_context(_answered_no(name, getattr(modeling_utils, name)))
        yield


@contextmanager
def _answered_no(name: str, question: Callable[[], bool]) -> Iterator[None]:
    """In this thread, wherever transformers asks it. The answer itself belongs to the process."""
    here = get_ident()

    def elsewhere() -> bool:
        return get_ident() != here and question()

    _replace(name, question, elsewhere)
    try:
        yield
    finally:
        _replace(name, elsewhere, question)


def _replace(name: str, old: Any, new: Any) -> None:
    for path, module in list(sys.modules.items()):
        if path.startswith("transformers") and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def check_whole(model: Any, name: str) -> None:
    """Raises ConfigError for a model of which this process has a part, or nothing but zeros."""
    remedy = (
        "A verifier needs all of its weights: load it with load_verifier('hf:NAME_OR_PATH'), "
        "which sees to that, and hand it to no trainer"
    )
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ConfigError(f"{name}: DeepSpeed's ZeRO-3 has partitioned its weights. {remedy}")
    embeddings = model.get_input_embeddings().weight
    if not embeddings.is_meta and not embeddings.any():
        raise ConfigError(
            f"{name}: its embeddings are zeros, as FSDP's cpu_ram_efficient_loading leaves them in "
            f"all processes but the first. {remedy}"
        )
