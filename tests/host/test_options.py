"""One set of option names everywhere; options that would be ignored; kernels that serve no site."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusepass
from fusepass.__main__ import main
from fusepass.compilation.backend import fusepass as backend
from fusepass.host.config import Options
from fusepass.reports.collector import collect
from tests.attention import Attention, Q, plain, softcapped


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(Attention(), (Q, Q, Q))


def enabled(**options: Any) -> None:
    with fusepass.enabled(**options):
        pass


def to_file(write: Callable[..., Any], name: str, **options: Any) -> None:
    write(Attention(), (Q, Q, Q), name, **options)


RUNS_THE_PASS: dict[str, Callable[..., Any]] = {
    "enable": enabled,
    "fuse": lambda **options: fusepass.fuse(exported(), **options),
    "export_pt2": partial(to_file, fusepass.export_pt2, "model.pt2"),
    "compile_aoti": partial(to_file, fusepass.compile_aoti, "model.pt2"),
}
WRITES_OPERATORS: dict[str, Callable[..., Any]] = {
    "export_onnx": partial(to_file, fusepass.export_onnx, "model.onnx"),
    "optimize_onnx": partial(fusepass.optimize_onnx, "model.onnx", "model.onnx"),
}


@pytest.mark.parametrize("function", RUNS_THE_PASS)
@pytest.mark.parametrize(("option", "value"), [("inner", "aot_eager"), ("mode", "max-autotune")])
def test_an_option_that_a_function_would_ignore_is_refused(function: str, option: str, value: str) -> None:
    with pytest.raises(ValueError, match="would be ignored") as raised:
        RUNS_THE_PASS[function](**{option: value})
    said = str(raised.value)
    assert said.startswith(f"{function}({option}={value!r})")
    assert "'kernel', 'precision', 'validate'" in said, "what it takes"
    assert "torch.compile(" in said or "inductor_configs" in said, "where the option belongs"


@pytest.mark.parametrize("function", WRITES_OPERATORS)
@pytest.mark.parametrize("option", Options.names())
def test_an_onnx_file_has_none_of_the_options(function: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{function}\({option}=1\) would be ignored: .* takes none; "):
        WRITES_OPERATORS[function](**{option: 1})


@pytest.mark.parametrize("function", ["enable", "fuse", "export_pt2"])
def test_every_option_of_the_pass_is_taken(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    RUNS_THE_PASS[function](kernel="sdpa", precision="native", validate=True)
    with pytest.raises(ValueError, match=r"'sdpaa' is unknown.*did you mean 'sdpa'"):
        RUNS_THE_PASS[function](kernel="sdpaa")


@pytest.mark.parametrize("function", [*RUNS_THE_PASS, *WRITES_OPERATORS])
def test_an_unknown_name_is_named(function: str) -> None:
    run = {**RUNS_THE_PASS, **WRITES_OPERATORS}[function]
    with pytest.raises(ValueError, match=rf"{function}\(\): unknown fusepass option 'kernl'"):
        run(kernl="sdpa")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dynamic", "dynamic= is an argument of torch.compile itself"),
        ("max_autotune", "it is TorchInductor's: with fusepass.enabled(): torch.compile(model, options="),
        ("triton.cudagraphs", "it is TorchInductor's"),
        ("kernal", "did you mean 'kernel'"),
    ],
)
def test_a_name_from_elsewhere_is_sent_there(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"unknown fusepass option {name!r}") as raised:
        Options.from_user(**{name: True})
    assert words in str(raised.value)


# ------------------------------------------------------------ mode


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of Inductor's calls; the graph runs uncompiled."""
    import torch._inductor.compile_fx

    calls: list[dict[str, Any]] = []

    def compile_fx(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        patches: dict[str, Any] = kwargs.get("config_patches") or {}
        calls.append({name: value for name, value in patches.items() if isinstance(value, bool)})
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    return calls


MAX = {"max_autotune": True, "coordinate_descent_tuning": True}


@pytest.mark.parametrize("around", [False, True], ids=["alone", "enabled"])
@pytest.mark.parametrize("ready", [False, True], ids=["a dictionary", "Options"])
def test_a_mode_beside_a_kernel(inductor: list[dict[str, Any]], ready: bool, around: bool) -> None:
    options: Any = {"kernel": "sdpa", "mode": "max-autotune-no-cudagraphs"}
    if around:
        fusepass.enable()
    try:
        with collect() as seen:
            given: Any = Options(**options) if ready else options
            torch.compile(Attention(), backend=backend, options=given)(Q, Q, Q)
    finally:
        fusepass.disable()
    assert inductor == [MAX]
    assert [site.kernel for site in seen.sites] == ["sdpa"], "the pass runs once"


@pytest.mark.parametrize("function", [fusepass.explain, fusepass.verify])
@pytest.mark.parametrize("ready", [False, True], ids=["a dictionary", "Options"])
def test_what_compiles_takes_all_options(
    inductor: list[dict[str, Any]], function: Callable[..., Any], ready: bool
) -> None:
    options: Any = {"inner": "inductor", "kernel": "sdpa", "mode": "max-autotune-no-cudagraphs"}
    options |= {"precision": "native", "validate": False}
    more = {"fusepass_repeats": 0} if function is fusepass.verify else {}
    given = Options(**options) if ready else options
    result = function(Attention(), Q, Q, Q, fusepass_options=given, **more)
    assert [site.kernel for site in result.sites] == ["sdpa"]
    assert inductor == ([MAX] if more else [])


def test_a_mode_chooses_inductor_in_verify(inductor: list[dict[str, Any]]) -> None:
    mode = {"mode": "max-autotune-no-cudagraphs"}
    verification = fusepass.verify(Attention(), Q, Q, Q, fusepass_options=mode, fusepass_repeats=0)
    assert verification.inner == "inductor"
    assert inductor == [MAX]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "max-autotun"}, ValueError, "did you mean 'max-autotune'"),
        ({"mode": 3}, TypeError, "mode=3: expected a string or None, got int"),
        ({"mode": "max-autotune", "inner": "eager"}, ValueError, "is for inner='inductor' only"),
    ],
)
def test_a_wrong_mode(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Options.from_user(**options)
    assert Options.from_user(mode="default", inner="eager").mode == "default"


def test_options_as_a_dictionary() -> None:
    assert Options(kernel="sdpa", mode="max-autotune").given() == {"kernel": "sdpa", "mode": "max-autotune"}
    assert Options.of(Options().given()) == Options()


# ------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--inner", "eager", "s.py"], "enable(inner='eager') would be ignored"),
        (["run", "--mode", "max-autotune", "s.py"], "torch.compile(model, mode=...)"),
        (["export", "m.py:m", "--to", "m.onnx", "--kernel", "sdpa"], "target= says which operators"),
        (["export", "m.py:m", "--to", "m.pt2", "--inner", "eager"], "export_pt2(inner='eager')"),
        (["export", "m.py:m", "--to", "m.pt2", "--aoti", "--mode", "x"], "inductor_configs"),
        (["optimize", "m.onnx", "--validate"], "optimize_onnx(validate=True)"),
        (["explain", "m.py:m", "--mode", "x"], "mode='x' is unknown"),
        (["verify", "m.py:m", "--mode", "max-autotune", "--inner", "eager"], "inner='inductor' only"),
    ],
)
def test_the_command_line_says_the_same(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


# ------------------------------------------------------------ kernels that serve no site


def through_the_backend(f: Callable[..., Tensor], options: dict[str, Any]) -> None:
    torch.compile(f, backend=backend, options={**options, "inner": "eager"})(Q, Q, Q)


Graph = Callable[..., Tensor]
COMPILE: dict[str, Callable[[Graph, dict[str, Any]], Any]] = {
    "backend": through_the_backend,
    "explain": lambda f, options: fusepass.explain(f, Q, Q, Q, fusepass_options=options),
    "fuse": lambda f, options: fusepass.fuse(torch.fx.symbolic_trace(f), Q, Q, Q, **options),
}


@pytest.mark.parametrize("way", COMPILE)
@pytest.mark.parametrize(
    ("kernel", "program", "reason"),
    [
        ("flash2", plain, "it runs on NVIDIA GPUs, and this is cpu"),
        ("sdpa", softcapped, "it has no 'softcap 5'"),
        ("sdpa", lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "the softmax runs over another axis"),
        ("flash2", torch.nn.functional.scaled_dot_product_attention, "a call to SDPA already"),
    ],
    ids=["machine", "modifier", "look-alike", "already"],
)
def test_a_kernel_that_serves_nothing_is_warned_of(
    way: str, kernel: str, program: Graph, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    COMPILE[way](lambda q, k, v: program(q, k, v), {"kernel": kernel})
    (said,) = [record.getMessage() for record in caplog.records if record.name == "fusepass"]
    assert said.startswith(f"fusepass: kernel={kernel!r} was requested but serves no attention site: ")
    assert reason in said


@pytest.mark.parametrize("way", COMPILE)
@pytest.mark.parametrize(
    ("kernel", "program"),
    [
        ("sdpa", lambda q, k, v: plain(q, k, v) + softcapped(q, k, v)),
        ("auto", lambda q, k, v: (q @ k.mT).softmax(-2) @ v),
    ],
    ids=["one of two", "not asked for"],
)
def test_otherwise_nothing_is_said(
    way: str, kernel: str, program: Graph, caplog: pytest.LogCaptureFixture
) -> None:
    COMPILE[way](program, {"kernel": kernel})
    assert not [record for record in caplog.records if record.name == "fusepass"]


@pytest.mark.parametrize("first", [True, False], ids=["served first", "served later"])
def test_it_is_said_once_a_request(first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """All graphs of one call of `torch.compile` belong to one request; the next call is another request."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = plain(q, k, v) if first else softcapped(q, k, v)
        torch._dynamo.graph_break()
        x = softcapped(x, k, v)
        torch._dynamo.graph_break()
        return softcapped(x, k, v)

    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(model, backend=backend, options={"inner": "eager", "kernel": "sdpa"})(Q, Q, Q)
    warned = [record for record in caplog.records if record.name == "fusepass"]
    assert len(warned) == (0 if first else 2)


def test_a_graph_without_attention_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    options: Any = {"inner": "eager", "kernel": "flash2"}
    torch.compile(lambda x: x + 1, backend=backend, options=options)(Q)
    assert not [record for record in caplog.records if record.name == "fusepass"]
    caplog.clear()
    fusepass.fuse(torch.fx.symbolic_trace(lambda x: x + 1), Q, kernel="flash2")
    assert "serves no attention site: no attention was found" in caplog.text, "there will be no other graph"


@pytest.fixture(autouse=True)
def all_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fusepass")
