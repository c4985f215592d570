from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import TableVerifier, logprob_of
from templates import LLAMA2, with_template
from tokenizer_kinds import TEXTS, load_tokenizer, shared_rows

from cme_reward import (
    CMEConfig,
    CrossModelEntropy,
    Ensemble,
    InputError,
    SpanTable,
    VerifierError,
    load_verifier,
)
from cme_reward.spans.utf8 import WHOLE_CHAR

PAPER = CMEConfig(whitespace="mask", eos="mask")


def reward(
    generator: str = "byte-level",
    verifier: str = "sentencepiece",
    config: CMEConfig = CMEConfig(),  # noqa: B008
    **kwargs: Any,
) -> tuple[CrossModelEntropy, TableVerifier, SpanTable]:
    stub = TableVerifier(load_tokenizer(verifier), **kwargs)
    cme = CrossModelEntropy(stub, load_tokenizer(generator), config)
    return cme, stub, cme.table


def sampled(table: SpanTable, text: str, *, eos: bool = False) -> list[int]:
    ids = table.encode(text)[0].tolist()
    return [*ids, table.tokenizer.eos_token_id] if eos else ids


@settings(deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    cut=st.integers(0, 20),
    extra=st.lists(st.integers(0, 258), max_size=5),
    verifier=st.sampled_from(["sentencepiece", "byte-level", "byte-level-nfc", "unigram"]),
)
def test_equals_the_naive_pipeline_and_conserves(
    text: str, cut: int, extra: list[int], verifier: str
) -> None:
    """Cut and re-split ids with stray bytes and special tokens among them, against loops."""
    cme, stub, table = reward("bytes", verifier, CMEConfig(eos="mask"))
    ids = [*sampled(table, text)[cut:], *extra, *sampled(table, text)[:cut]]
    batch = cme(["p"], [ids])
    shown, ends = table.decode(ids)
    if cme.members[0].format.is_chat and re.match(r" \S", shown):  # the first word's own space
        shown, ends = shown[1:], np.maximum(ends - WHOLE_CHAR, 0)
    verifier_table = SpanTable(stub.tokenizer)
    (asked,), (verifier_ends,), (holes,) = verifier_table.encode_batch([shown])
    assert stub.responses[:1] in ([asked.tolist()], [])
    logp = logprob_of(asked).astype(np.float64)
    total = float(logp.sum())
    unmasked = batch.token_logprobs.double().sum().item()
    assert abs(unmasked - total) <= 1e-6 * max(1, abs(total))  # float32 tensors
    if not len(holes):
        expected = oracle.align(
            [Fraction(float(x)) for x in logp], verifier_ends.tolist(), ends.tolist()
        )
        assert batch.token_logprobs[0].tolist() == pytest.approx(
            [float(x) for x in expected], rel=1e-5, abs=1e-6
        )
    kept = batch.token_rewards.double().sum().item()
    assert batch.dropped_nats[0].item() == pytest.approx(kept - total, abs=1e-4)
    assert (batch.token_rewards[~batch.mask] == 0).all()


def test_white_space_is_masked_and_its_share_counted() -> None:
    cme, _, table = reward("bytes", "bytes", PAPER)
    ids = sampled(table, "a \n b")
    logp = logprob_of(np.array(ids))
    batch = cme(["p"], [ids])
    assert batch.mask.tolist() == [[True, False, False, False, True]]
    assert batch.token_rewards[0].tolist() == [logp[0], 0, 0, 0, logp[4]]
    assert batch.token_logprobs[0].tolist() == logp.tolist()
    assert batch.dropped_nats[0].item() == pytest.approx(-logp[1:4].sum())
    keep, _, _ = reward("bytes", "bytes")
    kept = keep(["p"], [ids])
    assert kept.mask.all()
    assert kept.dropped_nats.tolist() == [0]


