"""The in-process verifier equals one plain forward pass per response, whatever the batch."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    CONFIGS,
    SIZES,
    VOCAB,
    assert_equals_oracle,
    build,
    draw,
    oracle,
    ragged_batch,
)
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, Phi3Config, PreTrainedTokenizerFast

from cme_reward.errors import ConfigError, InputError, TokenizerError, VerifierError
from cme_reward.verifiers.base import Verifier
from cme_reward.verifiers.head import gather_logprobs
from cme_reward.verifiers.hf import TransformersVerifier


@pytest.mark.parametrize("name", CONFIGS)
class TestEqualsFullForward:
    def test_one_rollout(self, name, bpe) -> None:
        verifier = TransformersVerifier(build(CONFIGS[name]), bpe)
        assert_equals_oracle(verifier, draw(11), draw(9))

    @pytest.mark.parametrize("head_rows", [1, 7, 512])
    def test_groups_and_ragged_responses(self, name, head_rows, bpe) -> None:
        verifier = TransformersVerifier(build(CONFIGS[name]), bpe, head_rows=head_rows)
        assert verifier.frozen.splits
        assert verifier.frozen.shares
        assert_equals_oracle(verifier, *ragged_batch())

    @pytest.mark.parametrize("batch_tokens", [1, 40, 16_384])
    def test_any_batch_size(self, name, batch_tokens, bpe) -> None:
        verifier = TransformersVerifier(build(CONFIGS[name]), bpe, batch_tokens=batch_tokens)
        assert_equals_oracle(verifier, *ragged_batch())

    def test_independent_of_order_and_company(self, name, bpe) -> None:
        verifier = TransformersVerifier(build(CONFIGS[name]), bpe)
        prompts, responses = ragged_batch()
        expected = verifier.logprobs(prompts, responses)
        for order in (np.random.default_rng(3).permutation(len(prompts)), [6, 4], [3]):
            got = verifier.logprobs([prompts[i] for i in order], [responses[i] for i in order])
            for i, logprobs in zip(order, got, strict=True):
                np.testing.assert_allclose(logprobs, expected[i], rtol=0, atol=1e-5)


def test_soft_cap_matters_in_these_models() -> None:
    """Otherwise the cases above could not tell the model's head from a bare matrix product."""
    model = build(CONFIGS["gemma2"])
    hidden = model.model(torch.tensor(draw(20))).last_hidden_state
    assert model.lm_head(hidden).abs().max() > 2 * CONFIGS["gemma2"].final_logit_softcapping


def test_hand_computed_log_softmax() -> None:
    # Logits 0 and ln 3 are odds of 1 to 3: probabilities 1/4 and 3/4.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [1000.0, 1000.0]])
    got = gather_logprobs(logits, torch.tensor([0, 1, 0]))
    np.testing.assert_allclose(got, [math.log(0.25), math.log(0.75), math.log(0.5)], rtol=1e-6)


def test_model_without_opinion_is_uniform(bpe) -> None:
    model = build(CONFIGS["llama"])
    model.lm_head.weight.data.zero_()
    verifier = TransformersVerifier(model, bpe)
    (logprobs,) = verifier.logprobs(draw(4), draw(6))
    # ln(1/307) = -5.726848
    np.testing.assert_allclose(logprobs, -5.726848, atol=1e-5)


def test_bf16_body_keeps_float32_log_softmax(bpe) -> None:
    model = build(CONFIGS["llama"], torch.bfloat16, scale=3.0)
    verifier = TransformersVerifier(model, bpe)
    prompt, response = draw(20, 60)
    (got,) = verifier.logprobs([prompt], [response])
    expected = oracle(model, prompt, response)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + response[:-1]])).logits[0, len(prompt) - 1 :]
    in_bf16 = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].float()
    error, bf16_error = np.abs(got - expected).max(), np.abs(in_bf16.numpy() - expected).max()
    assert bf16_error > 0.01
    assert error < 1e-5


def test_bf16_group_stays_within_rounding(bpe) -> None:
    model = build(CONFIGS["llama"], torch.bfloat16, scale=3.0)
    verifier = TransformersVerifier(model, bpe)
    assert verifier.frozen.shares
    assert_equals_oracle(verifier, *ragged_batch(), atol=0.1)


def test_head_never_sees_more_rows_than_a_chunk(bpe) -> None:
    model = build(CONFIGS["llama"])
    verifier = TransformersVerifier(model, bpe, head_rows=7, batch_tokens=16_384)
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: rows.append(output.numel() // VOCAB)
    )
    prompts, responses = ragged_batch()
    verifier.logprobs(prompts, responses)
    hook.remove()
    assert max(rows) == 7
    assert sum(rows) == sum(len(response) for response in responses)


