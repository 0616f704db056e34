"""The cost model, and the order of kernels that follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepass import costs, select
from fusepass.config import Options
from fusepass.costs import Fit, Profile, Sample
from fusepass.kernels import FLASH4, FLEX, KERNELS, SDPA, Target
from fusepass.rewrite import rewrite_graph
from fusepass.spec import Attention, Band, Bias, Document, Dropout, KeyPadding, Mask, Sink, SoftCap
from tests.fake_cuda import fake_graph, hopper

INF = float("inf")
CUDA = Target("cuda", False, False)


def spec(*scores: Any, **more: Any) -> Attention:
    made = Attention(2, 8, 2, 2048, 2048, 64, 64, torch.bfloat16, scores, out_dtype=torch.bfloat16)
    return replace(made, **more)


def mask(*atoms: Any) -> Mask:
    return Mask(0, -INF, atoms=atoms)


# ---------------------------------------------------------------------------------------- fitting


def samples(fixed: float, traffic: float, work: float, noise: float = 0.0) -> list[Sample]:
    made = []
    for n, length in enumerate((128, 256, 1024, 4096, 16384)):
        t, w = float(length * 1000), float(length**2 * 1000)
        exact = fixed + traffic * t + work * w
        made.append(Sample("k", "full", 64, "forward", t, w, exact * (1 + noise * (-1) ** n)))
    return made


@pytest.mark.parametrize(
    "truth", [(0.02, 1e-8, 1e-12), (0.0, 0.0, 3e-12), (0.5, 0.0, 0.0), (0.03, 2e-8, 0.0)]
)
def test_a_fit_finds_what_made_the_numbers(truth: tuple[float, float, float]) -> None:
    (found,) = costs.fit(samples(*truth))
    assert (found.fixed, found.traffic, found.work) == pytest.approx(truth, rel=1e-6, abs=1e-20)
    assert found.error < 1e-6 and found.samples == 5


def test_a_fit_is_never_negative_and_says_its_error() -> None:
    (found,) = costs.fit(samples(0.02, 0.0, 1e-12, noise=0.1))
    assert min(found.fixed, found.traffic, found.work) >= 0
    assert 0.0 < found.error < 0.25


def test_groups_are_fitted_apart_and_one_sample_is_enough() -> None:
    made = [
        Sample("a", "full", 64, "forward", 1e6, 1e9, 2.0),
        Sample("b", "full", 64, "forward", 1e6, 1e9, 3.0),
    ]
    first, second = costs.fit(made)
    assert first.milliseconds(1e6, 1e9) == pytest.approx(2.0)
    assert second.milliseconds(1e6, 1e9) == pytest.approx(3.0)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    made = Profile(("GPU",), {"torch": "2"}, costs.fit(samples(0.02, 1e-8, 1e-12)))
    made.save(tmp_path / "deep" / "p.json")
    assert costs.load(tmp_path / "deep" / "p.json") == made
    (tmp_path / "bad.json").write_text('{"devices": 3}')
    with pytest.raises(ValueError, match="is no profile of fusepass"):
        costs.load(tmp_path / "bad.json")


def test_the_users_profile_goes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    monkeypatch.setattr(costs, "SHIPPED", shipped)
    monkeypatch.setenv("FUSEPASS_CACHE", str(own))
    costs._profile.cache_clear()
    Profile(("GPU A", "GPU B"), {"from": "shipped"}, ()).save(shipped / "a.json")
    found = costs.profile("GPU B")
    assert found is not None and found.machine == {"from": "shipped"}
    assert costs.profile("GPU C") is None and costs.profile(None) is None
    Profile(("GPU B",), {"from": "here"}, ()).save(costs.place_of("GPU B"))
    costs._profile.cache_clear()
    found = costs.profile("GPU B")
    assert found is not None and found.machine == {"from": "here"}
    costs._profile.cache_clear()


def test_shipped_profiles_can_be_read() -> None:
    for place in costs.SHIPPED.glob("*.json"):
        found = costs.load(place)
        assert found.fits and found.devices and found.machine["device"] == found.devices[0]


def test_the_nearest_head_size_serves() -> None:
    fits = tuple(Fit("k", "full", d, "forward", float(d), 0.0, 0.0, 1, 0.0) for d in (64, 128))
    found = [Profile(("g",), {}, fits).find("k", "full", d, "forward") for d in (32, 80, 112, 256)]
    assert [f.head_dim for f in found if f is not None] == [64, 64, 128, 128]
    assert Profile(("g",), {}, fits).find("k", "causal", 64, "forward") is None


# ---------------------------------------------------------------------------------------- a site as work

KINDS = {
    "full": spec(),
    "causal": spec(mask(Band(None, 0))),
    "window": spec(mask(Band(100, 0))),
    "padding": spec(mask(Band(None, 0), KeyPadding())),
    "mask": spec(mask(Document())),
    "causal+softcap": spec(SoftCap(5.0), mask(Band(None, 0))),
    "full+bias": spec(Bias(0, "hij")),
    "causal+thin bias": spec(Bias(0, "hj"), mask(Band(None, 0))),
    "causal+sink": spec(mask(Band(None, 0)), sink=Sink(1, "h")),
    "full+dropout": spec(weights=(Dropout(0.1),)),
    "one query": spec(queries=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    assert select.kind_of(KINDS[kind]) == kind


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("left", [None, 0, 2, 20])
@pytest.mark.parametrize("right", [None, 0, 1, 20])
def test_pairs_are_counted(queries: int, keys: int, left: int | None, right: int | None) -> None:
    gap = torch.arange(keys) - torch.arange(queries)[:, None]
    seen = torch.ones_like(gap, dtype=torch.bool)
    seen = seen if left is None else seen & (gap >= -left)
    seen = seen if right is None else seen & (gap <= right)
    found = select.pairs_of(spec(mask(Band(left, right))), queries, keys)
    assert found == max(1, int(seen.sum()))


# ---------------------------------------------------------------------------------------- ranking


def profile(**milliseconds: float) -> Profile:
    """Kernels that always take that long, in forward and training, for full attention."""
    return Profile(
        ("GPU",), {"device": "GPU"},
        tuple(
            Fit(k, "full", 64, mode, ms, 0.0, 0.0, 1, 0.0)
            for k, ms in milliseconds.items() for mode in ("forward", "training")
        ),
    )  # fmt: skip


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2) * 0.1).softmax(-1) @ v).flatten(2)


def chosen(monkeypatch: pytest.MonkeyPatch, made: Profile | None, kernel: str = "auto") -> Any:
    hopper(monkeypatch)
    monkeypatch.setattr(costs, "profile", lambda device: made)
    graph = fake_graph(plain, *[(2, 4, 64, 64)] * 3)
    with torch.no_grad():
        return rewrite_graph(graph, Options(kernel=kernel)).sites[0]


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, profile(sdpa=2.0, flash4=1.0, flex=3.0)).kernel == "flash4"
    assert chosen(monkeypatch, profile(sdpa=1.0, flash4=2.0)).kernel == "sdpa"


def test_what_was_not_measured_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, profile(flex=3.0)).kernel == "flex"


def test_a_site_stays_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    site = chosen(monkeypatch, profile(unfused=0.5, sdpa=1.0))
    assert not site.fused and "measured faster as it is" in site.reason
    assert chosen(monkeypatch, profile(unfused=0.95, sdpa=1.0)).fused, "within the model's error: fused"
    assert chosen(monkeypatch, profile(unfused=0.5, sdpa=1.0), kernel="sdpa").fused, "asked for by name"


def test_without_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, None).kernel == "sdpa"


@pytest.mark.parametrize(
    ("given", "first"),
    [
        (spec(), SDPA),
        (spec(mask(Band(None, 0))), SDPA),
        (spec(mask(Band(100, 0))), FLASH4),
        (spec(mask(Band(None, 0), KeyPadding()), rows_seen=False), FLEX),
        (spec(mask(Band(100, 0)), queries=256, keys=256), SDPA),
        (spec(Bias(0, "hij")), SDPA),
    ],
)
def test_the_rule_avoids_large_dense_masks(given: Attention, first: Any) -> None:
    sizes = {"i": float(given.queries), "j": float(given.keys)}
    assert select.by_rule(given, sizes, KERNELS)[0] is first


def test_on_a_cpu_the_list_is_the_order() -> None:
    ranked = select.rank(None, replace(CUDA, device="cpu"), KERNELS, profile(flash4=0.1))  # type: ignore[arg-type]
    assert [r.kernel for r in ranked] == list(KERNELS)
