"""Names of a package that come with their modules when first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str,
    homes: Mapping[str, str],
    *,
    needs: Collection[str] = (),
    extra: str = "",
    before: Callable[[], object] = lambda: None,
) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names live in these modules of it.

    So that `cme-reward --help` does not wait for torch, nor `python -m cme_reward.verl` for veRL.
    Where one of the libraries in `needs` is missing, the error names the extra that brings it.
    `before` is called before a module is imported.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            before()
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in needs:
                raise
            raise ModuleNotFoundError(
                f"{package} needs {missing}, which is not installed: "
                f'pip install "cme-reward[{extra}]"',
                name=missing,
            ) from error
        setattr(sys.modules[package], name, value)
        return value

    return get
