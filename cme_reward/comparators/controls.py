"""Controls: cross-model entropy with an untrained verifier, and with the generator as its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from cme_reward import verifiers
from cme_reward.errors import ConfigError
from cme_reward.verifiers import Ensemble, Verifier, load_verifier, split_spec


def random_verifier(
    verifier: Verifier | Ensemble | str, *, seed: int = 0, **options: Any
) -> Verifier | Ensemble:
    """The same architecture and tokenizer with untrained weights (arXiv 2605.29009, the control).

    Args:
        verifier: the spec of a verifier (`hf:NAME`, `embedded`, `random:NAME`, joined by `+`), or
            a `TransformersVerifier` or ensemble of them.
        seed: the weights depend on it alone.
        options: those of `load_verifier("random:...")`.

    Raises:
        ConfigError: for a verifier whose architecture is not at hand, such as a server's.
    """
    if isinstance(verifier, str):
        specs = split_spec(verifier)
        loaded = [load_verifier(_untrained(spec), seed=seed, **options) for spec in specs]
        return loaded[0] if len(loaded) == 1 else Ensemble(loaded)  # type: ignore[arg-type]
    if isinstance(verifier, Ensemble):
        members = [random_verifier(m, seed=seed, **options) for m in verifier.members]
        return Ensemble(members)  # type: ignore[arg-type]
    model: Any = getattr(verifier, "model", None)
    if not hasattr(model, "config"):
        raise ConfigError(
            f"the architecture of {verifier.name} is not at hand; expected a TransformersVerifier "
            'or a spec such as "random:google/gemma-3-1b-it"'
        )
    import torch
    from transformers import AutoModelForCausalLM

    from cme_reward.verifiers.hf import TransformersVerifier

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        untrained = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    return TransformersVerifier(
        untrained.to(model.device),
        verifier.tokenizer,
        **{"max_length": verifier.max_length, "name": f"random:{verifier.name}", **options},
    )


def self_verifier(policy: Any, generator_tokenizer: Any, **options: Any) -> Verifier | Ensemble:
    """The generator as it is now, frozen, as its own verifier.

    Args:
        policy: a causal language model of transformers, of which a copy is kept, or its name.
        generator_tokenizer: its fast tokenizer.
        options: those of `TransformersVerifier`, or of `load_verifier` with a name.
    """
    if isinstance(policy, str):
        return load_verifier(f"hf:{policy.removeprefix('hf:')}", **options)
    from cme_reward.verifiers.hf import TransformersVerifier

    # Wrappers (DDP, PEFT) belong to the training; the copy is a model by itself.
    inner = getattr(policy, "module", policy)
    frozen = copy.deepcopy(inner)
    if hasattr(frozen, "merge_and_unload"):
        frozen = frozen.merge_and_unload()
    return TransformersVerifier(frozen, generator_tokenizer, **{"name": "self", **options})


def verifier_spec(reward: str, verifier: str, policy: str) -> str:
    """The verifier with which `CrossModelEntropy` is a reward of `REWARDS`, for adapters that score
    one response at a time and see of the policy what it sampled.

    Args:
        reward: "cme", or one of the controls: "random" or "self".
        verifier: the spec of the one that is named beside it.
        policy: the generator as it was before training: a name or a path.

    Raises:
        ConfigError: for the other rewards, saying what they would need; for an unknown one.
    """
    key = reward.lower().replace("_", "-")
    if key == "cme":
        return verifier
    if key == "random":
        return "+".join(_untrained(spec) for spec in split_spec(verifier))
    if key == "self":
        return f"hf:{policy}"
    if key in _ELSEWHERE:
        raise ConfigError(
            f"reward={reward!r} {_ELSEWHERE[key]}; expected cme, random or self here. TRL's "
            "trainer has all rewards: python adapters/trl/train.py --reward " + key
        )
    raise ConfigError(f"unknown reward {reward!r}; expected cme, random or self")


_DISTRIBUTIONS = (
    "is made of the policy's distributions at every position, of which the reward is handed the "
    "sampled tokens alone"
)
_VOTE = "is a vote over all rollouts of a prompt, which are scored one at a time"
_ELSEWHERE = {
    "rent": _DISTRIBUTIONS,
    "em-rl-token": _DISTRIBUTIONS,
    "em-rl-sequence": "is the policy's own log-prob, which is no reward of a verifier",
    "intuitor": _DISTRIBUTIONS,
    "ttrl": _VOTE,
    "evol-rl": _VOTE,
    "format-length": "is a function of the text alone, for the framework's own reward functions",
    "rlme": "asks the verifier questions about a response, which the shared verifier is not asked",
}


def _untrained(spec: str) -> str:
    kind, _, name = spec.partition(":")
    if spec == "embedded":
        return f"random:{Path(verifiers.__file__).parent / 'embedded'}"
    if kind in ("hf", "random") and name:
        return f"random:{name}"
    raise ConfigError(
        f"there is no untrained {spec!r}; expected hf:NAME_OR_PATH, random:NAME_OR_PATH or embedded"
    )
