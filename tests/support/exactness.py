"""Random conversations, scored by the package and by loops that know how they were made.

    python tests/support/exactness.py --cases 1000000 --processes 2
    python tests/support/exactness.py --cases 1000000 --record FILE   # goes on where it stopped

CME_SHARED adds real tokenizers.

Pairs of tokenizers x texts x cut and split ids x turns x thoughts x masks x EOS x ensembles. What
each verifier was shown must be its own template over exactly the messages of which the case was
made, and every reward the one that a double loop finds, to 1e-9 before it is rounded to float32.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from observations import SAID, expected, message, speakers, tail
from oracle import byte_cells, without_word_space
from stubs import TableVerifier
from templates import chat_tokenizer
from tokenizer_kinds import REAL, load_tokenizer

from cme_reward import CMEConfig, CrossModelEntropy
from cme_reward.verifiers import Ensemble

GENERATORS = [
    "chatml/special", "qwen/special", "gemma/special", "olmo-like/text", "olmo-like/special",
    "phi-like/special", "deepseek-like/text", "deepseek-like/special", "mistral-like/special",
    "plain/text", "thinks/special", "trl:qwen3/special", "trl:deepseekv3/special",
    "trl:llama3_1/special", "trl:cohere2/special", "trl:glm4moe/special",
    *(name for name in ("qwen2.5", "llama3", "olmo2-dolma2") if name in REAL),
]  # fmt: skip
CHAT = ["byte-level", "bytes", *(name for name in ("qwen2.5", "llama3") if name in REAL)]
BASE = ["sentencepiece", *(name for name in ("gpt2",) if name in REAL)]
PIECES = [
    "The answer is 7.", " so ", "\n\n", "12*7=84", "Größe", "日本", "🤷🏽", " ", "x = {'a': 1}",
    "<|user|>", "[INST] ", "no?", "\t", "naïve ", "<think>", "</think>", "</think>\n\n", "ok",
]  # fmt: skip
OBSERVATIONS = ["7", 'it says: "no"', "two\nlines", "", "日本 <b>", "look <|user|> there", "a\\b"]
TAGS = ("<think>", "</think>")
PER_SETUP, PER_CALL = 2500, 100


@dataclass
class Piece:
    """Of an assistant's turn: sampled ids, or text that was put there."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    end: int | None = None
    """The EOS that was sampled."""


@dataclass
class Case:
    """A response, and what it was made of."""

    prompt: Any
    turns: list[list[Piece]]
    observed: list[list[dict[str, Any]]]
    """Messages before each turn but the first."""
    begins: list[str]
    """What the template puts at the start of each turn."""
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    policy: list[float] = field(default_factory=list)


