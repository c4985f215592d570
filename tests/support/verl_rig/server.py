"""A verifier behind HTTP, to be killed: `python -m verl_rig.server PORT`.

STAND-IN for a vLLM server: its protocol, from fake_engines.py, with log-probs of a small
model, that of the trainer's tests.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fake_engines import FakeEngine
from transformers import AutoModelForCausalLM, AutoTokenizer


class ModelEngine(FakeEngine):
    """Answers with a real model's log-probs, in float64 for comparisons."""

    def __init__(self, engine: str, path: str, **options: Any) -> None:
        self.causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        limit = self.causal.config.max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(path)
        super().__init__(engine, tokenizer, model=path, max_model_len=limit, **options)

    def _logprobs(self, ids: list[int]) -> list[float]:
        with torch.inference_mode():
            logprobs_SV = self.causal(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        return logprobs_SV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


class Server:
    """The stand-in in a process of its own."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "verl_rig.server", str(self.port)]
        environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.log.read_text()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


if __name__ == "__main__":
    from verl_rig.naive import TRAINED

    torch.set_num_threads(1)
    with ModelEngine("vllm", str(TRAINED), port=int(sys.argv[1])):
        print("ready", flush=True)
        while True:
            time.sleep(3600)
