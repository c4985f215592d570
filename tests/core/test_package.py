from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cme_reward

REPOSITORY = Path(__file__).parents[2]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_the_public_names() -> None:
    frozen = [sys.executable, REPOSITORY / "scripts" / "signatures.py", "--check"]
    assert subprocess.run(frozen, capture_output=True, text=True).stdout == ""
    reference = [sys.executable, REPOSITORY / "scripts" / "reference.py", "--check"]
    assert subprocess.run(reference, capture_output=True, text=True).stdout == ""
    assert set(cme_reward.__all__) <= set(dir(cme_reward))
    with pytest.raises(AttributeError, match="no attribute 'CMEReward'"):
        cme_reward.CMEReward  # noqa: B018
    for name in cme_reward.__all__:
        assert getattr(cme_reward, name).__doc__, f"{name} has no docstring"


@pytest.mark.slow
def test_importing_takes_no_framework_and_no_model_code() -> None:
    light = [name for name in cme_reward.__all__ if name != "TransformersVerifier"]
    names = ", ".join(f"cme_reward.{name}" for name in light)
    loaded = run(f"import sys, cme_reward\n{names}\nprint(*sys.modules)").split()
    for module in ("transformers", "verl", "openrlhf", "trl", "ray", "vllm", "httpx", "fastapi"):
        assert module not in loaded


@pytest.mark.slow
def test_the_command_lines_help_takes_no_model_code() -> None:
    loaded = run("import sys, cme_reward.cli.app; print(*sys.modules)").split()
    assert "transformers" not in loaded
    assert "torch" not in loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [
        ("verl", "CMEReward", "verl"),
        ("openrlhf", "AgentExecutor", "openrlhf"),
        ("trl", "CMEGRPOTrainer", "trl"),
        ("server", "create_app", "serve"),
    ],
)
def test_a_door_without_its_framework_says_what_to_install(
    package: str, name: str, extra: str
) -> None:
    hidden = "import sys, importlib.metadata as m\n"
    hidden += "for name in ('verl', 'openrlhf', 'trl', 'fastapi'): sys.modules[name] = None\n"
    hidden += "def gone(name): raise m.PackageNotFoundError(name)\nm.version = gone\n"
    code = f"{hidden}import cme_reward.{package} as door\ntry: door.{name}\n"
    shown = run(code + "except ModuleNotFoundError as error: print(error)")
    assert f'pip install "cme-reward[{extra}]"' in shown


def test_errors_are_also_the_builtin_kind() -> None:
    for name in ("ConfigError", "InputError", "TokenizerError"):
        assert issubclass(getattr(cme_reward, name), cme_reward.CMEError)
        assert issubclass(getattr(cme_reward, name), ValueError)
    assert issubclass(cme_reward.VerifierError, RuntimeError)


def test_modules_are_small() -> None:
    """One concept each; a longer file is a sign of two."""
    root = Path(cme_reward.__file__).parent
    long = {
        path.name: n
        for path in root.rglob("*.py")
        if (n := len(path.read_text().splitlines())) > 310
    }
    assert not long


ROOMS = [
    {"errors"},
    {"_forks", "_keys", "_lazy", "_lru", "_ragged", "_settings", "_together"},
    {"spans"},
    {"advantages", "alignment", "batch", "config", "metrics"},
    {"_row", "conversation"},
    {"generator", "loading", "verifiers"},
    {"assembly", "calls", "reward", "scoring"},
    {"comparators", "heatmap", "ranking", "evaluation", "curves"},
    {"openrlhf", "server", "trl", "verl"},
    {"cli"},
]
"""From the lowest to the highest: each imports from its own row and those above it here, and a
framework's from no other framework's."""


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, modules and names in them, and whether it does when it is imported."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            assert node.module
            yield node.module, at_once
            yield from ((f"{node.module}.{alias.name}", at_once) for alias in node.names)
        at_once = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_once)

    yield from visit(ast.parse(path.read_text()), True)


def modules() -> dict[str, Path]:
    root = Path(cme_reward.__file__).parent
    names = {path: ".".join(path.relative_to(root.parent).with_suffix("").parts) for path in
             root.rglob("*.py")}  # fmt: skip
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def test_no_room_imports_from_a_higher_one() -> None:
    """Data flows one way; nothing of the core knows a framework."""
    rank = {name: k for k, names in enumerate(ROOMS) for name in names}
    found = modules()
    rooms = {name.split(".")[1] for name in found if "." in name}
    assert rooms == set(rank)
    frameworks = ROOMS[-2]
    for name, path in found.items():
        if name == "cme_reward":
            continue
        own = name.split(".")[1]
        for imported, _ in imports_of(path):
            package, _, inner = imported.partition(".")
            other = inner.partition(".")[0]
            if package == "cme_reward" and other in rank:
                assert rank[other] <= rank[own], f"{name} imports {imported}"
                assert own == other or not {own, other} <= frameworks, f"{name} imports {imported}"


def test_modules_do_not_import_in_a_circle() -> None:
    found = modules()
    graph = {
        name: {m for m, at_once in imports_of(path) if at_once and m in found and m != name}
        for name, path in found.items()
    }
    # A package's name stands for its __init__, which its modules may name for a version.
    sorter = graphlib.TopologicalSorter(
        {name: needs - {"cme_reward"} for name, needs in graph.items()}
    )
    assert set(sorter.static_order()) >= set(found) - {"cme_reward"}


def test_no_test_imports_a_test() -> None:
    """What tests share is in tests/support; a conftest that is imported is loaded twice."""
    modules = {path.stem for path in (REPOSITORY / "tests").rglob("test_*.py")} | {"conftest"}
    for path in (REPOSITORY / "tests").rglob("*.py"):
        for imported, _ in imports_of(path):
            assert not modules & set(imported.split(".")), f"{path} imports {imported}"


@pytest.mark.parametrize("folder", ["adapters", "benchmarks", "examples", "scripts", "tests"])
def test_private_modules_are_the_packages_own(folder: str) -> None:
    """Only the test of a module, `test_NAME.py`, imports what is private of it."""
    for path in (REPOSITORY / folder).rglob("*.py"):
        for imported, _ in imports_of(path):
            package, *parts = imported.split(".")
            private = [part for part in parts if part.startswith("_") and part[1] != "_"]
            if package == "cme_reward" and private:
                tested = {f"test_{part.lstrip('_')}" for part in parts}
                assert path.stem in tested, f"{path} imports {imported}"


def test_package_data_is_there_and_small() -> None:
    embedded = Path(cme_reward.__file__).parent / "verifiers" / "embedded"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"):
        assert (embedded / name).is_file(), name
    assert sum(path.stat().st_size for path in embedded.iterdir()) <= 8 * 1024 * 1024
