"""The commands of the pages that no test runs as they stand, since their models are large.

`test_the_first_run` goes through the steps of docs/first-run.md with a tiny policy.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from cme_reward.cli.app import app

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "adapters" / "trl"
PAGES = [ROOT / "docs" / name for name in ("first-run.md", "paper.md")]
PAGES += [SCRIPTS / "README.md", ROOT / "docs" / "comparators.md"]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip().removeprefix("$ ")
    for page in PAGES
    for block in BLOCK.findall(page.read_text(encoding="utf-8"))
    for line in block.replace("\\\n", " ").splitlines()
]
TRAINERS = [c for c in COMMANDS if "adapters/trl/" in c and "--help" not in c]
OWN = [c for c in COMMANDS if c.startswith("cme-reward ")]


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as Python does for a program


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINERS)
def test_the_scripts_take_it(command: str) -> None:
    given = words(command)
    (script,) = [n for n, word in enumerate(given) if word.startswith("adapters/trl/")]
    runpy.run_path(str(ROOT / given[script]))["options"](given[script + 1 :])


@pytest.mark.parametrize("command", OWN)
def test_the_command_line_knows_its_options(command: str) -> None:
    _, name, *given = words(command)
    known: Any = typer.main.get_command(app)
    flags = {flag for param in known.commands[name].params for flag in param.opts}
    assert {word for word in given if word.startswith("-")} <= flags


def test_there_are_commands_of_all_kinds() -> None:
    assert {c.split("adapters/trl/")[1].split(".py")[0] for c in TRAINERS} == {"train", "respond"}
    assert {c.split()[1] for c in OWN} == {"check-pair", "rank", "report", "evaluate"}


@pytest.mark.slow
def test_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts, marks, `rank`, training, `report`, responses, `evaluate`: each reads the last."""
    import trl_tiny as tiny

    tiny.policy().save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": text}) + "\n" for text in tiny.QUESTIONS]
    Path("prompts.jsonl").write_text("".join(lines))
    Path("judges.py").write_text(
        "def longer(prompt, a, b):\n    return {'verdict': 'A' if len(a) > len(b) else 'B'}\n"
    )

    def script(name: str, command: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *command.split()])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    def own(command: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == status, done.output
        return done.output

    asked = "--prompts prompts.jsonl --response-tokens 8"
    script(
        "respond.py", f"--model policy {asked} --rollouts 4 --temperature 1 --output rollouts.jsonl"
    )
    rows = [json.loads(line) for line in Path("rollouts.jsonl").read_text().splitlines()]
    marked = [json.dumps(row | {"good": "a" in row["response"]}) + "\n" for row in rows]
    Path("marked.jsonl").write_text("".join(marked))
    own("rank marked.jsonl --label good --verifier embedded --html rank.html -o ranked.jsonl")
    assert len(Path("ranked.jsonl").read_text().splitlines()) == 16
    script(
        "train.py",
        f"--model policy --verifier embedded {asked} --steps 2 --output run --precision fp32 "
        "--completions-per-update 8 --completions-at-once 4 --rollouts 4 --trl "
        "gradient_checkpointing=no",
    )
    said = own("report run --html report.html", status=1)  # no answer ends within 8 tokens
    assert said.count("run, ") == said.count("were cut off") == 1, said
    assert "cme/coverage" in Path("report.html").read_text()
    for model in ("policy", "run"):
        script("respond.py", f"--model {model} {asked} --output {model}.jsonl")
    own("evaluate policy.jsonl run.jsonl --judge python:judges:longer --both-orders --out judged")
    (rate,) = json.loads(Path("judged/report.json").read_text())["results"]
    assert (rate["model"], rate["baseline"], rate["n"]) == ("run", "policy", 4)
