"""Other rewards of the package, as scores beside those of cross-model entropy."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_type_hints

from cme_reward._settings import read_assignment, read_settings
from cme_reward.cli.jsonl import Bad
from cme_reward.cli.rank_rows import Response
from cme_reward.cli.score import in_halves, row_ids
from cme_reward.comparators import REWARDS, Comparator, comparator_of, load_reward, verifier_spec
from cme_reward.comparators.policy import STATISTICS, PolicyStatistics, policy_statistics
from cme_reward.conversation.format import PromptFormat
from cme_reward.errors import ConfigError
from cme_reward.verifiers.hf import TransformersVerifier

if TYPE_CHECKING:
    from cme_reward.reward import CrossModelEntropy
    from cme_reward.spans.table import SpanTable

CONTROLS = ("random", "self")
"""Rewards that are cross-model entropy of another verifier."""


@dataclass(frozen=True)
class Asked:
    """A reward by name and options: `rent`, `format-length longest=512`."""

    text: str
    name: str
    options: dict[str, Any]

    @property
    def needs_statistics(self) -> bool:
        """Whether it is made of the policy's distributions."""
        kind = comparator_of(self.name)
        return bool(kind and kind.needs)

    @classmethod
    def read(cls, text: str) -> Asked:
        """As `--reward` gives it.

        Raises:
            ConfigError: for an unknown reward or option, or a value of another type.
        """
        name, *settings = shlex.split(text) or [""]
        key = name.lower().replace("_", "-")
        if key not in REWARDS or key == "cme":
            known = ", ".join(sorted(set(REWARDS) - {"cme"}))
            raise ConfigError(
                f"--reward {text!r}: expected one of {known}, with options such as "
                "'format-length longest=512'; cross-model entropy is there without it"
            )
        given = dict(read_assignment(f"--reward {name}", s, "longest=512") for s in settings)
        kind = comparator_of(key)
        if given and kind is None:
            raise ConfigError(f"--reward {text!r}: {key} has no options")
        kinds = get_type_hints(kind.__init__) if kind else {}
        left_out = ("return", "generator_tokenizer", "config", "verifier", "eos_token_ids")
        known_kinds = {name: kinds[name] for name in kinds if name not in left_out}
        return cls(text, key, read_settings(given, known_kinds, section=f"--reward {key}"))


def require_policy(policy: str | None, asked: Sequence[Asked]) -> None:
    """Before anything is loaded.

    Raises:
        ConfigError: for a reward that is made of what the policy says, without one.
    """
    for one in asked:
        if policy is None and (one.name == "self" or one.needs_statistics):
            raise ConfigError(
                f"--reward {one.text!r} is made of what the model that wrote the responses says of "
                "them; name it with --policy NAME_OR_PATH"
            )


def controls(asked: Sequence[Asked], verifier: str, policy: str | None) -> list[tuple[str, str]]:
    """The controls among them as what they are called and the verifier that makes them."""
    return [
        (one.text, verifier_spec(one.name, verifier, str(policy)))
        for one in asked
        if one.name in CONTROLS
    ]


class Policy:
    """The model that wrote the responses; `loaded`, where it is a verifier too."""

    def __init__(self, name: str, device: str | None, loaded: Any = None) -> None:
        loaded = loaded or TransformersVerifier.from_pretrained(name, device=device)
        self.model = loaded.model
        self.format = PromptFormat(loaded.tokenizer)

    def read(
        self, rows: Sequence[Response], table: SpanTable, eos_id: int | None
    ) -> Iterator[PolicyStatistics | Bad]:
        """What it says of each row's tokens, at temperature 1.

        Where texts end with `eos_id`, of what its own template writes there: a base model's may
        end an answer with its line, and its EOS is then a token that it never writes.
        """
        own = eos_id
        if eos_id is not None and self.format.end_of_turn is not None:
            own = self.format.end_of_turn
        return in_halves(rows, lambda part: self._read(part, row_ids(table, part, own)))

    def _read(self, rows: Sequence[Response], ids: list[list[int]]) -> list[PolicyStatistics]:
        prompts: list[list[int]] = []
        for k, row in enumerate(rows):
            again = k and rows[k - 1].prompt == row.prompt  # rollouts stand beside each other
            prompts.append(prompts[-1] if again else self.format.render(row.prompt))
        # Padding that is no id can be read as any.
        found = policy_statistics(self.model, prompts, [[max(i, 0) for i in row] for row in ids])
        columns = [getattr(found, name) for name in STATISTICS]
        return [
            PolicyStatistics(*([values] for values in row)) for row in zip(*columns, strict=True)
        ]


@dataclass
class Rival:
    """A reward that is not cross-model entropy."""

    name: str
    reward: Comparator

    def score(self, rows: Sequence[Response], eos_id: int | None) -> list[float]:
        """Its reward of each row."""
        said = {name: [getattr(row.said, name)[0] for row in rows] for name in self.reward.needs}
        batch = self.reward(
            [row.prompt for row in rows],
            row_ids(self.reward.table, rows, eos_id),
            [row.response_mask for row in rows],
            policy_statistics=PolicyStatistics(**said),
        )
        return batch.sequence_rewards.tolist()


def rivals(asked: Sequence[Asked], scorers: dict[str, CrossModelEntropy]) -> list[Rival]:
    """Those of them that are no controls; those that ask a verifier once for each, by its name."""
    made = []
    for one in asked:
        if one.name in CONTROLS:
            continue
        for called, scorer in scorers.items():
            asks = one.name == "rlme"
            generator = scorer.generator
            reward = load_reward(
                one.name,
                generator.tokenizer,
                # Of the settings, the baseline is cross-model entropy's own.
                replace(scorer.config, baseline="none"),
                verifier=scorer.verifier,
                **one.options,
            ).for_generator(padded_vocabulary=generator.padded_vocabulary)
            made.append(Rival(f"{called}: {one.text}" if asks else one.text, reward))
            if not asks:
                break
    return made