@cache
def pieces_of(name: str, is_verifier: bool) -> list[bytes]:
    """What each id writes, by the tokenizer's own alphabet; special tokens write nothing."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = load_tokenizer(name) if is_verifier else chat_tokenizer(name)
    inverse = {char: byte for byte, char in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids)
    out, all_added = [], tokenizer.added_tokens_decoder
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        added = all_added.get(i)
        if i in special or (added is not None and added.special):
            out.append(b"")
        elif added is not None:
            out.append(added.content.encode())
        elif "sentencepiece" in name:
            is_byte = token.startswith("<0x") and len(token) == 6
            out.append(
                bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
            )
        else:
            out.append(bytes(inverse[char] for char in token))
    return out


@cache
def special_of(name: str) -> set[int]:
    return {i for i, piece in enumerate(pieces_of(name, False)) if not piece}


@cache
def byte_ids(name: str) -> dict[int, int]:
    """The ids that write a single byte, by it."""
    found = {piece[0]: i for i, piece in enumerate(pieces_of(name, False)) if len(piece) == 1}
    assert len(found) == 256
    return found


def cells(pieces: list[bytes]) -> tuple[str, list[int]]:
    """Text and right ends in twelfths."""
    text, ends = byte_cells(pieces)
    return text, [int(12 * end) for end in ends]


def observed_ids(
    name: str, r: random.Random, closed: int | None, prefill: str
) -> tuple[list[int], list[Any], str]:
    """What an environment wrote after a turn, in the generator's template, and its messages; and
    what the template puts at the start of the next turn."""
    tokenizer = chat_tokenizer(name)
    roles = [role for role in speakers(name) if role in ("user", "tool")] or speakers(name)
    role = r.choice(roles)
    observations = [message(role, r.choice(OBSERVATIONS)) for _ in range(r.choice([1, 1, 2, 3]))]
    written = tail(tokenizer, observations)
    if written is None:  # turns must alternate in this template
        observations = observations[:1]
        written = tail(tokenizer, observations)
    assert written is not None, (name, SAID)
    if closed is not None:
        end = tokenizer.convert_ids_to_tokens(closed)
        before, found, rest = written.partition(end)
        if found and not before.strip():
            written = rest
    ids = tokenizer.encode(written, add_special_tokens=False)
    return ids, expected(observations), prefill if written.endswith(prefill) else ""


def damaged(ids: list[int], name: str, r: random.Random, inner: list[int]) -> list[int]:
    """Cut anywhere, split into bytes, with other ids and special tokens put in."""
    ids = list(ids)
    for _ in range(r.choice([0, 0, 1, 2])):
        at = r.randrange(len(ids) + 1)
        action = r.randrange(4)
        if action == 0:
            ids = ids[:at]
        elif action == 1 and at < len(ids):
            ids[at : at + 1] = [byte_ids(name)[byte] for byte in pieces_of(name, False)[ids[at]]]
        elif action == 2 and inner:
            ids[at:at] = [r.choice(inner)]
        else:
            # Bytes of no character: with others, a verifier's NFC would change what they make.
            ids[at:at] = [byte_ids(name)[r.randrange(0xF8, 0x100)] for _ in range(r.choice([1, 2]))]
    return ids


def make_case(
    name: str, cme: CrossModelEntropy, r: random.Random, inner: list[int], prefill: str
) -> Case:
    tokenizer = chat_tokenizer(name)
    encode = cme.table.encode
    content = r.choice(OBSERVATIONS[:4]) or "what?"
    prompt: Any = content if r.random() < 0.2 else [{"role": "user", "content": content}]
    case = Case(prompt, [], [], ["" if isinstance(prompt, str) else prefill])
    end_id = int(tokenizer.eos_token_id)
    for n in range(r.choice([1, 1, 1, 1, 1, 2, 3])):
        pieces: list[Piece] = []
        if n:
            closed = case.turns[-1][-1].end
            ids, messages, begin = observed_ids(name, r, closed, prefill)
            case.observed.append(messages)
            case.begins.append(begin)
            case.ids += ids
            case.mask += [0] * len(ids)
        for k in range(r.choice([1, 1, 1, 2])):
            if k:  # a tool's words inside the turn
                words = r.choice([" -> 7\n", " (ok) ", "\n"])
                ids = tokenizer.encode(words, add_special_tokens=False)
                pieces.append(Piece(words))
                case.ids += ids
                case.mask += [0] * len(ids)
            text = "".join(r.choices(PIECES, k=r.randrange(1, 4)))
            ids = damaged(encode(text)[0].tolist(), name, r, inner) or encode("ok")[0].tolist()
            pieces.append(Piece(ids=ids))
            case.ids += ids
            case.mask += [1] * len(ids)
        if r.random() < 0.6:
            pieces[-1].end = end_id
            case.ids.append(end_id)
            case.mask.append(1)
        case.turns.append(pieces)
    if r.random() < 0.2:  # padding
        case.ids += [end_id] * 2
        case.mask += [0, 0]
    case.policy = [-r.randrange(1, 9) / 4 for _ in case.ids]
    return case


def thought_spans(texts: list[list[Any]]) -> list[list[bool]]:
    """For each character of a turn's pieces, whether it is a thought: one at a time."""
    events = [a for atoms in texts for a in atoms if a in TAGS]
    thinking = bool(events) and events[0] == TAGS[1]
    behind, out = False, []
    for atoms in texts:
        flags = []
        for a in atoms:
            if a == TAGS[0]:
                flags += [True] * len(a)
                thinking, behind = True, False
            elif a == TAGS[1] and thinking:
                flags += [True] * len(a)
                thinking, behind = False, True
            elif len(a) > 1:  # a closing tag of nothing
                flags += [thinking] * len(a)
                behind = False
            else:
                behind = behind and a.isspace()
                flags.append(thinking or behind)
        out.append(flags)
    return out


def atoms(text: str) -> list[str]:
    """Characters, and tags as one."""
    out, at = [], 0
    while at < len(text):
        tag = next((tag for tag in TAGS if text.startswith(tag, at)), text[at])
        out.append(tag)
        at += len(tag)
    return out


