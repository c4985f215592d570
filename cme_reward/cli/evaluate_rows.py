"""Lines of files -> the answers of models, and the preferences that are stored with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cme_reward._row import short
from cme_reward.cli.fields import no_field
from cme_reward.cli.jsonl import Bad, Good, read_rows
from cme_reward.cli.rank_rows import look_up
from cme_reward.errors import InputError
from cme_reward.evaluation.pairs import Answer

STORED = "stored preference"
"""The field in which `annotation` puts what a line of AlpacaEval's says."""


@dataclass
class Answers:
    """What several files hold, one answer at most of each model to each prompt."""

    kept: list[Answer] = field(default_factory=list)
    stored: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """By prompt, model and the model it was compared with: 1 for the former, 0 for the latter."""
    labels: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """The same of labels; those of a response alone have no other model, and are higher if better.
    """
    bad: list[str] = field(default_factory=list)
    """Lines that are left out, each with its file, its number and the reason."""
    _seen: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    _first: Good | None = None
    _there: set[str] = field(default_factory=set)
    """Those of the fields asked for that some line has."""

    def read(
        self,
        file: str,
        stream: Iterable[bytes],
        preferences: str | None = None,
        label: str | None = None,
    ) -> None:
        """Add the lines of a file; its name is the model's where a line has no `model`."""
        for row in read_rows(stream, split=annotation if preferences else _with_response):
            bad = isinstance(row, Bad)
            reason = row.reason if bad else self._add(file, row, preferences, label)
            if reason:
                self.bad.append(f"{file}, line {row.line}: {reason}")

    def require(self, option: str, name: str | None) -> None:
        """That some line has the field an option names.

        Raises:
            InputError: where lines are good, and none has.
        """
        if name is not None and self._first is not None and name not in self._there:
            raise no_field(option, name, self._first)

    def _notice(self, row: Good, *names: str | None) -> None:
        self._first = self._first or row
        for name in names:
            if name is not None and look_up(row.fields, name) is not None:
                self._there.add(name)

    def _add(self, file: str, row: Good, preferences: str | None, label: str | None) -> str:
        self._notice(row, label, preferences)
        if preferences is not None and row.fields.get(STORED) is not None:
            self._there.add(preferences)
        model = row.fields.get("model")
        model = _stem(file) if model is None else model
        if not isinstance(model, str) or not model:
            return f"model is {short(model)}; expected its name as text"
        answer = Answer(row.prompt, model, row.response or "")
        at = f"{file}, line {row.line}"
        before, where = self._seen.setdefault((model, answer.key), (answer.response, at))
        if before != answer.response:
            return f"is a second response of {model} to the prompt of {where}; the first is kept"
        if where == at:
            self.kept.append(answer)
        try:
            if label is not None:
                known = look_up(row.fields, label)
                if isinstance(known, bool | int | float):
                    self.labels[answer.key, model, ""] = float(known)
                elif (told := _preference(label, known)) is not None:
                    self.labels[answer.key, model, told[0]] = told[1]
            if preferences is not None:
                value = row.fields.get(STORED)
                value = look_up(row.fields, preferences) if value is None else value
                if (told := _preference(preferences, value)) is not None:
                    self.stored[answer.key, model, told[0]] = told[1]
        except InputError as error:
            return str(error)
        return ""


def annotation(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """A line of AlpacaEval's annotations as two rows, the second with its preference.

    There `preference` is 1 where output_1 is better, 2 where output_2 is, 1.5 (formerly 0) for a
    tie, and null where there is none. Another line stays as it is.

    Raises:
        InputError: for another preference, and without a response.
    """
    names = "output_1", "output_2", "generator_1", "generator_2"
    if not all(name in fields for name in names):
        return _with_response(fields)
    first, second, baseline, model = (fields[name] for name in names)
    value = fields.get("preference")
    if value is not None:
        if not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
            raise InputError(f"preference is {short(value)}; expected a number from 1 to 2, or 0")
        value = {"vs": baseline, "p_win": (value or 1.5) - 1}
    prompt = fields.get("prompt", fields.get("instruction"))
    return [
        {"prompt": prompt, "response": first, "model": baseline},
        {"prompt": prompt, "response": second, "model": model, STORED: value},
    ]


def _with_response(fields: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(fields.get("response"), str):
        raise InputError(
            f"response is {short(fields.get('response'))}; expected text, which a judge can read"
        )
    return [{k: v for k, v in fields.items() if k not in ("response_ids", "response_mask")}]


def _preference(name: str, value: Any) -> tuple[str, float] | None:
    if value is None:
        return None
    given = value if isinstance(value, dict) else {}
    other, chance = given.get("vs"), given.get("p_win")
    number = chance if isinstance(chance, int | float) and type(chance) is not bool else -1
    if isinstance(other, str) and 0 <= number <= 1:
        return other, float(number)
    raise InputError(
        f'{name} is {short(value)}; expected {{"vs": "another model", "p_win": 0.5}}, p_win from 0 '
        "to 1"
    )


def _stem(file: str) -> str:
    name = "standard input" if file == "-" else Path(file).name
    return name.removesuffix(".gz").removesuffix(".jsonl")