def test_eos_gets_the_end_of_turn() -> None:
    cme, stub, table = reward("byte-level", "byte-level")
    verifier_eos = stub.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, cut = sampled(table, "Yes.", eos=True), sampled(table, "Yes.")
    batch = cme(["p", "p"], [ids, cut])
    assert stub.responses == [ids, cut]
    assert batch.mask[0].all()
    assert batch.token_rewards[0, -1].item() == logprob_of(np.array([verifier_eos]))[0]
    assert not batch.mask[1, len(cut) :].any()
    # Eq. 3 over the verifier's tokens, the end of turn among them.
    assert batch.sequence_rewards.tolist() == pytest.approx(
        [logprob_of(np.array(ids)).mean(), logprob_of(np.array(cut)).mean()]
    )


def test_eos_masked_is_the_paper() -> None:
    cme, stub, table = reward("byte-level", "byte-level", PAPER)
    ids = sampled(table, "Yes.", eos=True)
    batch = cme(["p"], [ids])
    assert stub.responses == [ids[:-1]]
    assert (batch.mask[0, -1].item(), batch.token_rewards[0, -1].item()) == (False, 0)


def test_eos_before_padding_is_found_and_special_tokens_inside_are_not_eos() -> None:
    cme, _, table = reward("byte-level", "byte-level")
    end, pad = table.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    ids = [*sampled(table, "a"), end, *sampled(table, "b"), end, pad, pad]
    assert cme(["p"], [ids]).mask.tolist() == [[True, False, True, True, False, False]]


def test_a_base_verifiers_end_of_turn_is_its_eos() -> None:
    cme, stub, table = reward("byte-level", "sentencepiece")
    cme(["p"], [sampled(table, "Yes.", eos=True)])
    assert stub.responses[0][-1] == stub.tokenizer.eos_token_id


def test_an_empty_response_is_as_surprising_as_a_guess() -> None:
    eos = load_tokenizer("byte-level").eos_token_id
    for config, ids in ((PAPER, []), (PAPER, [eos]), (CMEConfig(), [])):
        cme, stub, _ = reward("byte-level", "byte-level", config)
        batch = cme(["p"], [ids])
        assert batch.sequence_rewards.tolist() == pytest.approx([-math.log(stub.vocab_size)])
        assert not batch.mask.any()
    cme, _, _ = reward("byte-level", "byte-level")
    batch = cme(["p"], [[eos]])
    assert batch.sequence_rewards.tolist() == logprob_of(np.array([eos])).tolist()


def test_an_empty_batch() -> None:
    cme, _, _ = reward()
    batch = cme([], [])
    assert batch.token_rewards.shape == batch.mask.shape == (0, 0)
    assert batch.sequence_rewards.shape == (0,)
    assert batch.advantages([]).shape == (0, 0)
    assert all(math.isfinite(value) for value in batch.metrics.values())


