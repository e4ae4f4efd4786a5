"""The rate limit of a labelling run, over all its threads."""

from __future__ import annotations

import threading
import time

from tppo_fast.labelling.llm import RateLimiter


def test_a_pause_holds_back_who_waits_already() -> None:
    limiter = RateLimiter(300)  # one in 200 ms
    limiter.wait()
    gone: list[float] = []
    thread = threading.Thread(target=lambda: (limiter.wait(), gone.append(time.monotonic())))
    thread.start()
    time.sleep(0.05)  # it waits for its turn
    paused = time.monotonic()
    limiter.pause(0.5)
    thread.join()
    assert gone[0] - paused >= 0.5


def test_the_rate_limit_spaces_requests() -> None:
    limiter = RateLimiter(1200)  # one in 50 ms
    began = time.monotonic()
    threads = [threading.Thread(target=limiter.wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.19 < time.monotonic() - began < 1.0
