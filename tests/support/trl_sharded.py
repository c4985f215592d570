"""A training of two processes of which each holds a part of the policy, and all of the verifier.

`sharded(FOLDER, "fsdp" or "zero3")` runs it. Nothing is imported here that needs TRL.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from two_ranks import in_two_processes

SHARING: dict[str, dict[str, Any]] = {
    "fsdp": {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "cpu_ram_efficient_loading": True,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    },
    "zero3": {
        "deepspeed": {
            "zero_optimization": {"stage": 3},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": False},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        }
    },
}
ASKED = [[1, 2, 3], [4, 5]], [[6, 7, 8], [9]]
"""Of the verifier of each process, by itself."""


def sharded(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What `main` saves, for each process."""
    import torch

    environ = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    in_two_processes(__file__, str(folder), kind, seconds=280, **environ)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def build_nothing() -> None:
    """Leave DeepSpeed's messages to torch.distributed, where it would compile an op with g++."""
    import deepspeed.ops  # pyright: ignore[reportMissingImports]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(folder: Path, kind: str) -> None:
    import torch
    import trl_tiny as tiny
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from datasets import Dataset
    from torch.distributed.tensor import DTensor

    from cme_reward import CMEConfig, load_verifier
    from cme_reward.trl import CMEGRPOTrainer, cme_reward_func

    if kind == "zero3":
        build_nothing()
    # The one stand-in: accelerate shares weights out where there are accelerators, and nowhere
    # else. This makes it take two CPU processes, which talk by gloo, for two GPUs.
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    own = folder / os.environ["RANK"]
    tiny.policy().save_pretrained(own / "policy")
    arguments = tiny.arguments(
        own,
        use_cpu=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        **SHARING[kind],
    )
    verifier: Any = load_verifier("embedded", device="cpu")
    made: Any = CMEGRPOTrainer(
        str(own / "policy"),
        [cme_reward_func(verifier, tiny.tokenizer())],
        arguments,
        Dataset.from_list(tiny.CHAT),
        processing_class=tiny.tokenizer(),
    )
    rows = tiny.rows_of(tiny.train(made, in_order=True))
    of_all: list[Any] = [None, None]
    torch.distributed.all_gather_object(of_all, rows)
    rows = [row for of_rank in of_all for row in of_rank]
    expected = tiny.expected_advantages(rows, CMEConfig())
    weights = list(made.model.parameters())
    told = {
        "processes": made.accelerator.num_processes,
        "shared": all(isinstance(w, DTensor) or hasattr(w, "ds_id") for w in weights),
        "logprobs": verifier.logprobs(*ASKED),
        "rows": len(rows),
        "worst": tiny.worst_error(rows, expected),
        "largest": max(abs(value) for row in expected for value in row),
    }
    torch.save(told, folder / f"{os.environ['RANK']}.pt")


def check(told: list[dict[str, Any]], logprobs: list[Any]) -> None:
    """The verifier of each process is whole, and the four rollouts have the advantages of one."""
    import numpy as np

    for of_rank in told:
        assert of_rank["processes"] == 2
        assert of_rank["shared"]
        for got, wanted in zip(of_rank["logprobs"], logprobs, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert of_rank["rows"] == 4
        assert of_rank["largest"] > 0.1
    assert told[0]["worst"] <= 1e-5


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
