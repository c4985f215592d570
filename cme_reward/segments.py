"""Responses -> the assistant turns in them, each with what the verifier is to see before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import Int64
from cme_reward._utf8 import WHOLE_CHAR
from cme_reward.conversation.environment import EnvironmentReader
from cme_reward.prompts import Message, Prompt, as_messages
from cme_reward.spans import NO_TEXT, SpanTable


@dataclass
class Segment:
    """One run of sampled tokens, and its text.

    `chat_prompt` and `chat_said` are what a chat model sees before it: messages, and what the same
    turn already says (tool output inside a response). A base model sees `prompt` and `said`, which
    holds everything after it.
    """

    row: int
    start: int
    stop: int
    prompt: Prompt
    said: str
    chat_prompt: Prompt
    chat_said: str
    text: str
    ends: Int64
    kinds: NDArray[np.uint8]
    eos: int | None
    """Position in the segment of the token that ends the turn; None where it was cut off."""

    dummy_space: bool
    """The text starts with the space of a SentencePiece dummy prefix, which a message lacks."""

    def as_message(self) -> tuple[str, Int64]:
        """Text and ends as part of a chat message."""
        if self.chat_said or not self.dummy_space:
            return self.text, self.ends
        return self.text[1:], np.maximum(self.ends - WHOLE_CHAR, 0)


def split_turns(
    prompts: Sequence[Prompt],
    ids: Sequence[Int64],
    masks: Sequence[NDArray[np.bool_]] | None,
    table: SpanTable,
    reader: EnvironmentReader,
    eos_ids: Int64,
) -> list[Segment]:
    """The assistant turns of responses, in order.

    Args:
        prompts: one per response.
        ids: per response, the generator's ids `[T]`.
        masks: per response `[T]`, True for sampled tokens; False for padding and for what an
            environment wrote. None: all were sampled.
        table: the generator's spans.
        reader: the generator's chat template, for what an environment wrote.
        eos_ids: ids with which the generator ends a turn.
    """
    runs = [[(0, len(row))] for row in ids] if masks is None else [_runs(mask) for mask in masks]
    pieces = [row[i:j] for row, bounds in zip(ids, runs, strict=True) for i, j in bounds]
    decoded = iter(zip(*table.decode_batch(pieces), strict=True))
    segments = []
    ends_of_turn = set(eos_ids.tolist())
    for b, bounds in enumerate(runs):
        chat_prompt = prompts[b]
        # A string is not known to have been rendered by the generator's template.
        said = chat_said = "" if isinstance(prompts[b], str) else reader.prefill
        previous, closed, sampled_end = 0, False, None
        for start, stop in bounds:
            if start > previous:
                written = reader.read(ids[b][previous:start], sampled_end)
                if written.closes or (closed and not written.text.strip()):
                    turn: list[Message] = [{"role": "assistant", "content": chat_said}]
                    chat_prompt = [
                        *as_messages(chat_prompt),
                        *(turn if previous else []),
                        *written.messages,
                    ]
                    words = [m["content"] for m in written.messages if m["content"].strip()]
                    said += "\n\n".join(["", *words, written.prefill])
                    chat_said = written.prefill
                else:
                    said += written.text
                    chat_said += written.text
            text, ends, kinds = next(decoded)
            segments.append(
                Segment(
                    row=b,
                    start=start,
                    stop=stop,
                    prompt=prompts[b],
                    said=said,
                    chat_prompt=chat_prompt,
                    chat_said=chat_said,
                    text=text,
                    ends=ends,
                    kinds=kinds,
                    eos=_turn_end(ids[b][start:stop], kinds, ends_of_turn),
                    dummy_space=table.dummy_prefix and text.startswith(" "),
                )
            )
            said += text
            chat_said += segments[-1].as_message()[0]
            with_text = np.flatnonzero(kinds != NO_TEXT)
            sampled_end = ids[b][start + (int(with_text[-1]) + 1 if with_text.size else 0) : stop]
            previous, closed = stop, segments[-1].eos is not None
    return segments


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Bounds of the runs of True."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(i), int(j)) for i, j in edges.reshape(-1, 2)]


def _turn_end(ids: Int64, kinds: NDArray[np.uint8], eos_ids: set[int]) -> int | None:
    """The first EOS among the special tokens after the text (what follows it is padding)."""
    with_text = np.flatnonzero(kinds != NO_TEXT)
    after = int(with_text[-1]) + 1 if with_text.size else 0
    return next((t for t, i in enumerate(ids[after:].tolist(), after) if i in eos_ids), None)
