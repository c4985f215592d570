"""Train the embedded verifier, the small causal LM behind `load_verifier("embedded")`.

One command, one seed, CPU only. The text is the GSM8K training set (MIT) and text that
`embedded_text.py` writes: arithmetic word problems with worked solutions, arithmetic facts, and
short English answers. GSM8K ends a solution in `#### N`, other collections in `A: N`; either ending
is written at random.

    python scripts/train_embedded.py --gsm8k gsm8k_train.jsonl.gz --out embedded-new
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from embedded_text import Pair, synthetic_pair
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
# The trainer numbers special tokens first, in this order.
BOS, SYSTEM, USER, ASSISTANT, END, PAD = range(6)
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ '<|system|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer clearly and briefly.",
    "You are a careful teacher. Think step by step.",
    "Solve the problem step by step and give the final answer on the last line.",
)
MAX_POSITIONS = 2048


def read_gsm8k(path: Path, held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return (train, held-out) pairs; one problem never appears in both."""
    if not path.is_file():
        raise SystemExit(f"GSM8K file {path} not found; pass --gsm8k PATH to a .jsonl.gz with "
                         "fields prompt and response.")  # fmt: skip
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: int(len(prompts) * held_out)])
    pairs = [(row["prompt"], row["response"]) for row in rows]
    return [p for p in pairs if p[0] not in held], [p for p in pairs if p[0] in held]


def either_ending(r: random.Random, response: str) -> str:
    """Write the last line `#### N` as `A: N` half of the time."""
    return re.sub(r"\n#### (?=[^\n]*$)", "\nA: ", response) if r.random() < 0.5 else response


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with every digit its own token and no normaliser."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIALS[BOS], eos_token=SPECIALS[END],
        pad_token=SPECIALS[PAD], additional_special_tokens=SPECIALS[SYSTEM : ASSISTANT + 1],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False, padding_side="right")  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Example(NamedTuple):
    """Token ids of one conversation and the loss weight of each of them."""

    ids: list[int]
    weights: list[float]


def make_example(
    tok: PreTrainedTokenizerFast, pairs: list[Pair], system: str | None, prompt_weight: float
) -> Example:
    """Lay out pairs exactly as the chat template does, with a loss weight for each token."""
    ids, weights = [BOS], [0.0]

    def add(text: str, role: int, weight: float) -> None:
        body = tok.encode(text, add_special_tokens=False)
        ids.extend([role, *body])
        weights.extend([0.0, *[weight] * len(body)])

    if system is not None:
        add(system, SYSTEM, prompt_weight)
    for prompt, response in pairs:
        add(prompt, USER, prompt_weight)
        add(response, ASSISTANT, 1.0)
        ids.append(END)
        weights.append(1.0)
    return Example(ids[:MAX_POSITIONS], weights[:MAX_POSITIONS])


def example_stream(
    tok: PreTrainedTokenizerFast, train: list[Pair], args: argparse.Namespace
) -> Iterator[Example]:
    """Yield examples for ever: mostly single turns, some dialogues, a few of 2,048 tokens."""
    r = random.Random(args.seed + 1)
    order: list[Pair] = []

    def pair() -> Pair:
        if r.random() < args.synthetic:
            return synthetic_pair(r)
        if not order:
            order.extend(train)
            r.shuffle(order)
        prompt, response = order.pop()
        return prompt, either_ending(r, response)

    while True:
        kind = r.random()
        # A 2,048-token dialogue holds about ten turns, so 0.4 % of draws is 4 % of tokens.
        turns = 40 if kind < 0.004 else r.randint(2, 4) if kind < 0.03 else 1
        system = r.choice(SYSTEM_PROMPTS) if r.random() < 0.1 else None
        yield make_example(tok, [pair() for _ in range(turns)], system, args.prompt_weight)


