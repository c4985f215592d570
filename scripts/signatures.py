"""The public names of the package and their signatures, read from its source.

`python scripts/signatures.py` writes them to tests/support/public_signatures.txt; with --check it
compares, and shows what is other. A change there is a change for users: it belongs in CHANGELOG.md.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FROZEN = ROOT / "tests" / "support" / "public_signatures.txt"
DOORS = ("", ".comparators", ".openrlhf", ".server", ".trl", ".verifiers", ".verl")


def tree_of(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def exported(package: str) -> Iterator[tuple[str, str]]:
    """Names in a package's `__all__`, and the modules that define them."""
    tree = tree_of(package)
    homes = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            for name in ast.literal_eval(node.value):
                home = homes.get(name, package)
                while (again := _passed_on(home, name)) is not None:
                    home = again
                yield name, home


def _passed_on(module: str, name: str) -> str | None:
    """Where a module has a name from, if from elsewhere in the package."""
    for node in tree_of(module).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return node.module if (node.module or "").startswith("cme_reward") else None
    return None


def signature(node: ast.AST, indent: str = "") -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        how = "".join(f"@{ast.unparse(d)} " for d in node.decorator_list)
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{indent}{how}{kind} {node.name}({ast.unparse(node.args)}){result}"
    elif isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        yield f"{indent}class {node.name}({bases})"
        for part in node.body:
            name = getattr(part, "name", "")
            if name in ("__init__", "__call__") or (name and not name.startswith("_")):
                yield from signature(part, indent + "    ")
            if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
                yield f"{indent}    {ast.unparse(part)}"
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        yield f"{indent}{ast.unparse(node)}"


def public(package: str) -> Iterator[tuple[str, str, ast.stmt]]:
    """Names in a package's `__all__`, the modules that define them, and the definitions."""
    for name, home in sorted(exported(package)):
        for node in tree_of(home).body:
            targets = [ast.unparse(t) for t in getattr(node, "targets", [])]
            if getattr(node, "name", None) == name or name in targets:
                yield name, home, node


def lines() -> Iterator[str]:
    for door in DOORS:
        package = f"cme_reward{door}"
        yield f"# {package}"
        for _, _, node in public(package):
            yield from signature(node)
        yield ""


def main() -> int:
    now = list(lines())
    if "--check" not in sys.argv:
        FROZEN.write_text("\n".join(now))
        return 0
    difference = list(
        difflib.unified_diff(FROZEN.read_text().split("\n"), now, "frozen", "now", lineterm="")
    )
    if difference:
        print("\n".join(difference))
        print("Public signatures changed. If meant: python scripts/signatures.py, and CHANGELOG.md")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
