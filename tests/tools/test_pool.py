"""bench: jobs in many processes.  This file loads no torch, and so do the processes that import it."""

from __future__ import annotations

import os
import time

from fusepass.tools.bench.pool import Exclusive, spread


def measure(job: str, exclusive: Exclusive) -> tuple[str, bool]:
    """What :func:`spread` calls elsewhere."""
    if job == "dies":
        os._exit(1)
    if job == "sleeps":
        time.sleep(60)
    with exclusive():
        time.sleep(0.01)
    return f"{job} done", job == "breaks"


def test_work_is_spread_and_no_failure_takes_others_along() -> None:
    work = ["a", "dies", "b", "breaks", "c", "sleeps", "d"]
    heard: list[str] = []
    results = spread(work, measure, lambda job, why: f"{job}: {why}", 2, heard.append, patience=3.0)
    want = [f"{job} done" for job in "abcd"] + ["breaks done", "dies: the measuring process died"]
    assert sorted(results) == sorted([*want, "sleeps: took more than 3 s to compile or run"])
    assert heard == results


def test_nothing_begins_after_the_limit() -> None:
    assert spread(["a", "b"], measure, lambda job, why: why, 1, limit=-1.0) == []
