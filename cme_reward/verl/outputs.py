"""What the reward has to know of an agent loop's output, and veRL does not hand on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cme_reward.errors import InputError

KEY = "cme"
"""Key of these notes: in veRL's per-sample fields, and in the last message of a prompt."""

PROMPT = "cme_prompt"
"""An agent loop may say here, in `extra_fields`, what precedes an output: a string or messages."""


def describe(outputs: Sequence[Any], *, validate: bool, logprobs: bool) -> list[dict[str, Any]]:
    """Notes on each output of one trajectory: masks, and what came between prompt and response.

    A later output usually has as its prompt the first one's prompt, then what was said since.
    Those tokens are context. Where they are responses of earlier outputs they were sampled, and are
    read as turns of the assistant; the others are read as turns of the environment.

    Raises:
        InputError: for a prompt of which this is not true, or an output with images.
    """
    return [
        _describe(outputs, i, validate=validate, logprobs=logprobs) for i in range(len(outputs))
    ]


def _describe(outputs: Sequence[Any], i: int, *, validate: bool, logprobs: bool) -> dict[str, Any]:
    output = outputs[i]
    if any(output.multi_modal_data.values() if output.multi_modal_data else ()):
        raise InputError(
            "a response has images, audio or video, and the verifier reads text alone; expected "
            "text prompts"
        )
    first, prompt = list(outputs[0].prompt_ids), list(output.prompt_ids)
    given = output.extra_fields.get(PROMPT)
    if given is None and prompt[: len(first)] != first:
        raise InputError(
            f"output {i} of a trajectory does not begin with the prompt of its first output, so "
            "that nothing says what the verifier is to read before it. Expected prompts that are "
            f"continued, or extra_fields[{PROMPT!r}]: a string or messages, set by the agent loop"
        )
    context = [] if given is not None else prompt[len(first) :]
    sampled, before = [0] * len(context), [0.0] * len(context)
    for earlier in outputs[:i] if context else ():
        said = list(earlier.prompt_ids) + list(earlier.response_ids)
        start = len(earlier.prompt_ids) - len(first)
        if start >= 0 and prompt[: len(said)] == said:
            own = slice(start, start + len(earlier.response_mask))
            sampled[own] = earlier.response_mask
            before[own] = earlier.response_logprobs or before[own]
    policy = output.response_logprobs if logprobs else None
    return {
        "row": digest(output.prompt_ids, output.response_ids),
        "mask": list(output.response_mask),
        "context": context,
        "sampled": sampled,
        **({} if given is None else {"prompt": given}),
        **({} if policy is None else {"logprobs": [*before, *policy]}),
        "validate": bool(validate),
    }


def digest(prompt_ids: Any, response_ids: Any) -> str:
    """The same for the same ids: which of a trajectory's outputs a row is."""
    rows = [np.asarray(ids, dtype=np.int64) for ids in (prompt_ids, response_ids)]
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    return hashlib.sha1(np.concatenate([sizes, *rows]).tobytes()).hexdigest()


def attach(messages: Sequence[Mapping[str, Any]], notes: list[dict[str, Any]]) -> list[Any]:
    """The messages with the notes in the last one.

    The only way to a colocated reward: of a sample's fields, veRL hands it the prompt alone.
    """
    *before, last = messages
    return [*before, {**last, KEY: json.dumps(notes)}]


def detach(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
    """The messages as they were, and the notes; none where none were attached."""
    *before, last = messages
    notes = last.get(KEY)
    plain = {key: value for key, value in last.items() if key != KEY}
    return [*before, plain], json.loads(notes) if notes else []
