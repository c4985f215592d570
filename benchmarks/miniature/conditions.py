"""What is compared: every condition by its name, and the groups they are reported in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.grpo import Settings
from benchmarks.miniature.candidates import Candidate

STRONGEST = "verifier-4"


@dataclass(frozen=True)
class Condition:
    """One way to train the generator."""

    name: str
    reward: str = "cme"
    """A name of `cme_reward.comparators.REWARDS`, or "oracle": the program's grades."""
    verifier: str = STRONGEST
    """A name of `Cast.model`."""
    regime: str = "pretrained"
    """The generator to start from."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `CMEConfig`."""
    candidate: Candidate = Candidate()  # noqa: RUF009 (frozen)
    """What is tried besides."""
    steps: int = 100
    cosine: bool = True
    lr: float | None = None
    """Learning rate; None: the usual one."""
    every: int = 20
    """Steps between two measurements."""
    trainer: str = "loop"
    """"loop", or "trl" for TRL's trainer."""
    half: str = "short"
    """Of the tasks, see `tasks.HALVES`."""
    prompts: int | None = None
    """Of an update; None: the usual number."""
    kl: float = 0.0
    """Weight of the divergence from the generator as it was."""
    seeds: int = 3
    """How many runs it has unless told: what its question needs and three hours of study allow."""

    def settings(self, base: Settings) -> Settings:
        lr = base.lr if self.lr is None else self.lr
        return replace(
            base,
            steps=self.steps,
            prompts=base.prompts if self.prompts is None else min(self.prompts, base.prompts),
            cosine=self.cosine,
            lr=lr,
            every=self.every,
            kl=self.kl,
        )


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
        Condition("Evol-RL", reward="evol-rl"),
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

    def fast(name: str, **config: Any) -> Condition:
        return Condition(f"fast: {name}", config=config, steps=150, cosine=False, lr=1e-3)

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
        fast("token, returns-to-go 0.9", credit="return", gamma=0.9),
        fast("token, eps 1", eps=1.0),
        fast("token, not divided", scale="none"),
        fast("token, returns-to-go 1", credit="return"),
        fast("sequence, EOS masked, eps 0.1", level="sequence", **masked),
    ]


def _horizon() -> list[Condition]:
    """What a token is credited with, over ten times the usual updates, without the cosine."""

    def ten(name: str, seeds: int = 2, **config: Any) -> Condition:
        return Condition(
            f"horizon: {name}", config=config, steps=1000, cosine=False, every=50, seeds=seeds
        )

    returns: dict[str, Any] = {"credit": "return", "scale": "batch"}
    policy: dict[str, Any] = {"baseline": "policy"}
    return [
        ten("token", 11),
        ten("sequence", 11, level="sequence"),
        ten("return", 11, **returns),
        ten("token, policy baseline", **policy),
        ten("return, policy baseline", 11, **returns, **policy),
        ten("sequence, policy baseline", level="sequence", **policy),
        ten("token, EOS masked", eos="mask"),
        ten("token, eps 1e-4", eps=1e-4),
        ten("token, not divided", scale="none"),
        ten("token, white space kept", whitespace="keep"),
    ]


def _screen() -> list[Condition]:
    """Candidates over twice the usual updates, without the cosine, each beside what it changes."""

    def twice(name: str, change: Candidate = Candidate(), **config: Any) -> Condition:  # noqa: B008
        return Condition(
            f"screen: {name}", config=config, candidate=change, steps=200, cosine=False, every=50,
            seeds=3,
        )  # fmt: skip

    returns: dict[str, Any] = {"credit": "return", "scale": "batch"}
    sequence: dict[str, Any] = {"level": "sequence"}
    return [
        twice("token"),
        twice("sequence", **sequence),
        twice("return", **returns),
        twice("token, power 0.5", Candidate(power=0.5)),
        twice("token, contrast 0.5", Candidate(contrast=0.5)),
        twice("token, power 0.5, contrast 0.5", Candidate(power=0.5, contrast=0.5)),
        twice("token, divided by the batch's deviation", scale="batch"),
        twice("token, gated by the response", Candidate(gate=True)),
        twice("token, half of the sequence's", Candidate(blend=0.5)),
        twice("sequence, soft minimum", Candidate(worst=1.0), **sequence),
        twice("sequence, power 0.5", Candidate(power=0.5), **sequence),
        twice("return, gamma 0.9", **returns, gamma=0.9),
        twice("return, gamma 0.5", **returns, gamma=0.5),
        twice("return, divided per position", credit="return"),
        twice("return, power 0.5", Candidate(power=0.5), **returns),
        twice("return, contrast 0.5", Candidate(contrast=0.5), **returns),
        twice("return, EOS masked", **returns, eos="mask"),
        twice("return, policy baseline", **returns, baseline="policy"),
        twice("return, policy baseline, white space kept", **returns, baseline="policy",
              whitespace="keep"),
    ]  # fmt: skip