def test_beyond_the_verifiers_context_is_masked_counted_and_warned_of_once() -> None:
    cme, stub, table = reward("bytes", "bytes", max_length=8)
    prompt = len(cme.members[0].format.render("p"))
    cme, stub, table = reward("bytes", "bytes", max_length=prompt + 3)
    ids = sampled(table, "abcdef", eos=True)
    with pytest.warns(UserWarning, match="1 of 2 responses do not fit the verifier's context"):
        batch = cme(["p", "p"], [ids, sampled(table, "ab")])
    assert stub.responses == [ids[:3], sampled(table, "ab")]
    assert batch.mask[0].tolist() == [True] * 3 + [False] * 4
    assert batch.sequence_rewards[0].item() == pytest.approx(logprob_of(np.array(ids[:3])).mean())
    assert batch.metrics["truncated"] == 1
    assert batch.metrics["coverage"] == pytest.approx(5 / 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled = cme(["a longer prompt"], [ids])  # fills the context by itself
    assert not filled.mask.any()
    assert filled.sequence_rewards.tolist() == pytest.approx([-math.log(stub.vocab_size)])


def test_a_token_across_the_end_of_the_context_is_masked() -> None:
    cme, _, table = reward("byte-level", "bytes")
    prompt = len(cme.members[0].format.render("p"))
    cme, _, table = reward("byte-level", "bytes", CMEConfig(max_length=prompt + 2))
    ids = sampled(table, "happiness")
    assert len(table.tokens(ids)[0]) > 2 or len(ids) > 2
    with pytest.warns(UserWarning, match="do not fit"):
        batch = cme(["p"], [ids])
    ends = table.decode(ids)[1]
    assert batch.mask[0].tolist() == (ends <= 24).tolist()


def test_text_the_verifier_drops_is_masked() -> None:
    # BERT strips the accent U+0301, which the generator wrote as a token of its own.
    cme, _, table = reward("bytes", "wordpiece")
    ids = sampled(table, "e\u0301!")
    batch = cme(["p"], [ids])
    assert batch.mask[0].tolist() == [True, False, False, True]
    assert batch.token_rewards[0, 1:3].tolist() == [0, 0]


def test_the_verifier_is_not_shown_an_unfinished_character() -> None:
    cme, stub, table = reward("bytes", "bytes")
    ids = sampled(table, "ab🤷")[:-1]
    batch = cme(["p"], [ids])
    assert stub.responses == [ids[:2]]
    assert batch.mask.tolist() == [[True, True, False, False, False]]


def test_masks_separate_padding_from_sampled_tokens() -> None:
    cme, _, table = reward("byte-level", "sentencepiece")
    rows = [sampled(table, "Yes.", eos=True), sampled(table, "No, three.", eos=True)]
    width = max(map(len, rows)) + 2
    pad = table.tokenizer.eos_token_id
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    masks = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch, ragged = cme(["p", "q"], padded, masks), cme(["p", "q"], rows)
    assert batch.token_rewards.shape == (2, width)
    assert torch.equal(batch.token_rewards[:, : width - 2], ragged.token_rewards)
    assert torch.equal(batch.sequence_rewards, ragged.sequence_rewards)
    assert not batch.mask[~masks.bool()].any()


def test_tool_output_inside_a_turn_is_conditioned_on_and_not_scored() -> None:
    cme, stub, table = reward("byte-level", "byte-level")
    first, tool, last = (sampled(table, t) for t in ("x = 1+1;", " -> 2\n", " so 2."))
    ids = [*first, *tool, *last, table.tokenizer.eos_token_id]
    mask = [1] * len(first) + [0] * len(tool) + [1] * (len(last) + 1)
    batch = cme(["p"], [ids], [mask])
    decode = stub.tokenizer.decode
    assert [decode(r) for r in stub.responses] == ["x = 1+1;", " so 2.<|im_end|>"]
    assert decode(stub.prompts[0]).endswith("<|im_start|>assistant\n")
    assert decode(stub.prompts[1]).endswith("<|im_start|>assistant\nx = 1+1; -> 2\n")
    tool_at = slice(len(first), len(first) + len(tool))
    assert not batch.mask[0, tool_at].any()
    assert not batch.token_rewards[0, tool_at].any()
    scored = np.concatenate([logprob_of(np.array(r)) for r in stub.responses])
    assert batch.sequence_rewards[0].item() == pytest.approx(scored.mean())


@pytest.mark.parametrize("verifier", ["byte-level", "sentencepiece"])
def test_turns_are_scored_in_the_verifiers_own_template(verifier: str) -> None:
    cme, stub, table = reward("byte-level", verifier)
    encode = table.tokenizer.encode
    first = encode("search(3)<|im_end|>")
    between = encode("\n<|im_start|>tool\nthree<|im_end|>\n<|im_start|>assistant\n")
    last = encode("It is three.<|im_end|>")
    mask = [1] * len(first) + [0] * len(between) + [1] * len(last)
    batch = cme(["What?"], [[*first, *between, *last]], [mask])
    decode = stub.tokenizer.decode
    if verifier == "byte-level":
        assert decode(stub.prompts[1]) == (
            "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nsearch(3)<|im_end|>\n"
            "<|im_start|>tool\nthree<|im_end|>\n<|im_start|>assistant\n"
        )
    else:  # a base model continues the text, without the generator's markup
        assert decode(stub.prompts[1]) == "What?search(3)\n\nthree\n\n"
    assert batch.mask[0, len(first) - 1]  # each turn's own end is scored
    assert batch.mask[0, -1]
    assert batch.mask[0].tolist()[len(first) : -len(last)] == [False] * len(between)


@pytest.mark.parametrize("verifier", ["byte-level", "sentencepiece"])
def test_examples_stand_in_front_of_every_turn_and_are_not_scored(verifier: str) -> None:
    config = CMEConfig(examples=[{"prompt": "A?", "response": "Yes."}])
    plain, plain_stub, table = reward("byte-level", verifier)
    cme, stub, _ = reward("byte-level", verifier, config)
    encode = table.tokenizer.encode
    first = encode("search(3)<|im_end|>")
    between = encode("\n<|im_start|>tool\nthree<|im_end|>\n<|im_start|>assistant\n")
    last = encode("It is three.<|im_end|>")
    mask = [1] * len(first) + [0] * len(between) + [1] * len(last)
    given = (["What?"], [[*first, *between, *last]], [mask])
    batch, without = cme(*given), plain(*given)
    front = "A?Yes.\n\n"  # to a base model
    if verifier == "byte-level":
        front = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    decode = stub.tokenizer.decode
    shown = [decode(ids) for ids in stub.prompts]
    assert shown == [front + decode(ids) for ids in plain_stub.prompts]
    assert stub.responses == plain_stub.responses
    # The stub's log-probs are of the tokens alone.
    assert torch.equal(batch.token_rewards, without.token_rewards)


def test_rollouts_of_one_prompt_are_shown_the_same_ids() -> None:
    cme, stub, table = reward("byte-level", "byte-level")
    cme(["p", "q", "p"], [sampled(table, t) for t in ("a", "b", "c")])
    assert stub.prompts[0] == stub.prompts[2] != stub.prompts[1]


def test_the_space_of_a_dummy_prefix_is_text_in_a_story_and_not_in_a_message() -> None:
    # The sampled ids begin with "▁she": " she" after a story, and the message "she" in a chat.
    for verifier, shown in (("sentencepiece", " she"), ("byte-level", "she")):
        cme, stub, table = reward("sentencepiece-dummy", verifier)
        ids = sampled(table, " she")
        batch = cme(["p"], [ids])
        assert SpanTable(stub.tokenizer).decode(stub.responses[0])[0] == shown
        assert batch.token_logprobs.sum().item() == pytest.approx(
            logprob_of(np.array(stub.responses[0])).sum()
        )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (" she ran", "she ran"),
        (" ", " "),
        ("  return 1", "  return 1"),
        (" \n she", " \n she"),
        ("\n she", "\n she"),
        ("she", "she"),
    ],
)
@pytest.mark.parametrize("generator", ["bytes", "byte-level"])
def test_the_space_in_front_of_a_first_word_is_no_part_of_a_message(
    said: str, shown: str, generator: str
) -> None:
    """A base model goes on with " she" after "A:"; a chat model's turn does not begin so."""
    for kind, wanted in (("byte-level", shown), ("byte-level, no template", said)):
        tokenizer = copy.deepcopy(load_tokenizer("byte-level"))
        if kind != "byte-level":
            tokenizer.chat_template = None
        stub = TableVerifier(tokenizer)
        cme = CrossModelEntropy(stub, load_tokenizer(generator))
        ids = sampled(cme.table, said)
        policy = [-0.5] * len(ids)
        batch = cme(["p"], [ids])
        assert cme.members[0].table.decode(stub.responses[0])[0] == wanted
        logp = logprob_of(np.array(stub.responses[0]))
        assert batch.token_logprobs.sum().item() == pytest.approx(logp.sum())
        assert batch.sequence_rewards.item() == pytest.approx(logp.mean())
        # The policy's own is of the same tokens: all but a space that is one by itself.
        less = CMEConfig(baseline="policy")
        own = CrossModelEntropy(stub, load_tokenizer(generator), less)(["p"], [ids], None, [policy])
        counted = len(ids) - (generator == "bytes" and wanted != said)
        assert own.sequence_rewards.item() == pytest.approx(
            (logp.sum() + 0.5 * counted) / len(logp)
        )
        assert own.mask.sum().item() == counted


