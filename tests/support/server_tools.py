"""The reward server in this process, and as a program on a real socket."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from stubs import TableVerifier
from waiting import PATIENCE

from cme_reward import VerifierError
from cme_reward.server import create_app
from cme_reward.verifiers.base import TokenIds

GOOD = {"prompts": ["a"], "responses": ["b"]}
IDS = {"prompts": ["a"], "response_ids": [[5, 6]]}


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(test())  # type: ignore[arg-type]


@asynccontextmanager
async def serving(verifier: Any, tokenizer: Any, *args: Any, **options: Any) -> AsyncIterator[Any]:
    """A client of the application, which is `client.app`; errors arrive as replies."""
    app = create_app(verifier, tokenizer, *args, **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url="http://server", timeout=PATIENCE
        ) as client,
    ):
        client.app = app  # type: ignore[attr-defined]
        yield client


class Gated(TableVerifier):
    """Waits in each call until it is let go, remembers the calls, dislikes one id."""

    def __init__(self, tokenizer: Any, dislikes: int | None = None) -> None:
        super().__init__(tokenizer)
        self.gate = threading.Event()
        self.busy = threading.Event()
        self.calls: list[tuple[list[list[int]], list[list[int]]]] = []
        self.dislikes = dislikes

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        self.calls.append(([list(p) for p in prompts], [list(r) for r in responses]))
        self.busy.set()
        assert self.gate.wait(PATIENCE)
        if any(self.dislikes in list(response) for response in responses):
            raise VerifierError(f"does not like {self.dislikes}")
        return super().logprobs(prompts, responses)


class Program:
    """`cme-reward serve` on a free port; `stop` returns the exit status."""

    def __init__(self, *options: str, cwd: Path, **environ: str) -> None:
        self.log: list[str] = []
        self.headers: dict[str, str] = {}
        self.process = subprocess.Popen(
            [Path(sys.executable).parent / "cme-reward", "serve", "--port", "0", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environ,
        )
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._listening.wait(PATIENCE)
        found = re.search(r"http://\S+:(\d+)", "".join(self.log))
        assert found, "".join(self.log)
        self.url, self.port = found[0], int(found[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if "listening on" in line:
                self._listening.set()
        self._listening.set()  # it ended

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers=self.headers).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not in\n{text}"
        return float(found[1])

    def stop(self, sig: int | None = signal.SIGTERM) -> int:
        """The exit status; None waits for an end that was asked for before."""
        if sig is not None and self.process.poll() is None:
            self.process.send_signal(sig)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


def refused(got: Any, status: int, error: str, message: str) -> None:
    assert got.status_code == status, got.text
    assert got.json().keys() == {"error", "detail"}
    assert got.json()["error"] == error
    assert re.search(message, got.json()["detail"]), got.json()["detail"]
