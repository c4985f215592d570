"""A condition trained by TRL's own trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig

from benchmarks.grpo import Settings
from benchmarks.miniature import evaluate, rewards
from benchmarks.miniature.cast import Cast
from benchmarks.miniature.conditions import Condition
from benchmarks.miniature.models import EOS, PAD
from benchmarks.miniature.tasks import MAX_NEW, Example, stream
from cme_reward.trl import CMEGRPOTrainer, RewardFunction


def train(
    policy: Any,
    tokenizer: Any,
    condition: Condition,
    cast: Cast,
    settings: Settings,
    test: Sequence[Example],
    seed: int,
    log: Callable[[str], object] = lambda line: None,
    on_step: Callable[[int], object] = lambda step: None,
) -> list[dict[str, Any]]:
    """Train the policy in place with `CMEGRPOTrainer`; the measurements are those of the loop.

    The prompts are the loop's, but TRL shuffles and samples by its own seed. `log` receives a line
    a measurement, `on_step` the number of each update.
    """
    scorer = rewards.reward(condition, cast, policy)
    questions = islice(stream(10_000 + seed), settings.steps * settings.prompts)
    policy.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    curve: list[dict[str, Any]] = []

    class TakeStock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.measure(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % settings.every == 0 or state.global_step == settings.steps:
                self.measure(state.global_step)
            on_step(state.global_step)

        def measure(self, step: int) -> None:
            training = policy.training
            point = evaluate.measure(policy, tokenizer, test) | {"step": step}
            policy.train(training)
            curve.append(point)
            log(f"step {step}: accuracy {point['accuracy']:.2f}, length {point['length']:.1f}")

    with tempfile.TemporaryDirectory() as folder:
        trainer = CMEGRPOTrainer(
            policy,
            RewardFunction(scorer),
            arguments(folder, settings, scorer.config.scale, seed, cast.device),
            Dataset.from_list([{"prompt": e.prompt} for e in questions]),
            processing_class=tokenizer,
            callbacks=[TakeStock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curve


def arguments(
    folder: str, settings: Settings, scale: str, seed: int, device: str = "cpu"
) -> GRPOConfig:
    """The paper's settings (arXiv 2605.29009, Appendix E), at the miniature's size."""
    return GRPOConfig(
        output_dir=folder,
        use_cpu=device == "cpu",
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        seed=seed,
        max_steps=settings.steps,
        learning_rate=settings.lr,
        warmup_steps=settings.warmup,
        lr_scheduler_type="cosine" if settings.cosine else "constant_with_warmup",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=settings.prompts * settings.rollouts,
        num_generations=settings.rollouts,
        max_completion_length=MAX_NEW["short"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        epsilon=0.2,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group" if scale == "std" else "none",
    )
