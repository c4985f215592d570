"""Samples of a run, kept by OpenRLHF's trainer: the one process with a step's rollouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cme_reward.conversation.rendered import RenderedReader
from cme_reward.curves.samples import FILE, Kept, Picked, is_due, keep
from cme_reward.openrlhf.checks import KEY, LOGPROBS, argument
from cme_reward.openrlhf.score import prompt_of, shown


def patch(module: ModuleType) -> None:
    """Wrap `BasePPOTrainer` of OpenRLHF's module, once."""
    trainer = module.BasePPOTrainer
    if not getattr(trainer, "_cme_samples", False):
        trainer.train_step = _keeping(trainer.train_step)
        trainer._cme_samples = True


def _keeping(original: Callable[..., Any]) -> Callable[..., Any]:
    """OpenRLHF's step, before which some of its rollouts are written beside its log."""

    @functools.wraps(original)
    def train_step(self: Any, rollouts: list[Any], global_step: int) -> Any:
        n = self.experience_maker._cme_settings.samples
        # Left in, they would be taken for a metric.
        logprobs = [rollout.info.pop(LOGPROBS, None) for rollout in rollouts]
        # Where some are missing, they are another agent's, which the step itself refuses.
        if n and is_due(global_step) and all(row is not None for row in logprobs):
            picked = Picked(n)
            for i, rollout in enumerate(rollouts):
                picked.offer(rollout.prompts[0], i, i)
            if not hasattr(self, "_cme_reader"):
                self._cme_reader = RenderedReader(self.tokenizer)
            chosen = [(rollouts[i], logprobs[i]) for i in picked.take()]
            keep(_file(self), global_step, [_kept(self._cme_reader, *pair) for pair in chosen])
        return original(self, rollouts, global_step)

    return train_step


def _kept(reader: RenderedReader, rollout: Any, logprobs_1A: torch.Tensor) -> Kept:
    """A rollout of `SamplesGenerator`; entry a of its rows is about token a + 1."""
    (sequence,), (logprobs,), (rewards,) = rollout.sequences, logprobs_1A, rollout.info[KEY]
    response = (~logprobs.isnan()).nonzero().flatten()
    ids = sequence[1:][response].tolist()
    before = sequence[: 1 + int(response[0])].tolist() if ids else []
    prompt, label = rollout.prompts[0], rollout.labels[0]
    rendered = shown(reader.tokenizer, prompt, before)
    return Kept(
        prompt_of(reader, rendered, label if rendered == prompt else None),
        reader.table.tokens(ids),
        logprobs[response].tolist(),
        (~rewards[response].isnan()).tolist(),
        rollout.info["cme/sequence_reward"].item(),
        rollout.info["cme/dropped_nats"].item(),
    )


def _file(trainer: Any) -> Path:
    """Beside TensorBoard's events; without them, where the trained model goes."""
    if trainer.tensorboard_logger is not None:
        return Path(trainer.tensorboard_logger.writer.log_dir) / FILE
    return Path(argument(trainer.args, "ckpt.output_dir")) / FILE
