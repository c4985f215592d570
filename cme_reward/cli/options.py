"""Settings from the command line, as the objects they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from cme_reward._settings import read_assignment, read_value
from cme_reward.loading import load_tokenizer, silence

if TYPE_CHECKING:
    from cme_reward.config import CMEConfig
    from cme_reward.reward import CrossModelEntropy


def configuration(file: Path | None, settings: list[str]) -> CMEConfig:
    from cme_reward.config import CMEConfig

    changes = dict(read_assignment("--set", setting, "eos=mask") for setting in settings)
    return CMEConfig.from_dict(changes) if file is None else CMEConfig.from_yaml(file, changes)


def verifier_options(device: str | None, settings: Sequence[str]) -> dict[str, Any]:
    """Keywords for `load_verifier` from a device and `KEY=VALUE` strings.

    Values are read as the types that verifiers declare; what they hand on to transformers has none.

    Raises:
        ConfigError: for a string of another form, or a value of another type.
    """
    options: dict[str, Any] = {} if device is None else {"device": device}
    kinds = _option_types() if settings else {}
    for setting in settings:
        key, value = read_assignment("--verifier-option", setting, "dtype=bfloat16")
        options[key] = read_value(f"--verifier-option {key}", kinds.get(key, Any), value)
    return options


def _option_types() -> dict[str, Any]:
    from cme_reward.verifiers.endpoint import EndpointVerifier
    from cme_reward.verifiers.hf import TransformersVerifier

    hf = TransformersVerifier
    makers = (hf.__init__, hf.from_pretrained, hf.from_config, EndpointVerifier.__init__)
    kinds = {name: kind for make in makers for name, kind in get_type_hints(make).items()}
    return kinds | {"tokenizer": str}  # by its name


def make_scorer(
    verifier: str,
    generator_tokenizer: str | None,
    device: str | None,
    config: CMEConfig,
    settings: Sequence[str] = (),
    *,
    padded_vocabulary: bool = False,
) -> CrossModelEntropy:
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.verifiers import load_verifier

    options = verifier_options(device, settings)
    silence()
    # First: a wrong name is noticed before minutes of loading weights.
    tokenizer = None if generator_tokenizer is None else load_tokenizer(generator_tokenizer)
    return CrossModelEntropy(
        load_verifier(verifier, **options),
        tokenizer,
        config,
        padded_vocabulary=padded_vocabulary,
    )
