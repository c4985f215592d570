"""What a process that forks off has to make anew: threads and locks in use do not come along."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
_owners: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


def renew_after_fork(owner: T, renew: Callable[[T], None]) -> None:
    """Have `renew(owner)` called in each process that forks off while `owner` lives.

    It runs before anything else does there, alone: no other thread of this process is in it, and
    whatever one of them was about to do is left half done.
    """
    _owners[owner] = renew


def _renew_all() -> None:
    for owner, renew in list(_owners.items()):
        renew(owner)


if hasattr(os, "register_at_fork"):  # elsewhere nothing forks
    os.register_at_fork(after_in_child=_renew_all)
