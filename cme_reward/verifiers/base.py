"""What a verifier is: a frozen language model that can tell how probable a response is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Lists, tuples and one-dimensional integer arrays all serve.
TokenIds: TypeAlias = Sequence[int] | np.ndarray


@runtime_checkable
class Verifier(Protocol):
    """A frozen causal language model, wherever it runs."""

    name: str
    """How reports call it, for example ``hf:google/gemma-3-1b-it``."""
    tokenizer: PreTrainedTokenizerFast
    """The model's own (fast) tokenizer."""
    max_length: int
    """Most tokens of prompt and response together."""
    vocab_size: int
    """Number of tokens a prediction chooses between; ids are below it."""

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """Log-probabilities of the responses, given their prompts.

        Args:
            prompts: one sequence of verifier token ids per response, none of them empty.
            responses: verifier token ids, as many sequences as prompts; a sequence may be empty.

        Returns:
            For each response, in the order given, a float32 array `[S]` that holds
            ``log p(response[s] | prompt, response[:s])`` in nats.
        """
        ...


class Closes:
    """``with`` for what has a `close`."""

    def close(self) -> None:
        """End connections and threads; harmless twice. Weights go with the object."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close(verifier: object) -> None:
    """Close a verifier if it is one that can be closed."""
    if isinstance(verifier, Closes):
        verifier.close()
