"""A tiny policy, its training by OpenRLHF, and what its advantages should be, by loops."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import oracle
import torch
from tokenizer_kinds import load_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from cme_reward import CMEConfig, SpanTable, load_verifier
from cme_reward.spans.table import UNFINISHED

HERE = Path(__file__).parent
QUESTIONS = ["What is 2 + 3?", "Tom has 4 pens, buys 1.", "Say hello: naïve café", "Why?"]
GROUP = 4
EOS = "<|im_end|>"
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@cache
def tokenizer() -> Any:
    made = copy.deepcopy(load_tokenizer("byte-level"))
    made.pad_token = "<|endoftext|>"
    return made


@cache
def gemma() -> Any:
    """The same with Gemma's chat template: a turn ends with another token than a text does."""
    made = copy.deepcopy(tokenizer())
    made.add_special_tokens(
        {"additional_special_tokens": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]}
    )
    made.bos_token, made.eos_token, made.chat_template = "<bos>", "<eos>", GEMMA
    return made


@cache
def verifier() -> Any:
    return load_verifier("embedded", device="cpu")


@cache
def parts() -> list[int]:
    """Ids that write a part of a character, which text cannot show."""
    texts = [tokenizer().decode([i]) for i in range(len(tokenizer()))]
    return [i for i, text in enumerate(texts) if "\N{REPLACEMENT CHARACTER}" in text]


def save_policy(
    folder: Path, ends: float = 3.0, writer: Any = None, end_of_turn: str = EOS
) -> Path:
    """A random Qwen2 of 100,000 weights, to which the end of turn is `exp(ends)` times as likely.

    It does not write parts of characters. One feature of its embeddings is constant, and only the
    end of turn and those have a weight on it.
    """
    writer = tokenizer() if writer is None else writer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        eos = writer.convert_tokens_to_ids(end_of_turn)
        config = Qwen2Config(
            vocab_size=len(writer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            eos_token_id=sorted({writer.eos_token_id, eos}),
            pad_token_id=writer.pad_token_id,
            bos_token_id=None,
        )
        model: Any = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        norm = model.model.embed_tokens.weight.square().mean(dim=1).sqrt().mean()
        model.lm_head.weight[eos] = 0.0
        model.lm_head.weight[eos, 0] = ends * float(norm)
        model.lm_head.weight[parts()] = 0.0
        model.lm_head.weight[parts(), 0] = -20 * float(norm)
    model.to(torch.bfloat16).save_pretrained(folder)
    writer.save_pretrained(folder)
    return folder


def save_prompts(file: Path, repeat: int = 1) -> Path:
    """Messages, and a label that says nothing about them."""
    rows = [
        {
            "messages": [{"role": "user", "content": question}],
            "answer": "5",
            "conversation": json.dumps([{"role": "user", "content": question}]),
        }
        for question in QUESTIONS * repeat
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def flags(folder: Path, **changes: Any) -> list[str]:
    """Two prompts a step, four rollouts each, per-token advantages on."""
    values: dict[str, Any] = {
        "actor.model_name_or_path": folder / "policy",
        "actor.num_nodes": 1,
        "actor.num_gpus_per_node": 1,
        "actor.adam.lr": 1e-2,
        "actor.lr_warmup_ratio": 0.0,
        "ref.num_nodes": 1,
        "ref.num_gpus_per_node": 1,
        "vllm.num_engines": 1,
        "vllm.tensor_parallel_size": 1,
        "data.prompt_dataset": folder / "prompts.jsonl",
        "data.prompt_split": "train",
        "data.input_key": "messages",
        "data.label_key": "answer",
        "data.apply_chat_template": True,
        "data.max_len": 96,
        "rollout.n_samples_per_prompt": GROUP,
        "rollout.batch_size": 2,
        "rollout.micro_batch_size": 2,
        "rollout.max_new_tokens": 12,
        "train.batch_size": 8,
        "train.micro_batch_size": 4,
        "train.num_episodes": 1,
        "ds.zero_stage": 2,
        "ds.attn_implementation": "eager",
        "algo.advantage.estimator": "group_norm",
        "algo.kl.init_coef": 0,
        "ckpt.output_dir": folder / "out",
        "ckpt.path": folder / "ckpt",
        **changes,
    }
    words: list[str] = []
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Of every process: the rig's stand-ins, no network, and `CME_...` settings."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("CME_", "RAY_"))}
    return own | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), *filter(None, [own.get("PYTHONPATH")])]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}",
        "CME_RIG": str(folder),
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **settings,
    }


