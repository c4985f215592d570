"""Keeps what the actor's loss receives, for the tests' own computation."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FIELDS = ("prompts", "responses", "response_mask", "advantages", "ref_log_prob", "old_log_probs")


def recorded(ppo_loss: Callable[..., Any]) -> Callable[..., Any]:
    """veRL's loss function, which leaves its rows in `VERL_RIG_RECORD`, a file for each call."""

    @functools.wraps(ppo_loss)
    def loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
        result = ppo_loss(config, model_output, data, dp_group)
        rows = {k: [row.cpu() for row in data[k].unbind()] for k in FIELDS if k in data}
        metrics = {k: float(v.aggregate()) for k, v in result[1].items() if hasattr(v, "aggregate")}
        folder = Path(os.environ["VERL_RIG_RECORD"])
        name = f"{time.time_ns()}-{os.getpid()}.pt"
        torch.save({"rows": rows, "metrics": metrics}, folder / f".{name}")
        (folder / f".{name}").rename(folder / name)
        return result

    return loss


def read(folder: Path) -> list[dict[str, Any]]:
    """The recorded calls, in their order."""
    return [torch.load(path) for path in sorted(folder.glob("*.pt"))]
