"""What makes two prompts, or two names of a group, the same."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from cme_reward.errors import InputError


def prompt_key(prompt: Any) -> str:
    """Equal for prompts that render equally, and for no others: a text is not the messages that it
    spells, and values keep their order, in which a template writes a tool call's arguments."""
    if isinstance(prompt, str):
        return f"text:{prompt}"
    messages = [
        {name: message[name] for name in sorted(message, key=str)}
        if isinstance(message, Mapping)
        else message
        for message in prompt
    ]
    return f"messages:{json.dumps(messages, default=_plain)}"


def group_key(group: Any) -> Hashable:
    """Equal for names of one group: numbers by value, wherever they live, and prompts.

    Raises:
        InputError: for what is neither hashable, nor a number, nor a prompt.
    """
    if getattr(group, "ndim", None) == 0:  # a tensor, an array or a scalar of numpy
        group = group.item()
    if isinstance(group, str):
        return prompt_key(group)
    several = isinstance(group, list | tuple | np.ndarray) and len(group)
    if several and all(isinstance(message, Mapping) for message in group):
        return prompt_key(group)
    if isinstance(group, tuple):
        return tuple(map(group_key, group))
    try:
        hash(group)
        if getattr(group, "ndim", 0) == 0:  # a tensor hashes by identity
            return group  # type: ignore[return-value]
    except TypeError:
        pass
    raise InputError(
        f"group {group!r} cannot be compared with others; expected a number, a text, a prompt (a "
        "string or a list of messages) or another hashable for each response, equal for rollouts "
        "of one prompt"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    return [type(value).__name__, str(value)]
