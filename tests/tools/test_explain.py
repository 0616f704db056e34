"""explain: what it shows, and that it changes nothing."""

import json

import pytest
import torch

import fusepass
from tests import engines

X = torch.randn(2, 8, 16)
pytestmark = pytest.mark.usefixtures("idle_engine")


def test_it_shows_every_site() -> None:
    explanation = fusepass.explain(engines.Attention(), X, scale=0.5, fusepass_options={"kernel": "flex"})
    (site,) = explanation.sites
    assert site.reason == "idle, kernel flex"
    assert explanation.left == [site]
    assert explanation.fused == []
    assert "0 of 1 attention site fused" in str(explanation)
    assert explanation.table().row_count == 1
    json.dumps(explanation.to_json())


def test_the_model_stays_as_it_was() -> None:
    model = engines.Attention(dropout=0.5).train()
    model.project.weight.grad = torch.ones_like(model.project.weight)
    grad, random = model.project.weight.grad, torch.get_rng_state()
    with torch.no_grad():
        fusepass.explain(model, X)
        assert not torch.is_grad_enabled()
    assert model.calls == 0
    assert model.training
    assert model.project.weight.grad is grad
    assert torch.equal(torch.get_rng_state(), random)


def test_compiled_code_stays_as_it_was() -> None:
    compilations = []

    def counting(gm: torch.fx.GraphModule, example_inputs: object) -> object:
        compilations.append(gm)
        return gm.forward

    model = engines.Attention()
    compiled = torch.compile(model, backend=counting)
    compiled(X)
    for _ in range(10):
        assert len(fusepass.explain(compiled, X).sites) == 1
    compiled(X)
    assert len(compilations) == 1


def test_a_model_with_a_graph_break() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(x @ x.mT, -1) @ x
        torch._dynamo.graph_break()
        return torch.softmax(y @ y.mT, -1) @ y

    assert len(fusepass.explain(broken, X).sites) == 2


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="unknown fusepass option 'dynamic'"):
        fusepass.explain(engines.Attention(), X, fusepass_options={"dynamic": True})


def test_the_original_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.install(monkeypatch, engines.wrong)
    seen = []

    class Seen(engines.Attention):
        def forward(self, x: torch.Tensor, scale: float = 0.25) -> torch.Tensor:
            out = super().forward(x, scale)
            torch._dynamo.graph_break()
            seen.append(out)
            return out

    model = Seen()
    explanation = fusepass.explain(model, X)
    assert len(explanation.fused) == 1
    model(X)
    torch.testing.assert_close(*seen)
