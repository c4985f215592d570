"""Rewards to compare with: any of them takes the place of `CrossModelEntropy`, by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cme_reward.batch import CMEBatch
from cme_reward.comparators.answers import final_answer
from cme_reward.comparators.base import Comparator
from cme_reward.comparators.controls import random_verifier, self_verifier, verifier_spec
from cme_reward.comparators.em_rl import EMRLSequence, EMRLToken
from cme_reward.comparators.evol_rl import EvolRL
from cme_reward.comparators.format_length import FormatLength
from cme_reward.comparators.intuitor import Intuitor
from cme_reward.comparators.policy import PolicyStatistics, policy_statistics
from cme_reward.comparators.rent import RENT
from cme_reward.comparators.rlme import RLME, MetaQuestion
from cme_reward.comparators.ttrl import TTRL
from cme_reward.config import CMEConfig
from cme_reward.errors import ConfigError
from cme_reward.loading import load_tokenizer
from cme_reward.reward import CrossModelEntropy
from cme_reward.verifiers import Ensemble, Verifier, load_verifier

__all__ = [
    "RENT",
    "REWARDS",
    "RLME",
    "TTRL",
    "Comparator",
    "EMRLSequence",
    "EMRLToken",
    "EvolRL",
    "FormatLength",
    "Intuitor",
    "MetaQuestion",
    "PolicyStatistics",
    "call_reward",
    "comparator_of",
    "final_answer",
    "load_reward",
    "needed_statistics",
    "policy_statistics",
    "random_verifier",
    "self_verifier",
    "verifier_spec",
]

REWARDS = {
    "cme": "cross-model entropy of a verifier (arXiv 2605.29009)",
    "rent": "negative mean token entropy of the generator (arXiv 2505.22660)",
    "em-rl-token": "negative sum of token entropies of the generator (arXiv 2505.15134)",
    "em-rl-sequence": "the generator's own log-prob of the response (arXiv 2505.15134)",
    "intuitor": "self-certainty of the generator (arXiv 2505.19590)",
    "ttrl": "agreement with the majority of the rollouts (arXiv 2504.16084)",
    "evol-rl": "the same, and difference from the other rollouts (arXiv 2509.15194)",
    "format-length": "a right format and a middling length (arXiv 2505.19439)",
    "rlme": "an evaluator's answers to questions about the response (arXiv 2601.21268)",
    "self": "control: cross-model entropy of the generator as it was before training",
    "random": "control: cross-model entropy of the verifier's architecture, untrained",
}

_ELSEWHERE = re.compile(r"(?:^|\+)\s*(?:vllm|sglang|python):")
"""Where they run is not ours to say."""
_OWN: dict[str, type[Comparator]] = {
    "rent": RENT,
    "em-rl-token": EMRLToken,
    "em-rl-sequence": EMRLSequence,
    "intuitor": Intuitor,
    "ttrl": TTRL,
    "evol-rl": EvolRL,
    "format-length": FormatLength,
}


def load_reward(
    name: str,
    generator_tokenizer: Any,
    config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
    *,
    verifier: Verifier | Ensemble | str | None = None,
    policy: Any = None,
    eos_token_ids: Iterable[int] = (),
    device: str | None = None,
    **options: Any,
) -> Any:
    """A reward by its name, a `CrossModelEntropy` or a `Comparator`; `call_reward` calls either.

    Args:
        name: one of `REWARDS`.
        generator_tokenizer: the sampler's fast tokenizer, or its name.
        config: see `CMEConfig`, and `Comparator` for what counts there.
        verifier: for "cme", "rlme" and "random": a verifier or the spec of one. The others leave it
            alone, and load nothing.
        policy: for "self": the generator, or its name; a copy is kept.
        eos_token_ids: see `CrossModelEntropy`.
        device: where a verifier that is given by a spec or name is loaded, if in this process.
        options: keywords of the reward, such as `per_token` (RENT, EM-RL, INTUITOR), `answer`
            (TTRL), `format` (format-length), `questions` (RLME), `seed` (random).

    Raises:
        ConfigError: for an unknown name or option, or where a verifier or policy is missing.
    """
    key = name.lower().replace("_", "-")
    if key not in REWARDS:
        known = "\n".join(f"  {known:16} {what}" for known, what in REWARDS.items())
        raise ConfigError(f"unknown reward {name!r}; expected one of\n{known}")
    if isinstance(generator_tokenizer, str):
        generator_tokenizer = load_tokenizer(generator_tokenizer)
    if key in _OWN:
        _check_options(key, _OWN[key], options)
        return _OWN[key](generator_tokenizer, config, eos_token_ids=eos_token_ids, **options)
    named = policy if key == "self" else verifier
    if named is None:
        what = "the generator: policy=MODEL" if key == "self" else "a verifier: verifier=VERIFIER"
        raise ConfigError(f"the reward {key!r} needs {what}, or the name of one")
    here = isinstance(named, str) and not _ELSEWHERE.search(named)
    place = {"device": device} if here and device is not None else {}
    if key == "rlme":
        _check_options(key, RLME, options)
        evaluator = load_verifier(named, **place) if isinstance(named, str) else named
        return RLME(evaluator, generator_tokenizer, config, eos_token_ids=eos_token_ids, **options)
    if key == "self":
        named = self_verifier(named, generator_tokenizer, **place, **options)
    elif key == "random":
        named = random_verifier(named, **place, **options)
    elif isinstance(named, str):
        named = load_verifier(named, **place, **options)
    elif options:
        raise ConfigError(f"{sorted(options)}: no options of a verifier that is loaded already")
    return CrossModelEntropy(named, generator_tokenizer, config, eos_token_ids=eos_token_ids)


def comparator_of(name: str) -> type[Comparator] | None:
    """The class of a reward of `REWARDS`; None where it is a `CrossModelEntropy`."""
    return RLME if name == "rlme" else _OWN.get(name)


def needed_statistics(reward: Any) -> tuple[str, ...]:
    """Fields of `PolicyStatistics` that an adapter has to supply for a reward."""
    if getattr(reward.config, "baseline", "none") == "policy":
        return ("logprobs",)
    return getattr(reward, "needs", ())


def call_reward(
    reward: Any,
    prompts: Sequence[Any],
    response_ids: Any,
    response_masks: Any = None,
    statistics: PolicyStatistics | None = None,
) -> CMEBatch:
    """Call any reward, `CrossModelEntropy` included, with what `needed_statistics` names."""
    given = statistics or PolicyStatistics()
    if isinstance(reward, Comparator):
        return reward(prompts, response_ids, response_masks, policy_statistics=given)
    return reward(prompts, response_ids, response_masks, given.logprobs)


def _check_options(name: str, build: Callable[..., Any], options: dict[str, Any]) -> None:
    parameters = inspect.signature(build).parameters.values()
    known = [
        p.name
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != "eos_token_ids"
    ]
    for option in options:
        if option not in known:
            raise ConfigError(f"{option!r} is no option of {name!r}; known: {', '.join(known)}")
