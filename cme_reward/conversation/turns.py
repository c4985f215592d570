"""Responses -> the assistant turns in them, each with what the verifier is to see before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import PADDING, Int64, place_of
from cme_reward.conversation.environment import EnvironmentReader
from cme_reward.conversation.format import PromptFormat
from cme_reward.conversation.messages import Message, Prompt, as_messages
from cme_reward.conversation.thinking import Piece, Split, split_thoughts
from cme_reward.errors import InputError
from cme_reward.spans.kinds import NO_TEXT, THOUGHT, UNFINISHED, kinds_of
from cme_reward.spans.table import SpanTable
from cme_reward.spans.utf8 import WHOLE_CHAR


class Thinking(NamedTuple):
    """What becomes of a generator's thoughts, see `CMEConfig.thinking`."""

    mode: str = "score"
    tags: tuple[str, str] = ("<think>", "</think>")
    tag_ids: Mapping[int, bool] = {}
    """Special tokens that are tags and write no text, and whether they open."""


class Shown(NamedTuple):
    """The text of a segment as a verifier sees it."""

    lead: str
    """White space that the verifier's template writes in front of an answer."""
    text: str
    ends: Int64
    """Right ends of the generator's tokens in `text`."""

    @property
    def whole(self) -> str:
        """What the verifier's tokenizer reads."""
        return self.lead + self.text

    def within(self, positions: Int64) -> Int64:
        """Positions in `whole` as positions in `text`: 0 for those in front of it."""
        return np.maximum(positions - WHOLE_CHAR * len(self.lead), 0) if self.lead else positions


@dataclass
class Segment:
    """A stretch of sampled tokens that is scored at once: a run of them, or an answer in it.

    `chat_prompt` and `chat_said` are what a chat model sees before it: messages, and what the same
    turn already says (what the template puts at its start, tool output, thoughts that are not
    scored). A base model sees `prompt` and `said`, which holds everything after it. Tokens whose
    text is not in `text` have no width.
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

    word_space: bool
    """The text starts with the space that belongs to its first word's token, see `_word_space`."""

    share_T: NDArray[np.float64] | None = None
    """How much of each token's text is in `text`; None for all of it."""

    n_thinking: int = 0
    """Tokens with text that is all in thoughts, tags included."""

    unclosed: bool = False
    """It ends inside a thought."""

    def as_message(self) -> tuple[str, Int64]:
        """Text and ends as part of a chat message."""
        if self.chat_said or not self.word_space:
            return self.text, self.ends
        return self.text[1:], np.maximum(self.ends - WHOLE_CHAR, 0)

    def shown(self, style: PromptFormat) -> Shown:
        """As a verifier that is prompted so sees it."""
        if not style.is_chat:
            return Shown("", self.text, self.ends)
        return Shown("" if self.chat_said else style.lead, *self.as_message())


@dataclass
class _Part(Piece):
    """Of an assistant's turn: sampled tokens, or what a template or an environment put there."""

    start: int = 0
    stop: int = 0
    ends: Int64 | None = None
    """None where nothing was sampled."""
    kinds: NDArray[np.uint8] | None = None
    eos: int | None = None


@dataclass
class _Turn:
    messages: list[Message]
    """Of an environment, before it."""
    parts: list[_Part] = field(default_factory=list)


