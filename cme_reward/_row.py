"""One row of data: a response, its prompt, and what is known of its tokens.

The command line reads rows as objects of JSON Lines, the server as one list for each field, named
in the plural. What a field is called, and which go together, is written here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cme_reward.conversation.messages import Prompt, as_messages, check_characters
from cme_reward.errors import InputError

FIELDS = {
    "prompt": "The prompt: a text (to a chat verifier, a user message), or a list of messages.",
    "messages": "The prompt as a list of messages, in place of `prompt`.",
    "response": "The response as text.",
    "response_ids": "The response as the ids that the generator sampled, in place of `response`.",
    "response_mask": "With `response_ids`, for each id: 0 marks what a tool or an environment "
    "wrote, which is shown to the verifier and not scored, and padding.",
    "policy_logprobs": "With `response_ids`, for each id the sampler's own log-prob in nats, for "
    "`baseline=policy`.",
}
"""What each field of a row holds."""

BY_TOKEN = ("response_mask", "policy_logprobs")
"""Fields that need `response_ids`."""


@dataclass
class Row:
    """A row that is whole and can be scored."""

    prompt: Prompt
    response: str | None = None
    """None where it was given as ids."""
    response_ids: list[int] | None = None
    response_mask: list[bool] | None = None
    policy_logprobs: list[float] | None = None


def plural(name: str) -> str:
    """What a list with one field of many rows is called."""
    return name if name.endswith("s") else f"{name}s"


def one_of(given: Collection[str], first: str, second: str, says: str = "has") -> str:
    """The one of two names that is given.

    Raises:
        InputError: for both or neither; `says` is its verb.
    """
    if (first in given) == (second in given):
        amount, joint = ("both", "and") if first in given else ("neither", "nor")
        raise InputError(f"{says} {amount} {first} {joint} {second}; expected one of the two")
    return first if first in given else second


def read_row(fields: Mapping[str, Any], vocab_size: int, *, needs_policy: bool = False) -> Row:
    """A row from an object of JSON. A field that is null counts as missing, others are not read.

    Args:
        fields: the object.
        vocab_size: of the generator's tokenizer.
        needs_policy: whether `policy_logprobs` are used. Otherwise they are not looked at.

    Raises:
        InputError: saying what is wrong with it.
    """
    given = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    prompt = _prompt(given)
    if one_of(given, "response", "response_ids") == "response":
        if "response_mask" in given or needs_policy:
            raise InputError(
                "has a response as text; expected response_ids, since response_mask and "
                "baseline=policy go by the sampled tokens"
            )
        if not isinstance(given["response"], str):
            raise InputError(f"response is {short(given['response'])}; expected text")
        check_characters("response", given["response"])
        return Row(prompt, given["response"])
    ids = _list(given, "response_ids", "token ids", lambda i: type(i) is int and abs(i) < 2**63)
    mask = policy = None
    if "response_mask" in given:
        flags = _list(given, "response_mask", "0s and 1s", lambda m: m in (0, 1), len(ids))
        mask = [bool(flag) for flag in flags]
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size and (mask is None or mask[position]):
            raise InputError(
                f"response_ids[{position}] is {i}, but the generator's tokenizer has ids 0 to "
                f"{vocab_size - 1}; were they sampled with another tokenizer? Padding has "
                "response_mask 0, and a model with more ids than its tokenizer --padded-vocabulary"
            )
    if needs_policy:
        if "policy_logprobs" not in given:
            raise InputError(
                "has no policy_logprobs; baseline=policy needs the sampler's log-prob, in nats, of "
                "each of the response_ids"
            )
        policy = _list(given, "policy_logprobs", "log-probs in nats", _is_number, len(ids))
    return Row(prompt, None, ids, mask, policy)


def short(value: Any) -> str:
    """A value from a file, fit for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _prompt(given: Mapping[str, Any]) -> Prompt:
    name = one_of(given, "prompt", "messages")
    prompt = given[name]
    is_text = name == "prompt" and isinstance(prompt, str)
    # Trainers keep conversations under either name.
    is_chat = isinstance(prompt, list) and len(prompt) > 0
    if not is_text and not (is_chat and all(isinstance(m, dict) for m in prompt)):
        raise InputError(
            f"{name} is {short(prompt)}; expected {'text, or ' * (name == 'prompt')}a list of "
            'messages such as {"role": "user", "content": "..."}'
        )
    check_characters(name, prompt)
    as_messages(prompt)
    return prompt


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(
    given: Mapping[str, Any],
    name: str,
    what: str,
    is_good: Callable[[Any], bool],
    length: int | None = None,
) -> list[Any]:
    values = given[name]
    if not isinstance(values, list):
        raise InputError(f"{name} is {short(values)}; expected a list of {what}")
    for position, value in enumerate(values):
        if not is_good(value):
            raise InputError(f"{name}[{position}] is {short(value)}; expected {what}")
    if length is not None and len(values) != length:
        raise InputError(
            f"{name} has {len(values)} entries; expected one for each of the {length} response_ids"
        )
    return values
