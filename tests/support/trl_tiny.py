"""A policy small enough to train in a test, and what its advantages should be, by loops.

Run as a program it is one of several processes of a training: `RANK=0 ... trl_tiny.py FOLDER`.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import oracle
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer.grpo_config import GRPOConfig
from two_ranks import in_two_processes

from cme_reward import CMEConfig, SpanTable, load_verifier
from cme_reward.conversation.format import PromptFormat
from cme_reward.trl import CMEGRPOTrainer, cme_reward_func

GENERATOR = Path(__file__).parents[2] / "examples" / "generator"
QUESTIONS = ["What is 2 + 3?", "Tom has 4 pens and buys 1.", "Say hello.", "Why?"]
CHAT = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
EOS = 1


def tokenizer() -> Any:
    loaded = AutoTokenizer.from_pretrained(GENERATOR, padding_side="left")
    loaded.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    return loaded


@cache
def verifier() -> Any:
    return load_verifier("embedded", device="cpu")


def policy(vocab_size: int | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config)


def arguments(folder: Path, **changes: Any) -> GRPOConfig:
    """Two prompts a step, four rollouts each, of which some end and some are cut."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        # Rarely does an untrained policy stop by itself.
        "generation_kwargs": {"sequence_bias": [[[EOS], 5.0]]},
        "dataloader_pin_memory": False,
    }
    return GRPOConfig(**settings | changes)


