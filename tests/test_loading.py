"""What the commands load, and where."""

import threading

import pytest

from cme_reward.errors import ConfigError
from cme_reward.loading import in_a_passing_thread


def test_a_verifier_is_loaded_in_a_thread_that_ends():
    thread = in_a_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    thread.join(60)
    assert not thread.is_alive()


def test_what_fails_there_is_raised_here():
    def fail() -> None:
        raise ConfigError("dtype='half': expected a dtype of torch")

    with pytest.raises(ConfigError, match="expected a dtype of torch"):
        in_a_passing_thread(fail)
