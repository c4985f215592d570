"""What is known of the sampler, at every door."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer

from cme_reward import CMEConfig, CrossModelEntropy, InputError, SpanTable, TokenizerError
from cme_reward.comparators import load_reward
from cme_reward.generator import Generator
from cme_reward.spans.kinds import NO_TEXT


def only_eos() -> Any:
    """A tokenizer as GPT-2's: the one special token ends responses."""
    tokenizer = copy.deepcopy(load_tokenizer("byte-level"))
    others = set(tokenizer.all_special_tokens) - {tokenizer.eos_token}
    for name in ("pad_token", "bos_token", "unk_token"):
        if getattr(tokenizer, name) in others:
            setattr(tokenizer, name, None)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram", "wordpiece"])
def test_an_id_that_only_a_padded_vocabulary_has_writes_nothing(kind: str) -> None:
    tokenizer = load_tokenizer(kind)
    size = SpanTable(tokenizer).vocab_size
    text = SpanTable(tokenizer).encode("five birds")[0].tolist()
    ids = [size + 7, *text[:1], size, *text[1:], size + 200_000]
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, padded_vocabulary=True)
    batch, plain = cme(["p"], [ids]), cme(["p"], [text])
    assert batch.mask[0].tolist() == [False, *plain.mask[0, :1].tolist(), False,
                                      *plain.mask[0, 1:].tolist(), False]  # fmt: skip
    assert batch.sequence_rewards.tolist() == plain.sequence_rewards.tolist()
    assert batch.token_rewards[batch.mask].tolist() == plain.token_rewards[plain.mask].tolist()
    assert batch.metrics["special_masked"] == plain.metrics["special_masked"] + 3
    assert cme.table.tokens(ids)[0] == ""


def test_it_ends_nothing_where_the_only_special_token_does() -> None:
    tokenizer = only_eos()
    size, eos = len(tokenizer), tokenizer.eos_token_id
    text = SpanTable(tokenizer).encode("five")[0].tolist()
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, padded_vocabulary=True)
    cut, ended = cme(["p", "p"], [[*text, size + 1], [*text, eos]]).sequence_rewards.tolist()
    assert cut == cme(["p"], [text]).sequence_rewards[0]
    assert cut != ended
    between = cme(["p"], [[*text, size + 1, eos]])
    assert between.sequence_rewards[0] == ended
    assert between.mask[0, -1]


def test_otherwise_it_is_an_error_that_says_what_to_do() -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer)
    with pytest.raises(InputError, match=r"id 999999 is not in .* needs padded_vocabulary=True"):
        cme(["p"], [[5, 999_999]])
    padded = cme.for_generator(padded_vocabulary=True)
    assert math.isfinite(padded(["p"], [[5, 999_999]]).sequence_rewards[0])
    with pytest.raises(InputError, match="id -1 is not in the vocabulary"):
        padded(["p"], [[5, -1]])
    assert padded(["p"], [[5, -1]], [[1, 0]]).mask.tolist() == [[True, False]]


def test_rewards_to_compare_with_take_it_too() -> None:
    tokenizer = load_tokenizer("byte-level")
    ttrl = load_reward("ttrl", tokenizer).for_generator(padded_vocabulary=True)
    ids = SpanTable(tokenizer).encode("The answer is 7")[0].tolist()
    rewards = ttrl(["p", "p", "p"], [[*ids, len(tokenizer) + 1], ids, ids[:1]]).sequence_rewards
    assert rewards.tolist() == [1, 1, 0]


def test_ends_are_added_to_those_the_tokenizer_names() -> None:
    tokenizer = load_tokenizer("byte-level")
    special = Generator(tokenizer).special_ids.tolist()
    one = Generator(tokenizer)
    other = next(i for i in special if i not in one.eos_ids)
    more = one.extended(eos_token_ids=[other], template_kwargs={"a": 1})
    assert more.eos_ids.tolist() == sorted([*one.eos_ids.tolist(), other])
    assert one.extended(template_kwargs={"b": 2}).eos_ids.tolist() == one.eos_ids.tolist()
    again = more.extended(template_kwargs={"b": 2})
    assert again.template_kwargs == {"a": 1, "b": 2}
    assert again.eos_ids.tolist() == more.eos_ids.tolist()
    assert Generator(tokenizer, eos_token_ids=[5]).eos_ids.tolist() == one.eos_ids.tolist()


def test_the_end_of_turn() -> None:
    tokenizer = load_tokenizer("byte-level")
    assert Generator(tokenizer).end_of_turn == tokenizer.eos_token_id
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.chat_template = None
    with pytest.raises(TokenizerError, match="has no special token that ends a response"):
        Generator(endless).end_of_turn  # noqa: B018


def test_a_table_has_room_for_no_id() -> None:
    table = SpanTable(load_tokenizer("byte-level"), padded=True)
    decoded = table.decode_batch([[table.vocab_size], [5, table.vocab_size]])
    assert decoded.texts[0] == ""
    assert decoded.kinds[1].tolist()[-1] == NO_TEXT
    assert np.diff(decoded.ends[1])[-1] == 0
    with pytest.raises(InputError, match="not in the vocabulary"):
        table.decode([table.vocab_size + 1])
    with pytest.raises(InputError, match="not in the vocabulary"):
        SpanTable(table.tokenizer).decode([table.vocab_size])


def test_settings_of_thoughts_reach_it() -> None:
    config = CMEConfig(thinking="hide", thinking_tags=("<a>", "</a>"))
    thinking = Generator(load_tokenizer("byte-level"), config).thinking
    assert (thinking.mode, thinking.tags) == ("hide", ("<a>", "</a>"))