@contextmanager
def cluster(folder: Path, *, dashboard: bool = False, **settings: str) -> Iterator[dict[str, str]]:
    """A Ray cluster of our own, with `settings` for its workers; gives its addresses."""
    command = [sys.executable, str(HERE / "cluster.py"), *["--dashboard"] * dashboard]
    with (
        (folder / "cluster.log").open("w") as log,
        subprocess.Popen(
            command,
            env=environment(folder, **settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "cluster.log").read_text()
        yield json.loads(line)
        assert process.stdin is not None
        process.stdin.close()


def train(
    folder: Path, address: str, command: list[str], seconds: float = 900, **settings: str
) -> tuple[int, str, list[list[dict[str, Any]]]]:
    """Run a training: exit status, what it printed, and for each step its rows.

    `command` is a module's name and its flags, or a program.
    """
    for file in (*folder.glob("step-*.pt"), *folder.glob("asked.jsonl")):
        file.unlink()
    done = subprocess.run(
        command if command[0] == "sh" else [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(folder, RAY_ADDRESS=address, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    return done.returncode, done.stdout, read_steps(folder)


def read_steps(folder: Path) -> list[list[dict[str, Any]]]:
    """What the experience maker returned, for each step its rows."""
    return [torch.load(file) for file in sorted(folder.glob("step-*.pt"))]


def read_asked(folder: Path) -> list[list[int]]:
    """What the shared verifier was asked: prompts and responses, as ids."""
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def verifier_logprobs(prompt_ids: list[int], ids: list[int]) -> list[float]:
    """One plain forward pass, unbatched and uncached."""
    with torch.no_grad():
        logits = verifier().model(torch.tensor([prompt_ids + ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    start = len(prompt_ids) - 1
    return [logp[start + s, i].item() for s, i in enumerate(ids)]


def question_of(rendered: str) -> str:
    """The user's message in a prompt rendered as ChatML."""
    start, _, rest = rendered.partition("<|im_start|>user\n")
    question, _, end = rest.partition("<|im_end|>\n")
    assert (start, end) == ("", "<|im_start|>assistant\n"), rendered
    return question


def with_observations(row: dict[str, Any]) -> dict[str, Any]:
    """A rollout of several turns from its first sampled token to its last, all between included."""
    at = [a + 1 for a, sampled in enumerate(row["mask"]) if sampled]
    given = dict(zip(at, row["advantages"], strict=True))
    places = range(at[0], at[-1] + 1)
    return {
        **row,
        "ids": row["sequence"][at[0] : at[-1] + 1],
        "sampled": [place in given for place in places],
        "advantages": [given.get(place, 0.0) for place in places],
        "kl": [0.0] * len(places),
    }


def naive_rewards(prompt: str, ids: list[int]) -> tuple[list[float | None], float]:
    """Reward of each token (None where masked) and the sequence reward, for one assistant turn."""
    messages = [{"role": "user", "content": prompt}]
    _, rewards, logp = naive_scores(messages, ids, tokenizer(), EOS)
    return rewards, statistics.fmean(logp) if logp else -float(torch.tensor(2048.0).log())


def naive_scores(
    messages: list[dict[str, str]], ids: list[int], writer: Any, end_of_turn: str
) -> tuple[list[int], list[float | None], list[float]]:
    """What the verifier reads, prompt and response; rewards; and log-probs of its tokens.

    `ids` are one assistant turn in tokens of `writer`; rewards are None where masked.
    """
    reader = verifier().tokenizer
    prompt_ids = reader.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    (text,), (generator_ends,), (kinds,) = SpanTable(writer).decode_batch([ids])
    text, ends = oracle.as_message(text, generator_ends.tolist())
    verifier_ids, verifier_ends = SpanTable(reader).encode(text)
    ends_of_turn = {writer.eos_token_id, writer.convert_tokens_to_ids(end_of_turn)}
    ended = not ends_of_turn.isdisjoint(ids[-1:])
    asked = verifier_ids.tolist() + [reader.convert_tokens_to_ids("<|end|>")] * ended
    logp = verifier_logprobs(prompt_ids, asked)
    aligned = oracle.align(
        [Fraction(value) for value in logp[: len(verifier_ids)]], verifier_ends.tolist(), ends
    )
    rewards: list[float | None] = []
    for value, end, start, kind in zip(aligned, ends, [0, *ends], kinds, strict=False):
        cut = kind == UNFINISHED  # holds part of a character that was never finished
        rewards.append(None if end == start or cut else float(value))
    if ended:
        rewards[-1] = logp[-1]
    return prompt_ids + asked, rewards, logp


def normalised(values: list[float | None], *, scale: str, eps: float) -> list[float]:
    """(r - mean) / (std + eps) of what is there, 0 for the others and for one alone."""
    there = [value for value in values if value is not None]
    if len(there) < 2:
        return [0.0] * len(values)
    mean, std = statistics.fmean(there), statistics.stdev(there)
    divisor = 1.0 if scale == "none" else std + eps
    return [0.0 if value is None else (value - mean) / divisor for value in values]


def returns(kl: list[float], beta: float) -> list[float]:
    """Sums of `-beta * KL` from each token to the last."""
    return [-beta * sum(kl[t:]) for t in range(len(kl))]


def expected_advantages(
    rows: list[dict[str, Any]],
    config: CMEConfig,
    *,
    beta: float = 0.0,
    limits: tuple[float, float] = (-10.0, 10.0),
    penalty: Any = lambda row: 0.0,
    score: Any = lambda row: naive_rewards(question_of(row["prompt"]), row["ids"]),
) -> dict[int, list[float]]:
    """By a rollout's index: advantages of its tokens, recomputed from their ids."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["index"] // GROUP, []).append(row)
    expected: dict[int, list[float]] = {}
    for group in groups.values():
        assert len(group) == GROUP
        assert len({row["prompt"] for row in group}) == 1
        scored = [score(row) for row in group]
        taken = [penalty(row) for row in group]
        own: list[list[float]] = [[] for _ in group]
        if config.level == "sequence":
            values: list[float | None] = [s + p for (_, s), p in zip(scored, taken, strict=True)]
            shared = normalised(values, scale=config.scale, eps=config.eps)
            own = [[a] * len(row["ids"]) for a, row in zip(shared, group, strict=True)]
        else:
            by_token = [rewards for rewards, _ in scored]
            if config.credit == "return":
                by_token = [
                    oracle.returns_to_go(rewards, row.get("sampled"), config.gamma)
                    for rewards, row in zip(by_token, group, strict=True)
                ]
            for t in range(max(len(row["ids"]) for row in group)):
                # A penalty is there once in each return, and once in each reward.
                column = [
                    r[t] + p if t < len(r) and r[t] is not None else None
                    for r, p in zip(by_token, taken, strict=True)
                ]
                column = normalised(column, scale=config.scale, eps=config.eps)
                for b, row in enumerate(group):
                    own[b] += [column[b]] if t < len(row["ids"]) else []
        for row, advantages in zip(group, own, strict=True):
            extra = returns(row["kl"], beta)
            clipped = [min(max(a, limits[0]), limits[1]) for a in advantages]
            expected[row["index"]] = [a + k for a, k in zip(clipped, extra, strict=True)]
    return expected


def worst_in_nats(rows: list[dict[str, Any]], config: CMEConfig) -> float:
    """At the sequence level, the largest difference of `advantage * (std + eps)` from a response's
    reward less the mean of its group.

    The rewards are float32; with OpenRLHF's own eps of 1e-9 the division by the std of four that
    nearly agree makes any multiple of their rounding.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["index"] // GROUP, []).append(row)
    worst = 0.0
    for group in groups.values():
        values = [naive_rewards(question_of(row["prompt"]), row["ids"])[1] for row in group]
        mean, divisor = statistics.fmean(values), statistics.stdev(values) + config.eps
        for row, value in zip(group, values, strict=True):
            assert len(set(row["advantages"])) == 1
            worst = max(worst, abs(row["advantages"][0] * divisor - (value - mean)))
    return worst


def worst_error(rows: list[dict[str, Any]], expected: dict[int, list[float]]) -> float:
    """Largest difference of an advantage, relative to those greater than one."""
    return max(
        abs(a - b) / max(1.0, abs(b))
        for row in rows
        for a, b in zip(row["advantages"], expected[row["index"]], strict=True)
    )
