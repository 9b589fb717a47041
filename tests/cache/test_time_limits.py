"""Time limits of requests: from those of recent ones of similar length, and longer after each that was too short."""

import pytest

from llava_twophase.cache.time_limits import TimeLimits

ROW = 1_200_000


@pytest.mark.parametrize(("nbytes", "limit"), [(4096, 5.0), (ROW, 38.4), (4_000_000, 128.0), (20_000_000, 300.0)])
def test_time_limits_begin_with_what_all_requests_take_at_1_mb_per_second(nbytes, limit):
    limits = TimeLimits(32)
    for _ in range(16):
        assert limits.first(nbytes) == limit
        limits.add(nbytes, 0.01)
    assert limits.first(nbytes) == 2.0


def test_time_limits_follow_the_slowest_of_recent_requests():
    limits = TimeLimits(32)
    for _ in range(16):
        limits.add(ROW, 0.2)
    for seconds, limit in ((3.0, 12.0), (50.0, 200.0), (100.0, 300.0)):
        limits.add(ROW, seconds)
        assert limits.first(ROW) == limit
    for _ in range(100):
        limits.add(ROW, 0.2)
    assert limits.first(ROW) == 2.0


def test_time_limits_of_rows_ignore_headers():
    limits = TimeLimits(32)
    for _ in range(100):
        limits.add(4096, 0.01)
    assert (limits.first(4096), limits.first(ROW)) == (2.0, 38.4)
    for _ in range(16):
        limits.add(ROW, 1.0)
    assert limits.first(ROW) == 4.0


def test_time_limits_are_longer_after_an_attempt_that_took_too_long():
    assert TimeLimits(32).after(2.0) == 8.0
    assert TimeLimits(32).after(32.0) == 128.0
    assert TimeLimits(32).after(128.0) == 300.0
