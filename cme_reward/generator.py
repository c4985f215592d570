"""What is known of the model that samples responses: its tokenizer, its ids, its template."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken

from cme_reward._ragged import (
    PADDING,
    Int64,
    flat_like,
    flatten_integers,
    on_host,
    out_of_vocabulary,
    place_of,
)
from cme_reward.config import CMEConfig
from cme_reward.conversation.environment import EnvironmentReader
from cme_reward.conversation.format import PromptFormat
from cme_reward.conversation.literal import special_names
from cme_reward.conversation.messages import Prompt
from cme_reward.conversation.turns import Segment, Thinking, split_turns
from cme_reward.errors import ConfigError, InputError, TokenizerError
from cme_reward.spans.pieces import special_ids
from cme_reward.spans.table import SpanTable


class Generator:
    """The sampler, as far as a reward has to know it.

    Args:
        tokenizer: its fast tokenizer.
        config: see `CMEConfig`; of it, what concerns thoughts and special tokens.
        eos_token_ids: added tokens with which it ends a response, special or not, besides its
            tokenizer's EOS and the token that its chat template writes after an assistant message.
            An id that is a text of the vocabulary, as a newline is, stays one.
        template_kwargs: what its prompts were rendered with, see `CrossModelEntropy`.
        padded_vocabulary: its model chooses among more ids than the tokenizer has (Qwen2.5: 151,936
            of 151,665). Such an id writes no text, has no reward and ends nothing; if False, it is
            an error, as one of another tokenizer would be.

    Attributes:
        special_ids: ids that write no text, sorted.
        eos_ids: those of them with which it ends a response, sorted.
        table: its spans.

    Raises:
        TokenizerError: if the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        eos_token_ids: Iterable[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        padded_vocabulary: bool = False,
    ) -> None:
        self.config = config
        self.template_kwargs = dict(template_kwargs or {})
        self.padded_vocabulary = padded_vocabulary
        template = self.template_kwargs.get("chat_template")
        asked = CMEConfig(chat_template=template, thinking_tags=config.thinking_tags)
        style = PromptFormat(tokenizer, asked)
        self._header = style.header or ""
        self._template_end = style.end_of_turn
        ends = {tokenizer.eos_token_id, self._template_end, *eos_token_ids} - {None}
        self.tokenizer = tokenizer = _with_special(tokenizer, ends)
        self.special_ids: Int64 = special_ids(tokenizer)
        self.eos_ids: Int64 = np.intersect1d(np.array(sorted(ends), np.int64), self.special_ids)
        shown = self._inner_specials() if config.special_tokens == "show" else ()
        self.table = SpanTable(tokenizer, shown, padded=padded_vocabulary)

    def extended(
        self,
        *,
        eos_token_ids: Iterable[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        padded_vocabulary: bool = False,
    ) -> Generator:
        """The same, also ending at these ids, its prompts rendered with these options too."""
        return Generator(
            self.tokenizer,
            self.config,
            eos_token_ids=[*self.eos_ids.tolist(), *eos_token_ids],
            template_kwargs={**self.template_kwargs, **(template_kwargs or {})},
            padded_vocabulary=self.padded_vocabulary or padded_vocabulary,
        )

    @property
    def name(self) -> str:
        """As its tokenizer was loaded."""
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__)

    @property
    def id_limit(self) -> int:
        """What it can sample is below this: its tokenizer's ids, or any of a padded vocabulary."""
        return 2**63 if self.padded_vocabulary else self.table.vocab_size

    @property
    def end_of_turn(self) -> int:
        """The id with which it ends a response: its template's, or its tokenizer's EOS.

        Raises:
            TokenizerError: if the tokenizer has no special token for it.
        """
        for end in (self._template_end, self.tokenizer.eos_token_id):
            if end is not None and end in self.eos_ids:
                return int(end)
        raise TokenizerError(
            f"the tokenizer {self.name!r} has no special token that ends a response; expected one "
            "as its eos_token, or leave responses without an end"
        )

    @cached_property
    def reader(self) -> EnvironmentReader:
        """Of what its template writes between turns, and of what an environment says there."""
        return EnvironmentReader(
            self.tokenizer,
            self.template_kwargs,
            self._tags,
            show_special=self.config.special_tokens == "show",
        )

    @cached_property
    def thinking(self) -> Thinking:
        """What becomes of its thoughts."""
        return Thinking(self.config.thinking, self._tags, self._tag_ids())

    def responses(self, ids: Any, masks: Any) -> tuple[Int64, Int64, NDArray[np.bool_]]:
        """Responses as callers give them -> their ids, row offsets, and which ids were sampled.

        Without a mask, of all responses or of one, everything was, but for the padding at its end.
        Under mask 0 any integer is allowed as padding: `PADDING` takes the place of those that are
        no ids, and `table.vocab_size` that of sampled ids which a padded vocabulary alone has.

        Raises:
            InputError: for a sampled id that is not in the vocabulary, and for rows that are not of
                integers, or not of one length with their masks.
        """
        flat, offsets = flatten_integers(on_host(ids), "response")
        lengths = np.diff(offsets)
        sampled, given_B = np.ones(len(flat), dtype=bool), np.zeros(len(lengths), dtype=bool)
        if masks is not None:
            given_B = np.array([mask is not None for mask in masks], dtype=bool)
            if len(masks) == len(lengths) and not given_B.all():
                masks = [
                    np.ones(n) if m is None else m for n, m in zip(lengths, masks, strict=True)
                ]
            sampled = flat_like(masks, offsets, "response_masks").astype(bool)
        bad = out_of_vocabulary(flat, self.table.vocab_size)
        if bad.size:
            textless = sampled[bad] & (flat[bad] >= 0) & self.padded_vocabulary
            self._refuse(flat, offsets, bad[sampled[bad] & ~textless])
            flat = flat.copy()
            flat[bad] = np.where(textless, self.table.vocab_size, PADDING)
        if not given_B.all():
            sampled &= self._without_padding(flat, offsets) | np.repeat(given_B, lengths)
        return flat, offsets, sampled

    def segments(
        self, prompts: Sequence[Prompt], ids: Sequence[Int64], masks: Sequence[Any] | None
    ) -> list[Segment]:
        """The assistant turns of responses, see `split_turns`."""
        return split_turns(
            prompts, ids, masks, self.table, self.reader, self.eos_ids, self.thinking
        )

    def require_answers(self) -> None:
        """Refuse a model that writes its template's markup itself, if that would be read as words.

        gpt-oss does, with its channels. It matters to rewards that show a verifier what it sampled.

        Raises:
            ConfigError: with the settings that read its answers alone.
        """
        header, tags = self._header, self._tags
        names = special_names(self.tokenizer).tokens
        markup = sorted((m for m in names if m in header and m not in tags), key=header.index)
        alone = self.config.thinking == "hide" and self.config.special_tokens == "show"
        if markup and not (alone and header.endswith(tags[1])):
            raise ConfigError(
                f"the model of {self.name!r} writes {header!r} before an answer, which a verifier "
                "would read as words. Expected the settings that score its answers alone: "
                "thinking='hide', special_tokens='show' and "
                f"thinking_tags=({markup[0]!r}, {header!r}), of which the first begins whatever "
                "is no answer"
            )

    def _refuse(self, flat: Int64, offsets: Int64, bad: Int64) -> None:
        size = self.table.vocab_size
        for at in bad[:1]:
            b, position = place_of(at, offsets)
            raise InputError(
                f"response {b}, position {position}: id {int(flat[at])} is not in the vocabulary "
                f"(expected 0 <= id < {size}); was it sampled with another tokenizer, or is "
                "padding left in? Strip padding, or give it mask 0 in response_masks. A model that "
                "chooses among more ids than its tokenizer has needs padded_vocabulary=True"
            )

    def _without_padding(self, flat: Int64, offsets: Int64) -> NDArray[np.bool_]:
        """All tokens but what follows the first end among the special tokens at a row's end.

        A row without an end was cut off; there, the tokenizer's padding tokens at its end are
        padding.
        """
        pad_id = getattr(self.tokenizer, "pad_token_id", None)
        sampled = np.ones(len(flat), dtype=bool)
        textless, ends = np.isin(flat, self.special_ids), set(self.eos_ids.tolist())
        for start, stop in pairwise(offsets.tolist()):
            if not textless[start:stop][-1:].any():
                continue
            n = int(np.append(textless[start:stop][::-1], False).argmin())
            tail = flat[stop - n : stop].tolist()
            kept = next((t + 1 for t, i in enumerate(tail) if i in ends), None)
            if kept is None:
                kept = n - next((t for t, i in enumerate(reversed(tail)) if i != pad_id), n)
            sampled[stop - n + kept : stop] = False
        return sampled

    @property
    def _tags(self) -> tuple[str, str]:
        opening, closing = self.config.thinking_tags
        return opening, closing

    def _inner_specials(self) -> list[int]:
        """Special tokens that can stand inside a response."""
        outer = {
            getattr(self.tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "unk")
        }
        return [int(i) for i in np.setdiff1d(self.special_ids, self.eos_ids) if i not in outer]

    def _tag_ids(self) -> dict[int, bool]:
        """Special tokens that open (True) and close thoughts, where their text is left out."""
        if self.config.special_tokens == "show":
            return {}
        names = self.tokenizer.convert_ids_to_tokens(self.special_ids.tolist())
        named = dict(zip(names, self.special_ids.tolist(), strict=True))
        return {named[tag]: tag == self._tags[0] for tag in self._tags if tag in named}


def _with_special(tokenizer: Any, ids: Iterable[int]) -> Any:
    """The tokenizer, or a copy in which those of the ids that are added tokens are special ones.

    Some fine-tunes of base models add `<|im_end|>` as a token like any other; what ends a response
    is no text of it. A line's end is, which Gemma's tokenizer has among its added tokens.
    """
    added = tokenizer.added_tokens_decoder
    plain = [added[i] for i in sorted(ids) if i in added and not added[i].special]
    plain = [token for token in plain if str(token).strip()]
    if plain:
        tokenizer = copy.deepcopy(tokenizer)
        ends = [AddedToken(str(token), special=True, normalized=False) for token in plain]
        tokenizer.add_tokens(ends, special_tokens=True)
    return tokenizer
