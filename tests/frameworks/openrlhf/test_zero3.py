"""Verifiers in a process whose trainer has DeepSpeed's ZeRO-3 on: real DeepSpeed, on the CPU."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from trl_sharded import ASKED, build_nothing, check, sharded

import cme_reward.verifiers
from cme_reward import ConfigError, load_verifier
from cme_reward.verifiers.hf import TransformersVerifier

FOLDER = str(Path(cme_reward.verifiers.__file__).parent / "embedded")
SETTINGS = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_PORT": port,
        }.items():
            patch.setenv(key, str(value))
        patch.setenv("MASTER_ADDR", "localhost")
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed  # pyright: ignore[reportMissingImports]

        build_nothing()
        deepspeed.init_distributed("gloo")
        yield
        torch.distributed.destroy_process_group()


def sizes(model: Any) -> set[int]:
    return {weight.numel() for weight in model.parameters()}


def test_a_verifier_is_whole_and_the_trainers_own_models_are_not() -> None:
    specs = [f"hf:{FOLDER}", f"random:{FOLDER}", "embedded"]
    before: list[Any] = [load_verifier(spec) for spec in specs]
    live = HfDeepSpeedConfig(SETTINGS)
    assert is_deepspeed_zero3_enabled()
    assert sizes(AutoModelForCausalLM.from_pretrained(FOLDER)) == {0}  # what it is about
    others: list[Any] = []

    def load_another() -> None:
        others.append(sizes(AutoModelForCausalLM.from_pretrained(FOLDER)))

    for spec, alone in zip(specs, before, strict=True):
        verifier: Any = load_verifier(spec)
        for weight, wanted in zip(
            verifier.model.parameters(), alone.model.parameters(), strict=True
        ):
            assert torch.equal(weight, wanted)
            assert weight.device.type == "cpu"
        for got, wanted in zip(verifier.logprobs(*ASKED), alone.logprobs(*ASKED), strict=True):
            np.testing.assert_array_equal(got, wanted)
        assert is_deepspeed_zero3_enabled()
    load_another()
    assert others == [{0}]
    del live
    assert not is_deepspeed_zero3_enabled()
    assert 0 not in sizes(AutoModelForCausalLM.from_pretrained(FOLDER))


def test_a_trainer_that_loads_meanwhile_gets_what_it_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = HfDeepSpeedConfig(SETTINGS)
    load = AutoModelForCausalLM.from_pretrained
    seen: list[bool] = []

    def load_while_another_thread_looks(*args: Any, **kwargs: Any) -> Any:
        looking = threading.Thread(target=lambda: seen.append(is_deepspeed_zero3_enabled()))
        looking.start()
        looking.join()
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_while_another_thread_looks)
    verifier: Any = load_verifier("embedded")
    assert seen == [True]
    assert 0 not in sizes(verifier.model)
    with pytest.raises(cme_reward.VerifierError, match="cannot load verifier"):
        load_verifier("hf:/no/such/folder")
    assert is_deepspeed_zero3_enabled()
    del live


def test_a_model_in_parts_is_refused() -> None:
    live = HfDeepSpeedConfig(SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    with pytest.raises(ConfigError, match=r"ZeRO-3 has partitioned its weights.*load_verifier"):
        TransformersVerifier(model, AutoTokenizer.from_pretrained(FOLDER))
    del live
    import deepspeed  # pyright: ignore[reportMissingImports]

    with (
        deepspeed.zero.Init(config_dict_or_path=SETTINGS),
        pytest.raises(ConfigError, match=r"while deepspeed\.zero\.Init .*: load it before"),
    ):
        load_verifier("embedded")


def test_a_training_of_two_processes(tmp_path: Path) -> None:
    verifier: Any = load_verifier("embedded", device="cpu")
    wanted = verifier.logprobs(*ASKED)
    check(sharded(tmp_path, "zero3"), wanted)
