"""Settings by name, read as the type that their field is annotated with, wherever they come from.

The environment and `KEY=VALUE` hold texts. YAML knows no fields: it reads the text `no` as false,
`1e-3` as a text, `012` as ten and `12:30` as 750. hydra holds nodes of OmegaConf.
"""

from __future__ import annotations

import difflib
import os
import sys
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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


@cache
def kinds_of(settings: type) -> Mapping[str, Any]:
    """The settings that a dataclass has, by name, and their annotations."""
    return types.MappingProxyType(get_type_hints(settings))


def check_names(
    given: Iterable[Any], known: Collection[str], *, section: str = "", file: str = ""
) -> None:
    """Refuse a setting that nobody reads.

    Args:
        given: names of settings.
        known: those that exist.
        section: the one they stand in, for the error.
        file: the one they stand in, for the error.

    Raises:
        ConfigError: naming the nearest known one.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{f'{file!r}: ' if file else ''}unknown setting "
                f"{f'{section}.{name}' if section else repr(name)}; did you mean {near[0]!r}? "
                f"Known: {', '.join(known)}"
            )


def read_settings(
    given: Mapping[str, Any], kinds: Mapping[str, Any], *, section: str = ""
) -> dict[str, Any]:
    """Settings as the types of their annotations.

    Raises:
        ConfigError: for an unknown name, naming the nearest, or a value of another type.
    """
    check_names(given, kinds, section=section)
    dotted = f"{section}." if section else ""
    return {
        name: read_value(f"{dotted}{name}", kinds[name], value) for name, value in given.items()
    }


def read_assignment(option: str, text: str, example: str) -> tuple[str, str]:
    """Key and value of a `KEY=VALUE` that a command line gives with an option.

    Raises:
        ConfigError: for another form, with an example of the right one.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} {text!r}: expected KEY=VALUE, such as {example}")
    return key.strip(), value


def read_environment(
    names: Iterable[str], prefix: str, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The settings that environment variables give: `eos` from `CME_EOS` for the prefix `CME_`.

    Only these names are looked up, so a misspelt variable cannot be told from one that belongs to
    something else.
    """
    environ = os.environ if environ is None else environ
    variables = {name: prefix + name.upper() for name in names}
    return {name: environ[key] for name, key in variables.items() if key in environ}


def read_yaml(path: str | Path, what: str, example: str) -> dict[str, Any]:
    """What a YAML file says at its top level; an empty file says nothing.

    Args:
        path: of the file.
        what: what is read, for the error.
        example: a line of such a file, for the error.

    Raises:
        ConfigError: if the file cannot be read, or holds anything but keys and values.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {what}{str(path)!r}: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"{str(path)!r} holds a {type(found).__name__}; expected settings such as `{example}`"
        )
    return found


def plain(value: Any) -> Any:
    """Mappings and lists as those of Python, all the way down: nodes of OmegaConf look alike, and
    neither pickle nor compare as such."""
    omegaconf = sys.modules.get("omegaconf")  # without it there are no nodes
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in value}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def check_choices(settings: Any) -> None:
    """Refuse a dataclass whose field of a `Literal` holds anything else.

    Raises:
        ConfigError: naming the field, its value and the choices.
    """
    for name, kind in kinds_of(type(settings)).items():
        if get_origin(kind) is Literal:
            read_value(name, kind, getattr(settings, name))


def read_value(name: str, kind: Any, value: Any) -> Any:
    """A value as one of the types of an annotation.

    A text is the first of these that it can be: a choice of a `Literal`, nothing (`null`; where a
    text would do, `none` is one), true or false, a whole number, a number, a mapping or a list in
    YAML, a text. For `Any` it is what YAML and Python both take it for. Other values must have one
    of the types already; only that a whole number will do as a number, and nodes of OmegaConf as
    what they stand for.

    Args:
        name: of the setting, for the error.
        kind: the annotation, as `typing.get_type_hints` gives it.
        value: a text, or what a file or another program has made of one.

    Raises:
        ConfigError: naming the setting, the value and what was expected.
    """
    value = plain(value)
    kinds, choices = _members(kind), _choices(kind)
    for choice in choices:
        with suppress(ValueError):
            if _read([type(choice)], value) == choice:
                return choice
    try:
        return _read(kinds, value)
    except (ValueError, yaml.YAMLError) as error:
        forms = [_FORMS.get(k) or getattr(k, "__name__", str(k)) for k in kinds if k is not Any]
        if choices:
            expected = ", ".join(dict.fromkeys([*map(str, choices), *forms]))
            raise ConfigError(f"{name}={value!r} is unknown; expected one of {expected}") from error
        expected = " or ".join(dict.fromkeys(forms)) or "a value in YAML, a text in quotes"
        raise ConfigError(f"{name}={value!r} cannot be read; expected {expected}") from error


def _read(kinds: list[Any], value: Any) -> Any:
    return _of_text(kinds, value) if isinstance(value, str) else _of_other(kinds, value)


def _choices(kind: Any) -> list[Any]:
    """The choices of an annotation's `Literal`s."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return [choice for part in parts for choice in _choices(part)]
    return list(parts) if origin is Literal else []


def _members(kind: Any) -> list[Any]:
    """The other types of an annotation, containers as `Mapping` and `Sequence`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return [member for part in parts for member in _members(part)]
    if origin is Literal:
        return []
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
        try:
            loaded = yaml.safe_load(text)
        except yaml.YAMLError:  # `[THINK] [/THINK]` begins like a list
            if str not in kinds:
                raise
            return text
        for container, form in ((Mapping, dict), (Sequence, list)):
            if container in kinds and isinstance(loaded, form):
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
        if Mapping in kinds:
            return value
    elif isinstance(value, Sequence):
        if Sequence in kinds:
            return value if isinstance(value, list | tuple) else list(value)
    elif isinstance(value, tuple(k for k in kinds if isinstance(k, type))):
        return value
    raise ValueError
