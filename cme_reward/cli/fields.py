"""Fields that options name: where no line has one, that is an error before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from cme_reward.cli.jsonl import Bad, Good, read_rows
from cme_reward.cli.rank_rows import Response, condition, look_up, preferences, responses
from cme_reward.errors import InputError

SHOWN = 30
ANY_IDS = 2**31
"""A vocabulary for ids whose tokenizer is not loaded yet."""


def require_fields(
    source: BinaryIO, label: str | None, where: Sequence[str], limit: int | None
) -> None:
    """Look through a stream that can be read again for what `rank` is told to find there.

    Bad lines are left to those who score; a pipe to `require_label`, when all has been read.

    Raises:
        InputError: no line has such a field, or no line is what `where` asks for.
    """
    if not source.seekable() or (label is None and not where):
        return
    start = source.tell()
    try:
        _look(read_rows(source, ANY_IDS, split=preferences), label, where, limit)
    finally:
        source.seek(start)


def require_label(kept: Sequence[Response], label: str | None, among: str = "") -> None:
    """The same for the label of responses that have been scored."""
    if label is not None and all(look_up(one.fields, label) is None for one in kept):
        raise no_field("--label", label, kept[0], among)


def no_field(option: str, field: str, row: Good, among: str = "") -> InputError:
    """What to say of a field that no line has."""
    names = list(_names(row.fields))
    there = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
    return InputError(
        f"{option} {field}: no line{among} has a value in the field {field!r}; line {row.line} has "
        f"{there}. Name one of a line's fields, outer.inner for one inside another"
    )


def among(where: Sequence[str], limit: int | None) -> str:
    """Which lines are looked at, where these are not all."""
    options = ["--where"] * bool(where) + ["--limit"] * (limit is not None)
    return f" that {' and '.join(options)} leave{'s' * (len(options) == 1)}" if options else ""


def _look(
    rows: Iterable[Good | Bad], label: str | None, where: Sequence[str], limit: int | None
) -> None:
    asked = dict(condition(text) for text in where)
    missing = {field for field, value in asked.items() if value is not None}
    first: list[Good] = []

    def noticed() -> Iterator[Good]:
        for row in rows:
            if isinstance(row, Bad):
                continue
            if not first:
                first.append(row)
            missing.difference_update([f for f in missing if look_up(row.fields, f) is not None])
            yield row

    left: list[Response] = []
    for one in responses(noticed(), None, where, limit):
        if isinstance(one, Response):
            left = left or [one]
            if label is None or look_up(one.fields, label) is not None:
                return
    if missing and first:
        raise no_field("--where", min(missing), first[0])
    if first and not left:
        raise InputError(
            f"no line is what --where {' --where '.join(where)} asks for; expected values as the "
            "lines have them, in JSON: true, 3, text"
        )
    if left:
        require_label(left, label, among(where, limit))


def _names(fields: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in fields.items():
        yield before + name
        if isinstance(value, Mapping):
            yield from _names(value, f"{before}{name}.")