def split_turns(
    prompts: Sequence[Prompt],
    ids: Sequence[Int64],
    masks: Sequence[NDArray[np.bool_]] | None,
    table: SpanTable,
    reader: EnvironmentReader,
    eos_ids: Int64,
    thinking: Thinking = Thinking(),  # noqa: B008 (immutable)
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
        thinking: what becomes of thoughts.
    """
    runs = [[(0, len(row))] for row in ids] if masks is None else [_runs(mask) for mask in masks]
    pieces = [row[i:j] for row, bounds in zip(ids, runs, strict=True) for i, j in bounds]
    decoded = zip(*table.decode_batch(pieces), strict=True)
    ends_of_turn = set(eos_ids.tolist())

    def part_of(row: Int64, start: int, stop: int) -> _Part:
        text, ends, kinds = next(decoded)
        tags = _tags(row[start:stop], ends, thinking.tag_ids) if thinking.tag_ids else []
        return _Part(text, tags, start, stop, ends, kinds,
                     _turn_end(row[start:stop], kinds, ends_of_turn))  # fmt: skip

    segments: list[Segment] = []
    for b, (row, bounds) in enumerate(zip(ids, runs, strict=True)):
        parts = (part_of(row, start, stop) for start, stop in bounds)
        # A string is not known to have been rendered by the generator's template.
        prefill = Piece() if isinstance(prompts[b], str) else reader.prefill
        turns = _turns(row, parts, prefill, reader)
        segments += _segments(b, prompts[b], turns, thinking, dummy=table.dummy_prefix)
    return segments


def check_environment(flat: Int64, offsets: Int64, sampled: NDArray[np.bool_]) -> None:
    """Raise `InputError` for padding between sampled tokens, where an environment's words are."""
    for at in np.flatnonzero(flat == PADDING):
        b, position = place_of(at, offsets)
        row = sampled[offsets[b] : offsets[b + 1]]
        if row[:position].any() and row[position:].any():
            raise InputError(
                f"response {b}, position {position} has mask 0, is not in the vocabulary, and lies "
                "between sampled tokens: what an environment wrote there is shown to the verifier. "
                "Expected its ids; -100 and the like can stand before and after what was sampled"
            )


def _turns(
    row: Int64, parts: Iterator[_Part], prefill: Piece, reader: EnvironmentReader
) -> list[_Turn]:
    """Sampled parts and what lies between them, turn by turn."""
    turns = [_Turn([], [_Part(prefill.text, prefill.tags)])]
    previous: _Part | None = None
    for part in parts:
        if part.start > (previous.stop if previous else 0):
            unsampled = row[previous.stop if previous else 0 : part.start]
            end = None
            if previous is not None and previous.eos is not None:
                end = row[previous.start + previous.eos : previous.stop]
            written = reader.read(unsampled[unsampled != PADDING], end)
            if written.closes or (end is not None and not written.words.text.strip()):
                begin = _Part(written.prefill.text, written.prefill.tags)
                turns.append(_Turn(list(written.messages), [begin]))
            else:
                turns[-1].parts.append(_Part(written.words.text, written.words.tags))
        turns[-1].parts.append(part)
        previous = part
    return turns


def _segments(
    row: int, prompt: Prompt, turns: list[_Turn], thinking: Thinking, *, dummy: bool
) -> list[Segment]:
    """What of a response is scored, each with what is shown before it."""
    segments: list[Segment] = []
    chat_prompt, said, chat_said, spoke = prompt, "", "", False
    for n, turn in enumerate(turns):
        if n:
            own: list[Message] = [{"role": "assistant", "content": chat_said}] if spoke else []
            chat_prompt = [*as_messages(chat_prompt), *own, *turn.messages]
            words = [m["content"] for m in turn.messages if m["content"].strip()]
            said = "\n\n".join([said, *words, ""])
            chat_said = ""
        spoke = any(part.ends is not None for part in turn.parts)
        for part, split in zip(turn.parts, split_thoughts(turn.parts, thinking.tags), strict=True):
            shown = 0  # characters of the part so far
            if part.ends is None:
                kept = split.answers if thinking.mode == "hide" else [(0, len(part.text))]
                text = "".join(part.text[i:j] for i, j in kept)
                said, chat_said = said + text, chat_said + text
                continue
            for start, stop, (i, j) in _stretches(part, split, thinking.mode):
                context = part.text[shown:i] if thinking.mode == "condition" else ""
                strip = not chat_said and not shown and _word_space(context, dummy=dummy)
                said, chat_said = said + context, chat_said + context[strip:]
                segment = _segment(row, part, start, stop, (i, j))
                segment.prompt, segment.said = prompt, said
                segment.chat_prompt, segment.chat_said = chat_prompt, chat_said
                segment.word_space = not i and _word_space(segment.text, dummy=dummy)
                segment.n_thinking = _n_thinking(part, split, start, stop)
                segment.unclosed = split.unclosed and stop == part.stop - part.start
                segments.append(segment)
                said, chat_said = said + segment.text, chat_said + segment.as_message()[0]
                shown = j
    return segments


def _word_space(text: str, *, dummy: bool) -> bool:
    """Whether a turn that begins so begins with a space which is no part of what it says.

    A base model that goes on after "Answer:" says " Paris", in one token, and SentencePiece puts a
    dummy prefix in front of everything. No chat model's turn begins so: a verifier that is shown
    the space may give it ten nats. More white space than one space is text, such as indented code.
    """
    return text.startswith(" ") and (dummy or bool(text[1:2].strip()))


def _stretches(part: _Part, split: Split, mode: str) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Tokens `[start, stop)` of the part, and the characters of theirs that are scored.

    A token that starts in an answer belongs to it, one that starts in a thought to the answer
    behind that.
    """
    assert part.ends is not None
    answers = [(0, len(part.text))] if mode == "score" else split.answers
    first = 0
    for i, j in answers[:-1]:  # token t starts where the one before it ends
        stop = int(np.searchsorted(part.ends[:-1], WHOLE_CHAR * j)) + 1
        yield first, stop, (i, j)
        first = stop
    yield first, len(part.ends), answers[-1]


def _segment(row: int, part: _Part, start: int, stop: int, at: tuple[int, int]) -> Segment:
    """The tokens `[start, stop)` with the text `at` of the part, nothing before it yet."""
    assert part.ends is not None
    assert part.kinds is not None
    ends, kinds, text = part.ends[start:stop], part.kinds[start:stop], part.text[at[0] : at[1]]
    share_T = None
    if at != (0, len(part.text)):
        widths_T = np.diff(part.ends, prepend=0)[start:stop]
        ends = np.clip(ends, WHOLE_CHAR * at[0], WHOLE_CHAR * at[1]) - WHOLE_CHAR * at[0]
        share_T = np.diff(ends, prepend=0) / np.maximum(widths_T, 1)
        in_answer = share_T > 0
        kept = (kinds == NO_TEXT) | (kinds == UNFINISHED)
        kinds = np.where(kept, kinds, np.where(in_answer, kinds_of(text, ends, in_answer), THOUGHT))
    eos = None if part.eos is None or not start <= part.eos < stop else part.eos - start
    return Segment(row, part.start + start, part.start + stop, "", "", "", "", text, ends,
                   kinds.astype(np.uint8), eos, word_space=False, share_T=share_T)  # fmt: skip


def _n_thinking(part: _Part, split: Split, start: int, stop: int) -> int:
    """How many of the tokens write something of a thought and nothing of an answer."""
    assert part.ends is not None
    if not split.has_thoughts(part.text):
        return 0
    answers = WHOLE_CHAR * np.array(split.answers)
    done = np.cumsum(np.diff(answers, axis=1)[:, 0])
    before = np.repeat(np.append(0, done), 2)[1:-1]  # of answers, at the edges of each
    answered = np.interp(part.ends, answers.ravel(), before)
    in_answer = np.diff(answered, prepend=0) > 0
    wide = np.diff(part.ends, prepend=0) > 0
    return int(np.count_nonzero((wide & ~in_answer)[start:stop]))


def _tags(ids: Int64, ends: Int64, tag_ids: Mapping[int, bool]) -> list[tuple[int, bool]]:
    """Where special tokens are tags, in characters, and whether these open."""
    at = np.flatnonzero(np.isin(ids, list(tag_ids)))
    return [(int(ends[t]) // WHOLE_CHAR, tag_ids[int(ids[t])]) for t in at]


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Bounds of the runs of True."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(i), int(j)) for i, j in edges.reshape(-1, 2)]


def _turn_end(ids: Int64, kinds: NDArray[np.uint8], eos_ids: set[int]) -> int | None:
    """The first EOS among the special tokens after the text (what follows it is padding)."""
    if kinds.size and kinds[-1] != NO_TEXT:
        return None
    with_text = np.flatnonzero(kinds != NO_TEXT)
    after = int(with_text[-1]) + 1 if with_text.size else 0
    return next((t for t, i in enumerate(ids[after:].tolist(), after) if i in eos_ids), None)
