"""verify: it passes right results, fails wrong ones, and tells by how much."""

import json
import math

import pytest
import torch

import fusepass
from fusepass.reports.check import Check
from fusepass.reports.measure import cost
from fusepass.tools.trial import distance
from tests import engines

X = torch.randn(2, 8, 16)
pytestmark = pytest.mark.usefixtures("idle_engine")
QUICK = {"inner": "eager"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    model = engines.Attention().to(dtype)
    verification = fusepass.verify(model, X.to(dtype), fusepass_options=QUICK, fusepass_repeats=0)
    assert verification.ok
    assert [check.name for check in verification.outputs] == ["output"]
    assert verification.exact == "float64"
    assert verification.difference == 0
    assert model.calls == 0, "the model's state is left alone"


def test_what_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.install(monkeypatch, engines.wrong)
    verification = fusepass.verify(
        engines.Attention(), X, fusepass_options=QUICK, fusepass_repeats=0, fusepass_grads=True
    )
    assert not verification.ok
    assert verification.outputs[0].fused_error == pytest.approx(0.01, rel=0.05)
    assert verification.outputs[0].ratio > 1000
    assert {check.name for check in verification.gradients} == {"project.weight", "project.bias"}
    assert not all(check.ok for check in verification.gradients)
    assert "WRONG" in str(verification)
    assert len(verification.sites) == 1


def test_gradients_of_arguments_count() -> None:
    x = X.clone().requires_grad_()
    verification = fusepass.verify(
        engines.Attention(), x, fusepass_options=QUICK, fusepass_repeats=0, fusepass_grads=True
    )
    assert verification.ok
    assert {check.name for check in verification.gradients} == {
        "argument 0",
        "project.weight",
        "project.bias",
    }
    assert x.grad is None


def test_time_and_memory_of_every_way() -> None:
    verification = fusepass.verify(engines.Attention(), X, fusepass_repeats=2)
    assert list(verification.costs) == ["eager", "inner", "fused"]
    assert verification.inner == "aot_eager"
    assert all(cost.milliseconds > 0 and cost.peak_bytes for cost in verification.costs.values())
    data = json.loads(json.dumps(verification.to_json()))
    assert data["ok"] is True
    assert data["outputs"][0]["name"] == "output"
    assert "aot_eager with fusepass" in str(verification)


def test_random_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output.*changes from run to run.*model.eval\(\)"):
        fusepass.verify(engines.Attention(dropout=0.5).train(), X, fusepass_options=QUICK)


def test_a_half_precision_model_that_cannot_run_in_float64() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype != torch.float64, "no float64 here"
        return torch.softmax(x @ x.mT, -1) @ x

    verification = fusepass.verify(picky, X.bfloat16(), fusepass_options=QUICK, fusepass_repeats=0)
    assert verification.exact == "float32"
    with pytest.raises(RuntimeError, match=r"no more precise copy of the model runs.*no float64 here"):
        fusepass.verify(picky, X, fusepass_options=QUICK, fusepass_repeats=0)


def test_distance_is_relative_and_strict_about_infinities() -> None:
    nan, inf = math.nan, math.inf
    want = torch.tensor([1.0, -4.0, 2.0])
    assert distance(want + 0.4, want, want) == pytest.approx(0.1)
    assert distance(want[:2], want, want) == inf
    assert distance(torch.tensor([1.0, nan, 2.0]), want, want) == inf
    eager = torch.tensor([1.0, inf, nan])
    assert distance(torch.tensor([1.1, inf, nan]), want, eager) == pytest.approx(0.025)
    assert distance(torch.tensor([1.0, -inf, nan]), want, eager) == inf
    assert distance(torch.zeros(3), torch.zeros(3), torch.zeros(3)) == 0


def test_results_are_named_by_their_place() -> None:
    def many(x: torch.Tensor) -> dict[str, object]:
        return {"first": x, "rest": [x + 1, (x + 2,)], "count": 3}

    verification = fusepass.verify(many, X, fusepass_options=QUICK, fusepass_repeats=0)
    assert [check.name for check in verification.outputs] == ["first", "rest.0", "rest.1.0"]


def test_ratio_of_errors() -> None:
    assert Check("a", 1e-7, 2e-7, 0, 4e-7).ratio == 2
    assert Check("a", 0, 0, 0, 1e-7).ratio == 1
    assert Check("a", 0, 1, 1, 1e-7).ratio == math.inf


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.empty(1000, 256)

    def hold() -> list[torch.Tensor]:
        return [torch.empty(1000, 256) for _ in range(3)]

    device = torch.device("cpu")
    assert cost(lambda: call, device, repeats=1).peak_bytes == 1_024_000
    assert cost(lambda: hold, device, repeats=1).peak_bytes == 3_072_000
