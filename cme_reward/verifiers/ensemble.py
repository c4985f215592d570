"""Several verifiers as one."""

from __future__ import annotations

from collections.abc import Sequence

from cme_reward.errors import VerifierError
from cme_reward.verifiers.base import Closes, Verifier, close


class Ensemble(Closes):
    """Verifiers whose aligned log-probs are averaged, token by token.

    Not itself a `Verifier`: its members have tokenizers of their own, and are averaged on the
    generator's tokens. A token is scored where all members score it.
    """

    def __init__(self, members: Sequence[Verifier]) -> None:
        if not members:
            raise VerifierError("an ensemble has no members; expected at least one verifier")
        self.members = tuple(members)

    def __repr__(self) -> str:
        return f"Ensemble({list(self.members)!r})"

    def close(self) -> None:
        """Close the members."""
        for member in self.members:
            close(member)

    @property
    def name(self) -> str:
        """The members' names, joined as in a spec."""
        return "+".join(member.name for member in self.members)