@pytest.mark.parametrize(
    ("answer", "own"),
    [("happiness of ", slice(None)), ("42", slice(1, None))],
    ids=["merged", "alone"],
)
def test_a_template_that_writes_a_space_before_the_answer(answer: str, own: slice) -> None:
    """The verifier reads "▁happiness▁of▁", or "▁", "4" and "2", where "▁" is none of the answer."""
    generator = load_tokenizer("byte-level")
    stub = TableVerifier(with_template("sentencepiece", LLAMA2))
    cme = CrossModelEntropy(stub, generator)
    ids = cme.table.encode(answer)[0].tolist()
    batch = cme(["p"], [ids])
    assert SpanTable(stub.tokenizer).decode(stub.responses[0])[0] == " " + answer
    logp = logprob_of(np.array(stub.responses[0]))[own]
    assert batch.token_rewards.sum().item() == pytest.approx(logp.sum())
    assert batch.sequence_rewards.item() == pytest.approx(logp.mean())
    assert batch.dropped_nats.item() == pytest.approx(0)
    assert batch.verifier_tokens[0][1].tolist() == logp.tolist()


def test_the_floor_and_the_policy_baseline() -> None:
    config = CMEConfig(logprob_floor=-0.5, baseline="policy")
    cme, _, table = reward("bytes", "bytes", config)
    ids = sampled(table, "abcd")
    floored = np.maximum(logprob_of(np.array(ids)), -0.5)
    policy = [-0.25, -3.0, -0.5, 0.0]
    batch = cme(["p"], [ids], policy_logprobs=[policy])
    assert batch.token_rewards[0].tolist() == pytest.approx((floored - policy).tolist())
    assert batch.sequence_rewards.item() == pytest.approx((floored - policy).mean())
    with pytest.raises(InputError, match='baseline="policy" needs policy_logprobs'):
        cme(["p"], [ids])
    with pytest.raises(InputError, match="policy_logprobs of response 0, token 1 is nan"):
        cme(["p"], [ids], policy_logprobs=[[0.0, math.nan, 0.0, 0.0]])