def n_unfinished(written: list[bytes]) -> int:
    """How many tokens at the end hold bytes of a character that is not completed."""
    data = b"".join(written)
    for n_bytes in range(min(3, len(data)), 0, -1):
        try:
            data[-n_bytes:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                n_tokens = 1
                while len(b"".join(written[-n_tokens:])) < n_bytes:
                    n_tokens += 1
                return n_tokens
    return 0


def segments_of(case: Case, name: str, config: CMEConfig) -> list[Any]:
    """`(turn, piece, sampled, ends, tokens with whole characters, text, start, stop, whether it is
    the piece's last, what is said before it to a chat model and to a base model, earlier turns)` of
    all that is scored."""
    table = pieces_of(name, False)
    tokenizer = chat_tokenizer(name)
    special = special_of(name)
    outer = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    outer.add(tokenizer.eos_token_id)
    found: list[Any] = []
    said = ""
    turns_said = []
    for n, pieces in enumerate(case.turns):
        parts = [Piece(case.begins[n]), *pieces]
        texts, ends, n_whole = [], [], []
        for piece in parts:
            written = [
                str(tokenizer.convert_ids_to_tokens(i)).encode()
                if config.special_tokens == "show" and i in special and i not in outer
                else table[i]
                for i in piece.ids
            ]
            text, right = cells(written) if piece.ids else (piece.text, [])
            texts.append(text)
            ends.append(right)
            n_whole.append(len(written) - n_unfinished(written))
        thoughts = thought_spans([atoms(text) for text in texts])
        if n:
            words = [m["content"] for m in case.observed[n - 1] if m["content"].strip()]
            said = "\n\n".join([said, *words, ""])
        chat_said = ""
        for k, (piece, text) in enumerate(zip(parts, texts, strict=True)):
            scored_thoughts = config.thinking == "score"
            kept = [scored_thoughts or not thought for thought in thoughts[k]]
            if not piece.ids:
                shown = "".join(
                    c
                    for c, keep in zip(text, kept, strict=True)
                    if keep or config.thinking == "condition"
                )
                said, chat_said = said + shown, chat_said + shown
                continue
            at = 0
            stretches = []
            while at < len(text):
                stop = at
                while stop < len(text) and kept[stop] == kept[at]:
                    stop += 1
                if kept[at]:
                    stretches.append((at, stop))
                at = stop
            if not stretches or stretches[-1][1] < len(text):
                stretches.append((len(text), len(text)))
            shown_to = 0
            for i, j in stretches:
                if config.thinking == "condition":
                    context = text[shown_to:i]
                    said += context
                    chat_said += context if shown_to else without_word_space(context, chat_said)
                last = (i, j) == stretches[-1]
                found.append((n, k, piece, ends[k], n_whole[k], text, i, j, last, chat_said, said,
                              list(turns_said)))  # fmt: skip
                answer = text[i:j] if i else without_word_space(text[i:j], chat_said)
                said, chat_said = said + text[i:j], chat_said + answer
                shown_to = j
        turns_said.append(chat_said)
    return found


def check(
    case: Case,
    row: int,
    batch: Any,
    stubs: list[TableVerifier],
    asked: list[list[tuple[str, list[int], list[float]]]],
    name: str,
    verifiers: list[str],
    config: CMEConfig,
) -> list[str]:
    """What is wrong with one response. `asked` is what each stub still has to be compared with."""
    complaints: list[str] = []
    n_tokens = len(case.ids)
    sums = [[0.0, 0.0, 0] for _ in stubs]
    aligned = [[0.0] * n_tokens for _ in stubs]
    scored, value_of_end = [False] * n_tokens, {}
    positions = {}
    at = 0
    found = segments_of(case, name, config)
    # Where the pieces' tokens stand in the response: sampled ones, in order.
    sampled_at = [t for t, m in enumerate(case.mask) if m]
    for n, pieces in enumerate(case.turns):
        for k, piece in enumerate(pieces, 1):
            if piece.ids:
                size = len(piece.ids) + (piece.end is not None)
                positions[n, k] = sampled_at[at : at + size]
                at += size
    for n, k, piece, ends, n_whole, text, i, j, last, chat_said, said, turns_said in found:
        where = positions[n, k]
        has_end = last and piece.end is not None and config.eos == "score"
        wide = [(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        # Where the text begins that each verifier is shown.
        begins = [
            j - len(without_word_space(text[i:j], chat_said)) if v in CHAT and i == 0 else i
            for v in verifiers
        ]
        for t, (a, b) in enumerate(wide):
            lo, hi = max(a, 12 * max(begins)), min(b, 12 * j)
            if lo < hi and t < n_whole:
                inked = any(not c.isspace() for c in text[lo // 12 : -(-hi // 12)])
                scored[where[t]] |= inked or config.whitespace == "keep"
        if i == j and not has_end:
            continue
        for m, (stub, verifier) in enumerate(zip(stubs, verifiers, strict=True)):
            prompt, ids, logp = asked[m].pop(0)
            tokenizer = stub.tokenizer
            is_chat = verifier in CHAT
            if is_chat:
                messages = (
                    [{"role": "user", "content": case.prompt}]
                    if isinstance(case.prompt, str)
                    else list(case.prompt)
                )
                for earlier in range(n):
                    own = {"role": "assistant", "content": turns_said[earlier]}
                    messages += [own, *case.observed[earlier]]
                wanted = (
                    tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=True
                    )
                    + chat_said
                )
            else:
                content = case.prompt if isinstance(case.prompt, str) else case.prompt[0]["content"]
                wanted = content + said
            answer = text[begins[m] : j]
            if "sentencepiece" in verifier:  # to which a literal U+2581 is a space
                wanted, answer = wanted.replace("▁", " "), answer.replace("▁", " ")
            if prompt.removeprefix(tokenizer.bos_token or "\0") not in (
                wanted,
                wanted.removeprefix(tokenizer.bos_token or "\0"),
            ):
                complaints.append(f"shown {prompt!r}, wanted {wanted!r}")
            body = ids[:-1] if has_end else ids
            own_text, right = cells([pieces_of(verifier, True)[v] for v in body])
            if own_text != answer:
                complaints.append(f"asked for {own_text!r}, wanted {answer!r}")
                continue
            if special := set(body) & {*tokenizer.all_special_ids}:  # ends, where none was sampled
                complaints.append(f"asked for {sorted(special)} in {own_text!r}")
            if has_end:
                end = (
                    "<|eot_id|>"
                    if verifier == "llama3"
                    else ("<|im_end|>" if is_chat else tokenizer.eos_token)
                )
                if tokenizer.convert_ids_to_tokens(ids[-1]) != end:
                    complaints.append(f"ended with {ids[-1]}")
                value_of_end[where[-1], m] = logp[-1]
                sums[m][1] += case.policy[where[-1]]
            sums[m][0] += math.fsum(logp)
            sums[m][2] += len(logp)
            first = 12 * begins[m]
            for t, (a, b) in enumerate(wide):  # the double loop
                lo, hi = max(a, first) - first, min(b, 12 * j) - first
                if lo >= hi:
                    continue
                # A word's own space is no text that was chosen, and counts for nothing.
                written = b - (max(a, first) if begins[m] > i else a)
                sums[m][1] += case.policy[where[t]] * (hi - lo) / written
                left = 0
                for stop, value in zip(right, logp, strict=False):
                    overlap = min(stop, hi) - max(left, lo)
                    if overlap > 0:
                        aligned[m][where[t]] += overlap * value / (stop - left)
                    left = stop
    members = len(stubs)
    share = {}
    for n, k, _, ends, _, _, i, j, _, *_ in found:
        for t, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            lo, hi = max(a, 12 * i), min(b, 12 * j)
            if lo < hi:
                share[positions[n, k][t]] = share.get(positions[n, k][t], 0) + (hi - lo) / (b - a)
    for (t, m), value in value_of_end.items():
        scored[t], share[t] = True, 1
        aligned[m][t] = value
    for t in range(n_tokens):
        want = math.fsum(row[t] for row in aligned) / members if scored[t] else 0.0
        if scored[t] and config.baseline == "policy":
            want -= case.policy[t] * share.get(t, 0)
        if bool(batch.mask[row, t]) != scored[t]:
            complaints.append(f"token {t}: mask {bool(batch.mask[row, t])}, wanted {scored[t]}")
        elif off(batch.token_rewards[row, t].item(), want):
            complaints.append(f"token {t}: {batch.token_rewards[row, t].item()}, wanted {want}")
    means = [
        (total - own * (config.baseline == "policy")) / count
        if count
        else -math.log(stub.vocab_size)
        for (total, own, count), stub in zip(sums, stubs, strict=True)
    ]
    want = math.fsum(means) / members
    if off(batch.sequence_rewards[row].item(), want):
        complaints.append(f"sequence {batch.sequence_rewards[row].item()}, wanted {want}")
    return complaints


def off(got: float, want: float) -> bool:
    """More than 1e-9 from it, before rounding to float32?"""
    return abs(got - want) > 1e-9 * max(1, abs(want)) + float(np.spacing(np.float32(abs(want)))) / 2


def run(seed: int, n_cases: int) -> dict[str, Any]:
    """So many cases of one pair of tokenizers and one configuration."""
    r = random.Random(seed)
    name = r.choice(GENERATORS)
    verifiers = r.sample([*CHAT, *BASE], r.choice([1, 1, 1, 1, 2, 3]))
    config = CMEConfig(
        whitespace=r.choice(["mask", "keep"]),
        eos=r.choice(["score", "score", "mask"]),
        thinking=r.choice(["score", "condition", "hide"]),
        special_tokens=r.choice(["hide", "hide", "show"]),
        baseline=r.choice(["none", "none", "policy"]),
    )
    stubs = [TableVerifier(load_tokenizer(verifier)) for verifier in verifiers]
    verifier = stubs[0] if len(stubs) == 1 else Ensemble(stubs)  # type: ignore[arg-type]
    cme = CrossModelEntropy(verifier, chat_tokenizer(name), config)  # type: ignore[arg-type]
    tokenizer = chat_tokenizer(name)
    prefill = "<think>\n" if name.startswith(("thinks", "trl:deepseekv3")) else ""
    generator = cme.generator
    inner = np.setdiff1d(generator.special_ids, generator.eos_ids).tolist()
    setup = f"{name} -> {'+'.join(verifiers)}, {config}"
    counts: Counter[str] = Counter()
    complaints: list[str] = []
    for first in range(0, n_cases, PER_CALL):
        cases = [
            make_case(name, cme, r, inner, prefill) for _ in range(min(PER_CALL, n_cases - first))
        ]
        counts["cases"] += len(cases)
        counts["tokens"] += sum(len(case.ids) for case in cases)
        counts["turns"] += sum(len(case.turns) for case in cases)
        for stub in stubs:
            stub.prompts, stub.responses = [], []
        try:
            batch = cme(
                [case.prompt for case in cases],
                [case.ids for case in cases],
                [case.mask for case in cases],
                [case.policy for case in cases] if config.baseline == "policy" else None,
            )
        except Exception:
            counts["exceptions"] += 1
            complaints.append(f"{setup}: {traceback.format_exc(limit=-3)}")
            continue
        asked = [
            [
                (stub.tokenizer.decode(p), list(map(int, a)), [-(1 + i % 7) / 4 for i in a])
                for p, a in zip(stub.prompts, stub.responses, strict=True)
            ]
            for stub in stubs
        ]
        for row, case in enumerate(cases):
            try:
                wrong = check(case, row, batch, stubs, asked, name, verifiers, config)
            except Exception:
                wrong = [traceback.format_exc(limit=-3)]
            if wrong:
                counts["leaks" if "shown" in wrong[0] else "off"] += 1
                complaints.append(f"{setup}: {tokenizer.decode(case.ids)!r}: {wrong[:2]}")
                break  # what was asked no longer corresponds
    return {"seed": seed, "counts": counts, "complaints": complaints[:3]}


def main() -> int:
    """Run the cases, print what was found; the exit status is 1 for anything wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first pair (default 0)")
    parser.add_argument("--processes", type=int, default=1, help="at a time (default 1)")
    add = parser.add_argument
    add("--record", type=Path, help="file of what each pair gave; pairs in it are not run again")
    args = parser.parse_args()
    from rich.progress import Progress

    n_setups = -(-args.cases // PER_SETUP)
    sizes = {args.seed + k: min(PER_SETUP, args.cases - k * PER_SETUP) for k in range(n_setups)}
    record = args.record
    lines = record.read_text().splitlines() if record and record.exists() else []
    results = [r for r in map(json.loads, lines) if sizes.get(r["seed"]) == r["counts"]["cases"]]
    left = [seed for seed in sizes if seed not in {result["seed"] for result in results}]
    started = time.time()
    with ProcessPoolExecutor(args.processes) as pool, Progress() as bar:
        done = sum(result["counts"]["cases"] for result in results)
        task = bar.add_task("cases", total=args.cases, completed=done)
        for result in pool.map(run, left, [sizes[seed] for seed in left], chunksize=4):
            results.append(result)
            for complaint in result["complaints"]:
                bar.print(complaint)
            if record:
                with record.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            bar.advance(task, result["counts"]["cases"])
    total = sum((Counter(result["counts"]) for result in results), Counter())
    complaints = [complaint for result in results for complaint in result["complaints"]]
    names = ("cases", "tokens", "turns", "off", "leaks", "exceptions")
    print(json.dumps({"seed": args.seed, "pairs": n_setups, **{n: total[n] for n in names},
                      "seconds": round(time.time() - started)}))  # fmt: skip
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
