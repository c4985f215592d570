"""`benchmarks/gpu.py` runs, at toy sizes, and counts operations rightly."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_toy(script, tmp_path, capsys) -> None:
    script["main"](["--toy", "--json", str(tmp_path / "gpu.json")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["machine"]) >= {"date", "device", "software", "bf16 matrix product"}
    assert [r["options"] for r in report["results"]] == ["defaults", "head_dtype=float32"]
    for result in report["results"]:
        assert result["tokens_per_second"] > 0
        assert 0 < result["utilisation"] < 1
        assert 0 < result["in_alignment"] < result["outside_forward"] + 0.5 < 1.5
    assert "tokens/s" in printed


def test_operations_by_hand(script) -> None:
    config = Gemma3TextConfig(
        vocab_size=10,
        hidden_size=2,
        intermediate_size=3,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        sliding_window=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    # A layer: 2 * (q 8 + k 4 + v 4 + o 8) + 3 * 2 * 3 = 66 weights; prompt 2, responses 1 and 2:
    # 5 tokens * 66 * 2 layers * 2 = 1320; head 3 * 2 * 10 * 2 = 120. Positions see 1, 2; 3; 3, 4
    # tokens: 13 in the full layer, 1 + 2 + 2 + 2 + 2 = 9 in a window of 2; (13 + 9) * 4 * 8 = 704.
    assert script["flops"](config, [2], [[1, 2]]) == 1320 + 120 + 704


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
def test_without_a_device(script) -> None:
    with pytest.raises(SystemExit, match=r"needs a CUDA device.*--toy"):
        script["main"]([])
