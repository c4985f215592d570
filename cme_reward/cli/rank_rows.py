"""Lines of a file -> responses to be ranked, each with its group and, where known, its label."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cme_reward._keys import prompt_key
from cme_reward._row import short
from cme_reward.cli.jsonl import Bad, Good
from cme_reward.errors import InputError

if TYPE_CHECKING:
    from cme_reward.comparators.policy import PolicyStatistics
    from cme_reward.spans.table import SpanTable


@dataclass(kw_only=True)
class Response(Good):
    """What is ranked."""

    group: Hashable
    """Responses of one group are compared: those to one prompt, or the two of a line."""
    label: float | None = None
    """Higher is better; None where nothing is known."""
    said: PolicyStatistics | None = None
    """What the model that wrote it says of its tokens, where that is asked."""

    def written(self, table: SpanTable) -> str:
        """As the generator's tokens write it, what an environment wrote included."""
        if self.response is not None:
            return self.response
        # Padding is no id, and of a padded vocabulary the last ones write nothing.
        return table.decode([i for i in self.response_ids or [] if 0 <= i < table.vocab_size])[0]


def responses(
    rows: Iterable[Good | Bad],
    label: str | None = None,
    where: Sequence[str] = (),
    limit: int | None = None,
) -> Iterator[Response | Bad]:
    """The responses of a file.

    Args:
        rows: its lines; those that `preferences` has split are compared with each other alone.
        label: the field with the label, true, false or a number; "meta.is_correct" for one inside
            another. Lines without it have none.
        where: `FIELD=VALUE`; lines in which it is not so are left out.
        limit: lines of the first so many prompts only.
    """
    wanted = [condition(text) for text in where]
    prompts: set[str] = set()
    for row in rows:
        if isinstance(row, Bad):
            yield row
            continue
        if any(look_up(row.fields, field) != value for field, value in wanted):
            continue
        key = prompt_key(row.prompt)
        if key not in prompts and limit is not None and len(prompts) >= limit:
            continue
        prompts.add(key)
        if CHOSEN in row.fields:
            is_chosen = float(row.fields[CHOSEN])
            yield Response(**vars(row), group=(key, row.line), label=is_chosen)
            continue
        value = None if label is None else look_up(row.fields, label)
        if value is not None and not isinstance(value, bool | int | float):
            yield Bad(
                row.line, f"{label} is {short(value)}; expected true, false or a number as label"
            )
            continue
        known = None if value is None else float(value)
        yield Response(**vars(row), group=key, label=known)


CHOSEN = "is_chosen"
"""The field of the two rows that `preferences` makes of a line: true, or false."""


def preferences(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """A line with `chosen` and `rejected`, TRL's format for preferences, as two rows.

    Both are texts, or lists of messages that end with the response; where there is no `prompt`,
    what they have in common is it. Another line stays as it is.

    Raises:
        InputError: for anything else in these fields.
    """
    if "chosen" not in fields or "rejected" not in fields or fields.get("response") is not None:
        return [fields]
    kept = {k: v for k, v in fields.items() if k not in ("chosen", "rejected", "messages")}
    prompt, texts = _two(fields)
    return [
        {**kept, "prompt": prompt, "response": text, CHOSEN: is_chosen}
        for text, is_chosen in zip(texts, (True, False), strict=True)
    ]


def _two(fields: Mapping[str, Any]) -> tuple[Any, list[str]]:
    prompt = fields.get("prompt", fields.get("messages"))
    texts, befores = [], []
    for name in ("chosen", "rejected"):
        value = fields[name]
        if isinstance(value, str):
            texts.append(value)
            continue
        good = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
        if not good or not isinstance(value[-1].get("content"), str):
            raise InputError(
                f"{name} is {short(value)}; expected text, or messages that end with the response"
            )
        texts.append(value[-1]["content"])
        befores.append(value[:-1])
    if prompt is None:
        if len(befores) < 2 or befores[0] != befores[1] or not befores[0]:
            raise InputError("has no prompt, and chosen and rejected do not begin with the same")
        prompt = befores[0]
    return prompt, texts


def look_up(fields: Mapping[str, Any], path: str) -> Any:
    """The value of a field, `outer.inner` of a field inside another; None where there is none."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def condition(text: str) -> tuple[str, Any]:
    """`FIELD=VALUE` as field and value; a value that is no JSON is a text.

    Raises:
        InputError: without an equals sign.
    """
    field, equals, value = text.partition("=")
    if not field or not equals:
        raise InputError(f"--where {text!r} is not FIELD=VALUE, such as meta.is_reference=false")
    try:
        return field, json.loads(value)
    except ValueError:
        return field, value
