"""Settings read as the type of their field."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Optional

import pytest

from cme_reward._settings import read_assignment, read_value
from cme_reward.cli.options import verifier_options
from cme_reward.errors import ConfigError

Numbers = list[float]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        # What YAML would take for false, a number or a date is a text where a text belongs.
        (str, "no", "no"),
        (str, "012", "012"),
        (str, "12:30", "12:30"),
        (str, "2026-11-26", "2026-11-26"),
        (str, "none", "none"),
        (str, "[a", "[a"),
        (str, " a ", " a "),
        (str | None, "none", "none"),
        (str | None, "", ""),
        (str | None, "null", None),
        (int | None, "none", None),
        (int | None, "", None),
        (bool, "no", False),
        (bool, "On", True),
        (bool, "1", True),
        (bool | str, "off", False),
        (bool | str, "inductor", "inductor"),
        (int, "012", 12),
        (float, "1e-3", 1e-3),
        (float, "-5", -5.0),
        (int | float, "5", 5),
        (Optional[int], "7", 7),  # noqa: UP045  (as other packages write it)
        (str | Literal[False], "false", False),
        (str | Literal[False], "true", "true"),
        (Literal["none", "all"] | None, "none", "none"),
        (Literal["none", "all"] | None, "null", None),
        (dict | str | None, "{a: no}", {"a": False}),
        (dict | str | None, "no", "no"),
        (Mapping[str, Any], "a: 1", {"a": 1}),
        (Numbers | None, "[1.0, 2]", [1.0, 2]),
        (Sequence[str] | None, "null", None),
        (Any, "1e-3", 1e-3),
        (Any, "0.5", 0.5),
        (Any, "true", True),
        (Any, "null", None),
        (Any, "bfloat16", "bfloat16"),
        (Any, "'no'", "no"),
        (Any, "{load_in_8bit: true}", {"load_in_8bit": True}),
    ],
)
def test_texts(kind: Any, text: str, value: Any) -> None:
    got = read_value("key", kind, text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (bool, "maybe", "true or false"),
        (int, "1.5", "int"),
        (int, "", "int"),
        (float | None, "one", "float or null"),
        (Mapping[str, Any], "no", "a mapping such as {key: value}"),
        (Mapping[str, Any], "{a: ", "a mapping such as {key: value}"),
        (list[str], "a", "a list such as [a, b]"),
        # Nobody knows whether these are meant as texts.
        (Any, "no", "a value in YAML, a text in quotes"),
        (Any, "12:30", "a value in YAML, a text in quotes"),
        (Any, "2026-11-26", "a value in YAML, a text in quotes"),
        (Any, "[a", "a value in YAML, a text in quotes"),
        # What a file or another program has read already.
        (str, False, "text (in YAML, in quotes)"),
        (str | None, 12, "text (in YAML, in quotes) or null"),
        (int, True, "int"),
        (float, True, "float"),
        (int, 2.0, "int"),
        (float, None, "float"),
        (float, [1.0], "float"),
        (str, {"a": 1}, "text (in YAML, in quotes)"),
    ],
)
def test_other_values_are_refused(kind: Any, value: Any, expected: str) -> None:
    message = re.escape(f"key={value!r} cannot be read; expected {expected}") + "$"
    with pytest.raises(ConfigError, match=message):
        read_value("key", kind, value)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (Literal["std", "none"], "max", "std, none"),
        (Literal["std", "none"], " std", "std, none"),
        (Literal["std", "none"], None, "std, none"),
        (Literal["off", "on"], False, "off, on"),  # in YAML, without quotes
        (Literal["std", "none"] | None, 1, "std, none, null"),
        (Literal[0, 1], True, "0, 1"),
    ],
)
def test_other_choices_are_refused(kind: Any, value: Any, expected: str) -> None:
    message = re.escape(f"key={value!r} is unknown; expected one of {expected}") + "$"
    with pytest.raises(ConfigError, match=message):
        read_value("key", kind, value)


def test_other_mappings_become_plain_all_the_way_down() -> None:
    frozen = MappingProxyType({"a": MappingProxyType({"b": [MappingProxyType({})]})})
    for kind in (Mapping[str, Any], Any):
        got = read_value("key", kind, frozen)
        assert got == {"a": {"b": [{}]}}
        assert {type(got), type(got["a"]), type(got["a"]["b"][0])} == {dict}


@pytest.mark.parametrize("text", ["eos", "=mask", " =mask", ""])
def test_an_assignment_has_a_key(text: str) -> None:
    message = re.escape(f"--set {text!r}: expected KEY=VALUE, such as eos=mask")
    with pytest.raises(ConfigError, match=message):
        read_assignment("--set", text, "eos=mask")


def test_an_assignment_is_cut_at_the_first_equals_sign() -> None:
    assert read_assignment("--set", " a =b = c", "eos=mask") == ("a", "b = c")


def test_values_of_the_right_type_stay() -> None:
    for kind, value in (
        (float, 2), (float | None, None), (bool, True), (str, "no"), (Numbers, [1.0]),
        (Sequence[str], ("a",)), (Mapping[str, Any], {"a": "no"}), (Any, object()),
    ):  # fmt: skip
        assert read_value("key", kind, value) == value


def test_options_of_a_verifier() -> None:
    given = {
        "trust_remote_code": "no",  # as a text it would be true
        "dtype": "bfloat16",
        "compile": "off",
        "head_rows": "none",
        "total_seconds": "1e2",
        "model": "012",
        "tokenizer": "no",
        "quantization_config": "{load_in_8bit: true}",
    }
    assert verifier_options("cpu", [f"{key}={text}" for key, text in given.items()]) == {
        "device": "cpu",
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "compile": False,
        "head_rows": None,
        "total_seconds": 100.0,
        "model": "012",
        "tokenizer": "no",
        "quantization_config": {"load_in_8bit": True},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"--verifier-option concurrency='many' .* expected int$"):
        verifier_options(None, ["concurrency=many"])
    with pytest.raises(
        ConfigError, match=r"local_files_only='no' .* a value in YAML, a text in qu"
    ):
        verifier_options(None, ["local_files_only=no"])
