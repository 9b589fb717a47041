"""Time limits of requests: from those of recent ones, and longer after each that was too short."""

from llava_twophase.cache.time_limits import TimeLimits


def test_time_limits_begin_with_a_fixed_one():
    limits = TimeLimits()
    for _ in range(16):
        assert limits.first() == 5.0
        limits.add(0.01)
    assert limits.first() == 2.0


def test_time_limits_follow_the_slowest_of_recent_requests():
    limits = TimeLimits()
    for _ in range(16):
        limits.add(0.2)
    for seconds, limit in ((3.0, 12.0), (100.0, 60.0)):
        limits.add(seconds)
        assert limits.first() == limit
    for _ in range(100):
        limits.add(0.2)
    assert limits.first() == 2.0


def test_time_limits_are_longer_after_an_attempt_that_took_too_long():
    assert TimeLimits().after(2.0) == 8.0
    assert TimeLimits().after(32.0) == 60.0
