"""TRL's GRPO trainer with per-token advantages."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, cast

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from cme_reward.advantages import token_advantages
from cme_reward.batch import CMEBatch
from cme_reward.comparators import PolicyStatistics, needed_statistics, policy_statistics
from cme_reward.curves.samples import FILE, Picked, is_due, keep, of_batch
from cme_reward.errors import ConfigError, InputError
from cme_reward.trl.checks import check_settings, check_tokenizer
from cme_reward.trl.reward import RewardFunction, score


class CMEGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with per-token advantages from cross-model entropy.

    The arguments are those of `GRPOTrainer`; exactly one entry of `reward_funcs` is a
    `RewardFunction`. With its weight w and the advantage `A_trl` that TRL computes for all other
    entries together (and their `reward_weights` v), the loss receives

        A[i, t] = w * A_cme[i, t] + V * A_trl[i],    V = sum |v|

    where V = 1 for `scale_rewards="none"`, since only scaling loses the size of v. `A_cme` is
    `group_advantages` over all rollouts of a prompt, on whichever process they are; tokens outside
    TRL's loss mask get 0 and do not take part.

    Raises:
        ConfigError: for settings under which per-token advantages would not reach the policy as
            such, see docs/trl.md.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        own = [k for k, func in enumerate(funcs) if isinstance(func, RewardFunction)]
        if len(own) != 1:
            raise ConfigError(
                f"reward_funcs has {len(own)} entries made by cme_reward_func; expected exactly "
                'one. Several verifiers are joined in one: cme_reward_func("hf:A+hf:B", ...)'
            )
        self._cme_index = own[0]
        entry = funcs[self._cme_index]
        if args is not None:  # before a model is loaded; an environment may bring a reward
            others = len(funcs) > 1 or kwargs.get("environment_factory") is not None
            check_settings(args, entry.scorer.config, others=others)
        super().__init__(model, funcs, args, *rest, **kwargs)
        check_settings(self.args, entry.scorer.config, others=len(self.reward_funcs) > 1)
        check_tokenizer(self.processing_class, entry.scorer)
        self._cme, self._cme_samples = entry.scorer, entry.samples
        self._cme_sampled: tuple[str, int] | None = None
        if hasattr(self._cme, "for_generator"):
            # TRL puts a template of its own in the place of one that changes what it has written.
            given: Any = self.chat_template_kwargs
            own = {"chat_template": self.chat_template} if self.chat_template else {}
            self._cme = self._cme.for_generator(
                eos_token_ids=self.eos_token_ids, template_kwargs={**given, **own}
            )
        # Where others are there, None leaves the entry out of their advantage; alone, it would
        # have TRL warn of unscorable completions in every step.
        self._cme_masks: list[list[int]] | None = None
        self._cme_calls = _Recorder(entry.__name__, None if len(self.reward_funcs) > 1 else 0.0)
        self.reward_funcs[self._cme_index] = self._cme_calls

    def _generate(self, prompts: list[Any]) -> Any:
        """Keep which tokens were sampled: TRL's `tool_mask` is 0 on all of a truncated completion
        that it leaves out of the loss."""
        out = super()._generate(prompts)  # type: ignore
        self._cme_masks = out[2]
        return out

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore
        prompts, ids = self._cme_calls.take()
        masks, self._cme_masks = self._cme_masks, None
        loss_mask_BT = out["completion_mask"].bool()
        if "tool_mask" in out:
            loss_mask_BT = loss_mask_BT & out["tool_mask"].bool()
        needs = needed_statistics(self._cme)
        statistics = self._policy_statistics(needs, out, ids) if needs else None
        batch = score(self._cme, prompts, ids, masks, statistics)
        self._keep_samples(prompts, ids, batch)
        cme_BT = self._cme_advantages(batch, loss_mask_BT)

        weights = self.reward_weights.to(cme_BT)
        others = torch.cat([weights[: self._cme_index], weights[self._cme_index + 1 :]])
        size = 1 if self.scale_rewards == "none" else others.abs().sum()
        total_BT = weights[self._cme_index] * cme_BT + size * out["advantages"][:, None]
        out["advantages"] = total_BT * loss_mask_BT
        self._log_cme(batch, cme_BT, out["advantages"], loss_mask_BT)
        return out

    def _policy_statistics(
        self, needs: tuple[str, ...], out: dict[str, Any], ids: list[list[int]]
    ) -> PolicyStatistics:
        """What the policy says of its own completions, at the sampling temperature.

        From TRL as far as TRL has it, since that works with sharded weights too.
        """
        if "self_certainties" in needs:
            masks_BP = out["prompt_mask"].bool()
            prompts = [
                row[mask].tolist() for row, mask in zip(out["prompt_ids"], masks_BP, strict=True)
            ]
            with self.accelerator.autocast():
                return policy_statistics(self.model, prompts, ids, temperature=self.temperature)
        logprobs_BT, entropies_BT = out.get("old_per_token_logps"), None
        if logprobs_BT is None or "entropies" in needs:
            with torch.no_grad():
                logprobs_BT, entropies_BT, _ = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1),
                    torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1),
                    out["completion_ids"].shape[1],
                    batch_size=self.args.per_device_train_batch_size,
                    compute_entropy="entropies" in needs,
                )
        return PolicyStatistics(_unpadded(logprobs_BT, ids), _unpadded(entropies_BT, ids))

    def _cme_advantages(self, batch: CMEBatch, loss_mask_BT: torch.Tensor) -> torch.Tensor:
        """`[B, T]` for this process's completions, normalised over all processes' groups."""
        if batch.config.level == "token":
            wide = (0, loss_mask_BT.shape[1] - batch.mask.shape[1])
            rewards, mask, sampled = (
                torch.nn.functional.pad(own, wide).to(loss_mask_BT.device)
                for own in (batch.token_rewards, batch.mask, batch.sampled)
            )
            mask, sampled = mask & loss_mask_BT, sampled & loss_mask_BT
        else:
            rewards = batch.sequence_rewards[:, None].to(loss_mask_BT.device)
            mask = sampled = loss_mask_BT.any(dim=1, keepdim=True)
        n, width = rewards.shape
        # [B, 3, T]: one gather instead of three.
        all_three = torch.stack([rewards, mask.to(rewards), sampled.to(rewards)], dim=1)
        all_three = cast(torch.Tensor, self.accelerator.pad_across_processes(all_three, dim=2))
        rewards, mask, sampled = self._everywhere(all_three.contiguous()).unbind(dim=1)
        advantages = token_advantages(
            rewards,
            mask.bool(),
            sampled.bool(),
            # TRL lays the rollouts of a prompt one after the other, across processes.
            torch.arange(len(rewards)) // self._mode()[1],
            **batch.config.of_advantages,
        )
        first = self.accelerator.process_index * n
        return advantages[first : first + n, :width] * loss_mask_BT

    def _keep_samples(self, prompts: list[Any], ids: list[list[int]], batch: CMEBatch) -> None:
        """Of the first batch of a step, and of the first of every evaluation."""
        mode, step = self._mode()[0], int(self.state.global_step)
        first, self._cme_sampled = self._cme_sampled != (mode, step), (mode, step)
        due = first and (mode == "eval" or is_due(step))
        if self._cme_samples and due and self.accelerator.is_main_process:
            picked = Picked(self._cme_samples)
            for b, prompt in enumerate(prompts):
                picked.offer(prompt, b, b)
            kept = [of_batch(prompts[b], ids[b], batch, b, self._cme.table) for b in picked.take()]
            keep(Path(self.args.output_dir or ".") / FILE, step, kept)

    def _mode(self) -> tuple[str, int]:
        """What TRL calls the mode, and how many rollouts a prompt has in it."""
        assert self.model is not None
        if self.model.training:
            return "train", self.num_generations or 1
        return "eval", self.num_generations_eval or 1

    def _everywhere(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in their order."""
        return cast(torch.Tensor, self.accelerator.gather(rows))

    def _log_cme(
        self,
        batch: CMEBatch,
        cme_BT: torch.Tensor,
        total_BT: torch.Tensor,
        loss_mask_BT: torch.Tensor,
    ) -> None:
        """Metrics of all processes, and TRL's own for a reward that TRL did not see."""
        mode, rollouts = self._mode()
        metrics = self._metrics[mode]
        name = self._cme_calls.__name__
        tokens_B = loss_mask_BT.sum(dim=1).clamp(min=1)
        credited = ((cme_BT != 0).sum(dim=1) / tokens_B).mean()
        values = batch.metrics | {"credited": credited.item()}
        row = torch.tensor([list(values.values())], dtype=torch.float32, device=total_BT.device)
        for key, of_processes in zip(values, self._everywhere(row).T, strict=True):
            value = of_processes.sum() if key == "truncated" else of_processes.mean()
            metrics[f"{name}/{key}"].append(value.item())

        mean_B = total_BT.sum(dim=1) / tokens_B
        both = torch.stack([batch.sequence_rewards.to(mean_B), mean_B], dim=1)
        sequence, advantages = self._everywhere(both).T
        metrics[f"rewards/{name}/mean"][-1] = sequence.mean().item()
        metrics[f"rewards/{name}/std"][-1] = sequence.std().item()
        if len(self.reward_funcs) == 1:
            weight = float(self.reward_weights[self._cme_index])
            spread = sequence.view(-1, rollouts).std(dim=1, correction=0)
            metrics["reward"][-1] = weight * sequence.mean().item()
            metrics["reward_std"][-1] = abs(weight) * sequence.std().item()
            metrics["frac_reward_zero_std"][-1] = (spread < 1e-8).float().mean().item()
        _replace_last(self._logs["rewards"][name], sequence.tolist())
        _replace_last(self._logs["advantages"], advantages.tolist())


class _Recorder:
    """Stands in for the entry in TRL's `reward_funcs`: takes the prompts and sampled ids."""

    def __init__(self, name: str, answer: float | None) -> None:
        self.__name__ = name
        self.answer = answer
        self.call: tuple[list[Any], list[list[int]]] | None = None

    def __call__(self, prompts: Any, completion_ids: Any, **columns: Any) -> list[float | None]:
        self.call = list(prompts), [list(row) for row in completion_ids]
        return [self.answer] * len(prompts)

    def take(self) -> tuple[list[Any], list[list[int]]]:
        if self.call is None:
            raise InputError("TRL did not call the reward function; expected one call per batch")
        call, self.call = self.call, None
        return call


def _unpadded(values_BT: torch.Tensor | None, ids: list[list[int]]) -> list[torch.Tensor] | None:
    if values_BT is None:
        return None
    return [values[: len(row)] for values, row in zip(values_BT, ids, strict=True)]


def _replace_last(log: deque[Any], values: list[Any]) -> None:
    for _ in range(min(len(log), len(values))):
        log.pop()
    log.extend(values)
