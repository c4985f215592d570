"""A small cache of what was used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRU(Generic[Value]):
    """The `size` values used last. Threads take turns, also while a value is made."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._turn = Lock()

    def __reduce__(self) -> tuple[type[LRU[Value]], tuple[int]]:
        return LRU, (self.size,)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made if it is not there. What `make` raises is not remembered."""
        with self._turn:
            if key in self._values:
                self._values.move_to_end(key)
            else:
                self._values[key] = make()
                if len(self._values) > self.size:
                    self._values.popitem(last=False)
            return self._values[key]
