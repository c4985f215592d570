"""Names and settings from the command line, as the objects they stand for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cme_reward.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    from cme_reward.config import CMEConfig
    from cme_reward.reward import CrossModelEntropy


def configuration(file: Path | None, settings: list[str]) -> CMEConfig:
    from dataclasses import asdict

    from cme_reward.config import CMEConfig

    values = asdict(CMEConfig() if file is None else CMEConfig.from_yaml(file))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r}: expected KEY=VALUE, such as eos=mask")
        values[key.strip()] = value
    return CMEConfig.from_dict(values)


def silence() -> None:
    """Keep what transformers says about its own loading out of the way."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a name on the hub, a directory, or a verifier spec; no weights are loaded.

    Raises:
        TokenizerError: if there is none, or for a spec of several verifiers.
    """
    from transformers import AutoTokenizer

    import cme_reward.verifiers

    if "+" in name and not Path(name).exists():
        raise TokenizerError(
            f"{name!r} names several verifiers; expected one, since each has a tokenizer of its own"
        )
    kind, _, rest = name.partition(":")
    where = rest if kind in ("hf", "random") and rest else name
    if name == "embedded" and not Path(name).exists():
        where = str(Path(cme_reward.verifiers.__file__).parent / "embedded")
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # of many kinds, for an unknown name, no network, a broken file
        first = str(error).strip().partition("\n")[0]
        raise TokenizerError(
            f"cannot load the tokenizer {name!r}: expected a directory with a tokenizer.json, the "
            "name of a model on the hub (check the spelling, the network and HF_TOKEN), or "
            f"embedded. transformers says: {first}"
        ) from error


def make_scorer(
    verifier: str, generator_tokenizer: str | None, device: str | None, config: CMEConfig
) -> CrossModelEntropy:
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.verifiers import Ensemble, load_verifier

    silence()
    # First: a wrong name is noticed before minutes of loading weights.
    tokenizer = load_tokenizer(generator_tokenizer) if generator_tokenizer else None
    model = load_verifier(verifier, **({} if device is None else {"device": device}))
    first = model.members[0] if isinstance(model, Ensemble) else model
    return CrossModelEntropy(model, tokenizer or first.tokenizer, config)


def end_of_turn(scorer: CrossModelEntropy) -> int:
    """The id with which the generator ends a response."""
    from cme_reward.prompts import PromptFormat

    tokenizer = scorer.generator_tokenizer
    for end in (PromptFormat(tokenizer).end_of_turn, tokenizer.eos_token_id):
        if end is not None and end in scorer.eos_ids:
            return int(end)
    raise TokenizerError(
        f"--append-eos: the tokenizer {tokenizer.name_or_path!r} has no special token that ends a "
        "response"
    )
