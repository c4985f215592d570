"""Every snippet of the README and the docs runs.

Python under `<!-- not run: WHY -->` is compiled: a part, or what needs something of the reader's.
Blocks of `console` are not run either: `test_commands.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^(?:<!-- not run: (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "adapters").glob("*/README.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
    ROOT / "cme_reward" / "verifiers" / "embedded" / "MODEL_CARD.md",
]
BLOCKS = [
    pytest.param(why, kind, code, id=f"{page.name}:{n}")
    for page in PAGES
    for n, (why, kind, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]
SNIPPETS = [
    pytest.param(kind, code, id=block.id)
    for block in BLOCKS
    for why, kind, code in [block.values]
    if kind in ("python", "sh") and not why
]
PARTS = [block for block in BLOCKS if block.values[0]]


def test_there_are_snippets_of_both_kinds() -> None:
    assert {param.values[0] for param in SNIPPETS} == {"python", "sh"}


def test_every_block_says_what_it_is() -> None:
    kinds = ("python", "sh", "console", "yaml", "text")
    other = [str(block.id) for block in BLOCKS if block.values[1] not in kinds]
    assert [name for name in other if not name.startswith("api.md")] == []  # a script writes that


@pytest.mark.parametrize(("why", "kind", "code"), PARTS)
def test_part(why: str, kind: str, code: str) -> None:
    assert kind == "python", why
    compile(code, why, "exec")


@pytest.mark.parametrize(("kind", "code"), SNIPPETS)
def test_snippet(kind: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    bin_dir = Path(sys.executable).parent
    environ = os.environ | {
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    if kind == "python":
        # What a dependency deprecates in itself comes and goes; what the snippet uses must not be.
        filters = ["error"]
        for category in ("DeprecationWarning", "FutureWarning"):
            filters += [f"default::{category}", f"error::{category}:__main__"]
        command = [sys.executable, *(f"-W{filter}" for filter in filters), "-c", code]
    else:
        command = ["sh", "-e", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"


def test_the_commands_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"sh (scripts/\w+)", text):
        assert (ROOT / name).is_file(), name
