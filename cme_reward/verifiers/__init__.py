"""Where a verifier can run, by the spec that names it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cme_reward.errors import ConfigError, VerifierError
from cme_reward.loading import of_module
from cme_reward.verifiers.base import Verifier
from cme_reward.verifiers.conformance import check_verifier
from cme_reward.verifiers.ensemble import Ensemble

__all__ = ["SPECS", "Ensemble", "Verifier", "check_verifier", "load_verifier", "split_spec"]

SPECS = {
    "embedded": "the small model shipped with this package; for trying things out, works offline",
    "hf:NAME_OR_PATH": "a causal language model of transformers, in this process",
    "random:NAME_OR_PATH": "the same architecture, untrained: the paper's control",
    "vllm:URL[,URL...]": "a model that vLLM servers run",
    "sglang:URL[,URL...]": "a model that SGLang servers run",
    "python:MODULE:NAME": "your own: what a function of the options, or a class, gives",
    "SPEC+SPEC": "an ensemble: the mean of the aligned log-probs",
}


def load_verifier(spec: str, **options: Any) -> Verifier | Ensemble:
    """The verifier that a spec names.

    Args:
        spec: `"embedded"`, `"hf:NAME_OR_PATH"`, `"random:NAME_OR_PATH"`, `"vllm:URL"`,
            `"sglang:URL"` (several replicas: URLs joined by commas), `"python:MODULE:NAME"` (a
            function or class, in the working directory or installed, called with the options), or
            several of these joined by `+`. Where the path of a folder holds a `+`, and the folder
            exists, it is one name.
        options: for `hf:` the keywords of `TransformersVerifier.from_pretrained` (`dtype`,
            `device`, `offload`, `compile`, `quantization_config`, ...), for `random:` those of
            `from_config`, for `vllm:` and `sglang:` those of `EndpointVerifier` (`tokenizer`,
            `model`, `concurrency`, ...). All members of an ensemble get the same.

    Raises:
        ConfigError: for an option that a verifier does not have, or a value out of range.
        VerifierError: for an unknown spec (lists the known ones), or a model that does not load.
    """
    # Each of them known, before the first one loads.
    loaders = [_loader(part, spec) for part in split_spec(spec)]
    members = [load(**options) for load in loaders]
    return Ensemble(members) if len(members) > 1 else members[0]


def split_spec(spec: str) -> list[str]:
    """The members that a spec names. A `+` in the path of a folder that exists is part of it."""
    pieces, members = spec.split("+"), []
    while pieces:
        longest = range(len(pieces), 1, -1)
        n = next((n for n in longest if _is_folder("+".join(pieces[:n]).strip())), 1)
        members.append("+".join(pieces[:n]).strip())
        del pieces[:n]
    return members


def _is_folder(spec: str) -> bool:
    kind, _, name = spec.partition(":")
    return kind in ("hf", "random") and os.path.isdir(name)


def _loader(part: str, spec: str) -> Callable[..., Verifier]:
    kind, _, name = part.partition(":")
    if kind == "embedded" and not name:
        return _embedded
    loader = _LOADERS.get(kind)
    if loader is None or not name:
        known = "\n".join(f"  {form:22} {what}" for form, what in SPECS.items())
        if part != spec.strip():
            known += f"\n{spec!r} names several; a + is part of a name where such a folder exists"
        raise VerifierError(f"unknown verifier {part!r}; expected one of\n{known}")
    return partial(loader, name)


def _hf(name: str, **options: Any) -> Verifier:
    from cme_reward.verifiers.hf import TransformersVerifier  # model code: seconds to import

    return TransformersVerifier.from_pretrained(name, **options)


def _random(name: str, **options: Any) -> Verifier:
    from cme_reward.verifiers.hf import TransformersVerifier

    return TransformersVerifier.from_config(name, **options)


def _embedded(**options: Any) -> Verifier:
    from cme_reward.verifiers.hf import TransformersVerifier

    folder = Path(__file__).parent / "embedded"
    return TransformersVerifier.from_pretrained(
        str(folder), **{"dtype": "float32", "name": "embedded", **options}
    )


def _endpoint(engine: str, urls: str, **options: Any) -> Verifier:
    from cme_reward.verifiers.endpoint import EndpointVerifier  # needs httpx

    known = list(inspect.signature(EndpointVerifier).parameters)[2:]
    for key in options.keys() - set(known):
        raise ConfigError(
            f"{key}={options[key]!r} is no option of a verifier behind HTTP, whose server decides "
            f"how the model runs; expected some of {', '.join(known)}"
        )
    return EndpointVerifier(engine, [url.strip() for url in urls.split(",")], **options)


def _python(where: str, **options: Any) -> Verifier:
    spec = f"python:{where}"
    try:
        make = of_module(where)
    except ImportError as error:
        raise VerifierError(
            f"{spec!r} cannot be imported: {error}; expected python:MODULE:NAME, with the module "
            "in the working directory or installed"
        ) from error
    if not callable(make):
        raise VerifierError(f"{spec!r}: it is {make!r}; expected a function or a class")
    try:
        made: Any = make(**options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ConfigError(f"{spec!r} takes no such option: {error}") from error
    if isinstance(made, Ensemble) or not isinstance(made, Verifier):
        raise VerifierError(
            f"{spec!r} gave {type(made).__name__}; expected one verifier, with name, tokenizer, "
            "max_length, vocab_size and logprobs"
        )
    return made


_LOADERS: dict[str, Callable[..., Verifier]] = {
    "hf": _hf,
    "random": _random,
    "vllm": partial(_endpoint, "vllm"),
    "sglang": partial(_endpoint, "sglang"),
    "python": _python,
}
