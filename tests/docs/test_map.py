"""CONTRIBUTING's map leads to file and function in one step."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import cme_reward

PACKAGE = Path(cme_reward.__file__).parent
MAP = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
TABLE = MAP[MAP.index("| what | where |") : MAP.index("| to add | write | run |")]
NAMES = re.findall(r"`([\w/]+)\.([\w.]+)`", TABLE)


def defined(tree: ast.AST, name: str) -> ast.AST | None:
    for node in ast.iter_child_nodes(tree):
        targets = [ast.unparse(t) for t in getattr(node, "targets", [])]
        if getattr(node, "name", None) == name or name in targets or f"self.{name}" in targets:
            return node
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in (name, f"self.{name}"):
            return node
        inner = isinstance(node, ast.FunctionDef) and node.name == "__init__"
        if inner and (found := defined(node, name)):
            return found
    return None


@pytest.mark.parametrize(("module", "name"), NAMES, ids=map(".".join, NAMES))
def test_what_the_map_names_is_there(module: str, name: str) -> None:
    if name == "py":
        assert (PACKAGE / f"{module}.py").is_file()
        return
    where = {"Generator": "generator"}.get(module, module)
    path = PACKAGE / f"{where}.py"
    assert path.is_file(), path
    tree: ast.AST | None = ast.parse(path.read_text())
    for part in (module, name) if where != module else name.split("."):
        tree = defined(tree, part)
        assert tree is not None, f"{part} is not in {path}"


def test_every_room_is_drawn() -> None:
    drawing = MAP.split("```")[1]
    rooms = {
        path.name + "/" * path.is_dir()
        for path in PACKAGE.iterdir()
        if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert {name for name in rooms if name not in drawing} == set()


def test_the_paper_is_all_there() -> None:
    for word in ("Eq. 1", "Eq. 2", "Eq. 3", "Appendix B", "EOS", "coverage", "`dropped_nats`",
                 "veRL's estimator", "the server's 429"):  # fmt: skip
        assert word in TABLE