def _claims() -> list[Condition]:
    """The paper's settings, over twice the usual updates, without the cosine."""

    def twice(name: str, **config: Any) -> Condition:
        return Condition(
            f"claims: {name}", config=config, steps=200, cosine=False, every=50, seeds=24
        )

    return [
        twice("token"),
        twice("sequence", level="sequence"),
        twice("token, EOS masked", eos="mask"),
        twice("token, eps 1e-4", eps=1e-4),
        twice("token, not divided", scale="none"),
        twice("token, policy baseline", baseline="policy"),
    ]


MIDDLING = "verifier-3"
"""Of the long half: right in two cases of three."""
LONG_LR = 1e-4
"""The largest of 3e-4 and 1e-4 at which 200 updates by the program's own grades help a generator
of long answers (sampled accuracy 0.14 to 0.36); at 3e-4 they ruin it (0.07)."""


def _harder() -> list[Condition]:
    """Long answers and a middling verifier, over twice the usual updates, without the cosine; what
    a token is credited with also over ten times as many."""

    def harder(
        name: str,
        change: Candidate = Candidate(),  # noqa: B008
        reward: str = "cme",
        kl: float = 0.0,
        steps: int = 200,
        seeds: int = 1,
        **config: Any,
    ) -> Condition:
        return Condition(
            f"harder: {name}", reward, MIDDLING, config=config, candidate=change, kl=kl,
            steps=steps, cosine=False, lr=LONG_LR, every=50, half="long", prompts=4, seeds=seeds,
        )  # fmt: skip

    returns: dict[str, Any] = {"credit": "return", "scale": "batch"}
    sequence: dict[str, Any] = {"level": "sequence"}
    policy: dict[str, Any] = {"baseline": "policy"}
    keep: dict[str, Any] = {"whitespace": "keep"}
    return [
        harder("token", seeds=8),
        harder("sequence", seeds=4, **sequence),
        harder("return", **returns),
        harder("return, policy baseline", **returns, **policy),
        harder("oracle", reward="oracle"),
        harder("random verifier, sequence", reward="random", **sequence),
        harder("sequence, policy baseline", **sequence, **policy),
        harder("token, policy baseline", **policy),
        harder("token, white space kept", seeds=8, **keep),
        harder("token, white space kept, policy baseline", **keep, **policy),
        harder("return, white space kept, policy baseline", **returns, **policy, **keep),
        harder("return, gamma 0.95", **returns, gamma=0.95),
        harder("return, gamma 0.95, policy baseline", **returns, **policy, gamma=0.95),
        harder("return, centred", Candidate(centre=True), **returns),
        harder("return, centred, policy baseline", Candidate(centre=True), **returns, **policy),
        harder("token, half of the sequence's", Candidate(blend=0.5)),
        harder("token, gated by the response", Candidate(gate=True)),
        harder("token, power 0.5", Candidate(power=0.5)),
        harder("token, contrast 0.5", Candidate(contrast=0.5)),
        harder("sequence, soft minimum", Candidate(worst=1.0), **sequence),
        harder("sequence, three verifiers", Candidate(spread=0.0), **sequence),
        harder("sequence, three verifiers minus deviation", Candidate(spread=1.0), **sequence),
        harder("sequence, minus half a weaker one", Candidate(minus=0.5), **sequence),
        harder(
            "token, white space kept, policy baseline, early tokens more",
            Candidate(early=0.5),
            **keep,
            **policy,
        ),
        harder("sequence, half of the prompts", Candidate(kept=0.5), **sequence),
        harder("sequence, rescaled by length", Candidate(shorter=1.0), **sequence),
        harder("TTRL", reward="ttrl"),
        harder("Evol-RL", reward="evol-rl"),
        harder("format and length", reward="format-length"),
        harder("sequence, KL 0.01", kl=0.01, **sequence),
        harder("sequence, KL 0.1", kl=0.1, **sequence),
        harder("token, white space kept, KL 0.1", kl=0.1, **keep),
        harder("1,000 updates, token", steps=1000),
        harder("1,000 updates, token, white space kept", steps=1000, **keep),
        harder("1,000 updates, sequence", steps=1000, **sequence),
        harder("1,000 updates, sequence, policy baseline", steps=1000, **sequence, **policy),
    ]


GROUPS: dict[str, list[Condition]] = {
    "rewards": _rewards(),
    "verifiers": _verifiers(),
    "regimes": _regimes(),
    "lessons": _lessons(),
    "horizon": _horizon(),
    "screen": _screen(),
    "claims": _claims(),
    "harder": _harder(),
}
STUDY = ("horizon", "screen", "claims", "harder")
"""Groups that take hours: only where they, or the study, are asked for."""
CONDITIONS: dict[str, Condition] = {c.name: c for group in GROUPS.values() for c in group}
