"""docs/api.md: the public names with their signatures and docstrings, read from the source.

`python scripts/reference.py` writes it; with --check it says whether it is what the source says.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from signatures import DOORS, ROOT, public, signature, tree_of

PAGE = ROOT / "docs" / "api.md"
HEAD = """# API reference

Written by `python scripts/reference.py` from the docstrings. Shapes: `B` responses, `T` generator
tokens, `S` verifier tokens, `N` tokens of several responses, `V` vocabulary, `D` hidden size.
Log-probs and rewards are in nats.
"""
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
_ENTRY = re.compile(r"(\*{0,2}\w+(?:, \w+)*): (.*)")


def markdown(docstring: str) -> Iterator[str]:
    """A docstring's lines, its sections as lists."""
    section = ""
    for line in inspect.cleandoc(docstring).splitlines():
        if heading := _SECTION.fullmatch(line):
            section = heading[1]
            yield from (f"**{section}**", "")
        elif section and line and not line.startswith(" "):
            section = ""
            yield line
        elif section and line:
            inner = line[4:]
            entry = None if inner.startswith(" ") else _ENTRY.fullmatch(inner)
            if entry and section != "Returns":
                yield f"- `{entry[1]}`: {entry[2]}"
            else:
                yield f"  {inner.strip()}" if section != "Returns" else inner.strip()
        else:
            yield line
    yield ""


def fields(node: ast.ClassDef) -> Iterator[str]:
    """The public attributes that have a docstring below them."""
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            name = ast.unparse(field.target)
            if not name.startswith("_") and isinstance(text.value, ast.Constant):
                said = " ".join(inspect.cleandoc(str(text.value.value)).split())
                yield f"- `{ast.unparse(field)}`: {said}"
    yield ""


def described(node: ast.stmt) -> Iterator[str]:
    lines = list(signature(node))
    if isinstance(node, ast.ClassDef):
        # Fields are told below, and methods each by itself.
        lines = [line for line in lines if not line.startswith("    ") or "def __init__" in line]
    yield from ("```", *lines, "```", "")
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    yield from markdown(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        yield from fields(node)
        for part in node.body:
            name = getattr(part, "name", "_")
            if name == "__call__" or not name.startswith("_"):
                yield from ("```", *signature(part), "```", "")
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield from markdown(ast.get_docstring(part) or "")


def page() -> str:
    lines = [HEAD]
    for door in DOORS:
        package = f"cme_reward{door}"
        lines += [f"## {package}", "", *markdown(ast.get_docstring(tree_of(package)) or "")]
        for name, home, node in public(package):
            lines += [f"### {name}", "", f"`{home}`", "", *described(node)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") != page():
        print("docs/api.md is not what the docstrings say: python scripts/reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
