"""A vLLM server on the CPU, and the small models it serves in the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import real_pair
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import cme_reward

EMBEDDED = Path(cme_reward.__file__).parent / "verifiers" / "embedded"
START_SECONDS = 600.0
KEY = "key of the real server"


def gemma3(folder: Path) -> None:
    """Random weights of Gemma 3's kind: sliding windows shorter than a prompt, soft-capped logits.

    The embedded verifier's tokenizer; head size 32 is the least that vLLM's CPU attention takes.
    """
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=2048,
        sliding_window=64,
        layer_types=[*["sliding_attention"] * 3, "full_attention"],
        final_logit_softcapping=30.0,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=4,
        pad_token_id=5,
    )
    Gemma3ForCausalLM(config).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)


def llama(folder: Path) -> None:
    """The embedded verifier, trained weights of Llama's kind."""
    shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)


def smollm2(folder: Path) -> None:
    """A real verifier of useful size."""
    folder.symlink_to(real_pair.VERIFIER, target_is_directory=True)


MODELS: dict[str, Callable[[Path], None]] = {
    "llama": llama,
    "gemma3": gemma3,
    "smollm2": smollm2,
}

# vLLM's quicker endpoint needs its second model runner, and that one Triton, which has no backend
# for CPUs: declare one, and let Triton's interpreter run the kernels. Slow, and the same code.
BACKEND = {
    "cpu_triton-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: cpu-triton\nVersion: 0\n",
    "cpu_triton-0.dist-info/entry_points.txt": "[triton.backends]\ncpu = cpu_triton\n",
    "cpu_triton/__init__.py": "",
    "cpu_triton/compiler.py": """
import triton.backends.compiler as base
class Compiler(base.BaseBackend):
    supports_target = staticmethod(lambda target: target.backend == "cpu")
    hash = parse_options = add_stages = load_dialects = get_module_map = pack_metadata = None
    get_codegen_implementation = None
""",
    "cpu_triton/driver.py": """
import torch
import triton.backends.compiler as compiler
import triton.backends.driver as base
class Driver(base.DriverBase):
    is_active = classmethod(lambda cls: True)
    get_current_target = lambda self: compiler.GPUTarget("cpu", 0, 1)
    get_active_torch_device = lambda self: torch.device("cpu")
    map_python_to_cpp_type = get_benchmarker = None
""",
}


@dataclass
class Server:
    """A vLLM server, the folder of its model, and where the client should ask it for scores."""

    folder: Path
    options: list[str]
    environment: dict[str, str]
    path: str = "/v1/completions"
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder.with_suffix(".log")

    def start(self) -> None:
        """Return when it is healthy."""
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.folder), "--served-model-name", self.folder.name,
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", *self.options,
        ]  # fmt: skip
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_API_KEY": KEY,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                env=os.environ | environment | self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        self.stop()
        tail = self.log.read_text(encoding="utf-8")[-4000:]
        raise AssertionError(f"vLLM did not start within {START_SECONDS} s:\n{tail}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it and the processes it started."""
        assert self.process is not None
        for signum in (how, signal.SIGKILL):  # the second for what the first has left
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)

    def answers(self) -> int:
        """How many scoring requests it answered well."""
        line = f'"POST {self.path} HTTP/1.1" 200'
        return self.log.read_text(encoding="utf-8").count(line)

    def tokens_from_cache(self) -> int:
        """How many prompt tokens it did not have to compute."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        hits = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
        return int(sum(float(line.split()[-1]) for line in hits))

    def cpu_seconds(self) -> float:
        """Of all its processes."""
        ticks = 0
        for process in self.processes():
            with suppress(FileNotFoundError, ProcessLookupError):  # processes end
                stat = (process / "stat").read_text(encoding="utf-8")
                ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def processes(self) -> list[Path]:
        """Its processes, as folders of /proc."""
        assert self.process is not None
        own = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError):
                stat = (process / "stat").read_text(encoding="utf-8")
                if int(stat.rpartition(")")[2].split()[2]) == self.process.pid:
                    own.append(process)
        return own


def forget_peak(processes: list[Path]) -> float:
    """Resident megabytes now; the peak counts from here."""
    for process in processes:
        (process / "clear_refs").write_text("5")
    return _megabytes(processes, "VmRSS")


def peak(processes: list[Path]) -> float:
    """Most resident megabytes since `forget_peak`."""
    return _megabytes(processes, "VmHWM")


def _megabytes(processes: list[Path], field: str) -> float:
    lines = [
        line
        for process in processes
        for line in (process / "status").read_text(encoding="utf-8").splitlines()
        if line.startswith(field)
    ]
    return sum(int(line.split()[1]) for line in lines) / 1024