def test_prompt_of_a_group_runs_once(bpe) -> None:
    model = build(CONFIGS["llama"])
    verifier = TransformersVerifier(model, bpe)
    tokens: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: tokens.append(args[0].numel())
    )
    (prompt,) = draw(50)
    verifier.logprobs([prompt] * 4, draw(10, 10, 10, 10))
    # 49 prompt tokens once; then the last prompt token and 9 response tokens for each rollout.
    assert tokens == [49, 40]
    tokens.clear()
    # 4 (2 + 60) tokens alone, 2 + 4 * 60 shared: saves 2 %, so a plain batch of 4 * 61 tokens.
    verifier.logprobs([prompt[:2]] * 4, draw(60, 60, 60, 60))
    assert tokens == [244]
    hook.remove()


def test_is_a_verifier_and_freezes_the_model(bpe) -> None:
    model = build(CONFIGS["llama"]).train()
    verifier = TransformersVerifier(model, bpe, name="tiny")
    assert isinstance(verifier, Verifier)
    assert (verifier.name, verifier.vocab_size) == ("tiny", VOCAB)
    assert not model.training
    assert not any(weights.requires_grad for weights in model.parameters())
    assert "forward" not in vars(model.model)


def test_accepts_arrays_and_empty_batches(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe)
    assert verifier.logprobs([], []) == []
    prompt, response = draw(5, 4)
    (from_lists,) = verifier.logprobs([prompt], [response])
    (from_arrays,) = verifier.logprobs([np.array(prompt)], [np.array(response, np.int32)])
    np.testing.assert_array_equal(from_lists, from_arrays)


class InputDependentHead(LlamaForCausalLM):
    """Logits that the hidden states alone do not determine."""

    def forward(self, input_ids, **kwargs) -> Any:  # pyright: ignore
        output: Any = super().forward(input_ids, **kwargs)
        output.logits = output.logits + (input_ids % 5)[..., None] * output.logits.sin()
        return output


def test_head_that_needs_the_ids_is_run_whole(bpe, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        verifier = TransformersVerifier(InputDependentHead(CONFIGS["llama"]), bpe, head_rows=7)
    assert not verifier.frozen.splits
    assert "one response at a time" in caplog.text
    assert_equals_oracle(verifier, *ragged_batch())


def test_cache_that_is_wrong_is_not_used(bpe, caplog) -> None:
    model = build(CONFIGS["llama"])
    forward = model.model.forward

    def forgetful(input_ids=None, past_key_values=None, **kwargs):
        return forward(input_ids, **kwargs)

    model.model.forward = forgetful
    with caplog.at_level(logging.WARNING):
        verifier = TransformersVerifier(model, bpe)
    assert verifier.frozen.splits
    assert not verifier.frozen.shares
    assert "run again for each" in caplog.text
    assert model.model.forward is forgetful
    assert_equals_oracle(verifier, *ragged_batch())


def test_positions_that_depend_on_length_get_passes_of_their_own(bpe) -> None:
    config = Phi3Config(
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    )
    verifier = TransformersVerifier(build(config), bpe)
    assert verifier.frozen.alone
    # 12 prompt tokens fit the 16 original positions, and so do the first two responses.
    assert_equals_oracle(verifier, draw(12) * 4, draw(2, 3, 20, 30))


class TestLoading:
    @pytest.fixture
    def saved(self, tmp_path, bpe) -> str:
        build(CONFIGS["llama"]).save_pretrained(tmp_path)
        bpe.save_pretrained(tmp_path)
        return str(tmp_path)

    def test_from_pretrained(self, saved) -> None:
        verifier = TransformersVerifier.from_pretrained(saved, device="cpu", head_rows=3)
        assert (verifier.name, verifier.max_length) == (f"hf:{saved}", 128)
        assert verifier.frozen.head_rows == 3
        assert_equals_oracle(verifier, *ragged_batch())

    def test_dtype(self, saved) -> None:
        verifier = TransformersVerifier.from_pretrained(saved, device="cpu", dtype="bfloat16")
        assert verifier.model.dtype == torch.bfloat16

    def test_from_config_is_untrained_and_seeded(self, saved) -> None:
        state = torch.get_rng_state()
        first, again, other = (
            TransformersVerifier.from_config(saved, seed=seed, device="cpu") for seed in (5, 5, 6)
        )
        assert torch.equal(torch.get_rng_state(), state)
        trained = TransformersVerifier.from_pretrained(saved, device="cpu")
        prompts, responses = draw(6), draw(8)
        (a,), (b,), (c,), (d,) = (
            verifier.logprobs(prompts, responses) for verifier in (first, again, other, trained)
        )
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-3
        assert np.abs(a - d).max() > 1e-3
        assert first.name == f"random:{saved}"

    @pytest.mark.parametrize("load", ["from_pretrained", "from_config"])
    def test_missing_path(self, load, tmp_path) -> None:
        path = str(tmp_path / "nowhere")
        with pytest.raises(VerifierError, match=r"nowhere.*expected a directory with config.json"):
            getattr(TransformersVerifier, load)(path)

    def test_slow_tokenizer(self) -> None:
        slow = SimpleNamespace(is_fast=False)
        with pytest.raises(TokenizerError, match=r"slow tokenizer.*tokenizer\.json"):
            TransformersVerifier(build(CONFIGS["llama"]), slow)


class TestLimits:
    def test_absolute_positions_bound_the_length(self, bpe) -> None:
        verifier = TransformersVerifier(build(CONFIGS["gpt2"]), bpe)
        assert verifier.max_length == 96
        assert_equals_oracle(verifier, draw(40, 40), draw(56, 56, seed=2))
        with pytest.raises(InputError, match=r"prompt 0 has 40 tokens.* 57: .* at most 96"):
            verifier.logprobs(draw(40), draw(57))

    def test_tokenizer_limit_counts(self) -> None:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), model_max_length=30
        )
        assert TransformersVerifier(build(CONFIGS["llama"]), tokenizer).max_length == 30
        asked = TransformersVerifier(build(CONFIGS["llama"]), tokenizer, max_length=64)
        assert asked.max_length == 64

    @pytest.mark.parametrize(
        "limits", [{"max_length": 129}, {"max_length": 1}, {"head_rows": 0}, {"batch_tokens": 0}]
    )
    def test_out_of_range(self, limits, bpe) -> None:
        ((key, value),) = limits.items()
        with pytest.raises(ConfigError, match=f"{key}={value}"):
            TransformersVerifier(build(CONFIGS["llama"]), bpe, **limits)


