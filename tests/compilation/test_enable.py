"""The backend, and the pass in every plain torch.compile: on, off, nested, without side effects."""

import logging
from typing import Any

import pytest
import torch

import fusepass
from fusepass.compilation.autoenable import is_enabled
from fusepass.compilation.backend import fusepass as backend
from fusepass.reports.collector import collect
from tests import engines

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    engines.install(monkeypatch, engines.idle)
    yield
    fusepass.disable()


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of Inductor, each with its settings; the graph runs without being compiled."""
    import torch._inductor.compile_fx

    calls: list[dict[str, Any]] = []

    def compile_fx(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("config_patches") or {})
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    return calls


X = torch.randn(2, 8, 16)


def test_the_backend_runs_the_pass_and_the_inner_backend() -> None:
    model = engines.Attention()
    with collect() as collector:
        compiled = torch.compile(model, backend=backend, options={"inner": "eager", "kernel": "sdpa"})
        torch.testing.assert_close(compiled(X), model(X))
    (site,) = collector.sites
    assert site.reason == "idle, kernel sdpa"


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(Exception, match=r"unknown fusepass option 'kernl'.*did you mean 'kernel'"):
        torch.compile(engines.Attention(), backend=backend, options={"kernl": "sdpa"})(X)


def test_a_mode_is_for_inductor(inductor: list[dict[str, Any]]) -> None:
    torch.compile(engines.Attention(), backend=backend, mode="max-autotune-no-cudagraphs")(X)
    assert inductor == [{"max_autotune": True, "coordinate_descent_tuning": True}]
    with pytest.raises(
        ValueError, match="mode='max-autotune' is for inner='inductor' only; here inner='eager'"
    ):
        backend(
            torch.fx.symbolic_trace(engines.Attention()), [], options={"inner": "eager"}, mode="max-autotune"
        )


def test_a_fault_of_the_pass_leaves_the_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines.install(monkeypatch, engines.failing)
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    model = engines.Attention()
    with collect() as collector, caplog.at_level(logging.WARNING, "fusepass"):
        compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
        torch.testing.assert_close(compiled(X), model(X))
    assert "ZeroDivisionError: an engine fault" in caplog.text
    assert "an engine fault" in collector.notes[0]


def test_strict_raises_a_fault_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.install(monkeypatch, engines.failing)
    monkeypatch.setenv("FUSEPASS_STRICT", "1")
    with pytest.raises(Exception, match="an engine fault"):
        torch.compile(engines.Attention(), backend=backend, options={"inner": "eager"})(X)


def test_enable_puts_the_pass_before_inductor(inductor: list[dict[str, Any]]) -> None:
    fusepass.enable(kernel="flex")
    with collect() as collector:
        torch.compile(engines.Attention())(X)
        torch.compile(engines.Attention(), backend="inductor", options={"max_autotune": True})(X)
        torch.compile(mode="max-autotune-no-cudagraphs")(engines.Attention())(X)
    assert [site.reason for site in collector.sites] == ["idle, kernel flex"] * 3
    assert [patches.get("max_autotune", False) for patches in inductor] == [False, True, True]


def test_other_backends_never_notice(inductor: list[dict[str, Any]]) -> None:
    fusepass.enable()
    with collect() as collector:
        torch.compile(engines.Attention(), backend="eager")(X)
    assert collector.graphs == []
    assert inductor == []


def test_what_counts_is_the_call_of_compile(inductor: list[dict[str, Any]]) -> None:
    before = torch.compile(engines.Attention())
    with fusepass.enabled():
        during = torch.compile(engines.Attention())
    after = torch.compile(engines.Attention())
    seen = []
    for compiled in (before, during, after):
        with collect() as collector:
            compiled(X)
        seen.append(len(collector.graphs))
    assert seen == [0, 1, 0]


def test_a_model_in_place(inductor: list[dict[str, Any]]) -> None:
    model = engines.Attention()
    with fusepass.enabled(), collect() as collector:
        model.compile()
        model(X)
    assert len(collector.sites) == 1


def test_one_function_compiled_with_and_without(inductor: list[dict[str, Any]]) -> None:
    model = engines.Attention()
    torch.compile(model)(X)
    with fusepass.enabled(), collect() as collector:
        torch.compile(model)(X)
    assert len(collector.sites) == 1
    with fusepass.enabled(), collect() as collector:
        torch.compile(model)(X)
    assert collector.graphs == [], "equal settings share compiled code"


def test_on_and_off_any_number_of_times() -> None:
    original = torch._TorchCompileInductorWrapper
    assert not is_enabled()
    fusepass.enable()
    fusepass.enable()
    assert is_enabled()
    with fusepass.enabled(kernel="sdpa"):
        with fusepass.enabled():
            assert is_enabled()
        assert is_enabled()
    assert is_enabled()
    fusepass.disable()
    fusepass.disable()
    assert not is_enabled()
    with pytest.raises(RuntimeError), fusepass.enabled():
        raise RuntimeError
    assert torch._TorchCompileInductorWrapper is original


def test_enable_takes_no_inner() -> None:
    with pytest.raises(ValueError, match=r"enable\(inner='eager'\).*torch.compile\(..., backend='fusepass'"):
        fusepass.enable(inner="eager")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="'flush2' is unknown"):
        fusepass.enable(kernel="flush2")
    assert not is_enabled()
