"""Texts, tokenizer pairs and timing that all benchmarks share, and the table that ends a run."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_kinds import SHARED, load_tokenizer, shared_rows
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from cme_reward import SpanTable

ROOT = Path(__file__).resolve().parents[1]
RESPONSES = 512


@dataclass
class Row:
    group: str
    what: str
    ours: str
    baseline: str
    ratio: str


ROWS = pytest.StashKey[list[Row]]()


@dataclass
class Timing:
    """Seconds of interleaved runs of two ways to do one thing; medians."""

    ours: float
    baseline: float

    @property
    def ratio(self) -> float:
        return self.ours / self.baseline


@dataclass
class Corpus:
    """Responses of one kind, sampled by one tokenizer and scored by another."""

    name: str
    generator: SpanTable
    verifier: SpanTable
    texts: list[str]
    generator_ids: list[list[int]]
    verifier_logprobs: list[np.ndarray]
    """Made up: one for each token of the verifier's encoding, in nats."""

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.generator_ids))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark-ratios", metavar="FILE", help="write the ratio table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    machine = _machine()
    terminalreporter.section("ratios to baselines")
    for key, value in machine.items():
        terminalreporter.write_line(f"{key}: {value}")
    terminalreporter.write_line("")
    names = ["group", "what", "ours", "baseline", "ratio"]
    table = [names, *(list(asdict(row).values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in [table[0], ["-" * width for width in widths], *table[1:]]:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
    path: str | None = config.getoption("--benchmark-ratios")
    if path:
        report = {"machine": machine, "rows": [asdict(row) for row in rows]}
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def _machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    threads = ", ".join(
        f"{name}={os.environ[name]}"
        for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
        if name in os.environ
    )
    packages = ("numpy", "torch", "tokenizers", "transformers")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "software": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
        "threads": threads or "as the libraries choose",
        "texts": "real tokenizers and responses (CME_SHARED)"
        if SHARED
        else "small tokenizers trained on this repository; set CME_SHARED for real ones",
    }


@pytest.fixture
def ratio_table(request: pytest.FixtureRequest) -> Callable[[str, str, str, str, str], None]:
    """`(group, what, ours, baseline, ratio)`: one row of the table that ends the run."""

    def add(group: str, what: str, ours: str, baseline: str, ratio: str) -> None:
        request.config.stash[ROWS].append(Row(group, what, ours, baseline, ratio))

    return add


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Only correctness is asked for: small inputs do."""
    return bool(request.config.getoption("benchmark_disable"))


@pytest.fixture
def paired(benchmark: Any) -> Callable[..., Timing | None]:
    """`(ours, baseline, rounds)`: run the two in turns. None if benchmarks are disabled."""

    def run(
        ours: Callable[[], Any], baseline: Callable[[], Any], rounds: int = 9, warmup: int = 1
    ) -> Timing | None:
        seconds: list[float] = []

        def other() -> None:
            start = time.perf_counter()
            baseline()
            seconds.append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=other, rounds=rounds, warmup_rounds=warmup)
        if benchmark.stats is None:
            return None
        timing = Timing(benchmark.stats.stats.median, statistics.median(seconds[warmup:]))
        benchmark.extra_info |= {"baseline_seconds": timing.baseline, "ratio": timing.ratio}
        return timing

    return run


@pytest.fixture
def growth(benchmark: Any, quick: bool) -> Callable[..., tuple[float, list[float]]]:
    """`(prepare, sizes)`: time `prepare(size)()` per size; exponent of the upper half, seconds.

    The upper half, because a call's fixed cost flattens the lower one.
    """

    def run(
        prepare: Callable[[int], Callable[[], Any]], sizes: list[int], rounds: int = 7
    ) -> tuple[float, list[float]]:
        seconds: list[float] = []

        def sweep() -> None:
            calls = [prepare(size) for size in (sizes[:2] if quick else sizes)]
            times: list[list[float]] = [[] for _ in calls]
            for _ in range(1 if quick else rounds):  # in turns: a slow moment hits every size
                for call, taken in zip(calls, times, strict=True):
                    start = time.perf_counter()
                    call()
                    taken.append(time.perf_counter() - start)
            seconds.extend(min(taken) for taken in times)

        benchmark.pedantic(sweep, rounds=1)
        upper = len(seconds) // 2
        x, y = np.log(sizes[upper : len(seconds)]), np.log(seconds[upper:])
        exponent = float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else float("nan")
        benchmark.extra_info |= {"sizes": sizes, "seconds": seconds, "exponent": exponent}
        return exponent, seconds

    return run


@pytest.fixture(scope="session")
def tables() -> dict[str, SpanTable]:
    """Three tokenizers, by role: two of byte-level BPE, and one with byte fallback."""
    if SHARED:
        names = {"llama": "llama3", "qwen": "qwen2.5", "gemma": "gemma3"}
        made = {role: load_tokenizer(name) for role, name in names.items()}
    else:
        texts = _stand_in_texts(200, "plain") + _stand_in_texts(100, "unicode")
        made = {
            "llama": _byte_level(texts, 4000),
            "qwen": _byte_level(texts[::2], 6000, normalizers.NFC()),
            "gemma": _byte_fallback(texts, 5000),
        }
    return {role: SpanTable(tokenizer) for role, tokenizer in made.items()}


@pytest.fixture(scope="session")
def responses(quick: bool) -> dict[str, list[str]]:
    """Mostly English, some 320 tokens each ("plain"); CJK, Indic scripts, emoji ("unicode")."""
    n = 24 if quick else RESPONSES
    if SHARED is None:
        return {kind: _stand_in_texts(n, kind) for kind in ("plain", "unicode")}
    plain = [row["response"] for row in shared_rows("dev_alpacaeval") if row["response"].strip()]
    mixed = [row["response"] for name in ("udhr", "strings") for row in shared_rows(f"dev_{name}")]
    mixed = [text for text in mixed if any(char > "\u07ff" for char in text)]
    return {"plain": plain[:: len(plain) // n][:n], "unicode": mixed[:n]}


@pytest.fixture(scope="session")
def corpora(tables: dict[str, SpanTable], responses: dict[str, list[str]]) -> dict[str, Corpus]:
    """By name: "llama -> qwen", "qwen -> gemma", and both again on "unicode" text."""
    made = {}
    rng = np.random.default_rng(0)
    for kind, texts in responses.items():
        for generator, verifier in (("llama", "qwen"), ("qwen", "gemma")):
            name = f"{generator} -> {verifier}" + (", unicode" if kind == "unicode" else "")
            ids = [row.tolist() for row in tables[generator].encode_batch(texts).ids]
            # What the sampler wrote: its ids decide, also where it normalised the text.
            written = tables[generator].decode_batch(ids).texts
            lengths = [len(row) for row in tables[verifier].encode_batch(written).ids]
            made[name] = Corpus(
                name=name,
                generator=tables[generator],
                verifier=tables[verifier],
                texts=written,
                generator_ids=ids,
                verifier_logprobs=[-rng.exponential(2.0, size=n) for n in lengths],
            )
    return made


def _stand_in_texts(n: int, kind: str) -> list[str]:
    """About 320 tokens each: passages of this repository, or words of letters of many scripts."""
    rng = random.Random(kind)
    if kind == "plain":
        files = sorted([*ROOT.glob("*.md"), *ROOT.glob("cme_reward/**/*.py")])
        lines = "\n".join(path.read_text(encoding="utf-8") for path in files).split("\n")
        starts = [rng.randrange(max(1, len(lines) - 25)) for _ in range(n)]
        return ["\n".join(lines[start : start + 25]) or "empty" for start in starts]
    scripts = [(0x4E00, 0x5400), (0x3041, 0x3097), (0xAC00, 0xB000), (0x0905, 0x093A)]
    scripts += [(0x0430, 0x0450), (0x1F600, 0x1F650)]
    words = []
    for first, stop in scripts:
        letters = [chr(code) for code in range(first, stop)]
        words += ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=90)) for _ in range(n)]


def _byte_level(texts: list[str], size: int, normalizer: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def _byte_fallback(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Gemma's kind: no prefix, spaces as `▁`, rare characters as bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<eos>"]
    every_byte = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special + every_byte,
        limit_alphabet=400,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # The trainer makes byte tokens special, which would hide them from decode.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
