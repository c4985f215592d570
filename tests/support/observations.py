"""What an environment says between two turns, and what a chat template makes of it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from templates import chat_tokenizer

ROLES = ("user", "tool", "ipython", "environment", "observation", "function")
ASK = {"role": "user", "content": "What is it?"}
SAID = "A one."


def message(role: str, content: str) -> dict[str, Any]:
    more = {"name": "look", "tool_call_id": "abcdefghi"} if role == "tool" else {}
    return {"role": role, "content": content, **more}


def render(tokenizer: Any, messages: list[Any], *, ask: bool = True) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception:  # what a template makes of roles it does not know is its own affair
        return None


def tail(tokenizer: Any, observations: list[Any]) -> str | None:
    """What the template writes after the assistant's words; None where it refuses or drops them."""
    whole = render(tokenizer, [ASK, message("assistant", SAID), *observations])
    without = render(tokenizer, [ASK, message("assistant", SAID)])
    if whole is None or whole == without:
        return None
    after = whole.rpartition(SAID)[2]
    contents = [m["content"] for m in observations]
    return after if all(c in after or in_json(c) in after for c in contents) else None


def in_json(content: str) -> str:
    return json.dumps(content, ensure_ascii=False)[1:-1]


@cache
def speakers(name: str) -> list[str]:
    """Roles in which an environment may speak in this template, other than as the assistant."""
    tokenizer = chat_tokenizer(name)
    as_assistant = tail(tokenizer, [message("assistant", "XYZ")])
    found: dict[str, str] = {}
    for role in ROLES:
        written = tail(tokenizer, [message(role, "XYZ")])
        if written is not None and "XYZ" in written and written != as_assistant:
            found.setdefault(written, role)  # some templates write several roles alike
    return list(found.values())


def expected(messages: list[Any]) -> list[dict[str, str]]:
    called_tool = ("tool", "ipython", "environment", "observation", "function")
    return [
        {"role": "tool" if m["role"] in called_tool else m["role"], "content": m["content"]}
        for m in messages
    ]