def batches(examples: Iterator[Example], tokens: int, seed: int) -> Iterator[list[Example]]:
    """Group examples of similar length, at most `tokens` padded tokens a batch, in random order."""
    r = random.Random(seed)
    while True:
        pool = sorted((next(examples) for _ in range(800)), key=lambda e: len(e.ids))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example.ids) > tokens and groups[-1]:
                groups.append([])
            groups[-1].append(example)
        r.shuffle(groups)
        yield from groups


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to `ids [B, T]` and `weights [B, T]`; causal attention needs no mask for that."""
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [PAD] * (width - len(e.ids)) for e in examples])
    weights = torch.tensor([e.weights + [0.0] * (width - len(e.weights)) for e in examples])
    return ids, weights


def build_model(args: argparse.Namespace, tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=args.hidden, intermediate_size=args.ffn,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128), max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True, initializer_range=0.04, bos_token_id=BOS,
        eos_token_id=END, pad_token_id=PAD)  # fmt: skip
    return LlamaForCausalLM(config)


def make_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    After 0.4 M tokens Muon stood at 2.92 held-out nats a token, AdamW alone (same batch) at 3.12.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, ns_steps=4)
    adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for group in (*muon.param_groups, *adam.param_groups):
        group["initial_lr"] = group["lr"]
    return [muon, adam]


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return `-log p(ids[:, 1:])` in nats, shape `[B, T-1]`."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # Flattened, because cross_entropy over a strided class dimension costs a third of the step.
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, held: list[Pair]
) -> tuple[float, float]:
    """Held-out loss of the response with its end token, in nats: (per token, per UTF-8 byte)."""
    r = random.Random(0)
    pairs = [(p, either_ending(r, s)) for p, s in held]
    examples = sorted((make_example(tok, [p], None, 0.0) for p in pairs), key=lambda e: len(e.ids))
    nats = tokens = 0.0
    for start in range(0, len(examples), 16):
        ids, weights = collate(examples[start : start + 16])
        nats += float((token_losses(model, ids) * weights[:, 1:]).sum())
        tokens += float(weights[:, 1:].sum())
    return nats / tokens, nats / sum(len(s.encode()) for _, s in pairs)


@torch.no_grad()
def loss_by_position(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, held: list[Pair]
) -> dict[str, float]:
    """Held-out response loss by position, over dialogues that fill the whole context."""
    edges = (0, 128, 256, 512, 1024, 1536, MAX_POSITIONS)
    sums, counts = torch.zeros(MAX_POSITIONS), torch.zeros(MAX_POSITIONS)
    for start in range(0, len(held) - 14, 14):
        ids, weights = collate([make_example(tok, held[start : start + 14], None, 0.0)])
        losses = (token_losses(model, ids) * weights[:, 1:])[0]
        sums[1 : len(losses) + 1] += losses
        counts[1 : len(losses) + 1] += weights[0, 1:]
    return {f"{a}-{b}": round(float(sums[a:b].sum() / counts[a:b].sum()), 4)
            for a, b in itertools.pairwise(edges)}  # fmt: skip


def save(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder file by file, each by rename, so that a reader never sees half a file."""
    staging = out.with_name(out.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    tok.save_pretrained(staging, save_jinja_files=False)
    settings = json.loads((staging / "tokenizer_config.json").read_text())
    # transformers 4 knows the class and the list by these names only; transformers 5 takes both.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings.pop("backend", None)
    (staging / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # Half precision on disk, but the config says float32 so that it is loaded, and run, in float32.
    config = model.config.to_diff_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "rope_theta": 10000.0}
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()
               if k != "lm_head.weight"}  # fmt: skip
    save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        (staging / name).chmod(0o644)
        os.replace(staging / name, out / name)
    shutil.rmtree(staging)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    train_pairs, held = read_gsm8k(args.gsm8k, 0.05, args.seed)
    r = random.Random(args.seed + 2)
    own = [synthetic_pair(r) for _ in range(6000)]
    mixed = [(p, either_ending(r, s)) for p, s in train_pairs] + own
    tok = train_tokenizer((t for pair in mixed for t in pair), args.vocab)
    model = build_model(args, tok)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters; {len(train_pairs)} problems, {len(held)} held out", flush=True)

    optimizers = make_optimizers(model, args)
    stream = batches(example_stream(tok, train_pairs, args), args.batch, args.seed + 3)
    best, seen, steps, next_eval, start = math.inf, 0, 0, args.eval_every, time.time()
    report = {"parameters": size, "seed": args.seed}
    bar = Progress(TextColumn("{task.description}"), BarColumn(),
                   TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())  # fmt: skip
    with bar:
        task = bar.add_task("training", total=args.tokens)
        while seen < args.tokens:
            ids, weights = collate(next(stream))
            warm = min(1.0, (seen + 1) / (0.02 * args.tokens))
            scale = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * seen / args.tokens)))
            # Explicit attention is faster on a CPU until its [T, T] matrices leave the cache.
            model.set_attn_implementation("eager" if ids.shape[1] <= 512 else "sdpa")
            with torch.autocast("cpu", torch.bfloat16):
                losses = token_losses(model, ids)
            loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in optimizers:
                for group in opt.param_groups:
                    group["lr"] = group["initial_lr"] * scale
                opt.step()
                opt.zero_grad()
            new = int(ids.ne(PAD).sum())
            seen, steps = seen + new, steps + 1
            speed = seen / (time.time() - start)
            bar.update(task, completed=seen,
                       description=f"loss {loss.item():.3f}  {speed:,.0f} tokens/s")  # fmt: skip
            if seen >= next_eval or seen >= args.tokens:
                next_eval += args.eval_every
                per_token, per_byte = evaluate(model, tok, held)
                losses_text = f"{per_token:.4f} nats/token, {per_byte:.4f} nats/byte"
                clock = f"{seen:,} tokens, {time.time() - start:.0f} s, lr x {scale:.2f}"
                print(f"{clock}: held-out {losses_text}", flush=True)
                if per_token < best:
                    best = per_token
                    save(model, tok, args.out)
                    report |= {"held_out_nats_per_token": round(per_token, 4),
                               "held_out_nats_per_byte": round(per_byte, 4),
                               "tokens_at_best": seen}  # fmt: skip
    trained = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    report |= {"tokens": seen, "steps": steps, "seconds": round(time.time() - start),
               "bytes": (args.out / "model.safetensors").stat().st_size,
               "nats_per_token_by_position": loss_by_position(trained, tok, held)}  # fmt: skip
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    shared = Path(os.environ.get("CME_SHARED", "."))
    package = Path(__file__).resolve().parent.parent / "cme_reward" / "verifiers" / "embedded"
    add = parser.add_argument
    add("--gsm8k", type=Path, default=shared / "texts" / "gsm8k_train.jsonl.gz",
        help="JSON lines, gzipped, with fields prompt and response")  # fmt: skip
    add("--out", type=Path, default=package, help="folder to write; the best checkpoint so far")
    add("--tokens", type=float, default=7e6, help="training tokens, padding not counted")
    add("--eval-every", type=float, default=5e5, help="tokens between held-out evaluations")
    add("--batch", type=int, default=2048, help="padded tokens an optimiser step")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--muon-lr", type=float, default=2e-2, help="peak learning rate of Muon")
    add("--synthetic", type=float, default=0.4, help="share of examples from embedded_text.py")
    add("--prompt-weight", type=float, default=0.3, help="loss weight of prompt tokens")
    add("--vocab", type=int, default=2048, help="tokens of the byte-level BPE")
    add("--hidden", type=int, default=256, help="model width, a multiple of 128")
    add("--ffn", type=int, default=512, help="width of the feed-forward layers")
    add("--layers", type=int, default=5, help="number of layers")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--seed", type=int, default=20260529, help="seed of the split, the text and the weights")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
