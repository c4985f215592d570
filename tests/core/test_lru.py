"""The cache of prompts: what it keeps, and that its memory is bounded."""

import pickle
import threading

import pytest
from forks import in_a_fork

from cme_reward._lru import LRU


def kept(cache: LRU[str], *keys: str) -> str:
    """Those of the keys that the cache still holds, which are used by asking in this order."""
    too_heavy = cache.weight + 1  # so that what is made to answer here is not kept
    return "".join(key for key in keys if cache.get(key, str, too_heavy))


def test_the_values_used_last_stay():
    cache: LRU[str] = LRU(2, 100)
    for key in "abac":
        assert cache.get(key, lambda key=key: key.upper(), 1) == key.upper()
    assert kept(cache, "a", "b", "c") == "ac"
    assert cache.get("a", lambda: "made again", 1) == "A"


def test_heavy_values_push_out_others_and_the_heaviest_stays_out():
    cache: LRU[str] = LRU(10, 100)
    for key, weight in (("a", 40), ("b", 40), ("c", 50), ("d", 101)):
        cache.get(key, lambda key=key: key, weight)
    assert kept(cache, "a", "b", "c", "d") == "bc"
    assert cache.get("d", lambda: "made again", 101) == "made again"
    cache.get("e", lambda: "e", 100)
    assert kept(cache, "b", "c", "e") == "e"


def test_what_fails_is_tried_again():
    cache: LRU[int] = LRU(2, 2)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 // 0, 1)
    assert cache.get("a", lambda: 1, 1) == 1
    assert len(pickle.loads(pickle.dumps(cache))) == 0


def test_nobody_waits_for_the_value_of_another_key():
    cache: LRU[str] = LRU(2, 2)
    started, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        started.set()
        assert go_on.wait(60)
        return "slow"

    thread = threading.Thread(target=cache.get, args=("slow", slow, 1))
    thread.start()
    assert started.wait(60)
    assert cache.get("quick", lambda: "quick", 1) == "quick"
    go_on.set()
    thread.join()
    assert kept(cache, "quick", "slow") == "quickslow"


def test_a_cache_that_was_being_changed_starts_empty_in_a_fork():
    cache: LRU[str] = LRU(2, 10)
    cache.get("a", lambda: "A", 1)
    assert in_a_fork(lambda: (len(cache), cache.get("a", str, 1))) == (1, "A")
    inside, go_on = threading.Event(), threading.Event()

    class Key:
        """Holds the cache up where it looks the key up."""

        def __hash__(self) -> int:
            inside.set()
            assert go_on.wait(60)
            return 0

    thread = threading.Thread(target=cache.get, args=(Key(), str, 11))
    thread.start()
    assert inside.wait(60)
    assert in_a_fork(lambda: (len(cache), cache.get("b", lambda: "B", 1))) == (0, "B")
    go_on.set()
    thread.join()
    assert cache.get("a", str, 1) == "A"
