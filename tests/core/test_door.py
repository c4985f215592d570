"""The Python door: names and texts in, and everything closed behind."""

from __future__ import annotations

import ast
import asyncio
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer

from cme_reward import (
    CMEBatch,
    CMEConfig,
    ConfigError,
    CrossModelEntropy,
    Ensemble,
    InputError,
    TokenizerError,
    VerifierError,
    load_verifier,
)
from cme_reward.metrics import METRICS
from cme_reward.verifiers.base import Closes
from cme_reward.verifiers.shared import shared

ROOT = Path(__file__).parents[2]


class Closing(TableVerifier, Closes):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_names_are_enough() -> None:
    generator = str(ROOT / "examples" / "generator")
    with CrossModelEntropy("embedded", generator, CMEConfig(eos="mask")) as reward:
        batch = reward.score_texts(["How many?"], ["Seven."])
        by_hand = CrossModelEntropy(load_verifier("embedded"), reward.generator_tokenizer,
                                    CMEConfig(eos="mask"))  # fmt: skip
        ids = by_hand.table.encode("Seven.")[0]
        assert (
            batch.token_rewards[0, :-1].tolist()
            == by_hand(["How many?"], [ids]).token_rewards[0].tolist()
        )
    assert repr(reward) == (
        f"CrossModelEntropy(verifier='embedded', generator={generator!r}, level='token')"
    )
    assert repr(Ensemble([load_verifier("embedded")])).startswith("Ensemble([")  # type: ignore[list-item]


def test_a_wrong_tokenizer_shows_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cme_reward.reward.load_verifier", lambda spec: pytest.fail("loaded"))
    with pytest.raises(TokenizerError, match="cannot load the tokenizer 'nowhere'"):
        CrossModelEntropy("embedded", "nowhere")


def test_a_wrong_verifier_lists_the_known_ones() -> None:
    with pytest.raises(VerifierError, match="hf:NAME_OR_PATH"):
        CrossModelEntropy("gpt-9", load_tokenizer("byte-level"))


def test_what_was_opened_is_closed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Closing(load_tokenizer("byte-level"))
    monkeypatch.setattr("cme_reward.reward.load_verifier", lambda spec: made)
    with CrossModelEntropy("embedded") as reward:
        other = reward.for_generator(eos_token_ids=[1])
        other.close()
        assert not made.closed
    assert made.closed == 1
    with CrossModelEntropy(made) as reward:
        assert reward.generator_tokenizer is made.tokenizer
    assert made.closed == 1


def test_texts() -> None:
    tokenizer = load_tokenizer("byte-level")
    reward = CrossModelEntropy(TableVerifier(tokenizer), tokenizer)
    prompts, texts = ["p", "p", "q"], ["One two.", "", "Ünïcode 🤷🏽"]
    eos = tokenizer.eos_token_id
    ids = [[*row.tolist(), eos] for row in reward.table.encode_batch(texts).ids]
    assert same(reward.score_texts(prompts, texts), reward(prompts, ids))
    open_ended = reward.score_texts(prompts, texts, ended=False)
    assert same(open_ended, reward(prompts, [row[:-1] for row in ids]))
    mixed = reward.score_texts(prompts, texts, ended=[True, False, True])
    in_numpy = reward.score_texts(prompts, texts, ended=np.array([True, False, True]))
    assert in_numpy.token_rewards.tolist() == mixed.token_rewards.tolist()
    assert reward.score_texts(prompts, texts, ended=np.array(False)).mask.equal(open_ended.mask)
    assert same(mixed, reward(prompts, [ids[0], ids[1][:-1], ids[2]]))
    assert reward.score_texts([], []).mask.shape == (0, 0)
    with pytest.raises(InputError, match="2 prompts and 3 responses"):
        reward.score_texts(["p", "q"], texts)
    with pytest.raises(InputError, match="got 3 prompts and 4 responses"):
        reward.score_texts(prompts, "text")
    with pytest.raises(InputError, match="ended has 1 entries for 3 responses"):
        reward.score_texts(prompts, texts, ended=[True])