def test_log_probs_that_no_sample_has_are_warned_of_once() -> None:
    """As those of an EOS that stands for what a base model wrote there."""
    cme, _, table = reward("bytes", "bytes", CMEConfig(baseline="policy"))
    ids = sampled(table, "abcd")
    usual, odd = [-0.25, -29.9, 0.0, -9.0], [-0.25, -3.0, -0.5, -41.2]
    cme(["p"], [ids], policy_logprobs=[usual])
    cme(["p"], [ids], [[True, True, True, False]], policy_logprobs=[odd])  # nobody sampled it
    says = (
        r"policy_logprobs of response 1, token 3 is -41\.2 nats, less than a policy gives what it"
    )
    with pytest.warns(UserWarning, match=says):
        batch = cme(["p", "p"], [ids, ids], policy_logprobs=[usual, odd])
    assert batch.token_rewards[1, 3].item() > 41 - 30
    cme(["p"], [ids], policy_logprobs=[odd])  # an error where warnings are


def test_sequence_level() -> None:
    cme, _, table = reward("byte-level", "bytes", CMEConfig(level="sequence", eps=0.0))
    rows = [sampled(table, "Yes, two.", eos=True), sampled(table, "No")]
    batch = cme(["p", "p"], rows)
    assert batch.token_rewards.sum(1).tolist() == batch.sequence_rewards.tolist()
    assert (batch.token_rewards != 0).sum(1).tolist() == [1, 1]
    assert batch.mask.sum(1).tolist() == [len(row) for row in rows]
    better = batch.sequence_rewards[0] > batch.sequence_rewards[1]
    # Two rollouts: deviations of equal size, +-1/sqrt(2) of the sample standard deviation.
    expected = 0.70710678 if better else -0.70710678
    advantages = batch.advantages(["p", "p"])
    assert advantages[0].tolist() == pytest.approx([expected] * len(rows[0]))
    assert advantages[1].tolist() == pytest.approx(
        [-expected] * len(rows[1]) + [0] * (len(rows[0]) - len(rows[1]))
    )


