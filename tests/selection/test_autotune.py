"""autotune: it measures what would run, and stores the result."""

from __future__ import annotations

import json
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass.selection import autotune, costs
from tests.checking import assert_same_accuracy, call, compiled


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) * 0.1
    hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return s.masked_fill(hidden, float("-inf")).softmax(-1) @ v


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSEPASS_CACHE", str(tmp_path))
    return tmp_path / "autotune.json"


def inputs(length: int = 64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(2, 4, length, 16) for name in "qkv"}


@pytest.mark.parametrize("grads", [False, True])
def test_candidates_are_measured_and_the_answer_kept(
    grads: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float | None] = []
    real = autotune.milliseconds

    def watched(*args: Any) -> float | None:
        measured.append(real(*args))
        return measured[-1]

    monkeypatch.setattr(autotune, "milliseconds", watched)
    given = inputs()
    got = call(compiled(causal, "autotune", "aot_eager"), given, grads=grads)
    exact = call(causal, given, torch.float64, grads)
    assert_same_accuracy(got, call(causal, given, grads=grads), exact)
    assert len(measured) >= 2 and all(ms is not None and ms > 0 for ms in measured)
    (kept,) = json.loads(cache.read_text()).values()
    assert {"unfused", "sdpa"} <= set(kept["milliseconds"])
    assert kept["kernel"] == min(kept["milliseconds"], key=kept["milliseconds"].get)
    assert got.site.fused is (kept["kernel"] != "unfused")
    if got.site.fused:
        assert got.site.kernel == kept["kernel"]
    count = len(measured)
    torch._dynamo.reset()
    call(compiled(causal, "autotune", "aot_eager"), given, grads=grads)
    assert len(measured) == count, "remembered"


@pytest.mark.parametrize("best", ["sdpa", "flex", "unfused"])
def test_the_fastest_is_taken(best: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = {"unfused": 3.0, "sdpa": 2.0, "flex": 2.5} | {best: 1.0}
    times = chain(order.values(), repeat(9.0))
    monkeypatch.setattr(autotune, "milliseconds", lambda *args: next(times))
    site = call(compiled(causal, "autotune", "aot_eager"), inputs()).site
    assert site.kernel == (None if best == "unfused" else best)
    assert site.fused or site.reason == "measured faster as it is"


def test_a_candidate_that_fails_is_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = chain([2.0, None, 1.0], repeat(9.0))
    monkeypatch.setattr(autotune, "milliseconds", lambda *args: next(times))
    assert call(compiled(causal, "autotune", "aot_eager"), inputs()).site.kernel == "flex"


def test_other_sizes_are_another_question(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "milliseconds", lambda *args: 1.0)
    for length in (32, 64):
        torch._dynamo.reset()
        call(compiled(causal, "autotune", "aot_eager", dynamic=False), inputs(length))
    assert len(json.loads(cache.read_text())) == 2


def test_a_broken_cache_is_no_error(cache: Path) -> None:
    cache.write_text("{")
    assert autotune.remembered("x") is None
    assert autotune.remember("x", {"a": 2.0, "b": 1.0}) == "b" and autotune.remembered("x") == "b"
    assert costs.cache_folder() == cache.parent
