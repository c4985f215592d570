"""Prompts that are kept between calls: what is read again, what memory they take, and that none is
stale."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, assert_equals_oracle, build, draw

from cme_reward.errors import ConfigError
from cme_reward.verifiers.hf import TransformersVerifier
from cme_reward.verifiers.prefixes import size_of


def counting(verifier: TransformersVerifier) -> list[int]:
    """Tokens of every pass from now on."""
    tokens: list[int] = []
    verifier.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: tokens.append(args[0].numel())
    )
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_rollouts_one_by_one_read_their_prompt_once(name, bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS[name]), bpe)
    tokens = counting(verifier)
    (prompt, other), responses = draw(50, 30), draw(10, 40, 3, 1)
    for response in responses:
        assert_equals_oracle(verifier, [prompt], [response])
    # The oracle reads everything; ours reads 49 tokens once, then one more and all but the last.
    ours = [n for n in tokens if n not in (59, 89, 52, 50)]
    assert ours == [49, 10, 40, 3, 1]
    tokens.clear()
    # Another prompt comes and goes, and the first one is still there.
    verifier.logprobs([other, prompt], [responses[0], responses[2]])
    verifier.logprobs([prompt] * 2, [responses[0], responses[0]])
    assert tokens == [3, 39, 20]


def test_small_prompts_of_a_batch_still_share_a_pass(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe, batch_tokens=128)
    tokens = counting(verifier)
    verifier.logprobs(draw(*[30] * 6), draw(*[11] * 6))
    assert tokens == [3 * 40] * 2
    tokens.clear()
    # One that fills a pass by itself is kept; the other is not, and its pass is not split.
    long, short = draw(80, 30)
    responses = draw(11, 11)
    verifier.logprobs([long, short], responses)
    verifier.logprobs([long, short], responses)
    assert sorted(tokens) == [11, 11, 40, 40, 79]


def test_short_prompts_are_not_worth_a_pass(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe)
    tokens = counting(verifier)
    (prompt,) = draw(3)
    for response in draw(60, 60):
        verifier.logprobs([prompt], [response])
    assert tokens == [62, 62]


def test_memory_is_bounded_and_what_was_used_last_stays(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe)
    config = verifier.model.config
    heads = config.num_key_value_heads * config.head_dim
    with torch.inference_mode():
        cache = verifier.frozen.prefix(np.arange(49))
    each = 2 * config.num_hidden_layers * heads * 49 * 4
    assert size_of(cache) == each
    verifier._prefixes._kept.weight = 3 * each
    tokens = counting(verifier)
    prompts, (response,) = draw(50, 50, 50, 50), draw(10)
    for prompt in prompts:
        verifier.logprobs([prompt], [response])
    assert verifier._prefixes._kept._held == 3 * each
    tokens.clear()
    for prompt in (prompts[3], prompts[0]):
        verifier.logprobs([prompt], [response])
    assert tokens == [10, 49, 10]
    assert verifier._prefixes._kept._held == 3 * each


def test_none_are_kept_where_nobody_wants_them(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe, prompt_cache_mb=0)
    tokens = counting(verifier)
    (prompt,), responses = draw(50), draw(10, 10)
    for response in responses:
        verifier.logprobs([prompt], [response])
    verifier.logprobs([prompt] * 2, responses)
    assert tokens == [59, 59, 49, 20]
    with pytest.raises(ConfigError, match=r"prompt_cache_mb=-1: expected MB, or 0"):
        TransformersVerifier(build(CONFIGS["llama"]), bpe, prompt_cache_mb=-1)


def test_none_is_stale_after_a_change_of_the_weights(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe)
    (prompt,), (response,) = draw(50), draw(10)
    before = verifier.logprobs([prompt], [response])[0]

    def changed() -> None:
        nonlocal before
        assert_equals_oracle(verifier, [prompt], [response])
        after = verifier.logprobs([prompt], [response])[0]
        assert np.abs(after - before).max() > 0.01
        before = after

    verifier.model.requires_grad_(True)  # a policy that scores itself while it is trained
    optimizer = torch.optim.AdamW(verifier.model.parameters(), lr=0.05)
    verifier.model(torch.tensor([prompt])).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    changed()
    other = {name: weight * 1.5 for name, weight in verifier.model.state_dict().items()}
    verifier.model.load_state_dict(other)
    changed()


def test_copies_start_without(bpe) -> None:
    verifier = TransformersVerifier(build(CONFIGS["llama"]), bpe)
    (prompt,), (response,) = draw(50), draw(10)
    expected = verifier.logprobs([prompt], [response])
    again = pickle.loads(pickle.dumps(verifier))
    assert len(again._prefixes._kept) == 0
    np.testing.assert_allclose(again.logprobs([prompt], [response])[0], expected[0], atol=1e-6)
