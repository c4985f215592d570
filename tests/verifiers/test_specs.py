"""Verifiers by the specs that name them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import cme_reward.verifiers
from cme_reward import VerifierError
from cme_reward.comparators import random_verifier
from cme_reward.verifiers import Ensemble, load_verifier, split_spec


def test_a_plus_in_the_name_of_a_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`x/a+b` and `x/c` are there; `x/a` and `x/a+c` are not."""
    shutil.copytree(Path(cme_reward.verifiers.__file__).parent / "embedded", tmp_path / "x" / "a+b")
    (tmp_path / "x" / "c").mkdir()
    a_b, c = tmp_path / "x" / "a+b", tmp_path / "x" / "c"
    assert split_spec(f"hf:{a_b}") == [f"hf:{a_b}"]
    assert split_spec(f"hf:{a_b}+embedded") == [f"hf:{a_b}", "embedded"]
    assert split_spec(f" embedded + random:{a_b}+hf:{c} ") == [
        "embedded", f"random:{a_b}", f"hf:{c}",
    ]  # fmt: skip
    assert split_spec(f"hf:{c}+hf:{a_b}+hf:{a_b}") == [f"hf:{c}", f"hf:{a_b}", f"hf:{a_b}"]
    assert split_spec("vllm:http://a:1+sglang:http://b:2") == [
        "vllm:http://a:1",
        "sglang:http://b:2",
    ]
    assert split_spec(f"hf:{tmp_path}/x/a+c") == [f"hf:{tmp_path}/x/a", "c"]
    monkeypatch.chdir(tmp_path)
    one = load_verifier("hf:x/a+b")
    assert one.name == "hf:x/a+b"
    both = load_verifier("hf:x/a+b+embedded")
    assert isinstance(both, Ensemble)
    assert [member.name for member in both.members] == ["hf:x/a+b", "embedded"]
    untrained = random_verifier("hf:x/a+b")
    assert untrained.name == "random:x/a+b"
    # None of it is loaded before all of it is known; the list says how it was read.
    with pytest.raises(
        VerifierError, match=r"unknown verifier 'c'(.|\n)*'hf:x/a\+c' names several"
    ):
        load_verifier("hf:x/a+c")
