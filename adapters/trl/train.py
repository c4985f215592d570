"""Train a policy with per-token cross-model entropy in TRL; the defaults are the paper's.

Without options: Qwen2.5-0.5B, verified by gemma-3-1b-it, one epoch over 5,000 UltraFeedback prompts
(arXiv 2605.29009, Appendix E). One GPU: `python adapters/trl/train.py`; four of them:
`accelerate launch --num_processes 4 adapters/trl/train.py`. Settings of the reward are given as
`--set eos=mask`, all others of TRL's GRPOConfig as `--trl save_steps=50`; values are read as the
setting's type.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig

from cme_reward import ConfigError, InputError
from cme_reward.cli.options import configuration, read_value
from cme_reward.comparators import REWARDS
from cme_reward.conversation.format import PromptFormat
from cme_reward.conversation.messages import as_messages, plain_content
from cme_reward.trl import CMEGRPOTrainer, cme_reward_func
from cme_reward.trl.checks import SCALES

Prompt = str | list[dict[str, Any]]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. What the paper does not say is marked."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    what = parser.add_argument_group("models and prompts").add_argument
    what("--model", default="Qwen/Qwen2.5-0.5B", help="the policy: a name on the hub or a folder")
    what("--verifier", default="hf:google/gemma-3-1b-it", help="a spec of load_verifier")
    what("--reward", choices=REWARDS, default="cme", help="another one, to compare with")
    what(
        "--prompts",
        default="HuggingFaceH4/ultrafeedback_binarized",
        help="a .jsonl file with `prompt` (text or messages) or `messages`, or a dataset on the "
        "hub with a column `prompt`",
    )
    what("--split", default="train_prefs", help="of a dataset on the hub")
    what("--n-prompts", type=int, default=5000, help="at most so many, drawn with the seed")
    what("--chat-template", type=Path, help="a Jinja file, for a base model that has "
        "none; kept with the trained policy")  # fmt: skip
    what("--system-prompt", help="for the policy, in front of every prompt (not in the paper)")
    what("--output", default="cme-run", help="folder for checkpoints")
    how = parser.add_argument_group("training").add_argument
    how("--learning-rate", type=float, default=3e-6, help="the paper: 5e-6 for Llama-3.2-1B")
    how("--warmup-steps", type=int, default=20, help="updates")
    how("--lr-scheduler", default="cosine", help="after the warm-up")
    how("--weight-decay", type=float, default=0.0, help="of AdamW (not in the paper)")
    how("--max-grad-norm", type=float, default=1.0, help="longer gradients are shortened")
    how("--epochs", type=float, default=1.0, help="over the prompts")
    how("--steps", type=int, default=-1, help="stop after so many updates; -1: after the epochs")
    how("--completions-per-update", type=int, default=128, help="on all processes together")
    how("--completions-at-once", type=int, default=8, help="in one backward pass of one process")
    how("--precision", choices=("bf16", "fp32"), default="bf16", help="weights stay in float32")
    how("--seed", type=int, default=42, help="(not in the paper)")
    grpo = parser.add_argument_group("GRPO").add_argument
    grpo("--rollouts", type=int, default=8, help="G, completions of one prompt")
    grpo("--temperature", type=float, default=1.0, help="of sampling")
    grpo("--top-p", type=float, default=1.0, help="of sampling")
    grpo("--response-tokens", type=int, default=2048, help="at most; longer responses are cut")
    grpo("--clip", type=float, default=0.2, help="epsilon of the clipped ratio")
    grpo("--kl", type=float, default=0.0, help="coefficient of the KL penalty")
    grpo("--loss", default="grpo", help="mean over tokens, then over responses (Eq. 2)")
    grpo("--level", choices=("token", "sequence"), default="token", help="where CME is given")
    add("--samples", type=int, default=4, help="responses of a step kept for cme-reward report")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of CMEConfig")
    add(
        "--reward-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the reward, such as per_token=true for rent",
    )
    add("--trl", action="append", default=[], metavar="KEY=VALUE", help="a setting of GRPOConfig")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    return parser.parse_args(arguments)


def prompts_of(given: argparse.Namespace) -> list[Prompt]:
    """Prompts as message lists (or texts), shuffled with the seed.

    Raises:
        InputError: naming the line that holds no prompt.
    """
    path = Path(given.prompts)
    found: list[Prompt]
    if path.suffix == ".jsonl":
        found = []
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise InputError(f"{path}, line {n}, is not JSON: {error}") from None
            prompt = None if row is None else row.get("prompt", row.get("messages"))
            if row is not None and not (isinstance(prompt, str | list) and prompt):
                raise InputError(f"{path}, line {n}: expected `prompt` or `messages`, got {row!r}")
            if prompt:
                found.append(prompt)
        found = [json.loads(p) for p in dict.fromkeys(map(json.dumps, found))]
    else:
        found = list(load_dataset(given.prompts, split=given.split)["prompt"])
    if not found:
        raise InputError(f"{given.prompts} holds no prompts")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(given.seed))
    return [found[i] for i in order[: given.n_prompts].tolist()]


def for_policy(prompts: list[Prompt], tokenizer: Any, system_prompt: str | None) -> Dataset:
    """A column `prompt`: messages where the policy has a chat template, else plain texts."""
    if tokenizer.chat_template is None:
        if system_prompt or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(
                f"{tokenizer.name_or_path!r} has no chat template for messages or a system prompt; "
                "give prompts as plain texts, a model with a template, or --chat-template FILE"
            )
        return Dataset.from_dict({"prompt": prompts})
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    rows = []
    for prompt in prompts:
        # A column of tables cannot hold tool calls, each with arguments of its own.
        kept = [
            {"role": m["role"], "content": plain_content(k, m, "a data set's column")}
            for k, m in enumerate(as_messages(prompt))
        ]
        rows.append({"prompt": kept if kept[0]["role"] == "system" else system + kept})
    return Dataset.from_list(rows)


def load_policy(name: str, chat_template: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer; the model also stops where its chat template ends a turn.

    Base models with a template stop at their end of text only, and would go on to write the next
    turn.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    given = model.generation_config.eos_token_id
    stops = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id}
    end_of_turn = PromptFormat(tokenizer).end_of_turn
    if end_of_turn in tokenizer.all_special_ids:
        stops.add(end_of_turn)
    model.generation_config.eos_token_id = sorted(stops - {None})
    return model, tokenizer


def grpo_config(given: argparse.Namespace, scale: str = "std") -> GRPOConfig:
    """TRL's settings, beside `CMEConfig(scale=...)`.

    Raises:
        ConfigError: if the completions of an update cannot be divided evenly, or for an unknown
            setting or a value of another type than the setting's.
    """
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": given.output,
        "learning_rate": given.learning_rate,
        "warmup_steps": given.warmup_steps,
        "lr_scheduler_type": given.lr_scheduler,
        "weight_decay": given.weight_decay,
        "max_grad_norm": given.max_grad_norm,
        "num_train_epochs": given.epochs,
        "max_steps": given.steps,
        "per_device_train_batch_size": given.completions_at_once,
        "bf16": given.precision == "bf16",
        "seed": given.seed,
        "num_generations": given.rollouts,
        "temperature": given.temperature,
        "top_p": given.top_p,
        "max_completion_length": given.response_tokens,
        "epsilon": given.clip,
        "beta": given.kl,
        "loss_type": given.loss,
        "scale_rewards": next(name for name, own in SCALES.items() if own == scale),
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "report_to": "none",
        "logging_steps": 1,
        "save_steps": 100,
    }
    kinds = get_type_hints(GRPOConfig)
    known = [field.name for field in dataclasses.fields(GRPOConfig)]
    for setting in given.trl:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"--trl {setting!r}: expected KEY=VALUE with a setting of GRPOConfig; did you mean "
                f"{near}?"
            )
        settings[key] = read_value(f"--trl {key}", kinds[key], value)
    if "gradient_accumulation_steps" not in settings:
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by accelerate and torchrun
        at_once = given.completions_at_once * processes
        if given.completions_per_update % at_once:
            raise ConfigError(
                f"--completions-per-update {given.completions_per_update} is not a multiple of "
                f"{at_once}, which is --completions-at-once {given.completions_at_once} on each of "
                f"{processes} processes"
            )
        settings["gradient_accumulation_steps"] = given.completions_per_update // at_once
    make: Any = GRPOConfig  # settings of many types
    try:
        return make(**settings)
    except ValueError as error:
        raise ConfigError(f"settings that GRPOConfig refuses: {error}") from error


def reward_options(given: argparse.Namespace) -> dict[str, Any]:
    """Options of the reward; the policy is the verifier of "self".

    Raises:
        ConfigError: for a setting that cannot be read.
    """
    found: dict[str, Any] = {"policy": given.model}
    for setting in given.reward_set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--reward-set {setting!r}: expected KEY=VALUE with a value in YAML, such as "
                "questions=['Is it true?']"
            )
        found[key] = read_value(f"--reward-set {key}", Any, value)
    return found


def main() -> None:
    """Train, and save the policy in the output folder."""
    given = options()
    try:
        config = configuration(None, [f"level={given.level}", *given.set])
        args, rewards = grpo_config(given, config.scale), reward_options(given)
        prompts = prompts_of(given)
        model, tokenizer = load_policy(given.model, given.chat_template)
        trainer = CMEGRPOTrainer(
            model,
            cme_reward_func(
                given.verifier,
                tokenizer,
                config,
                reward=given.reward,
                samples=given.samples,
                **rewards,
            ),
            args,
            for_policy(prompts, tokenizer, given.system_prompt),
            processing_class=tokenizer,
        )
    except (ConfigError, InputError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None
    trainer.train(resume_from_checkpoint=given.resume or None)
    trainer.save_model()


if __name__ == "__main__":
    main()
