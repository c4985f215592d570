"""A masked token and a reward of zero stay two things, all the way to the estimator."""

# pyright: reportMissingImports=false
from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cme_reward.verl.channel import read_mask, write_rewards

# A certain verifier, what float32 rounds to zero, its smallest numbers, ordinary rewards, and the
# positive ones that baseline="policy" makes.
HONEST = [0.0, -0.0, -1e-50, 1e-50, -1e-42, -1e-38, -1e-7, -0.5, -80.0, 0.7, 3.25]


@given(st.lists(st.tuples(st.sampled_from(HONEST) | st.floats(-1e4, 1e4), st.booleans())))
def test_the_mask_is_read_back_and_rewards_are_kept(rows: list[tuple[float, bool]]) -> None:
    rewards = np.array([r for r, _ in rows])
    mask = np.array([m for _, m in rows], dtype=bool)
    written = write_rewards(rewards, mask)
    assert written.dtype == np.float32
    assert read_mask(torch.from_numpy(written)).tolist() == mask.tolist()
    np.testing.assert_allclose(written, np.where(mask, rewards, 0), rtol=1e-7, atol=2e-38)


def test_values_by_hand() -> None:
    # A scored zero has the sign bit: 0x80000000; a masked one has not.
    written = write_rewards([0.0, 0.0, -0.25, 0.5], [True, False, True, False])
    assert written.view(np.uint32).tolist() == [0x80000000, 0, 0xBE800000, 0]


def test_denormals_survive_a_process_that_flushes_them() -> None:
    written = torch.from_numpy(write_rewards([-1e-42, 1e-42, -1e-30], [True] * 3))
    if not torch.set_flush_denormal(True):
        pytest.fail("this CPU cannot flush denormals; run the test on x86")
    try:
        assert read_mask(written * 1.0).tolist() == [True] * 3
    finally:
        torch.set_flush_denormal(False)


def test_the_way_through_verl_keeps_the_sign() -> None:
    """Jagged in TransferQueue, serialized between processes, padded for the estimator."""
    from tensordict import TensorDict
    from verl.workers.utils.padding import response_to_nested

    rows = [
        torch.from_numpy(write_rewards([0.0, 0.0, -1.0], [True, False, True])),
        torch.from_numpy(write_rewards([0.0], [True])),
    ]
    jagged = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    buffer = io.BytesIO()
    torch.save(TensorDict({"rm_scores": jagged}, batch_size=2), buffer)
    buffer.seek(0)
    arrived = torch.load(buffer, weights_only=False)
    padded = arrived.to_padded_tensor()["rm_scores"]
    expected = [[True, False, True], [True, False, False]]  # the padding counts as masked
    assert read_mask(padded).tolist() == expected
    assert read_mask(torch.tensor(rows[0].tolist())).tolist() == expected[0]
    mask = torch.nested.as_nested_tensor([torch.ones(3), torch.ones(1)], layout=torch.jagged)
    again = response_to_nested(padded, mask).to_padded_tensor(0.0)
    assert read_mask(again).tolist() == expected
