from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import TableVerifier, logprob_of
from tokenizer_kinds import TEXTS, load_tokenizer

from cme_reward import CMEConfig, CrossModelEntropy, Ensemble, InputError, SpanTable
from cme_reward.spans.utf8 import WHOLE_CHAR

POLICY = CMEConfig(baseline="policy")


class Flat(TableVerifier):
    """-2 nats, whatever the token."""

    def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
        return [np.full(len(response), -2.0) for response in responses]


def test_verifier_and_policy_that_agree_everywhere_have_reward_0() -> None:
    """Masked, white space has no token reward; its -2 nats stood on one side of the sum alone."""
    tokenizer = load_tokenizer("bytes")
    cme = CrossModelEntropy(Flat(tokenizer), tokenizer, replace(POLICY, whitespace="mask"))
    ids = SpanTable(tokenizer).encode("a\n\n\n\nb\n\n\n\nc")[0].tolist()
    ids.append(tokenizer.eos_token_id)
    batch = cme(["p"], [ids], policy_logprobs=[[-2.0] * len(ids)])
    assert batch.mask.sum() == 4  # a, b, c and the end
    assert batch.token_rewards.tolist() == [[0] * 12]
    assert batch.sequence_rewards.tolist() == [0]
    # By hand: the policy half as surprised, 12 tokens of -2 against -1 each.
    less = cme(["p"], [ids], policy_logprobs=[[-1.0] * len(ids)])
    assert less.sequence_rewards.tolist() == [-1]
    plain = CrossModelEntropy(Flat(tokenizer), tokenizer)(["p"], [ids])
    assert plain.sequence_rewards.tolist() == [-2]  # Eq. 3, white space included


def test_members_of_different_contexts_are_compared_on_what_each_has_read() -> None:
    """The first reads "abcd" and an end, the second "ab": -2 against -1 a token for both."""
    tokenizer = load_tokenizer("bytes")
    room = len(CrossModelEntropy(Flat(tokenizer), tokenizer).members[0].format.render("p"))
    members = [Flat(tokenizer), Flat(tokenizer, max_length=room + 2)]
    cme = CrossModelEntropy(Ensemble(members), tokenizer, POLICY)
    ids = [*SpanTable(tokenizer).encode("abcd")[0].tolist(), tokenizer.eos_token_id]
    with pytest.warns(UserWarning, match="do not fit"):
        batch = cme(["p"], [ids], policy_logprobs=[[-1.0] * 5])
    assert batch.mask.tolist() == [[True, True, False, False, False]]
    assert batch.sequence_rewards.tolist() == [-1]  # (-10 + 5) / 5 and (-4 + 2) / 2


def test_a_token_across_the_end_of_the_context_counts_by_its_share() -> None:
    """The verifier reads 2 of the 6 bytes of a token of -6 nats: -2 of them are over its text."""
    generator, verifier = load_tokenizer("byte-level"), load_tokenizer("bytes")
    room = len(CrossModelEntropy(Flat(verifier), generator).members[0].format.render("p"))
    cme = CrossModelEntropy(Flat(verifier, max_length=room + 2), generator, POLICY)
    ids = cme.table.encode("happiness")[0].tolist()
    assert cme.table.tokens(ids) == ["happin", "ess"]
    with pytest.warns(UserWarning, match="do not fit"):
        batch = cme(["p"], [ids], policy_logprobs=[[-6.0, -math.inf]])
    assert not batch.mask.any()
    assert batch.sequence_rewards.tolist() == [-1]  # (-4 - -2) / 2


def test_what_is_not_counted_need_not_be_finite() -> None:
    tokenizer = load_tokenizer("bytes")
    cme = CrossModelEntropy(Flat(tokenizer), tokenizer, CMEConfig(baseline="policy", eos="mask"))
    ids = [*SpanTable(tokenizer).encode("a b")[0].tolist(), tokenizer.eos_token_id]
    batch = cme(["p"], [[*ids, 0]], [[1, 1, 1, 1, 0]], [[-1.0, -1.0, -1.0, -math.inf, math.nan]])
    assert batch.sequence_rewards.tolist() == [-1]
    with pytest.raises(InputError, match="response 0, token 1 is -inf"):  # a space is text
        cme(["p"], [ids], policy_logprobs=[[-1.0, -math.inf, -1.0, 0.0]])


