"""What a token is credited with: its own reward, or what follows from it on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import returns_to_go as naive_returns
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer

from cme_reward import CMEConfig, ConfigError, CrossModelEntropy, group_advantages
from cme_reward.advantages import returns_to_go, token_advantages

# A response of seven tokens: scored, white space, an environment's two, scored, scored, and one
# beyond the verifier's context; in the second row, the same with another ending.
REWARDS = torch.tensor([[-1.0, -9.0, -9.0, -9.0, -2.0, -4.0, -9.0]])
MASK = torch.tensor([[1, 0, 0, 0, 1, 1, 0]]).bool()
SAMPLED = torch.tensor([[1, 1, 0, 0, 1, 1, 1]]).bool()


def test_returns_by_hand() -> None:
    # From the end: nothing after the last reward; -4; -2 - 4/2 = -4; the environment's two have no
    # return of their own; the white space before them has gamma times the next sampled token's,
    # -4/2 = -2; -1 - 2/2 = -2.
    returns, mask = returns_to_go(REWARDS, MASK, SAMPLED, 0.5)
    assert returns.tolist() == [[-2.0, -2.0, 0.0, 0.0, -4.0, -4.0, 0.0]]
    assert mask.tolist() == [[True, True, False, False, True, True, False]]
    returns, again = returns_to_go(REWARDS, MASK, SAMPLED)
    assert returns.tolist() == [[-7.0, -6.0, 0.0, 0.0, -6.0, -4.0, 0.0]]
    assert again.equal(mask)
    returns, again = returns_to_go(REWARDS, MASK, SAMPLED, 0.0)
    assert returns.tolist() == [[-1.0, 0.0, 0.0, 0.0, -2.0, -4.0, 0.0]]
    assert again.equal(mask)


def test_nothing_to_credit() -> None:
    empty = torch.zeros(0, 0)
    assert returns_to_go(empty, empty, empty)[0].shape == (0, 0)
    returns, mask = returns_to_go(REWARDS, MASK & False, SAMPLED)
    assert not returns.any()
    assert not mask.any()


rows = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(-40, 0).map(lambda n: n / 8)), st.booleans()).map(
        lambda row: (row[0] if row[1] else None, row[1])
    ),
    max_size=9,
)


@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_as_the_sum_written_out(batch: list[list], gamma: float) -> None:
    width = max(map(len, batch))
    rewards = torch.full((len(batch), width), float("nan"), dtype=torch.float64)
    mask, sampled = torch.zeros(2, len(batch), width, dtype=torch.bool)
    for b, row in enumerate(batch):
        for t, (reward, chosen) in enumerate(row):
            sampled[b, t], mask[b, t] = chosen, reward is not None
            if reward is not None:
                rewards[b, t] = reward
    found, has = returns_to_go(rewards, mask, sampled, gamma)
    for b, row in enumerate(batch):
        naive = naive_returns([r for r, _ in row], [s for _, s in row], gamma)
        assert has[b, : len(row)].tolist() == [value is not None for value in naive]
        wanted = [value or 0.0 for value in naive]
        assert found[b, : len(row)].tolist() == pytest.approx(wanted, abs=1e-12)
        assert not has[b, len(row) :].any()


def test_advantages_of_a_batch() -> None:
    tokenizer = load_tokenizer("byte-level")
    texts = ["One two.", "Three", "Four five six seven"]
    for credit, gamma, scale in (
        ("token", 1.0, "std"),
        ("return", 0.8, "std"),
        ("return", 1.0, "batch"),
    ):
        config = CMEConfig(
            whitespace="mask",
            credit=credit,  # type: ignore[arg-type]
            gamma=gamma,
            scale=scale,  # type: ignore[arg-type]
        )
        cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, config)
        batch = cme.score_texts(["p"] * 3, texts)
        rewards, mask = batch.token_rewards, batch.mask
        assert batch.sampled.sum() > mask.sum()  # white space
        if credit == "return":
            rewards, mask = returns_to_go(rewards, mask, batch.sampled, gamma)
            assert mask.equal(batch.sampled)
        wanted = group_advantages(rewards, mask, [0] * 3, scale=scale)  # type: ignore[arg-type]
        assert batch.advantages(["p"] * 3).equal(wanted)
        assert token_advantages(batch.token_rewards, batch.mask, batch.sampled, [0] * 3,
                                **config.of_advantages).equal(wanted)  # fmt: skip


def test_what_an_environment_says_is_no_choice_and_a_cut_tail_is_not_known() -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, CMEConfig(credit="return"))
    ids = cme.table.encode("One two three four")[0].tolist()
    mask = [1, 1, 0, 0] + [1] * (len(ids) - 4)
    batch = cme(["p"], [ids], [mask])
    assert batch.sampled[0].tolist() == [bool(flag) for flag in mask]
    room = len(cme.members[0].format.render("p")) + 3
    short = CMEConfig(credit="return", max_length=room)
    cut = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, short)
    cut.warns = False
    found = cut(["p"] * 2, [ids, ids[::-1]])
    last = int(found.mask[0].nonzero()[-1])
    assert last + 1 < len(ids)
    advantages = found.advantages(["p"] * 2)
    assert advantages[0, : last + 1].any()
    assert not advantages[0, last + 1 :].any()


def test_scaled_by_the_whole_batch() -> None:
    # Deviations 1, -1 at the first position and 3, -3 at the second, of one group; a group of one
    # is compared with nothing. Root of (1 + 1 + 9 + 9) / 3 = 2.58199; eps 0.1.
    rewards = torch.tensor([[1.0, 3.0], [-1.0, -3.0], [7.0, 7.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    found = group_advantages(rewards, mask, [0, 0, 1], scale="batch")
    wanted = torch.tensor([[1.0, 3.0], [-1.0, -3.0], [0.0, 0.0]]) / 2.68199
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    same = group_advantages(torch.ones(2, 1), torch.ones(2, 1), [0, 0], scale="batch", eps=0.0)
    assert same.tolist() == [[0.0], [0.0]]


def test_sequence_is_another_word_for_the_level() -> None:
    assert CMEConfig(credit="sequence") == CMEConfig(level="sequence")
    assert CMEConfig.from_dict({"credit": "sequence"}).level == "sequence"
    with pytest.raises(ConfigError, match='made of token rewards, and level="sequence" has none'):
        CMEConfig(credit="return", level="sequence")
    with pytest.raises(ConfigError, match=r'gamma=0\.9 has no effect without credit="return"'):
        CMEConfig(gamma=0.9)
    with pytest.raises(ConfigError, match=r"gamma=1\.5 must be a discount from 0 to 1"):
        CMEConfig(credit="return", gamma=1.5)
    with pytest.raises(ConfigError, match="credit='words' is unknown; expected one of token, ret"):
        CMEConfig(credit="words")  # type: ignore[arg-type]