def same(one: CMEBatch, other: CMEBatch) -> bool:
    return (
        one.token_rewards.equal(other.token_rewards)
        and one.mask.equal(other.mask)
        and one.sequence_rewards.equal(other.sequence_rewards)
    )


def test_a_batch_says_what_it_is_and_moves() -> None:
    reward = CrossModelEntropy(TableVerifier(load_tokenizer("byte-level")))
    batch = reward.score_texts(["p", "q"], ["One two.", "Three"])
    shown = repr(batch)
    assert shown.startswith(f"CMEBatch(2 responses, T={batch.mask.shape[1]}, level='token', ")
    assert f"sequence_reward_mean={batch.metrics['sequence_reward_mean']:.4g}" in shown
    assert len(shown) < 250
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
            assert getattr(moved, name).shape == value.shape
            assert value.device.type == "cpu"
    assert moved.metrics is batch.metrics


def test_every_metric_is_defined_once_and_in_the_docs() -> None:
    reward = CrossModelEntropy(TableVerifier(load_tokenizer("byte-level")))
    batch = reward.score_texts(["p"], ["One."])
    assert list(batch.metrics) == list(METRICS)
    table = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, flags=re.M)
    assert dict(rows) == {name: metric.unit for name, metric in METRICS.items()}
    worries = re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) ?\|$", table, flags=re.M)
    assert {name for name, _ in worries} >= set(METRICS)
    for name, worry in worries:
        if name in METRICS:  # the page adds links
            assert re.sub(r'[`"]', "", worry).startswith(METRICS[name].worry), name
            assert bool(worry.strip()) == bool(METRICS[name].worry), name


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_shared_verifier_is_observed(ensemble: bool) -> None:
    tokenizer = load_tokenizer("byte-level")
    seen: list[Any] = []

    @contextmanager
    def observe(n_responses: int) -> Iterator[None]:
        seen.append(n_responses)
        yield
        seen.append("done")

    inner = [Closing(tokenizer) for _ in range(1 + ensemble)]
    one: Any = Ensemble(inner) if ensemble else inner[0]
    many = shared(one, observe=observe)
    cme = CrossModelEntropy(many, tokenizer)
    assert same(cme.score_texts(["p", "q"], ["a", "b"]),
                CrossModelEntropy(one, tokenizer).score_texts(["p", "q"], ["a", "b"]))  # fmt: skip
    assert seen == [2, "done"] * len(inner)
    asyncio.run(cme.score_async(["p"], [[5]]))
    assert seen[-2:] == [1, "done"]
    many.close()
    assert [verifier.closed for verifier in inner] == [1] * len(inner)


def test_one_that_batches_by_itself_is_asked_directly_and_observed() -> None:
    tokenizer = load_tokenizer("byte-level")
    calls: list[int] = []

    class Endpoint(Closing):
        async def logprobs_async(self, prompts: Any, responses: Any) -> list[np.ndarray]:
            return self.logprobs(prompts, responses)

    @contextmanager
    def observe(n_responses: int) -> Iterator[None]:
        calls.append(n_responses)
        yield

    inner = Endpoint(tokenizer)
    assert shared(inner) is inner
    watched = shared(inner, observe=observe)
    cme = CrossModelEntropy(watched, tokenizer)
    batch = asyncio.run(cme.score_async(["p"], [[5, 6]]))
    assert same(batch, CrossModelEntropy(inner, tokenizer)(["p"], [[5, 6]]))
    assert calls == [1]
    watched.close()
    assert inner.closed == 1


def test_a_verifier_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "examples" / "custom_verifier.py"
    runpy.run_path(str(file), run_name="__main__")
    usual, odd = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert usual > odd
    (own,) = (n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef))
    assert own.end_lineno - own.lineno < 25  # type: ignore[operator]
    document = (ROOT / "docs" / "your-own.md").read_text()
    assert "examples/custom_verifier.py" in document


def test_a_choice_that_does_not_exist_names_the_others() -> None:
    with pytest.raises(ConfigError, match="level='word' is unknown; expected one of token, seq"):
        CMEConfig(level="word")  # type: ignore[arg-type]
