"""Samples between the scorer, which has the rollouts, and the trainer, which has the step."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from verl.utils.tracking import Tracking
from verl_rig import naive

from cme_reward.curves.samples import FILE, Kept
from cme_reward.verl import samples as samples_module
from cme_reward.verl.scorer import Request, Scorer


def request(tokenizer: Any, question: str, text: str, **fields: Any) -> Request:
    ids = tokenizer.encode(text, add_special_tokens=False)
    given = {"prompt": [naive.user(question)], "ids": ids, "mask": [1] * len(ids)}
    return Request(**{**given, **fields})


def taken(scorer: Scorer, requests: list[Request]) -> dict[bool, list[Kept]]:
    async def run() -> dict[bool, list[Kept]]:
        for one in requests:
            await scorer.score(one)
        return await scorer.samples()

    return asyncio.run(run())


def content_of(kept: Kept) -> str:
    (message,) = kept.prompt
    assert isinstance(message, dict)
    return message["content"]


def test_the_same_are_picked_in_whatever_order_they_are_scored(config: Any, policy: Path) -> None:
    """Short responses are scored first, and must not be the ones that are shown."""
    config.reward.cme.samples = 2
    tokenizer = AutoTokenizer.from_pretrained(policy)
    texts = ["15", "7 plus 8 equals 15. The answer is 15.", " The answer is 3"]
    requests = [request(tokenizer, q, text) for q in ("7 plus 8", "1 plus 2") for text in texts]
    requests.append(request(tokenizer, "3 plus 3", "6", validate=True))
    scorer = Scorer(config)
    found = taken(scorer, requests)
    assert found == taken(scorer, requests[::-1])
    assert {content_of(kept) for kept in found[False]} == {"1 plus 2", "7 plus 8"}
    assert [kept.prompt for kept in found[True]] == [[naive.user("3 plus 3")]]
    assert taken(scorer, []) == {False: [], True: []}
    for kept in found[False]:
        text = "".join(kept.tokens)
        ids = tokenizer.encode(text, add_special_tokens=False)
        rewards, mask = naive.token_rewards(
            naive.NaiveVerifier(), tokenizer, content_of(kept), ids, [1] * len(ids)
        )
        assert kept.mask == mask.tolist()
        own = [p for p, m in zip(kept.token_logprobs, mask, strict=True) if m]
        assert own == pytest.approx(rewards[mask].tolist(), abs=1e-5)
        assert kept.dropped_nats >= 0


def test_a_later_output_is_shown_after_what_came_before_it(config: Any, policy: Path) -> None:
    config.reward.cme.samples = 1
    tokenizer = AutoTokenizer.from_pretrained(policy)
    first = tokenizer.encode("7", add_special_tokens=False)
    later = request(tokenizer, "q", "7 plus 8", start=len(first))
    ((kept,), _) = taken(Scorer(config), [later]).values()
    assert "".join(kept.tokens) == "7 plus 8"
    assert len(kept.tokens) == len(kept.token_logprobs) == len(kept.mask)


def test_none_are_picked_where_none_are_kept(config: Any, policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    found = taken(Scorer(config), [request(tokenizer, "q", "7 plus 8")])
    assert found == {False: [], True: []}


def test_steps_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """veRL's real loggers; its step 34 came after 33 updates, of which nothing is kept."""
    monkeypatch.chdir(tmp_path)
    one = Kept([naive.user("q")], ["a"], [-1.0], [True], -1.0, 0.0)
    found = {False: [one], True: [one]}
    monkeypatch.setattr(samples_module, "actor_samples", lambda: found)
    config = {"trainer": {"default_local_dir": "checkpoints"}}
    places = {
        ("file", "tensorboard"): [
            Path("project", f"run-1.{FILE}"),
            Path("tensorboard_log", "project", "run-1", FILE),
        ],
        (): [Path("checkpoints", FILE)],
    }
    for loggers, files in places.items():
        tracking = Tracking("project", "run-1", list(loggers))
        for step in (1, 34):
            samples_module.keeper(config)(tracking, step)
        for file in files:
            steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
            assert steps == [0, 1, 34]
    monkeypatch.setattr(samples_module, "actor_samples", lambda: {})  # before the first response
    samples_module.keeper(config)(SimpleNamespace(logger={}), 2)
    assert len(Path("checkpoints", FILE).read_text().splitlines()) == 3
