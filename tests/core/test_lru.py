"""The cache of prompts: what it keeps, and that its memory is bounded."""

import pickle
import threading

import pytest

from cme_reward._lru import LRU


def kept(cache: LRU[str], *keys: str) -> str:
    """Those of the keys that the cache still holds; asking does not change it."""
    return "".join(key for key in keys if key in cache._values)


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
