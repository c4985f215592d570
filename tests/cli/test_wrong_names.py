"""A model, tokenizer, device or folder that is not there ends every command in one paragraph."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cme_reward.verifiers
from cme_reward.cli.app import app

EMBEDDED = Path(cme_reward.verifiers.__file__).parent / "embedded"


def said(*command: Any) -> str:
    """What a command that fails says, in one line; anything but an error of ours is raised."""
    result = CliRunner().invoke(app, [*map(str, command)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, result.output
    assert not result.stdout
    paragraphs = result.stderr.strip().split("error: ")
    assert len(paragraphs) == 2, result.stderr
    return " ".join(paragraphs[1].split())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "What is 2 + 3?", "response": "5"}\n')
    return file


@pytest.fixture(params=["score", "rank", "serve"])
def reads(request: pytest.FixtureRequest, rows: Path) -> Callable[..., str]:
    """A command that loads a verifier, with these options."""
    command: list[Any] = [request.param]
    if request.param == "serve":
        command += ["--port", 0]
    else:
        command += [rows]

    def run(**options: Any) -> str:
        if request.param == "serve":
            options = {"verifier": "embedded", "generator_tokenizer": "embedded"} | options
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return said(*command, *flags)

    return run


def damaged(folder: Path, name: str, text: str | None) -> Path:
    shutil.copytree(EMBEDDED, folder)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    return folder


DAMAGE = [
    ("model.safetensors", None), ("model.safetensors", "not weights"), ("config.json", "{"),
    ("config.json", '{"model_type": "nosuch"}'), ("tokenizer.json", "{"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), DAMAGE)
def test_a_damaged_verifier(
    reads: Callable[..., str], tmp_path: Path, name: str, text: str | None
) -> None:
    folder = damaged(tmp_path / "damaged", name, text)
    words = reads(verifier=f"hf:{folder}")
    assert words.startswith(f"cannot load verifier '{folder}': expected a directory with config")
    assert "transformers says: " in words


def test_a_verifier_that_is_not_there(reads: Callable[..., str]) -> None:
    for spec in ("hf:no-such/model", "random:no-such/model", "hf:/no/such/folder"):
        words = reads(verifier=spec)
        assert words.startswith(f"cannot load verifier '{spec.partition(':')[2]}': expected")
        assert "check the spelling, the network" in words
    assert "unknown verifier 'nosuch'; expected one of embedded" in reads(verifier="nosuch")
    assert "'nonsense' is no URL" in reads(verifier="vllm:nonsense")
    assert "cannot be imported" in reads(verifier="python:no_such_module:make")


def test_a_tokenizer_that_is_not_there(reads: Callable[..., str], tmp_path: Path) -> None:
    for name in ("no-such/model", "/no/such/folder", "", tmp_path):
        words = reads(generator_tokenizer=name)
        assert words.startswith(f"cannot load the tokenizer '{name}': expected a directory")


def test_a_device_that_is_not_there(reads: Callable[..., str]) -> None:
    for name in ("nosuch", "cuda:77"):
        words = reads(device=name)
        assert f"device='{name}': expected cpu, or a GPU such as cuda or cuda:0, of which" in words


def test_options_that_are_none(reads: Callable[..., str]) -> None:
    words = reads(verifier_option="device_map=nosuch")
    assert "device_map='nosuch'" in words
    assert "dtype='nosuch': expected 'float32'" in reads(verifier_option="dtype=nosuch")


def test_a_pair_of_which_one_is_not_there(tmp_path: Path) -> None:
    damaged(tmp_path / "damaged", "tokenizer.json", "{")
    for name in ("no-such/model", tmp_path / "damaged", "", "hf:"):
        for pair in ((name, "embedded"), ("embedded", name)):
            words = said("check-pair", *pair)
            assert words.startswith(f"cannot load the tokenizer '{name}': expected a directory")
    assert "is a server" in said("check-pair", "embedded", "vllm:http://x")


@pytest.mark.parametrize(
    ("module", "text", "says"),
    [
        ("no_such_judge", None, "No module named 'no_such_judge'; expected python:module:function"),
        ("judge_of_nothing", "", "has no attribute 'pick'; expected python:module:function"),
        ("judge_unfinished", "def (", "SyntaxError: .*expected python:module:function"),
        ("judge_that_fails", "1 / 0", "ZeroDivisionError: division by zero; expected python"),
    ],
)
def test_a_judge_that_is_not_there(
    rows: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str | None, says: str
) -> None:
    monkeypatch.chdir(rows.parent)
    monkeypatch.syspath_prepend(str(rows.parent))
    other = rows.parent / "other.jsonl"
    other.write_text(rows.read_text().replace("5", "6"))
    if text is not None:
        (rows.parent / f"{module}.py").write_text(text)
    words = said("evaluate", rows, other, "--judge", f"python:{module}:pick", "--out", "judged")
    assert words.startswith(f"--judge 'python:{module}:pick': ")
    assert re.search(says, words)
    assert not (rows.parent / "judged").exists()


def test_a_page_that_would_be_a_folder_is_refused_before_anything_is_scored(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cme_reward.cli.options.make_scorer", pytest.fail)
    folder = rows.parent
    places = (folder, "is a directory; expected a file"), (folder / "no" / "x", "the directory ")
    for name in ("score", "rank", "report"):
        for file, says in places:
            assert said(name, rows, "--html", file).startswith(f"--html {file}: {says}")
