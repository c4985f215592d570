"""Names of a package that come with their modules when first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, homes: Mapping[str, str], *, needs: Collection[str] = (), extra: str = ""
) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names live in these modules of it.

    So that `cme-reward --help` does not wait for torch, nor `python -m cme_reward.verl` for veRL.
    Where one of the libraries in `needs` is missing, the error names the extra that brings it.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name not in needs:
                raise
            raise ModuleNotFoundError(
                f"{package} needs {error.name}, which is not installed: "
                f'pip install "cme-reward[{extra}]"',
                name=error.name,
            ) from error
        setattr(sys.modules[package], name, value)
        return value

    return get
