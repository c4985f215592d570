"""The short way of a good request, past what FastAPI does for any other."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from cme_reward.errors import CMEError
from cme_reward.server.errors import HANDLERS
from cme_reward.server.gate import Message, Receive, Send, first


class Way(NamedTuple):
    """How a path is answered."""

    model: type[BaseModel]
    answer: Callable[[Any], Awaitable[Response]]


class Direct:
    """ASGI middleware inside the gate: good requests go to their function at once.

    Any other goes on to FastAPI, which says what is wrong with it.
    """

    def __init__(self, app: Any, ways: Mapping[str, Way]) -> None:
        self.app = app
        self.ways = ways

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        way = self.ways.get(scope["path"]) if scope["type"] == "http" else None
        if way is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        message = await receive()  # the gate gives it whole
        try:
            asked = way.model.model_validate(json.loads(message["body"]))
        except Exception:
            await self.app(scope, first(message, receive), send)
            return
        try:
            reply = await way.answer(asked)
        except CMEError as error:
            reply = await HANDLERS[CMEError](Request(scope), error)
        await reply(scope, receive, send)
