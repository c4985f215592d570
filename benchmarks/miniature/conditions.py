"""What is compared: every condition by its name, and the groups they are reported in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.miniature.grpo import Settings

STRONGEST = "verifier-4"


@dataclass(frozen=True)
class Condition:
    """One way to train the generator."""

    name: str
    reward: str = "cme"
    """A name of `cme_reward.comparators.REWARDS`."""
    verifier: str = STRONGEST
    """A name of `Cast.model`."""
    regime: str = "pretrained"
    """The generator to start from."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `CMEConfig`."""
    gamma: float | None = None
    """Discount of returns-to-go; None: rewards as they are."""
    steps: int = 100
    cosine: bool = True
    lr: float | None = None
    """Learning rate; None: the usual one."""
    trainer: str = "loop"
    """"loop", or "trl" for TRL's trainer."""

    def settings(self, base: Settings) -> Settings:
        lr = base.lr if self.lr is None else self.lr
        return replace(base, steps=self.steps, cosine=self.cosine, lr=lr)


def _rewards() -> list[Condition]:
    sequence = {"level": "sequence"}
    return [
        Condition("CME, token"),
        Condition("CME, sequence", config=sequence),
        Condition("CME, token, policy baseline", config={"baseline": "policy"}),
        Condition("RENT", reward="rent"),
        Condition("EM-RL", reward="em-rl-token"),
        Condition("INTUITOR", reward="intuitor"),
        Condition("TTRL", reward="ttrl"),
        Condition("RLME", reward="rlme"),
        Condition("self-verifier, token", reward="self"),
        Condition("random verifier, token", reward="random"),
        Condition("random verifier, sequence", reward="random", config=sequence),
        Condition("CME, token, in TRL", trainer="trl"),
    ]


def _verifiers() -> list[Condition]:
    names = ("verifier-1", "verifier-2", "verifier-3", "same-family", "same-tokenizer")
    return [Condition(f"CME, token, {name}", verifier=name) for name in names]


def _regimes() -> list[Condition]:
    return [Condition(f"CME, token, from {name}", regime=name) for name in ("sft", "preference")]


def _lessons() -> list[Condition]:
    """What the deviation is divided by, and whether stopping is paid for, beyond the usual steps.

    "long" doubles the steps at the usual learning rate, "fast" trains at three times that rate:
    both without the cosine, under which any drift would slow down and stop.
    """

    def long(name: str, **config: Any) -> Condition:
        return Condition(f"long: {name}", config=config, steps=200, cosine=False)

    def fast(name: str, gamma: float | None = None, **config: Any) -> Condition:
        return Condition(
            f"fast: {name}", config=config, gamma=gamma, steps=150, cosine=False, lr=1e-3
        )

    masked: dict[str, Any] = {"eos": "mask"}
    return [
        long("token, eps 0.1"),
        long("token, eps 1e-4", eps=1e-4),
        long("token, EOS masked, eps 0.1", **masked),
        long("token, EOS masked, eps 1e-4", eps=1e-4, **masked),
        fast("token, eps 0.1"),
        fast("token, eps 1e-4", eps=1e-4),
        fast("token, EOS masked, eps 0.1", **masked),
        fast("token, EOS masked, eps 1e-4", eps=1e-4, **masked),
        fast("sequence, eps 0.1", level="sequence"),
        fast("token, returns-to-go 0.9", gamma=0.9),
        fast("token, eps 1", eps=1.0),
        fast("token, not divided", scale="none"),
        fast("token, returns-to-go 1", gamma=1.0),
        fast("sequence, EOS masked, eps 0.1", level="sequence", **masked),
    ]


GROUPS: dict[str, list[Condition]] = {
    "rewards": _rewards(),
    "verifiers": _verifiers(),
    "regimes": _regimes(),
    "lessons": _lessons(),
}
CONDITIONS: dict[str, Condition] = {c.name: c for group in GROUPS.values() for c in group}
