"""Start the real trainer on a tiny policy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cme_reward.verl.launch import to_override

ROOT = Path(__file__).resolve().parents[3]
SUPPORT = Path(__file__).resolve().parents[1]
STEP = re.compile(r"step:(\d+) - (.*)")


@dataclass
class Run:
    """A finished run: exit status, everything it printed, and what its actor received."""

    status: int
    log: str
    record: Path

    def steps(self) -> list[dict[str, float]]:
        """veRL's console log, a dict for each step."""
        found = {}
        for step, line in STEP.findall(self.log):
            pairs = (pair.rpartition(":") for pair in line.split(" - "))
            numbers = {}
            for key, _, value in pairs:
                text = re.sub(r"np\.\w+\((.*)\)", r"\1", value.strip())
                numbers[key] = float(re.sub(r"\x1b.*", "", text))
            found[int(step)] = found.get(int(step), {}) | numbers
        return [found[step] for step in sorted(found)]


def settings(policy: Path, data: Path, steps: int) -> dict[str, Any]:
    """veRL's keys for a tiny run on the CPU."""
    return {
        "data.train_files": str(data),
        "data.val_files": str(data),
        "data.train_batch_size": 4,
        "data.max_prompt_length": 64,
        "data.max_response_length": 24,
        "data.dataloader_num_workers": 0,
        "data.shuffle": False,
        "actor_rollout_ref.model.path": str(policy),
        "actor_rollout_ref.model.use_remove_padding": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "actor_rollout_ref.actor.strategy": "fsdp2",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
        "actor_rollout_ref.rollout.name": "hfcpu",
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.rollout.dtype": "float32",
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.logger": ["console"],
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": 1000,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "ray_kwargs.ray_init.num_cpus": 8,
        "+ray_kwargs.ray_init.num_gpus": 1,
        "+ray_kwargs.ray_init.address": "local",
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 300_000_000,
    }


def start(
    folder: Path,
    config: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    module: str = "cme_reward.verl",
    file: Path | None = None,
    gpus: int = 1,
) -> subprocess.Popen[str]:
    """Start a run in `folder`: with its log in `log.txt`, its actor's rows in `record`.

    `config` is written to a file for `cme_reward.verl`, or added to `file` on the command line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record").mkdir(exist_ok=True)
    # Sockets of Ray have names of at most 107 bytes.
    ray_folder = tempfile.mkdtemp(prefix="cme-ray-", dir="/tmp")
    config = {**config, "+ray_kwargs.ray_init._temp_dir": ray_folder}
    config["+ray_kwargs.ray_init.num_gpus"] = gpus
    if file is None:
        file = folder / "config.yaml"
        file.write_text(json.dumps(config, indent=1))  # JSON is YAML
    else:
        overrides = [*(f"{key}={to_override(value)}" for key, value in config.items()), *overrides]
    arguments = [str(file), *overrides] if module == "cme_reward.verl" else list(overrides)
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
        "VERL_USE_EXTERNAL_MODULES": "verl_rig",
        "VERL_PLATFORM": "cpu",
        "VERL_RIG_RECORD": str(folder / "record"),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HYDRA_FULL_ERROR": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VERL_LOGGING_LEVEL": "WARN",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environ, stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[str], folder: Path, seconds: float = 600) -> Run:
    """Wait for a run to end, and end what it leaves behind."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        kill(process)
    return Run(status, (folder / "log.txt").read_text(errors="replace"), folder / "record")


def kill(process: subprocess.Popen[str]) -> None:
    """End the run's processes: the session that it began, and no others."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
