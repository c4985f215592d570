"""What coroutines ask of one function in one turn of their event loop, asked in one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

X = TypeVar("X")
Y = TypeVar("Y")
ALONE = 1024
"""Tokens of one item for which the event loop waits: about a millisecond."""
AT_ONCE = 8192
"""Tokens of many items in one call, for which it waits: ten or twenty. In several calls all of them
would take longer."""


class _Wish(NamedTuple):
    item: Any
    n_tokens: int
    answer: asyncio.Future[tuple[Any, float]]


_WAITING: dict[tuple[asyncio.AbstractEventLoop, Callable[..., Any]], list[_Wish]] = {}


async def together(
    function: Callable[[list[X]], list[Y]], item: X, n_tokens: int
) -> tuple[Y, float]:
    """`function([item])[0]`, and the seconds that it took.

    Small calls are of many items where more is at hand: most of their time is numpy's for each
    array. When such a call fails, its items are tried one by one. In a thread, where so many tokens
    take longer than to wake one.
    """
    if n_tokens > ALONE:
        (result,), seconds = await asyncio.to_thread(timed, function, [item])
        return result, seconds
    loop = asyncio.get_running_loop()
    waiting = _WAITING.setdefault((loop, function), [])
    if not waiting:
        _forget_closed()
        loop.call_soon(_begin, loop, function)
    waiting.append(_Wish(item, n_tokens, loop.create_future()))
    return await waiting[-1].answer


def timed(function: Callable[..., Y], *args: Any) -> tuple[Y, float]:
    """The function's result, and the seconds that it took."""
    started = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - started


def _forget_closed() -> None:
    """A loop that was closed in the middle of a turn would be kept for ever, the verifier too."""
    for key in list(_WAITING):
        if key[0].is_closed():
            _WAITING.pop(key, None)


def _begin(loop: asyncio.AbstractEventLoop, function: Callable[..., Any]) -> None:
    """As much of what waits as the loop can wait for; the rest in its next turns."""
    waiting = [wish for wish in _WAITING.pop((loop, function)) if not wish.answer.done()]
    n, size = 0, 0
    while n < len(waiting) and (not n or size + waiting[n].n_tokens <= AT_ONCE):
        size += waiting[n].n_tokens
        n += 1
    if waiting[n:]:
        _WAITING[loop, function] = waiting[n:]
        loop.call_soon(_begin, loop, function)
    _grant(function, waiting[:n])


def _grant(function: Callable[..., Any], wishes: list[_Wish]) -> None:
    if not wishes:
        return
    try:
        results, seconds = timed(function, [wish.item for wish in wishes])
    except Exception as error:
        if len(wishes) == 1:
            wishes[0].answer.set_exception(error)
        else:
            for wish in wishes:
                _grant(function, [wish])
        return
    for wish, result in zip(wishes, results, strict=True):
        wish.answer.set_result((result, seconds / len(wishes)))
