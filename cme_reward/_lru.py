"""A small cache of what was used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

from cme_reward._forks import renew_after_fork

Value = TypeVar("Value")


class LRU(Generic[Value]):
    """The values used last, at most `size` of at most `weight` in all; a heavier one is not kept.

    For any threads. Two that miss the same value at a time both make it, so that none waits for
    another one's long value.
    """

    def __init__(self, size: int, weight: int) -> None:
        self.size = size
        self.weight = weight
        self._start_empty()
        renew_after_fork(self, LRU._renew)

    def _start_empty(self) -> None:
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._held = 0
        self._turn = Lock()

    def _renew(self) -> None:
        if self._turn.locked():  # by a thread of the other process, in the middle of a change
            self._start_empty()

    def __reduce__(self) -> tuple[type[LRU[Value]], tuple[int, int]]:
        return LRU, (self.size, self.weight)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(
        self, key: Hashable, make: Callable[[], Value], weight: int | Callable[[Value], int]
    ) -> Value:
        """The value of `key`, made if it is not there. What `make` raises is not remembered."""
        with self._turn:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        if not isinstance(weight, int):
            weight = weight(value)
        with self._turn:
            if key not in self._values and weight <= self.weight:
                self._values[key] = value, weight
                self._held += weight
            while len(self._values) > self.size or self._held > self.weight:
                _, (_, dropped) = self._values.popitem(last=False)
                self._held -= dropped
        return value
