"""Values of settings, read as the type of their field.

The environment and `KEY=VALUE` hold texts. YAML knows no fields: it reads the text `no` as false,
`1e-3` as a text, `012` as ten and `12:30` as 750.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from cme_reward.errors import ConfigError

_BOOLS: dict[str, bool] = dict.fromkeys(("true", "yes", "on", "1"), True)
_BOOLS |= dict.fromkeys(("false", "no", "off", "0"), False)
_FORMS: dict[Any, str] = {
    bool: "true or false",
    Mapping: "a mapping such as {key: value}",
    Sequence: "a list such as [a, b]",
    str: "text (in YAML, in quotes)",
    type(None): "null",
}


def read_value(name: str, kind: Any, value: Any) -> Any:
    """A value as one of the types of an annotation.

    A text is the first of these that it can be: nothing (`null`; where a text would do, `none` is
    one), true or false, a whole number, a number, a mapping or a list in YAML, a text. For `Any` it
    is what YAML and Python both take it for. Other values must have one of the types already;
    only that a whole number will do as a number.

    Args:
        name: of the setting, for the error.
        kind: the annotation, as `typing.get_type_hints` gives it.
        value: a text, or what a file or another program has made of one.

    Raises:
        ConfigError: naming the setting, the value and what was expected.
    """
    kinds = _members(kind)
    try:
        return _of_text(kinds, value) if isinstance(value, str) else _of_other(kinds, value)
    except (ValueError, yaml.YAMLError) as error:
        forms = [_FORMS.get(k) or getattr(k, "__name__", str(k)) for k in kinds if k is not Any]
        expected = " or ".join(dict.fromkeys(forms)) or "a value in YAML, a text in quotes"
        raise ConfigError(f"{name}={value!r} cannot be read; expected {expected}") from error


def _members(kind: Any) -> list[Any]:
    """The types of an annotation, containers as `Mapping` and `Sequence`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return [member for part in parts for member in _members(part)]
    if origin is Literal:
        return [type(part) for part in parts]
    for container in (Mapping, Sequence):
        found = origin or kind
        if found is not str and isinstance(found, type) and issubclass(found, container):
            return [container]
    return [kind]


def _of_text(kinds: list[Any], text: str) -> Any:
    word = text.strip().lower()
    if Any in kinds:
        return _of_any(text, word)
    nothing = ("null", "~") if str in kinds else ("null", "~", "none", "")
    if type(None) in kinds and word in nothing:
        return None
    if bool in kinds and word in _BOOLS:
        return _BOOLS[word]
    for number in (int, float):
        if number in kinds:
            with suppress(ValueError):
                return number(text)
    if str not in kinds or word[:1] in ("{", "["):
        for container, form in ((Mapping, dict), (Sequence, list)):
            if container in kinds and isinstance(loaded := yaml.safe_load(text), form):
                return loaded
    if str in kinds:
        return text
    raise ValueError


def _of_any(text: str, word: str) -> Any:
    """Of a field whose type nobody knows: `no` may be a text there, and is refused."""
    if any(character.isdigit() for character in word):
        for number in (int, float):
            with suppress(ValueError):
                return number(text)
    loaded = yaml.safe_load(text)
    if loaded is None or isinstance(loaded, str | dict | list) or word in ("true", "false"):
        return loaded
    raise ValueError


def _of_other(kinds: list[Any], value: Any) -> Any:
    if Any in kinds or (value is None and type(None) in kinds):
        return value
    if isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, Integral | Real):
        if int in kinds and isinstance(value, Integral):
            return value
        if float in kinds:
            return float(value)
    elif isinstance(value, Mapping):
        if Mapping in kinds:  # of hydra, perhaps
            return {key: value[key] for key in value}
    elif isinstance(value, Sequence):
        if Sequence in kinds:
            return value if isinstance(value, list | tuple) else list(value)
    elif isinstance(value, tuple(k for k in kinds if isinstance(k, type))):
        return value
    raise ValueError
