"""`python -m cme_reward.verl CONFIG.yaml`: veRL's trainer from a file that names the reward."""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cme_reward.errors import CMEError, ConfigError
from cme_reward.verl.settings import (
    ESTIMATOR_KEYS,
    ESTIMATOR_ONLY,
    MANAGER,
    check_settings,
    check_version,
)

MAIN = "verl.trainer.main_ppo"
DEFAULT = "cme_reward.verl:CMEReward"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; on success this process becomes veRL's."""
    parser = argparse.ArgumentParser(
        prog="python -m cme_reward.verl",
        description="Train with veRL and cross-model entropy. The file holds veRL's settings, and "
        f"`reward_fn: {DEFAULT}` with a block `cme:` for the reward's.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="KEY=VALUE as veRL takes them, and cme.KEY=VALUE"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help=f"print the command with {MAIN} that this stands for, and do not run it",
    )
    parser.add_argument("--no-check", action="store_true", help="do not check before starting")
    known, unknown = parser.parse_known_args(arguments)
    wrong = [word for word in unknown if word.startswith("--") or "=" not in word]
    if wrong:
        parser.error(f"unknown arguments: {' '.join(wrong)}")
    try:
        overrides = expand(read_config(known.config), [*known.overrides, *unknown])
        if not known.no_check:
            check_version()
            check_settings(compose(overrides))
    except CMEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if known.print_config:
        lines = [f"python -m {MAIN}", *map(shlex.quote, overrides)]
        print(" \\\n    ".join(lines))
        return 0
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", MAIN, *overrides])


def read_config(path: Path) -> dict[str, Any]:
    """The file's settings.

    Raises:
        ConfigError: if it cannot be read, or holds no settings.
    """
    import yaml
    from omegaconf import OmegaConf  # reads 3e-6 as a number, which PyYAML alone does not

    try:
        settings = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{str(path)!r} holds no settings; expected YAML such as `reward_fn: {DEFAULT}`"
        )
    return settings


def expand(settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[str]:
    """veRL's own overrides for a file's settings and those of the command line, which win.

    `reward_fn: MODULE:CLASS` and `cme:` become the keys under which veRL finds the reward; all else
    is passed on. A key that veRL's configuration does not have is written with a leading `+`.

    Raises:
        ConfigError: for another `reward_fn`, or a `cme:` that is no block.
    """
    rest = dict(settings)
    reward_fn, cme = rest.pop("reward_fn", None), rest.pop("cme", None) or {}
    if not isinstance(reward_fn, str) or not re.fullmatch(r"[\w.]+:\w+", reward_fn):
        raise ConfigError(f"reward_fn={reward_fn!r}; expected MODULE:CLASS, such as {DEFAULT}")
    if not isinstance(cme, Mapping):
        raise ConfigError(f"cme={cme!r}; expected a block of settings such as `verifier: SPEC`")
    from omegaconf import OmegaConf  # veRL's own; not where help is all that is asked for

    cme, passed = dict(cme), []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+").startswith("cme."):
            parsed = OmegaConf.create(f"value: {value}")
            cme[key.lstrip("+").removeprefix("cme.")] = OmegaConf.to_container(parsed)["value"]
        else:
            passed.append(override)
    module, _, name = reward_fn.partition(":")
    if cme.get("credit") == "sequence":
        cme |= {"level": cme.get("level", "sequence")}
        del cme["credit"]
    level = cme.get("level", "token")
    native: dict[str, Any] = {
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.module.path": f"pkg://{module}",
        "reward.reward_manager.name": name,
        "reward.custom_reward_function.path": "pkg://cme_reward.verl",
        "reward.custom_reward_function.name": "compute_score",
        f"++{MANAGER}": "cme_reward.verl.CMEAgentLoopManager",
        "algorithm.adv_estimator": "grpo" if level == "sequence" else "cme_grpo",
    }
    if level == "sequence":
        for key in ESTIMATOR_ONLY:
            if key in cme:
                raise ConfigError(
                    f"cme.{key}={cme[key]!r} would have no effect: at the sequence level veRL's "
                    "own GRPO normalises. Leave it out, or write algorithm.adv_estimator=cme_grpo "
                    f"with +algorithm.cme.level=sequence and +algorithm.cme.{key} in veRL's keys"
                )
    else:
        native["++algorithm.cme"] = {key: cme[key] for key in ESTIMATOR_KEYS if key in cme}
    native["++reward.cme"] = {k: v for k, v in cme.items() if k not in ESTIMATOR_ONLY}
    if cme.get("verifier") == "hosted":
        native["reward.reward_model.enable"] = True
        if dict(_flat(rest)).get("reward.reward_model.enable_resource_pool") is True:
            # Else veRL puts it to sleep when it starts, and never wakes it.
            native["reward.reward_model.rollout.free_cache_engine"] = False
    written = [f"{key}={to_override(value)}" for key, value in native.items()]
    return [*written, *(f"{key}={to_override(value)}" for key, value in _flat(rest)), *passed]


def compose(overrides: Sequence[str]) -> Any:
    """veRL's configuration with the overrides, as its main would see it.

    Raises:
        ConfigError: for a key that it does not have, naming the nearest.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError('veRL is not installed; run pip install "cme-reward[verl]"')
    folder = Path(spec.submodule_search_locations[0]) / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        try:
            return hydra_compose("ppo_trainer", overrides=list(overrides))
        except HydraException as error:
            default = OmegaConf.to_container(hydra_compose("ppo_trainer"))
            keys = [key for key, _ in _flat(default)]  # type: ignore[arg-type]
            found = re.search(r"Could not override '([\w.]+)'", str(error))
            near = difflib.get_close_matches(found[1], keys, n=1) if found else []
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{str(error).partition(chr(10))[0]} {hint}A key that veRL does not have itself is "
                "written with a leading +"
            ) from error


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a `+` anywhere in a key goes to its front."""
    for key, value in settings.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, dotted)
        else:
            plus = "+" * min(2, dotted.count("+"))
            yield plus + dotted.replace("+", ""), value


def to_override(value: Any) -> str:
    """A value in the grammar of hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = (f"{to_override(str(key))}: {to_override(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_override, value)) + "]"
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z_/][\w/.-]*(://[\w/.-]+)?", text, re.ASCII)
    if plain and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    # Only backslashes in front of a quote mean something to hydra.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * trailing + "'"
