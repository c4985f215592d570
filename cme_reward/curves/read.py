"""The log of a run, whoever wrote it -> its metrics over the steps."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme_reward.curves.samples import FILE as SAMPLES
from cme_reward.errors import InputError

STEPS = ("step", "global_step", "training/global_step", "_step")
"""What the number of a step is called; without any, lines are counted from 1."""


@dataclass(frozen=True)
class Series:
    """A metric: its steps, rising, and its values; a step that was logged twice has the last."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    name: str
    series: dict[str, Series]


def read_run(path: str | Path) -> Run:
    """The run in a file or a folder.

    - TRL, or any Trainer of transformers: the output folder, a checkpoint in it, or its
      `trainer_state.json`
    - veRL: the file of `trainer.logger=[file]`
    - OpenRLHF (`--logger.tensorboard_dir`) and others: a folder of TensorBoard's events
    - JSON Lines: an object for each step, flat, or veRL's `{"step": 1, "data": {...}}`

    Raises:
        InputError: where nothing of this is there, or a line is no JSON.
    """
    path = Path(path)
    name = path.name if path.is_file() else path.resolve().name
    if path.is_file():
        entries = _of_file(path)
    elif path.is_dir():
        entries = _of_folder(path)
    else:
        raise InputError(f"{str(path)!r} is neither a file nor a folder; expected a run's log")
    found: dict[str, dict[float, float]] = {}
    for number, entry in enumerate(entries, 1):
        step = next((entry[k] for k in STEPS if _is_number(entry.get(k))), number)
        for key, value in entry.items():
            if key not in STEPS and _is_number(value):
                found.setdefault(key, {})[float(step)] = float(value)
    if not found:
        raise InputError(f"{str(path)!r} holds no metric: no number beside that of a step")
    series = {}
    for key, values in sorted(found.items()):
        steps = sorted(values)
        series[key] = Series(np.array(steps), np.array([values[step] for step in steps]))
    return Run(name, series)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _of_file(path: Path) -> Iterable[Mapping[str, Any]]:
    text = path.read_bytes()
    if path.suffix == ".json":
        try:
            state = json.loads(text)
        except ValueError as error:
            raise InputError(f"{str(path)!r} is not JSON: {error}") from None
        history = state.get("log_history") if isinstance(state, dict) else None
        if history is None:
            raise InputError(f"{str(path)!r} has no log_history; expected a trainer_state.json")
        return history
    return _of_lines(path, text.splitlines())


def _of_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"{str(path)!r}, line {number}, is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise InputError(f"{str(path)!r}, line {number}, is no object with metrics")
        data = entry.get("data")
        yield {"step": entry.get("step"), **data} if isinstance(data, dict) else entry


def _of_folder(path: Path) -> Iterable[Mapping[str, Any]]:
    states = [*path.glob("trainer_state.json"), *path.glob("checkpoint-*/trainer_state.json")]
    if states:  # each has all that the ones before it have
        return _of_file(max(states, key=_steps))
    if any(path.rglob("*tfevents*")):
        return _of_events(path)
    logs = sorted(file for file in path.glob("*.jsonl") if not file.name.endswith(SAMPLES))
    if len(logs) == 1:
        return _of_file(logs[0])
    raise InputError(
        f"{str(path)!r} has {len(logs)} .jsonl files, and neither trainer_state.json nor "
        "TensorBoard's events; expected a run's log, see cme-reward report --help"
    )


def _steps(state: Path) -> float:
    """Updates so far; times of files say nothing once they are copied."""
    try:
        history = json.loads(state.read_bytes())["log_history"]
        return float(history[-1]["step"]) if history else 0.0
    except (ValueError, TypeError, LookupError):
        return math.inf  # whoever reads it says what is wrong with it


def _of_events(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    except ImportError:
        raise InputError(
            f"{str(path)!r} holds TensorBoard's events, which take the package tensorboard to "
            "read: pip install tensorboard"
        ) from None
    for folder in sorted({file.parent for file in path.rglob("*tfevents*")}):
        accumulator = events.EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            for event in accumulator.Scalars(tag):
                yield {"step": event.step, tag: event.value}