def cells(ends: Any) -> list[range]:
    """The twelfths of characters that each token writes."""
    return [range(i, j) for i, j in pairwise([0, *ends.tolist()])]


def naive(
    cme: CrossModelEntropy, prompt: str, ids: list[int], mask: list[int], policy: list[float]
) -> tuple[float, list[float]]:
    """Sequence and token rewards (all tokens, none masked), twelfth by twelfth of a character."""
    masks = [np.array(mask, dtype=bool)]
    arrays = [np.array(ids)]
    segments = cme.generator.segments([prompt], arrays, masks)
    sequence, tokens = Fraction(0), [Fraction(0)] * len(ids)
    for member in cme.members:
        own, theirs, count = Fraction(0), Fraction(0), 0
        for s, prompt_ids in zip(segments, member.ask(segments).prompts_n, strict=True):
            lead, text, ends = s.shown(member.format)
            shown = member.table.encode(lead + text)
            written = cells(shown[1])
            holes = member.table.encode_batch([lead + text]).holes[0].tolist()
            dropped = {c for i, j in holes for c in range(i, j)}
            end = member.format.end_of_turn if cme.config.eos == "score" else None
            ended = s.eos is not None and end is not None
            wanted = [*shown[0].tolist(), *([end] if ended else [])]
            kept = wanted[: max(0, member.max_length - len(prompt_ids))]
            logp = [Fraction(float(x)) for x in logprob_of(np.array(kept, dtype=np.int64))]
            seen: dict[int, Fraction] = {}
            for k, token in enumerate(written[: len(kept)]):
                width = len([c for c in token if c not in dropped])
                inked = [c for c in token if c >= WHOLE_CHAR * len(lead)]
                if inked:
                    theirs, count = theirs + logp[k], count + 1
                for c in inked:
                    if c not in dropped:
                        within = [d for d in inked if d not in dropped]
                        seen[c - WHOLE_CHAR * len(lead)] = logp[k] / (len(within) or width)
            for t, token in enumerate(cells(ends), s.start):
                if len(token):
                    share = Fraction(sum(c in seen for c in token), len(token))
                    part = share * Fraction(policy[t])
                    own += part
                    tokens[t] += sum((seen.get(c, Fraction(0)) for c in token), -part)
            if ended and len(kept) == len(wanted):
                at = s.start + (s.eos or 0)
                own, theirs, count = own + Fraction(policy[at]), theirs + logp[-1], count + 1
                tokens[at] += logp[-1] - Fraction(policy[at])
        n = len(cme.members)
        uniform = Fraction(-math.log(member.verifier.vocab_size))
        sequence += ((theirs - own) / count if count else uniform) / n
    return float(sequence), [float(x / len(cme.members)) for x in tokens]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)  # of five responses each: making a reward takes longest
