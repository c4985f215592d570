"""The examples that the README and the demo run: how they are made, what the verifier can tell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cme_reward.cli.app import app

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "word-problems.jsonl"


def ranked(file: Path) -> dict[str, Any]:
    given = ["rank", str(file), "--label", "is_correct", "--append-eos", "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_word_problems_are_what_their_script_writes(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    subprocess.run([sys.executable, tmp_path / "scripts" / "word_problems.py"], check=True)
    assert (tmp_path / "examples" / FILE.name).read_bytes() == FILE.read_bytes()


def test_a_slip_is_one_and_nothing_else_is_wrong() -> None:
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    right = {row["prompt"]: row["response"] for row in rows if row["is_correct"]}
    assert len(right) == 14
    assert len({row["id"].split("/")[1] for row in rows}) == 5
    for row in rows:
        good, lines = right[row["prompt"]].split("\n"), row["response"].split("\n")
        assert len(lines) == len(good)
        assert (lines == good) == row["is_correct"]
        if row["id"].endswith("disordered"):
            assert sorted(lines) == sorted(good)


@pytest.mark.slow
def test_the_verifier_tells_slips_in_what_it_was_trained_on_and_not_gsm8k() -> None:
    ours, other = ranked(FILE), ranked(ROOT / "examples" / "gsm8k.jsonl")
    assert ours["verdict"]["text"].startswith("It ranks.")
    assert other["verdict"]["text"].startswith("NOT SHOWN.")


def test_the_demos_packages_are_among_the_development_tools() -> None:
    """So that `scripts/install` only adds to what the demo installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras["demo"]) < set(extras["dev"])


def test_installing_for_the_demo_does_not_pass_for_the_development_tools(tmp_path: Path) -> None:
    """A stand-in for the interpreter writes down what pip was asked for."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install", tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >>asked\n')
    python.chmod(0o755)
    asked = tmp_path / "asked"

    def install(*extra: str) -> list[str]:
        asked.write_text("")
        command = ["sh", str(tmp_path / "scripts" / "install"), *extra]
        subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
        return [line.split()[-1] for line in asked.read_text().splitlines()]

    assert install("demo") == ["torch", ".[demo]"]
    assert install("demo") == []
    assert install() == ["torch", ".[dev]"]
    assert install() == install("demo") == []
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert install("demo") == ["torch", ".[demo]"]