class TestInputErrors:
    @pytest.fixture
    def verifier(self, bpe) -> TransformersVerifier:
        return TransformersVerifier(build(CONFIGS["llama"]), bpe)

    @pytest.mark.parametrize("bad", [-1, VOCAB])
    def test_id_outside_the_vocabulary(self, bad, verifier) -> None:
        with pytest.raises(InputError, match=rf"response 1 .* id {bad} at position 2.*{VOCAB}"):
            verifier.logprobs(draw(3, 3), [[4, 5], [4, 5, bad]])
        with pytest.raises(InputError, match=rf"prompt 0 .* id {bad} at position 0"):
            verifier.logprobs([[bad]], [[4]])

    def test_unequal_numbers(self, verifier) -> None:
        with pytest.raises(InputError, match="1 prompts for 2 responses"):
            verifier.logprobs(draw(3), draw(3, 3))

    def test_empty_prompt(self, verifier) -> None:
        with pytest.raises(InputError, match="prompt 0 has 0 tokens"):
            verifier.logprobs([[]], [[4]])

    @pytest.mark.parametrize("bad", [[1.5, 2.0], [[1, 2]], ["a"]])
    def test_not_flat_integers(self, bad, verifier) -> None:
        with pytest.raises(InputError, match=r"response 0 is .*flat sequence of integer"):
            verifier.logprobs([[1]], [bad])

    def test_log_prob_that_is_not_finite(self, bpe) -> None:
        model = build(CONFIGS["llama"])
        verifier = TransformersVerifier(model, bpe, name="broken")
        model.lm_head.register_forward_hook(
            lambda module, args, logits: logits.index_fill(-1, torch.tensor([9]), -torch.inf)
        )
        with pytest.raises(VerifierError, match="broken: log-prob -inf for token 1 of response 1"):
            verifier.logprobs([[3, 4], [5, 6]], [[7, 8], [8, 9, 7]])


def test_stories(shared, bpe, tmp_path) -> None:
    """The trained 260K model where it is at hand, a random one of its architecture elsewhere."""
    if shared is None:
        build(CONFIGS["llama-tied"]).save_pretrained(tmp_path)
        bpe.save_pretrained(tmp_path)
    path = tmp_path if shared is None else shared / "models/stories260K"
    verifier = TransformersVerifier.from_pretrained(str(path), device="cpu")
    texts = ["Once upon a time there was", "Tom and his dog went to"]
    endings = [" a little girl who liked to play.", " the park. They saw a big tree!", " bed"]
    encode = verifier.tokenizer.encode
    prompts = [encode(text) for text in texts for _ in endings]
    responses = [encode(ending, add_special_tokens=False) for _ in texts for ending in endings]
    assert_equals_oracle(verifier, prompts, responses)
