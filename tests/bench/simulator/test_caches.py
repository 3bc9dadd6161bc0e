from bench.simulator.caches import Cache


def test_the_least_recently_used_goes_first() -> None:
    cache = Cache(10)
    for key in "ab":
        cache.put(key, 4)
    assert cache.touch("a")
    cache.put("c", 4)
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    assert cache.used == 8


def test_putting_again_adds_nothing_and_what_is_too_large_is_not_kept() -> None:
    cache = Cache(10)
    cache.put("a", 4)
    cache.put("a", 4)
    cache.put("huge", 11)
    assert cache.used == 4
    assert not cache.touch("huge")
    cache.clear()
    assert cache.used == 0
    assert "a" not in cache