def trainer(
    folder: Path,
    config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
    *,
    rows: list[Any] = CHAT,
    before: tuple[Any, ...] = (),
    after: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
    reward: str = "cme",
    reward_options: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer with the entry for CME, or another reward, between other reward functions."""
    entry = cme_reward_func(
        verifier(), tokenizer(), config, reward=reward, **(reward_options or {})
    )
    return CMEGRPOTrainer(
        policy(),
        [*before, entry, *after],
        arguments(folder, **changes),
        Dataset.from_list(rows),
        processing_class=tokenizer(),
        **(options or {}),
    )


def train(made: Any, *, in_order: bool = False, **kwargs: Any) -> list[dict[str, torch.Tensor]]:
    """Train; returns the inputs of every loss, as the loss received them.

    `in_order` adds the position that a completion had when it was scored.
    """
    received: list[dict[str, torch.Tensor]] = []
    compute_loss, generate = made._compute_loss, made._generate_and_score_completions

    def numbered(inputs: Any) -> dict[str, torch.Tensor]:
        """TRL shuffles what comes from here, all tensors alike."""
        out = generate(inputs)
        return {**out, "position": torch.arange(len(out["completion_ids"]))}

    def spy(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        received.append({key: value.detach().clone() for key, value in inputs.items()})
        return compute_loss(model, inputs)

    made._compute_loss = spy
    if in_order:
        made._generate_and_score_completions = numbered
    made.train(**kwargs)
    return received


def rows_of(received: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """One dictionary a completion: prompt text, its own ids, masks, advantages."""
    rows = []
    for inputs in received:
        mask_BT = inputs["completion_mask"].bool()
        tool_BT = inputs.get("tool_mask", torch.ones_like(mask_BT)).bool()
        for b, mask_T in enumerate(mask_BT):
            n = int(mask_T.sum())
            prompt_ids = inputs["prompt_ids"][b][inputs["prompt_mask"][b].bool()]
            advantages = inputs["advantages"][b]
            per_token = advantages.expand(len(mask_T)) if advantages.ndim == 0 else advantages
            assert advantages.ndim == 0 or (advantages[n:] == 0).all()
            rows.append(
                {
                    "prompt": tokenizer().decode(prompt_ids).removesuffix("\n"),
                    "ids": inputs["completion_ids"][b, :n].tolist(),
                    "position": int(inputs["position"][b]) if "position" in inputs else None,
                    "sampled": tool_BT[b, :n].tolist(),
                    "advantages": per_token[:n].tolist(),
                    "own_logprobs": inputs["old_per_token_logps"][b, :n].tolist()
                    if "old_per_token_logps" in inputs
                    else None,
                }
            )
    return rows


def verifier_logprobs(prompt_ids: list[int], ids: list[int], model: Any = None) -> list[float]:
    """One plain forward pass, unbatched and uncached."""
    model = verifier().model if model is None else model
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    start = len(prompt_ids) - 1
    return [logp[start + s, i].item() for s, i in enumerate(ids)]


def naive_rewards(
    prompt: str | list[dict[str, str]], ids: list[int], by: Any = None, writer: Any = None
) -> tuple[list[float | None], float]:
    """Reward of each token (None where masked) and the sequence reward, for one assistant turn.

    `writer` is the policy's tokenizer, where that is not `tokenizer()`.
    """
    by = verifier() if by is None else by
    writer = tokenizer() if writer is None else writer
    reader = by.tokenizer
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    prompt_ids = reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    text, generator_ends = SpanTable(writer).decode(ids)
    text, ends = oracle.as_message(text, generator_ends.tolist())
    verifier_ids, verifier_ends = SpanTable(reader).encode(text)
    ended = ids[-1:] == [writer.eos_token_id]
    asked = verifier_ids.tolist() + [PromptFormat(reader).end_of_turn] * ended
    logp = verifier_logprobs(prompt_ids, asked, by.model)
    aligned = oracle.align(
        [Fraction(value) for value in logp[: len(verifier_ids)]],
        verifier_ends.tolist(),
        ends,
    )
    rewards: list[float | None] = []
    for value, end, start in zip(aligned, ends, [0, *ends], strict=False):
        rewards.append(None if end == start else float(value))
    if ended:
        rewards[-1] = logp[-1]
    return rewards, statistics.fmean(logp) if logp else -float(torch.tensor(len(reader)).log())


def normalised(values: list[float | None], *, scale: str, eps: float) -> list[float]:
    """(r - mean) / (std + eps) of what is there, 0 for the others and for one alone."""
    there = [value for value in values if value is not None]
    if len(there) < 2:
        return [0.0] * len(values)
    mean, std = statistics.fmean(there), statistics.stdev(there)
    divisor = std + eps if scale == "std" else 1.0
    return [0.0 if value is None else (value - mean) / divisor for value in values]


def by_prompt(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["prompt"]].append(row)
    return list(groups.values())


def expected_advantages(
    rows: list[dict[str, Any]], config: CMEConfig, by: Any = None
) -> list[list[float]]:
    """Per-token advantages of `rows`, in their order, from their ids alone."""
    expected: dict[int, list[float]] = {}
    for group in by_prompt(rows):
        scored = [naive_rewards(row["prompt"], row["ids"], by) for row in group]
        if config.level == "sequence":
            same = normalised([s for _, s in scored], scale=config.scale, eps=config.eps)
            for row, advantage in zip(group, same, strict=True):
                expected[id(row)] = [advantage] * len(row["ids"])
            continue
        by_token = [rewards for rewards, _ in scored]
        if config.credit == "return":
            by_token = [oracle.returns_to_go(row, gamma=config.gamma) for row in by_token]
        by_position = per_position(by_token, config)
        for row, advantages in zip(group, by_position, strict=True):
            expected[id(row)] = advantages
    if config.scale == "batch":
        counted = [a for row in rows for a in expected[id(row)] if a]
        over = math.sqrt(sum(a * a for a in counted) / (len(counted) - 1)) + config.eps
        return [[a / over for a in expected[id(row)]] for row in rows]
    return [expected[id(row)] for row in rows]


def per_position(
    group: list[list[float | None]],
    config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
) -> list[list[float]]:
    """The rewards of a prompt's rollouts, normalised at each position."""
    advantages: list[list[float]] = [[] for _ in group]
    for t in range(max(map(len, group))):
        column = [rewards[t] if t < len(rewards) else None for rewards in group]
        normal = normalised(column, scale=config.scale, eps=config.eps)
        for row, rewards, advantage in zip(advantages, group, normal, strict=True):
            row += [advantage] if t < len(rewards) else []
    return advantages


def worst_error(rows: list[dict[str, Any]], expected: list[list[float]]) -> float:
    """Largest difference, relative to advantages greater than one (float32 log-probs of -40)."""
    return max(
        abs(a - b) / max(1.0, abs(b))
        for row, want in zip(rows, expected, strict=True)
        for a, b in zip(row["advantages"], want, strict=True)
    )


def worst_in_nats(group: list[dict[str, Any]], rewards: list[list[float | None]]) -> float:
    """Largest difference of `advantage * (std + eps)` from the reward less its mean.

    What float32 leaves of a reward is a matter of nats. Where the rollouts of a position all but
    agree (late ones, with two left), the division by their std makes any multiple of it.
    """
    worst, config = 0.0, CMEConfig()
    for t in range(max(map(len, rewards))):
        column = [row[t] if t < len(row) else None for row in rewards]
        there = [value for value in column if value is not None]
        divisor = (statistics.stdev(there) if len(there) > 1 else 0.0) + config.eps
        differences = normalised(column, scale="none", eps=config.eps)
        for row, wanted, of_row in zip(group, differences, rewards, strict=True):
            if t < len(of_row):
                worst = max(worst, abs(row["advantages"][t] * divisor - wanted))
    return worst


def text_length(text: str) -> int:
    """An "answer" on which untrained rollouts agree now and then."""
    return len(text) // 8


def two_processes(folder: Path, reward: str) -> list[Any]:
    """What `main` saves, of a training of two processes that share the rollouts of one prompt."""
    in_two_processes(__file__, str(folder), reward, seconds=120, ACCELERATE_USE_CPU="true")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def main(folder: Path, reward: str) -> None:
    made = trainer(
        folder,
        reward=reward,
        reward_options={"answer": text_length} if reward == "ttrl" else {},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
    )
    assert made.accelerator.num_processes == 2
    assert torch.distributed.get_backend() == "gloo"
    received = train(made, in_order=True)
    log = [entry for entry in made.state.log_history if f"{reward}/repetition" in entry]
    torch.save((received, log), folder / f"{made.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
