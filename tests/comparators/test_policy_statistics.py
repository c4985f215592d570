from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, build, ragged_batch
from transformers import GPT2Config, GPT2LMHeadModel

from cme_reward import ConfigError, InputError
from cme_reward.comparators import PolicyStatistics, policy_statistics


def naive(
    model: Any, prompts: list[list[int]], responses: list[list[int]], temperature: float = 1.0
) -> list[list[tuple[float, float, float]]]:
    """One whole forward pass a response, and loops over the vocabulary."""
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        rows.append([])
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0].double() / temperature
        for t, sampled in enumerate(response):
            logp = logits[len(prompt) - 1 + t].log_softmax(-1).tolist()
            entropy = -math.fsum(math.exp(x) * x for x in logp)
            certainty = -math.fsum(x + math.log(len(logp)) for x in logp) / len(logp)
            rows[-1].append((logp[sampled], entropy, certainty))
    return rows


def assert_equal(
    found: PolicyStatistics, expected: list[list[tuple[float, float, float]]], tolerance: float
) -> None:
    fields = found.logprobs, found.entropies, found.self_certainties
    for k, field in enumerate(fields):
        assert field is not None
        assert [len(row) for row in field] == [len(row) for row in expected]
        for row, want in zip(field, expected, strict=True):
            for value, numbers in zip(row.tolist(), want, strict=True):
                assert value == pytest.approx(numbers[k], abs=tolerance)


class Bigram(torch.nn.Module):
    """The next token depends on the last one alone, by a table of logits; no body, no head."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.tensor(table))

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.table(ids))


def test_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """After token 0: p = (1/2, 1/4, 1/4), after token 1: uniform.

    H = 1/2 ln 2 + 2 (1/4 ln 4) = 1.5 ln 2 = 1.03972; KL(U || p) = -1/3 (ln(3/2) + 2 ln(3/4))
    = -(0.405465 - 0.575364) / 3 = 0.056633. Uniform: H = ln 3, KL = 0.
    At temperature 1/2, p is proportional to its square: (4, 1, 1) / 6, of which
    H = 2/3 ln(3/2) + 1/3 ln 6 = 0.867563.
    """
    model = Bigram([[math.log(4), math.log(2), math.log(2)], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    found = policy_statistics(model, [[2, 0], [0]], [[1, 2], []])
    expected = [[(-math.log(4), 1.03972, 0.056633), (-math.log(3), math.log(3), 0.0)], []]
    assert_equal(found, expected, 1e-5)
    assert "all logits of a response" in caplog.text
    sharper = policy_statistics(model, [[0]], [[0]], temperature=0.5)
    assert_equal(sharper, [[(math.log(2 / 3), 0.867563, 0.231049)]], 1e-5)


def test_a_probability_of_zero_is_no_entropy() -> None:
    model = Bigram([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = policy_statistics(model, [[0]], [[1]])
    assert found.entropies is not None
    assert found.entropies[0].tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_plain_forward_pass(
    name: str, temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(CONFIGS[name]).eval()
    prompts, responses = ragged_batch()
    found = policy_statistics(
        model, prompts, responses, temperature=temperature, batch_tokens=64, head_rows=7
    )
    assert_equal(found, naive(model, prompts, responses, temperature), 2e-4)
    assert not caplog.records  # a body was found


def test_logits_exist_for_few_positions_at_a_time() -> None:
    model = build(CONFIGS["llama"])
    prompts, responses = ragged_batch()
    policy_statistics(model, prompts, responses)  # what is looked up once
    rows = []
    model.lm_head.register_forward_hook(
        lambda module, args, output: rows.append(output.numel() // VOCAB)
    )
    policy_statistics(model, prompts, responses, batch_tokens=64, head_rows=7)
    assert max(rows) <= 7
    assert sum(rows) >= sum(map(len, responses))


def test_the_policy_stays_as_it_was_and_is_asked_without_dropout() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).train()
    model.transformer.drop.eval()  # somebody may have wanted this
    prompts, responses = [[1, 2, 3], [4]], [[5, 6, 7, 8], [9, 10]]
    before = {name: module.training for name, module in model.named_modules()}
    found = policy_statistics(model, prompts, responses)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert found.logprobs is not None
    assert not any(row.requires_grad for row in found.logprobs)
    assert_equal(found, naive(model.eval(), prompts, responses), 1e-5)


def test_a_policy_in_ddp() -> None:
    model = build(CONFIGS["qwen3"])
    prompts, responses = ragged_batch()
    bare = policy_statistics(model, prompts, responses)
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        found = policy_statistics(wrapped, prompts, responses)
    finally:
        torch.distributed.destroy_process_group()
    assert found.entropies is not None
    assert bare.entropies is not None
    for ours, theirs in zip(found.entropies, bare.entropies, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_is_measured_in_float32() -> None:
    """In bfloat16 the sum of probabilities of an entropy would be off by a percent."""
    model = build(CONFIGS["llama"], torch.bfloat16)
    prompts, responses = ragged_batch()
    found = policy_statistics(model, prompts[:2], responses[:2])
    assert_equal(found, naive(model, prompts[:2], responses[:2]), 0.05)


def test_nothing_gives_nothing() -> None:
    assert policy_statistics(build(CONFIGS["llama"]), [], []) == PolicyStatistics([], [], [])


@pytest.mark.parametrize(
    ("prompts", "responses", "options", "message"),
    [
        ([[1]], [[2], [3]], {}, r"1 prompts of \[1\] tokens for 2 responses"),
        ([[]], [[2]], {}, r"of \[0\] tokens"),
        ([[1]], [[2]], {"temperature": 0.0}, "temperature=0.0; expected the positive"),
    ],
)
def test_arguments_are_checked(
    prompts: Any, responses: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        policy_statistics(build(CONFIGS["llama"]), prompts, responses, **options)


def test_sharded_weights_are_refused() -> None:
    model = build(CONFIGS["llama"])
    model.lm_head.weight.ds_id = 3  # as DeepSpeed's ZeRO-3 marks them
    with pytest.raises(ConfigError, match=r"'lm_head.weight' is sharded"):
        policy_statistics(model, [[1]], [[2]])
