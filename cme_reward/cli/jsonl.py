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

from cme_reward._row import Row, read_row, short
from cme_reward.errors import InputError


@dataclass(kw_only=True)
class Good(Row):
    """A line that can be scored."""

    line: int
    """Its number, from 1."""
    fields: dict[str, Any]
    """All of the line, to be written again."""


@dataclass
class Bad:
    """A line that cannot be scored."""

    line: int
    reason: str


def read_rows(
    stream: Iterable[bytes],
    vocab_size: int | None = None,
    *,
    needs_policy: bool = False,
    split: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda fields: [fields],
) -> Iterator[Good | Bad]:
    """Each line that is not blank, in order; whole, or Bad.

    Args:
        stream: the lines.
        vocab_size: of the generator's tokenizer; None where that is unknown, and ids are refused.
        needs_policy: whether `policy_logprobs` are used. Otherwise they are not looked at.
        split: makes of a line's object those of its rows; raises InputError where it cannot.
    """
    for line, raw in enumerate(stream, 1):
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            try:
                rows = [
                    _row(line, fields, vocab_size, needs_policy=needs_policy)
                    for fields in split(_parse(raw))
                ]
            except InputError as error:
                yield Bad(line, str(error))
            else:
                yield from rows


def _row(line: int, fields: dict[str, Any], vocab_size: int | None, *, needs_policy: bool) -> Good:
    if vocab_size is None:
        if fields.get("response_ids") is not None and fields.get("response") is None:
            raise InputError(
                "has response_ids, but whose ids are they? Name the tokenizer of the model that "
                "sampled them with --generator-tokenizer"
            )
        vocab_size = 0  # there are no ids
    row = read_row(fields, vocab_size, needs_policy=needs_policy)
    return Good(**vars(row), line=line, fields=fields)


def batches(rows: Iterable[Good | Bad], size: int) -> Iterator[list[Good | Bad]]:
    """Lists of about `size` rows. Neighbours with one prompt stay together, up to `2 * size`."""
    batch: list[Good | Bad] = []
    previous = None
    for row in rows:
        prompt = row.prompt if isinstance(row, Good) else previous
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
            f'is {short(fields)}; expected an object such as {{"prompt": "...", "response": "..."}}'
        )
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is too large a number")
    return value
