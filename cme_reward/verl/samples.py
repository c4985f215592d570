"""Samples of a run, written by the trainer's process, which knows the step and where the log is."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cme_reward.curves.samples import FILE, beside, is_due, keep
from cme_reward.verl.scorer import actor_samples


def keep_samples(folder: Path, tracking: Any, step: int) -> None:
    """Write what the scorer has picked since the last entry in veRL's log, beside that log.

    veRL counts a step before it is made and logs it with its validation, which came after it.

    Args:
        folder: of a run without a log that `cme-reward report` reads.
        tracking: veRL's `Tracking`.
        step: of the entry.
    """
    for validate, responses in actor_samples().items():
        before = step if validate else step - 1
        if responses and (validate or is_due(before)):
            for file in _files(tracking.logger, folder):
                keep(file, before, responses)


def keeper(config: Mapping[str, Any]) -> partial[None]:
    """`keep_samples` for veRL's configuration."""
    return partial(keep_samples, Path(config["trainer"]["default_local_dir"]))


def _files(loggers: Mapping[str, Any], folder: Path) -> list[Path]:
    found = []
    if "file" in loggers:
        found.append(beside(Path(loggers["file"].filepath)))
    if "tensorboard" in loggers:
        found.append(Path(loggers["tensorboard"].writer.log_dir) / FILE)
    return found or [folder / FILE]
