"""Rewards by name, and the controls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from stubs import TableVerifier
from tiny_models import CONFIGS, assert_equals_oracle, build, draw, trained_tokenizer
from tokenizer_kinds import load_tokenizer

import cme_reward
from cme_reward import CMEConfig, ConfigError, CrossModelEntropy, Ensemble, VerifierError
from cme_reward.comparators import (
    REWARDS,
    RLME,
    load_reward,
    random_verifier,
    self_verifier,
)
from cme_reward.verifiers.hf import TransformersVerifier

TOKENIZER = load_tokenizer("byte-level")
FOLDER = Path(cme_reward.__file__).parent / "verifiers" / "embedded"
IDS = [[10, 11, 12], [13, 14]]


def test_one_word_of_configuration_changes_the_reward() -> None:
    stub = TableVerifier(load_tokenizer("sentencepiece"))
    stub_only = [name for name in REWARDS if name not in ("self", "random")]
    rewards = [load_reward(name, TOKENIZER, verifier=stub) for name in stub_only]
    assert [getattr(r, "name", "cme") for r in rewards] == stub_only
    assert load_reward("EM_RL_Token", TOKENIZER).config.level == "sequence"


def test_rewards_without_a_verifier_load_none() -> None:
    assert load_reward("rent", TOKENIZER, verifier="hf:no/such-model").config.level == "sequence"


def test_names_of_tokenizers_and_verifiers() -> None:
    config = CMEConfig(level="sequence")
    options: dict[str, Any] = {"verifier": "embedded", "device": "cpu"}
    reward = load_reward("cme", str(FOLDER), config, batch_tokens=7, **options)
    assert isinstance(reward, CrossModelEntropy)
    assert reward.config is config
    assert reward.verifier.batch_tokens == 7  # type: ignore[union-attr]
    questions = ["Is it?", "Was it?"]
    rlme = load_reward("rlme", str(FOLDER), questions=questions, **options)
    assert isinstance(rlme, RLME)
    assert len(rlme.questions) == 2


def test_an_unknown_name_lists_all() -> None:
    with pytest.raises(ConfigError, match="unknown reward 'renta'") as caught:
        load_reward("renta", TOKENIZER)
    assert all(f"  {name} " in str(caught.value) for name in REWARDS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rent", {"questions": []}, "'questions' is no option of 'rent'; known: per_token"),
        ("ttrl", {"anwser": len}, "'anwser' is no option of 'ttrl'; known: answer, per_token"),
        ("rlme", {"verifier": TableVerifier(TOKENIZER), "seed": 1}, "'seed' is no option of 'rlm"),
        ("cme", {"verifier": TableVerifier(TOKENIZER), "dtype": 1}, "a verifier that is loaded"),
        ("cme", {}, "'cme' needs a verifier: verifier=VERIFIER"),
        ("rlme", {}, "'rlme' needs a verifier: verifier=VERIFIER"),
        ("random", {}, "'random' needs a verifier: verifier=VERIFIER"),
        ("self", {"verifier": "embedded"}, "'self' needs the generator: policy=MODEL"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(name, TOKENIZER, **options)


def test_a_device_is_for_verifiers_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def spy(spec: str, **options: Any) -> Any:
        seen.append(options)
        return TableVerifier(TOKENIZER)

    monkeypatch.setattr("cme_reward.comparators.load_verifier", spy)
    for spec in ("vllm:http://a", "hf:x+ sglang:http://b", "hf:vllm/x"):
        load_reward("cme", TOKENIZER, verifier=spec, device="cuda:1")
    assert seen == [{}, {}, {"device": "cuda:1"}]


def parameters(verifier: Any) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in verifier.model.parameters()])


@pytest.mark.slow
def test_the_random_control_is_the_same_architecture_untrained() -> None:
    trained: Any = cme_reward.load_verifier("embedded", device="cpu")
    for given in ("embedded", f"hf:{FOLDER}", f"random:{FOLDER}", trained):
        place: dict[str, Any] = {} if given is trained else {"device": "cpu"}
        control: Any = random_verifier(given, **place)
        assert control.name.startswith("random:")
        assert control.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
        assert parameters(control).shape == parameters(trained).shape
        assert not torch.equal(parameters(control), parameters(trained))
        again: Any = random_verifier(given, **place)
        assert torch.equal(parameters(control), parameters(again))
        other: Any = random_verifier(given, seed=1, **place)
        assert not torch.equal(parameters(control), parameters(other))


def test_the_random_control_of_an_ensemble() -> None:
    control = random_verifier("embedded+embedded", device="cpu")
    assert isinstance(control, Ensemble)
    assert len(control.members) == 2
    trained = cme_reward.load_verifier("embedded+embedded", device="cpu")
    again = random_verifier(trained)
    assert [m.name for m in again.members] == ["random:embedded"] * 2  # type: ignore[union-attr]


def test_drawing_weights_leaves_the_random_state_alone() -> None:
    model = TransformersVerifier(build(CONFIGS["llama"]), trained_tokenizer())
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    random_verifier(model)
    assert torch.rand(3).tolist() == expected


@pytest.mark.parametrize("given", ["vllm:http://localhost:1", "hf:", "nonsense"])
def test_a_control_needs_an_architecture(given: str) -> None:
    with pytest.raises(ConfigError, match="there is no untrained"):
        random_verifier(given)
    with pytest.raises(ConfigError, match="the architecture of table is not at hand"):
        random_verifier(TableVerifier(TOKENIZER))


def test_the_self_verifier_is_the_policy_as_it_was() -> None:
    policy = build(CONFIGS["llama"]).train()
    before = copy.deepcopy(policy)
    tokenizer = trained_tokenizer()
    verifier: Any = self_verifier(policy, tokenizer)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1.0)  # training goes on
    assert all(weight.requires_grad for weight in policy.parameters())
    assert policy.training
    prompts, responses = draw(4, 7), draw(5, 3, seed=1)
    assert_equals_oracle(verifier, prompts, responses)
    again = TransformersVerifier(before, tokenizer)
    for a, b in zip(
        verifier.logprobs(prompts, responses), again.logprobs(prompts, responses), strict=True
    ):
        assert a.tolist() == b.tolist()


def test_the_self_verifier_by_name() -> None:
    reward = load_reward("self", str(FOLDER), policy=str(FOLDER), device="cpu")
    trained: Any = cme_reward.load_verifier("embedded", device="cpu")
    same = CrossModelEntropy(trained, trained.tokenizer)
    ids = [trained.tokenizer.encode("It is 5.")]
    assert isinstance(reward, CrossModelEntropy)
    assert torch.equal(reward(["What?"], ids).token_rewards, same(["What?"], ids).token_rewards)
    with pytest.raises(VerifierError, match="cannot load"):
        load_reward("self", str(FOLDER), policy="no/such-model")