@given(data=st.data())
def test_both_sums_are_over_the_same_text(data: st.DataObject) -> None:
    kinds = ["bytes", "byte-level", "sentencepiece", "sentencepiece-dummy", "unigram", "wordpiece"]
    generator = load_tokenizer(data.draw(st.sampled_from(["bytes", "byte-level", *kinds[2:4]])))
    config = CMEConfig(
        baseline="policy",
        whitespace=data.draw(st.sampled_from(["mask", "keep"])),
        eos=data.draw(st.sampled_from(["score", "mask"])),
    )
    members = [
        TableVerifier(load_tokenizer(name), data.draw(st.sampled_from([12, 30, 60, 10_000])))
        for name in data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    ]
    cme = CrossModelEntropy(Ensemble(members), generator, config)
    cme.warns = False
    rows, masks, policies = [], [], []
    for _ in range(5):
        text = data.draw(st.sampled_from([t[:40] for t in TEXTS]))
        ids = cme.table.encode(text)[0].tolist()
        ids = ids[data.draw(st.integers(0, 3)) :]
        ids += [generator.eos_token_id] * data.draw(st.integers(0, 1))
        tool = data.draw(st.integers(0, len(ids)))
        rows.append(ids)
        masks.append([int(not (tool <= t < tool + 2)) for t in range(len(ids))])
        policies.append([data.draw(st.integers(-40, 0)) / 8 for _ in ids])
    batch = cme(["p"] * 5, rows, masks, policies)
    for b, row in enumerate(zip(rows, masks, policies, strict=True)):
        sequence, tokens = naive(cme, "p", *row)
        assert batch.sequence_rewards[b].item() == pytest.approx(sequence, rel=1e-6, abs=1e-6)
        for t, scored in enumerate(batch.mask[b].tolist()):
            expected = tokens[t] if scored and t < len(row[0]) else 0
            assert batch.token_rewards[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_follows_the_first_end_is_padding(level: Any) -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, CMEConfig(level=level))
    end = tokenizer.eos_token_id
    texts = ["Yes.", "No, it is three or four of them, said Lily; then she laughed."]
    rows = [[*cme.table.encode(text)[0].tolist(), end] for text in texts]
    ragged = cme(["p", "q"], rows)
    for ids in (padded(rows, end), padded(rows, end).tolist(), [rows[0] + [end] * 40, rows[1]]):
        batch = cme(["p", "q"], ids)
        n = len(rows[1])
        assert batch.token_rewards[:, :n].tolist() == ragged.token_rewards.tolist()
        assert batch.mask[:, :n].tolist() == ragged.mask.tolist()
        assert not batch.mask[:, n:].any()
        for name in ("repetition", "length_correlation", "verifier_tokens_per_token", "coverage"):
            assert batch.metrics[name] == ragged.metrics[name], name
    assert ragged.metrics["repetition"] == 0


def test_padding_after_a_response_that_was_cut_off() -> None:
    """`<|endoftext|>` ends nothing; where it is the padding token, it is none of the response."""
    tokenizer = load_tokenizer("byte-level")
    config = CMEConfig(level="sequence")
    pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = SpanTable(tokenizer).encode("Yes")[0].tolist()
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, config)
    assert cme(["p"], [[*ids, pad, pad]]).mask.all()
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=tokenizer.chat_template,
    )
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, config)
    batch = cme(["p"], [[*ids, pad, pad]])
    assert batch.mask.tolist() == [[True] * len(ids) + [False, False]]
    assert batch.token_rewards[0, len(ids) - 1] == batch.sequence_rewards[0]
    assert not cme(["p"], [[pad, pad]]).mask.any()


def test_only_a_mask_says_that_something_was_sampled_after_the_end() -> None:
    tokenizer = load_tokenizer("bytes")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, CMEConfig(level="sequence"))
    end = tokenizer.eos_token_id
    rows = [[97, end, end], [97, end, end]]
    batch = cme(["p", "p"], rows, [[1, 1, 1], None])
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    # Text after an end is no padding: the end is the last one.
    assert cme(["p"], [[97, end, 98, end, end]]).mask.tolist() == [[True] * 4 + [False]]


def test_any_integer_is_padding_under_mask_0() -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer)
    ids = SpanTable(tokenizer).encode("Yes.")[0].tolist()
    end, n = tokenizer.eos_token_id, len(ids) + 1
    alone = cme(["p"], [[*ids, end]])
    row = [-100, 10**7, *ids, end, -100, -1]
    batch = cme(["p"], torch.tensor([row]), torch.tensor([[0, 0, *[1] * n, 0, 0]]))
    assert batch.token_rewards[0, 2 : n + 2].tolist() == alone.token_rewards[0].tolist()
    assert batch.sequence_rewards.tolist() == alone.sequence_rewards.tolist()
    assert cme.table.tokens(row)[:3] == ["", "", cme.table.tokens(ids)[0]]
    with pytest.raises(InputError, match="position 1 has mask 0, is not in the vocabulary, and"):
        cme(["p"], [[ids[0], -100, *ids[1:]]], [[1, 0, *[1] * (len(ids) - 1)]])
    with pytest.raises(InputError, match="position 1: id -100 is not in the vocabulary"):
        cme(["p"], [[ids[0], -100]], [[1, 1]])
