"""The reward server under load: requests a second, latencies, what batching is worth, memory.

    python benchmarks/server_load.py --verifier hf:PATH --generator PATH --memory-minutes 10

The server is a process of its own; this one is its clients, over the loopback. Each client sends a
rollout, waits for its reward and sends the next one, in OpenRLHF's protocol. Eight rollouts of a
prompt follow one another, as they do in training.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, LlamaConfig

from cme_reward.loading import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ROLLOUTS = 8


@dataclass
class Server:
    host: str
    port: int
    pid: int

    def memory(self) -> float:
        """Resident, in MiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(args: argparse.Namespace, *options: str) -> Any:
    command = [
        *(
            sys.executable,
            "-c",
            "from cme_reward.cli.app import main; main()",
            "serve",
            "--port",
            "0",
        ),
        *("--verifier", args.verifier, "--generator-tokenizer", args.generator),
        *("--device", args.device, *options),
    ]
    with started(command) as server:
        yield server


@contextmanager
def started(command: list[str]) -> Any:
    """The server that a command runs, from when it listens; it has to end well when told to."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"listening on http://(\S+):(\d+)", line)
        if found:
            yield Server(found[1], int(found[2]), process.pid)
            break
        sys.stderr.write(line)
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    status = process.wait()
    process.stderr.close()
    if status or "Traceback" in rest:
        raise SystemExit(f"the server ended with {status}:\n{rest[-3000:]}")


def requests(args: argparse.Namespace) -> list[bytes]:
    """Whole HTTP requests, ready to be written to a socket."""
    tokenizer = AutoTokenizer.from_pretrained(args.generator)
    texts = passages()
    made = []
    for k in range(args.prompts):
        prompt = texts[k % len(texts)][: args.prompt_chars]
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        end = tokenizer.eos_token or ""
        for g in range(ROLLOUTS):
            response = texts[(7 * k + 13 * g + 1) % len(texts)][: args.response_chars]
            body = {"query": [prompt + response + end], "prompts": [prompt], "labels": [""]}
            data = json.dumps(body).encode()
            head = (
                "POST /get_reward HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n"
            )
            made.append(head.encode() + data)
    return made


def passages() -> list[str]:
    shared = os.environ.get("CME_SHARED")
    if shared:
        path = Path(shared) / "texts" / "dev_alpacaeval.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)["response"] for line in lines]
        return [text for text in rows if len(text) > 400]
    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cme_reward/*.py")])
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return [text[k : k + 2000] for k in range(0, len(text) - 2000, 700)]


async def load(
    server: Server, bodies: list[bytes], clients: int, seconds: float
) -> tuple[list[float], float]:
    """Latencies of all requests of `clients` that take turns for a while, and how long it took."""
    latencies: list[float] = []
    todo = cycle(bodies)
    stop = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        while (started := time.perf_counter()) < stop:
            writer.write(next(todo))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert head.startswith(b"HTTP/1.1 200 "), head
            assert length
            await reader.readexactly(int(length[1]))
            latencies.append(time.perf_counter() - started)
        writer.close()
        await writer.wait_closed()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies, time.perf_counter() - started


def measured(server: Server, bodies: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    asyncio.run(load(server, bodies, clients, min(2.0, seconds)))  # caches, connections
    cpu = server.cpu_seconds()
    latencies, took = asyncio.run(load(server, bodies, clients, seconds))
    cpu = server.cpu_seconds() - cpu
    p50, p95, p99 = 1000 * np.percentile(latencies, [50, 95, 99])
    return {
        "clients": clients,
        "requests": len(latencies),
        "per_second": len(latencies) / took,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "cpu_ms": 1000 * cpu / len(latencies),
    }


def show(name: str, row: dict[str, float]) -> None:
    print(
        f"{name:34} {row['clients']:3} clients  {row['per_second']:7.1f} requests/s   p50 "
        f"{row['p50_ms']:7.1f}  p95 {row['p95_ms']:7.1f}  p99 {row['p99_ms']:7.1f} ms   "
        f"CPU {row['cpu_ms']:.1f} ms each",
        flush=True,
    )


def compare(name: str, ours: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    """Ratios within each round: other load on the machine changes between rounds."""
    rates = [a["per_second"] / b["per_second"] for a, b in zip(ours, others, strict=True)]
    cpu = [b["cpu_ms"] / a["cpu_ms"] for a, b in zip(ours, others, strict=True)]
    print(
        f"{name}: {statistics.median(rates):.2f} times the requests/s "
        f"({', '.join(f'{rate:.2f}' for rate in rates)}); "
        f"1/{statistics.median(cpu):.2f} of the CPU time a request"
    )


def memory_over(
    server: Server, bodies: list[bytes], minutes: float, clients: int
) -> list[dict[str, float]]:
    """Resident memory twice a minute under steady load, after one minute to warm up."""
    rows = []
    started = time.perf_counter()
    asyncio.run(load(server, bodies, clients, min(60, 60 * minutes)))
    while True:
        elapsed = (time.perf_counter() - started) / 60
        rows.append({"minute": elapsed, "mib": server.memory()})
        print(f"  minute {elapsed:5.1f}: {rows[-1]['mib']:7.1f} MiB", flush=True)
        if elapsed >= minutes:
            return rows
        asyncio.run(load(server, bodies, clients, min(30, 60 * minutes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verifier", default="embedded")
    parser.add_argument("--generator", default=str(ROOT / "examples" / "generator"))
    parser.add_argument(
        "--untrained",
        nargs=2,
        type=int,
        metavar=("WIDTH", "LAYERS"),
        help="instead of the verifier, a Llama of this size with its tokenizer and random weights: "
        "as fast as a trained one",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turns; best is shown")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-chars", type=int, default=300)
    parser.add_argument("--response-chars", type=int, default=200)
    parser.add_argument("--memory-minutes", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.untrained:
            save_llama(folder, load_tokenizer(args.verifier), *args.untrained)
            args.verifier = f"random:{folder}"
        measure(args)


def save_llama(folder: str, tokenizer: Any, width: int, layers: int) -> None:
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ).save_pretrained(folder)


def measure(args: argparse.Namespace) -> None:
    bodies = requests(args)
    found: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}

    # The same server with and without batching: a budget of 1 token is one request a call.
    with serving(args) as batching, serving(args, "--max-batch-tokens", "1") as single:
        settings = [(batching, n) for n in (1, 16, 64)] + [(single, 64)]
        rows: list[list[dict[str, float]]] = [[] for _ in settings]
        for _ in range(args.rounds):
            for k, (server, clients) in enumerate(settings):
                rows[k].append(measured(server, bodies, clients, args.seconds))
        best = [max(row, key=lambda r: r["per_second"]) for row in rows]
        for row in best[:3]:
            show("batching", row)
        show("one request in a verifier call", best[3])
        compare("64 clients against one request at a time", rows[2], rows[0])
        compare("64 clients against 64 without batching", rows[2], rows[3])
        found |= {"batching": best[:3], "single": best[3], "rounds": rows}
        if args.memory_minutes:
            found["memory"] = memory_over(batching, bodies, args.memory_minutes, clients=16)
            sizes = [row["mib"] for row in found["memory"]]
            print(f"memory: {sizes[0]:.1f} MiB at first, {sizes[-1]:.1f} MiB at last")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