def test_an_ensemble_averages_aligned_log_probs() -> None:
    generator = load_tokenizer("byte-level")
    members = [TableVerifier(load_tokenizer(name)) for name in ("bytes", "sentencepiece")]
    ids = [SpanTable(generator).encode("unhappiness")[0].tolist()]
    together = CrossModelEntropy(Ensemble(members), generator)(["p"], ids)
    alone = [CrossModelEntropy(member, generator)(["p"], ids) for member in members]
    mean = torch.stack([batch.token_rewards for batch in alone]).mean(0)
    torch.testing.assert_close(together.token_rewards, mean)
    means = torch.stack([batch.sequence_rewards for batch in alone]).mean(0)
    torch.testing.assert_close(together.sequence_rewards, means)
    assert Ensemble(members).name == "table+table"
    with pytest.raises(VerifierError, match="no members"):
        Ensemble([])


def test_metrics_by_hand() -> None:
    cme, _, table = reward("bytes", "bytes", PAPER)
    rows = [sampled(table, "ababababab"), sampled(table, "a b")]
    batch = cme(["p", "p"], rows)
    # "abab..." has 7 4-grams, of which 2 are distinct: 5/7 repeated; "a b" has none.
    assert batch.metrics["repetition"] == pytest.approx((5 / 7 + 0) / 2)
    assert batch.metrics["whitespace"] == pytest.approx((0 + 1 / 3) / 2)  # "a", " ", "b"
    assert batch.metrics["coverage"] == 1
    assert batch.metrics["verifier_tokens_per_token"] == 1
    rewards = batch.token_rewards[batch.mask]
    assert batch.metrics["token_reward_mean"] == pytest.approx(rewards.mean().item())
    assert batch.metrics["token_reward_std"] == pytest.approx(rewards.std().item())
    space = -logprob_of(np.array(rows[1][1:2]))[0]
    assert batch.metrics["dropped_nats"] == pytest.approx(space / 2)
    longer_is_better = batch.sequence_rewards[0] > batch.sequence_rewards[1]
    assert batch.metrics["length_correlation"] == pytest.approx(1 if longer_is_better else -1)
    assert batch.metrics["verifier_seconds"] >= 0 < batch.metrics["alignment_seconds"]


def test_verifier_tokens_are_kept_for_looking() -> None:
    cme, stub, table = reward("byte-level", "sentencepiece")
    batch = cme(["p", "p"], [sampled(table, "Yes.", eos=True), []])
    ids, logprobs = batch.verifier_tokens[0]
    assert ids.tolist() == stub.responses[0]
    assert logprobs.tolist() == logprob_of(ids).tolist()
    assert batch.verifier_tokens[1][0].size == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([np.array([-1.0, np.nan], np.float32)], r"returned nan for response 0, verifier token 1"),
        ([np.array([-np.inf, -1.0], np.float32)], r"returned -inf for response 0, .*\(id \d+\)"),
        ([np.zeros(3, np.float32)], r"shape \(3,\) for response 0; expected .* 2 verifier tokens"),
        ([], "answered 0 of 1 responses"),
    ],
)
def test_a_verifier_that_answers_wrongly_is_caught(answer: list, message: str) -> None:
    cme, stub, table = reward("bytes", "bytes")
    stub.logprobs = lambda prompts, responses: answer  # type: ignore[method-assign]
    with pytest.raises(VerifierError, match=message):
        cme(["p"], [sampled(table, "ab")])


@pytest.mark.parametrize(
    ("prompts", "ids", "masks", "message"),
    [
        (["p"], [[1], [1]], None, "1 prompts and 2 responses"),
        ("p", [[1]], None, "expected one prompt"),
        (["p"], [[-1]], None, "id -1 is not in the vocabulary"),
        (["p"], [[10**7]], None, "padding left in"),
        (["p"], [[1, 2]], [[1]], r"response_masks of response 0 has shape \(1,\)"),
        (["p"], [[1, 2]], [[1, 1], [1]], "response_masks has 2 rows for 1 responses"),
    ],
)
def test_input_that_does_not_fit(prompts: Any, ids: Any, masks: Any, message: str) -> None:
    cme, _, _ = reward()
    with pytest.raises(InputError, match=message):
        cme(prompts, ids, masks)


