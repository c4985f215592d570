"""Verifiers by the specs that name them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import cme_reward.verifiers
from cme_reward import ConfigError, VerifierError
from cme_reward.comparators import load_reward, random_verifier
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


OWN = """
from cme_reward import load_verifier

def make(name="mine"):
    verifier = load_verifier("embedded")
    verifier.name = name
    return verifier

several = lambda: load_verifier("embedded+embedded")
nothing = lambda: None
value = 3
"""


def test_one_of_ones_own_by_its_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_verifier.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    spec = "python:own_verifier:make"
    assert load_verifier(spec).name == "mine"
    assert load_verifier(spec, name="other").name == "other"
    both = load_verifier(f"embedded+{spec}")
    assert isinstance(both, Ensemble)
    reward = load_reward("cme", "embedded", verifier=spec, device="cpu")  # its own business
    assert reward.members[0].verifier.name == "mine"
    for wrong, says in (
        ("python:own_verifier", "expected python:MODULE:NAME"),
        ("python:own_verifier:nil", "cannot be imported: .*no attribute 'nil'"),
        ("python:nowhere:make", "cannot be imported: No module named 'nowhere'"),
        ("python:own_broken:make", "cannot be imported: ZeroDivisionError: division by zero"),
        ("python:own_verifier:value", "it is 3; expected a function"),
        ("python:own_verifier:nothing", "gave NoneType; expected one verifier"),
        ("python:own_verifier:several", "gave Ensemble; expected one verifier"),
    ):
        with pytest.raises(VerifierError, match=says):
            load_verifier(wrong)
    with pytest.raises(ConfigError, match=r"takes no such option: .*dtype"):
        load_verifier(spec, dtype="float32")
