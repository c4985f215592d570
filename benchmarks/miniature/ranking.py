"""Before any training: how often a reward puts the right answer above the generator's mistake."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.miniature import rewards
from benchmarks.miniature.cast import CAPABILITIES
from benchmarks.miniature.conditions import CONDITIONS, Condition
from benchmarks.miniature.models import EOS
from benchmarks.miniature.runs import World, file_of
from cme_reward.comparators import call_reward, needed_statistics, policy_statistics

SEQUENCE = {"level": "sequence"}
REWARDS = [
    *(
        Condition(f"CME, {name}", verifier=name, config=SEQUENCE)
        for name in (*CAPABILITIES, "same-tokenizer", "same-family")
    ),
    *(CONDITIONS[name] for name in ("RLME", "RENT", "EM-RL", "INTUITOR")),
    Condition("self-verifier", reward="self", config=SEQUENCE),
    Condition("random verifier", reward="random", config=SEQUENCE),
]


def rank(world: World) -> dict[str, float]:
    """Share of held-out questions whose right answer has the higher sequence reward.

    Over questions where answer and mistake differ; a tie counts half. Rewards made of the
    generator's own distributions take them from the untrained one of seed 0. TTRL compares rollouts
    with each other and says nothing of a single one.
    """
    file = file_of(world, "ranking", 0)
    if not file.is_file():
        found = {c.name: _share(world, c) for c in REWARDS}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _share(world: World, condition: Condition) -> float:
    cast = world.cast()
    policy, tokenizer = cast.model("pretrained"), cast.tokenizer("pretrained")
    examples = [e for e in world.test() if e.answer != e.mistake]
    prompts = [e.prompt for e in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    scorer: Any = rewards.reward(condition, cast, policy)

    def score(texts: list[str]) -> list[float]:
        ids = [[*i, EOS] for i in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        statistics = None
        if needed_statistics(scorer):
            statistics = policy_statistics(policy, prompt_ids, ids)
        return call_reward(scorer, prompts, ids, None, statistics).sequence_rewards.tolist()

    right, wrong = score([e.answer for e in examples]), score([e.mistake for e in examples])
    pairs = list(zip(right, wrong, strict=True))
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