def test_pickles() -> None:
    cme, _, table = reward()
    again = pickle.loads(pickle.dumps(cme))
    ids = [sampled(table, "There and back again.")]
    assert torch.equal(again(["p"], ids).token_rewards, cme(["p"], ids).token_rewards)


def test_unknown_verifiers_are_refused_with_the_list() -> None:
    for spec in ("", "gpt-4", "hf:", "vlm:http://localhost", "embedded:x", "embedded+"):
        with pytest.raises(VerifierError, match=r"unknown verifier(.|\n)*hf:NAME_OR_PATH"):
            load_verifier(spec)


def test_real_rollouts_with_the_model_that_sampled_them(shared: Any) -> None:
    """Token rewards are the sampler's own log-probs where verifier and sampler are one model.

    Without shared material: the embedded model, sampling from itself.
    """
    if shared is None:
        verifier: Any = load_verifier("embedded")
        tokenizer = verifier.tokenizer
        cme = CrossModelEntropy(verifier, tokenizer)
        ids = SpanTable(tokenizer).encode("She has 3 + 4 = 7 apples.")[0].tolist()
        prompt = cme.members[0].format.render("p")
        with torch.inference_mode():
            logits = verifier.model(torch.tensor([[*prompt, *ids]])).logits[0].float()
        logp = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(ids) - 1), ids]
        rows = [("p", ids, logp.tolist())]
    else:
        verifier: Any = load_verifier(f"hf:{shared / 'models' / 'stories260K'}")
        cme = CrossModelEntropy(verifier, load_tokenizer("tok512"))
        rows = [
            (row["prompt"], row["meta"]["response_ids"], row["meta"]["response_logprobs"])
            for row in shared_rows("dev_tinylm")
            if row["meta"]["reencode_equals_sampled"]
        ]
        assert len(rows) == 27
    batch = cme([row[0] for row in rows], [row[1] for row in rows])
    for b, (_, ids, expected) in enumerate(rows):
        assert batch.token_rewards[b, : len(ids)].tolist() == pytest.approx(expected, abs=2e-5)


def test_a_byte_level_verifier_sums_over_each_tokens_bytes(shared: Any) -> None:
    """Real log-probs of a byte-level model, aligned onto sampled tokens, against the plain sum."""
    from cme_reward import align_logprobs

    generator = load_tokenizer("tok512" if shared else "byte-level")
    verifier = SpanTable(load_tokenizer("bytes256" if shared else "bytes"))
    if shared:
        rows = [
            (row["meta"]["response_ids"], row["response"], row["meta"]["verifier_byte_logprobs"])
            for row in shared_rows("dev_tinylm")
        ]
    else:
        table = SpanTable(generator)
        rng = np.random.default_rng(0)
        rows = [
            (table.encode(t)[0].tolist(), t, (-rng.exponential(size=len(t.encode()))).tolist())
            for t in TEXTS
        ]
    compared = 0
    for ids, text, byte_logprobs in rows:
        shown, ends = SpanTable(generator).decode(ids)
        assert shown == text
        byte_ids, byte_ends = verifier.encode(text)
        assert len(byte_ids) == len(byte_logprobs)
        expected, done = [], 0
        for token in SpanTable(generator).tokens(ids):
            n = len(token.encode())
            expected.append(math.fsum(byte_logprobs[done : done + n]))
            done += n
        if done != len(byte_logprobs):
            continue  # parts of characters: the oracle's job, not of this plain sum
        compared += 1
        assert align_logprobs(byte_logprobs, byte_ends, ends).tolist() == pytest.approx(
            expected, abs=1e-9
        )
    assert compared >= (30 if shared else 4)
