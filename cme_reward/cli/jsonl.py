"""JSON Lines of prompts and responses, and their rewards, as the command line reads and writes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cme_reward.conversation.messages import Prompt, as_messages
from cme_reward.errors import InputError


@dataclass
class Row:
    """One good line."""

    line: int
    """Its number, from 1."""
    fields: dict[str, Any]
    """All of the line, to be written again."""
    prompt: Prompt
    response: str | None
    """The response as text; None where it was given as ids."""
    ids: list[int] | None
    mask: list[bool] | None
    policy: list[float] | None


@dataclass
class Bad:
    """A line that cannot be scored."""

    line: int
    reason: str


def read_rows(
    stream: Iterable[bytes], vocab_size: int | None = None, *, needs_policy: bool = False
) -> Iterator[Row | Bad]:
    """Each line that is not blank, in order. The arguments are those of `parse_row`."""
    for line, raw in enumerate(stream, 1):
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            try:
                yield parse_row(line, raw, vocab_size, needs_policy=needs_policy)
            except InputError as error:
                yield Bad(line, str(error))


def parse_row(
    line: int, raw: bytes, vocab_size: int | None = None, *, needs_policy: bool = False
) -> Row:
    """One line as a row. A field that is null counts as missing.

    Args:
        line: its number.
        raw: its bytes.
        vocab_size: of the generator's tokenizer; None where that is unknown, and ids are refused.
        needs_policy: whether `policy_logprobs` are used. Otherwise they are not looked at.

    Raises:
        InputError: saying what is wrong with the line.
    """
    fields = _parse(raw)
    given = {key: value for key, value in fields.items() if value is not None}
    prompt = _prompt(given)
    if _one_of(given, "response", "response_ids") == "response":
        if "response_mask" in given or needs_policy:
            raise InputError(
                "has a response as text; expected response_ids, since response_mask and "
                "baseline=policy go by the sampled tokens"
            )
        if not isinstance(given["response"], str):
            raise InputError(f"response is {_short(given['response'])}; expected text")
        _check_characters("response", given["response"])
        return Row(line, fields, prompt, given["response"], None, None, None)
    if vocab_size is None:
        raise InputError(
            "has response_ids, but whose ids are they? Name the tokenizer of the model that "
            "sampled them with --generator-tokenizer"
        )
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
                "response_mask 0"
            )
    if needs_policy:
        if "policy_logprobs" not in given:
            raise InputError(
                "has no policy_logprobs; baseline=policy needs the sampler's log-prob, in nats, of "
                "each of the response_ids"
            )
        policy = _list(given, "policy_logprobs", "log-probs in nats", _is_number, len(ids))
    return Row(line, fields, prompt, None, ids, mask, policy)


def batches(rows: Iterable[Row | Bad], size: int) -> Iterator[list[Row | Bad]]:
    """Lists of about `size` rows. Neighbours with one prompt stay together, up to `2 * size`."""
    batch: list[Row | Bad] = []
    previous = None
    for row in rows:
        prompt = row.prompt if isinstance(row, Row) else previous
        if len(batch) >= 2 * size or (len(batch) >= size and prompt != previous):
            yield batch
            batch = []
        batch.append(row)
        previous = prompt
    if batch:
        yield batch


def partial_path(path: Path) -> Path:
    """Where the output lies until it is complete."""
    path = path.resolve()  # a link stays a link
    return path.with_name(path.name + ".partial")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when all of it is there; until then `.partial`.

    After an error the partial file stays, unless it is empty. What is not a regular file (a pipe,
    a device) is written to as it is.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    partial = partial_path(path)
    try:
        file = partial.open("wb")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error
    try:
        with file:
            yield file
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path.resolve())
    finally:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode(), parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 (byte 0x{raw[error.start]:02X} at position {error.start + 1}); save the "
            "file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(
            f"is {_short(fields)}; expected an object such as "
            '{"prompt": "...", "response": "..."}'
        )
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is too large a number")
    return value


def _one_of(given: dict[str, Any], first: str, second: str) -> str:
    if (first in given) == (second in given):
        amount = "both" if first in given else "neither"
        raise InputError(
            f"has {amount} {first} {'and' if first in given else 'nor'} {second}; expected one of "
            "the two"
        )
    return first if first in given else second


def _prompt(given: dict[str, Any]) -> Prompt:
    name = _one_of(given, "prompt", "messages")
    prompt = given[name]
    is_text = name == "prompt" and isinstance(prompt, str)
    # Trainers keep conversations under either name.
    is_chat = isinstance(prompt, list) and len(prompt) > 0
    if not is_text and not (is_chat and all(isinstance(m, dict) for m in prompt)):
        raise InputError(
            f"{name} is {_short(prompt)}; expected {'text, or ' * (name == 'prompt')}a list of "
            'messages such as {"role": "user", "content": "..."}'
        )
    _check_characters(name, json.dumps(prompt, ensure_ascii=False))
    as_messages(prompt)
    return prompt


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(
    given: dict[str, Any],
    name: str,
    what: str,
    is_good: Callable[[Any], bool],
    length: int | None = None,
) -> list[Any]:
    values = given[name]
    if not isinstance(values, list):
        raise InputError(f"{name} is {_short(values)}; expected a list of {what}")
    for position, value in enumerate(values):
        if not is_good(value):
            raise InputError(f"{name}[{position}] is {_short(value)}; expected {what}")
    if length is not None and len(values) != length:
        raise InputError(
            f"{name} has {len(values)} entries; expected one for each of the {length} response_ids"
        )
    return values


def _check_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds {text[error.start]!a}, half of a surrogate pair and no character; "
            "expected Unicode text"
        ) from None


def _short(value: Any) -> str:
    """A value from the file, fit for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
