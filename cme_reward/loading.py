"""Names and settings from the command line, as the objects they stand for."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from cme_reward._values import read_value
from cme_reward.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    from cme_reward.config import CMEConfig
    from cme_reward.reward import CrossModelEntropy

T = TypeVar("T")


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
    """Keep what transformers says about its own loading out of the way, and not what we do."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    warnings.simplefilter("ignore")
    assert logging.lastResort is not None
    logging.getLogger("cme_reward").addHandler(logging.lastResort)  # to standard error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a name on the hub, a directory, or a verifier spec; no weights are loaded.

    Raises:
        TokenizerError: if there is none, or for a spec of several verifiers.
    """
    import cme_reward.verifiers
    from cme_reward.fidelity import load_faithful

    if "+" in name and not Path(name).exists():
        raise TokenizerError(
            f"{name!r} names several verifiers; expected one, since each has a tokenizer of its own"
        )
    kind, _, rest = name.partition(":")
    if kind in ("vllm", "sglang"):
        raise TokenizerError(
            f"{name!r} is a server, and its tokenizer is that of the model it runs; expected that "
            "model's name or directory, such as google/gemma-3-1b-it"
        )
    where = rest if kind in ("hf", "random") and rest else name
    if name == "embedded" and not Path(name).exists():
        where = str(Path(cme_reward.verifiers.__file__).parent / "embedded")
    try:
        return load_faithful(where, trust_remote_code=False)
    except Exception as error:  # of many kinds, for an unknown name, no network, a broken file
        first = str(error).strip().partition("\n")[0]
        raise TokenizerError(
            f"cannot load the tokenizer {name!r}: expected a directory with a tokenizer.json, the "
            "name of a model on the hub (check the spelling, the network and HF_TOKEN), or "
            f"embedded. transformers says: {first}"
        ) from error


def in_a_passing_thread(make: Callable[[], T]) -> T:
    """The function's result, from a thread that ends with it.

    For processes whose verifier runs in a thread: on a CPU, OpenMP keeps threads for each thread
    that has ever used torch, and once these are more than cores, all of them wait asleep. Left
    over from loading, the main thread's made forward passes take 1.4 to 1.9 times as long.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(make())
        except BaseException as error:
            result.set_exception(error)

    # A daemon, so that Ctrl-C does not wait for the rest of the weights.
    threading.Thread(target=run, daemon=True).start()
    return result.result()


def verifier_options(device: str | None, settings: Sequence[str]) -> dict[str, Any]:
    """Keywords for `load_verifier` from a device and `KEY=VALUE` strings.

    Values are read as the types that verifiers declare; what they hand on to transformers has none.

    Raises:
        ConfigError: for a string of another form, or a value of another type.
    """
    options: dict[str, Any] = {} if device is None else {"device": device}
    kinds = _option_types() if settings else {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(
                f"--verifier-option {setting!r}: expected KEY=VALUE, such as dtype=bfloat16"
            )
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
) -> CrossModelEntropy:
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.verifiers import Ensemble, load_verifier

    options = verifier_options(device, settings)
    silence()
    # First: a wrong name is noticed before minutes of loading weights.
    tokenizer = load_tokenizer(generator_tokenizer) if generator_tokenizer else None
    model = load_verifier(verifier, **options)
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
