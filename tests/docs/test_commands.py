"""The commands that no test runs as they stand: their models are large, or they take hours.

What they name is there, and knows the options. Not looked at: what is not ours (`OTHERS`), the
flags of OpenRLHF and the keys of veRL, which `tests/frameworks` hold against the real ones.
`test_the_first_run` goes through the steps of docs/first-run.md with a tiny policy.
"""

from __future__ import annotations

import ast
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
from cme_reward.openrlhf.settings import load_settings

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "adapters" / "trl"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "adapters").glob("*/README.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
    ROOT / "cme_reward" / "verifiers" / "embedded" / "MODEL_CARD.md",
]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
ONE = re.compile(r"""(?:'[^']*'|"[^"]*"|(?!&& |; \w)[^'"])+""")
"""A command, up to a `&&` or `;` outside of quotes."""
OTHERS = {".", "done", "export", "gunzip", "head", "hf", "jq", "pip", "ray", "sha256sum", "tail"}
"""Programs and words of the shell that are not this repository's."""
YOURS = {"mark.py"}
"""What a page asks the reader to write."""


def commands(block: str) -> list[str]:
    """The commands of a block: continued lines and open quotes joined, loops opened."""
    found, open_ = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        open_ += line.strip().removeprefix("$ ")
        try:
            shlex.split(open_, comments=True)
        except ValueError:  # no closing quotation
            continue
        whole, open_ = re.sub(r"^for .*; do$", "", open_), ""
        for one in ONE.findall(whole.partition(" #")[0]):
            if one := re.sub(r"^(?:[A-Z_]+=\S+ )+", "", one.strip(" &;")):
                found.append(one)
    assert not open_
    return found


COMMANDS = [
    command
    for page in PAGES
    for block in BLOCK.findall(page.read_text(encoding="utf-8"))
    for command in commands(block)
    if not re.match(r"\+?[\w.]+=", command)  # veRL's keys: tests/frameworks/verl/test_docs.py
]
TRAINERS = [c for c in COMMANDS if "adapters/trl/" in c and "--help" not in c]
OWN = [c for c in COMMANDS if c.startswith("cme-reward ")]
REST = [c for c in COMMANDS if c not in TRAINERS and c not in OWN]


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


def options_of(file: Path) -> set[str]:
    """What looks like an option among the texts of a program, or of a package."""
    files = file.parent.glob("*.py") if file.name == "__main__.py" else [file]
    texts = (node.value for each in files
             for node in ast.walk(ast.parse(each.read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and isinstance(node.value, str))  # fmt: skip
    return {text for text in texts if re.fullmatch(r"--[\w-]+", text)} | {"--help"}


@pytest.mark.parametrize("command", dict.fromkeys(REST))
def test_what_it_names_is_there(command: str) -> None:
    program, *given = words(command)
    options = {word.partition("=")[0] for word in given if word.startswith("--")}
    if program == "sh":
        assert (ROOT / given[0]).is_file()
    elif program == "pytest":
        assert (ROOT / given[0]).is_dir()
        ours = options_of(ROOT / "benchmarks" / "conftest.py")
        assert options <= ours | {"--benchmark-disable"}  # of pytest-benchmark
    elif Path(program).name == "python":
        if given[0] == "-c":
            compile(given[1], command, "exec")
        if given[0] in YOURS | {"-c"}:
            return
        if given[0] != "-m":
            file = ROOT / given[0]
        elif given[1].split(".")[0] in ("benchmarks", "cme_reward"):
            file = ROOT / given[1].replace(".", "/")
            file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
        else:  # a framework's own entry
            assert given[1].split(".")[0] in ("openrlhf", "verl")
            return
        assert file.is_file()
        if "cme_reward.openrlhf" not in given:  # its options are OpenRLHF's
            assert options <= options_of(file)
    else:
        assert program in OTHERS, "neither known here nor a file"


def test_a_wrong_command_is_found() -> None:
    for wrong in (
        "trainer = CMEGRPOTrainer(model)",
        "sh scripts/nothing",
        "python -m benchmarks.miniature --groups horizon",
        "python benchmarks/gpus.py",
    ):
        with pytest.raises(AssertionError):
            test_what_it_names_is_there(wrong)


def test_the_settings_of_openrlhfs_page_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "openrlhf.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    settings = load_settings(environ={"CME_SETTINGS": str(file)})
    assert (settings.verifier, settings.config.eps) == ("hf:google/gemma-3-1b-it", 0.1)


def test_there_are_commands_of_all_kinds() -> None:
    assert {c.split("adapters/trl/")[1].split(".py")[0] for c in TRAINERS} == {"train", "respond"}
    assert {c.split()[1] for c in OWN} == {
        "check-pair", "evaluate", "rank", "report", "score", "serve"
    }  # fmt: skip
    assert {words(c)[0].split("/")[-1] for c in REST} > {"sh", "pytest", "python"}


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

    def own(command: str, *status: int) -> str:
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code in (status or (0,)), done.output
        return done.output

    asked = "--prompts prompts.jsonl --response-tokens 8"
    script(
        "respond.py", f"--model policy {asked} --rollouts 4 --temperature 1 --output rollouts.jsonl"
    )
    rows = [json.loads(line) for line in Path("rollouts.jsonl").read_text().splitlines()]
    marked = [json.dumps(row | {"good": "a" in row["response"]}) + "\n" for row in rows]
    Path("marked.jsonl").write_text("".join(marked))
    ranked = "rank marked.jsonl --label good --verifier embedded --html rank.html -o ranked.jsonl"
    own(ranked, 0, 3)  # what an untrained policy samples may be put the wrong way round
    assert len(Path("ranked.jsonl").read_text().splitlines()) == 16
    script(
        "train.py",
        f"--model policy --verifier embedded {asked} --steps 2 --output run --precision fp32 "
        "--completions-per-update 8 --completions-at-once 4 --rollouts 4 --trl "
        "gradient_checkpointing=no",
    )
    said = own("report run --html report.html", 1)  # no answer ends within 8 tokens
    assert said.count("run, ") == said.count("were cut off") == 1, said
    assert "cme/coverage" in Path("report.html").read_text()
    for model in ("policy", "run"):
        script("respond.py", f"--model {model} {asked} --output {model}.jsonl")
    own("evaluate policy.jsonl run.jsonl --judge python:judges:longer --both-orders --out judged")
    (rate,) = json.loads(Path("judged/report.json").read_text())["results"]
    assert (rate["model"], rate["baseline"], rate["n"]) == ("run", "policy", 4)
