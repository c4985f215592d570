"""Whose turn it is with the replicas of one engine: who waits, for which of them, and how long."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from cme_reward.errors import VerifierError

REMEMBERED_KEYS = 10_000


@dataclass(eq=False)
class Replica:
    """One URL. `trusted` from a passed proof until the connection fails.

    `dialect` is how it is asked, for whoever proves it to decide.
    """

    url: str
    dialect: Any = None
    in_flight: int = 0
    trusted: bool = False
    refused: str = ""
    """Why it is never to be used again."""
    trouble: str = ""
    """Its last error, for messages."""
    recovery: asyncio.Task[None] | None = None


class Turns:
    """Who waits for a replica, in their order. Lives in one event loop.

    Requests that share a key wait for one replica while it is there; new keys for any, and get the
    one with the fewest requests in flight.

    Args:
        replicas: of which `in_flight` is kept here.
        concurrency: most requests in flight per replica.
        seconds: how long all wait where no server answers anyone.
    """

    def __init__(self, replicas: Sequence[Replica], concurrency: int, seconds: float) -> None:
        self.replicas = replicas
        self.concurrency = concurrency
        self.seconds = seconds
        self._home: dict[Hashable, Replica] = {}
        self._waiting: dict[asyncio.Future[Replica | None], Hashable] = {}
        self._answered = 0.0

    async def take(self, key: Hashable) -> Replica:
        """A replica with one more request in flight, once there is one that may have it.

        Raises:
            VerifierError: if no server has answered anyone for `seconds`, or all are refused.
        """
        loop = asyncio.get_running_loop()
        began, turn = loop.time(), loop.create_future()
        self._waiting[turn] = key
        replica = None
        try:
            self.hand_out()
            while not turn.done():
                left = max(began, self._answered) + self.seconds - loop.time()
                if left <= 0:
                    raise VerifierError(
                        f"no verifier has answered anyone for {self.seconds:g} s, and this "
                        f"request waits for its turn\n{troubles(self.replicas)}"
                    )
                await asyncio.wait([turn], timeout=left)
            replica = turn.result()
        finally:
            self._waiting.pop(turn, None)
            if replica is None and turn.done() and turn.result() is not None:  # cancelled just then
                self.give_back(turn.result())
        if replica is None:
            raise VerifierError(f"no verifier is left\n{troubles(self.replicas)}")
        return replica

    def give_back(self, replica: Replica) -> None:
        """One request less is in flight."""
        replica.in_flight -= 1
        self.hand_out()

    def answered(self) -> None:
        """A server has answered someone just now."""
        self._answered = asyncio.get_running_loop().time()

    def forget(self, key: Hashable) -> None:
        """The next request of this key may go to any replica."""
        self._home.pop(key, None)

    def hand_out(self) -> None:
        """Give what is free to those who wait, whenever more of it may be."""
        if not any_left(self.replicas):
            for turn in self._waiting:
                turn.set_result(None)
            self._waiting.clear()
        while (found := self._next()) is not None:
            turn, key, replica = found
            del self._waiting[turn]
            self._home[key] = replica
            if len(self._home) > REMEMBERED_KEYS:
                del self._home[next(iter(self._home))]
            replica.in_flight += 1
            turn.set_result(replica)

    def _next(self) -> tuple[asyncio.Future[Replica | None], Hashable, Replica] | None:
        """Whose turn it is, for which key and on which replica."""
        if self._free():
            for turn, key in self._waiting.items():
                replica = self._free_for(key)
                if replica is not None:
                    return turn, key, replica
        return None

    def _free(self) -> list[Replica]:
        return [r for r in self.replicas if r.trusted and r.in_flight < self.concurrency]

    def _free_for(self, key: Hashable) -> Replica | None:
        home = self._home.get(key)
        if home is not None and home.trusted:
            return home if home.in_flight < self.concurrency else None
        return min(self._free(), key=lambda r: r.in_flight, default=None)


def any_left(replicas: Sequence[Replica]) -> bool:
    """Is there one that may be used, now or later?"""
    return not all(r.refused for r in replicas)


def troubles(replicas: Sequence[Replica]) -> str:
    """A line for each replica: what is wrong with it."""
    return "\n".join(
        f"  {r.url}: {r.refused or r.trouble or ('fine' if r.trusted else 'no reply yet')}"
        for r in replicas
    )
