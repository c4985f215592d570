"""CPU time that the reward server takes for a request besides the verifier, against other versions.

    git worktree add ../before v0.3.0
    python benchmarks/server_cpu.py ../before . --generator PATH --tokenizer PATH

A server for each checkout, with a verifier that sleeps for `--verifier-seconds` in each call and
answers a constant. All are asked at the same time, as in server_load.py, so that whatever else the
machine does disturbs them alike: CPU seconds and their ratios within a round tell them apart.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


class Constant:
    """A verifier that takes time, and none of the CPU's."""

    name = "constant"
    max_length = 8192

    def __init__(self, tokenizer: Any, seconds: float) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.seconds = seconds

    def logprobs(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[np.ndarray]:
        time.sleep(self.seconds)
        return [np.full(len(response), -1.5) for response in responses]


def serve(checkout: str, generator: str, tokenizer: str, seconds: float) -> None:
    sys.path.insert(0, checkout)
    from cme_reward.loading import load_tokenizer
    from cme_reward.server import ServerSettings, create_app
    from cme_reward.server.run import bind, run

    settings = ServerSettings()
    verifier = Constant(load_tokenizer(tokenizer), seconds)
    app = create_app(verifier, load_tokenizer(generator), settings=settings)
    run(app, bind("127.0.0.1", 0), settings)


def serving(checkout: str, args: argparse.Namespace) -> Any:
    from server_load import started

    options = [args.generator, args.tokenizer, str(args.verifier_seconds)]
    return started([sys.executable, __file__, "--serve", str(Path(checkout).resolve()), *options])


def main() -> None:
    from server_load import load, requests

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="+", help="others are held against the first")
    example = str(ROOT / "examples" / "generator")
    parser.add_argument("--generator", default=example)
    parser.add_argument("--tokenizer", default=example, help="the verifier's")
    parser.add_argument("--verifier-seconds", type=float, default=0.05, help="of a call")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-chars", type=int, default=500)
    parser.add_argument("--response-chars", type=int, default=200)
    args = parser.parse_args()
    bodies = requests(args)
    cpu: list[list[float]] = []
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(path, args)) for path in args.checkouts]

        async def together(seconds: float) -> list[Any]:
            return await asyncio.gather(*(load(s, bodies, args.clients, seconds) for s in servers))

        asyncio.run(together(args.seconds))  # caches, connections
        for k in range(args.rounds):
            before = [s.cpu_seconds() for s in servers]
            found = asyncio.run(together(args.seconds))
            used = [s.cpu_seconds() - was for s, was in zip(servers, before, strict=True)]
            latencies = [row for row, _ in found]
            cpu.append([1000 * x / len(row) for x, row in zip(used, latencies, strict=True)])
            tails = [np.percentile(row, [50, 99]) for row in latencies]
            for path, ms, (p50, p99), s in zip(
                args.checkouts, cpu[-1], tails, servers, strict=True
            ):
                print(
                    f"round {k} {path:30} CPU {ms:.3f} ms a request, {ms / cpu[-1][0]:.3f} of the "
                    f"first's; p99 {p99 / p50:.2f} times p50; {s.memory():.1f} MiB",
                    flush=True,
                )
    for path, ours in zip(args.checkouts, zip(*cpu, strict=True), strict=True):
        ratio = statistics.median(ms / row[0] for ms, row in zip(ours, cpu, strict=True))
        print(f"{path}: median {statistics.median(ours):.3f} ms, {ratio:.3f} of the first's")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], sys.argv[4], float(sys.argv[5]))
    else:
        main()
