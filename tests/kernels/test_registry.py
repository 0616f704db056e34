"""Kernels of other packages: registered, chosen, refused, shown, found, and safe by default."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fusepass
from fusepass.compilation.backend import fusepass as backend
from fusepass.host import kernel_names
from fusepass.host.config import Options
from fusepass.kernels import (
    Builder,
    Gate,
    Mask,
    Package,
    Refused,
    Scale,
    ScaleBy,
    Site,
    Takes,
    Target,
    conjunction,
    operands,
    registry,
    rounds,
    scaled,
)
from fusepass.selection import autotune, costs
from fusepass.tools import doctor
from fusepass.tools.bench import measuring as bench
from fusepass.tools.bench import report as bench_report
from tests.attention import Attention, Q, plain, softcapped
from tests.fake_cuda import fake_graph, hopper

ROOT = Path(__file__).parents[2]
GATE = Gate("mine", (torch.float32, torch.float64))


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Scales and masks by SDPA, as a stand-in for a library."""
    scale, x = scaled(site, build, operands(site, build))
    mask = conjunction(site, build, site.spec.masks) if site.spec.masks else None
    call = torch.ops.aten.scaled_dot_product_attention.default
    return build.call(call, x.q, x.k, x.v, attn_mask=mask, scale=scale)


def register(emit: Any = emit, **more: Any) -> None:
    given: dict[str, Any] = {"takes": Takes((Scale, ScaleBy, Mask)), "gate": GATE, **more}
    fusepass.register_kernel("mine", emit, **given)


def kernels(program: Callable[..., Any] | None = None, *args: Tensor, **options: Any) -> list[str | None]:
    """The kernels of a program's sites, which is also run and compared."""
    program, args = program or Attention(), args or (Q, Q, Q)
    torch._dynamo.reset()
    with fusepass.collect() as seen:
        got = torch.compile(program, backend=backend, options={"inner": "eager", **options})(*args)
    torch.testing.assert_close(got, program(*args), rtol=1e-4, atol=1e-4)
    return [site.kernel for site in seen.sites]


# ------------------------------------------------------------ by name


def test_it_is_chosen_by_its_name_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register()
    monkeypatch.chdir(tmp_path)
    program = torch.export.export(Attention(), (Q, Q, Q))
    assert kernels(kernel="mine") == ["mine"]
    for function in (fusepass.explain, fusepass.verify):
        result = function(Attention(), Q, Q, Q, fusepass_options={"kernel": "mine"})
        assert [site.kernel for site in result.sites] == ["mine"]
    with fusepass.collect() as seen:
        fusepass.fuse(program, kernel="mine")
        fusepass.export_pt2(program, (Q, Q, Q), "model.pt2", kernel="mine")
        with fusepass.enabled(kernel="mine"):
            torch.compile(Attention())(Q, Q, Q)
    assert [site.kernel for site in seen.sites] == ["mine"] * 3


def test_its_reasons_are_explained() -> None:
    register(refuse=lambda spec, target: "not on Sundays" if spec.dtype is torch.float64 else None)
    program: Callable[..., Tensor]
    for program, args, why in (
        (softcapped, [Q] * 3, "mine: it has no 'softcap 5'"),
        (Attention(), [Q.half()] * 3, "mine: it computes in float32 and float64, and this is float16"),
        (Attention(), [Q.double()] * 3, "mine: not on Sundays"),
    ):
        (site,) = fusepass.explain(program, *args, fusepass_options={"kernel": "mine"}).sites
        assert not site.fused and site.reason == why


def test_a_name_that_nobody_registered_is_unknown() -> None:
    with pytest.raises(ValueError, match="kernel='mine' is unknown"):
        Options(kernel="mine")
    register()
    assert Options(kernel="mine").kernel == "mine"
    with pytest.raises(ValueError, match=r"'reference', 'mine'.*did you mean 'mine'"):
        Options(kernel="mien")
    registry.unregister_kernel("mine")
    with pytest.raises(ValueError, match="kernel='mine' is unknown"):
        Options(kernel="mine")
    with pytest.raises(ValueError, match="no kernel 'mine' is registered"):
        registry.unregister_kernel("mine")


# ------------------------------------------------------------ by auto


@pytest.mark.parametrize("chosen", [False, True])
def test_auto_chooses_it_where_its_gate_says_so(chosen: bool) -> None:
    register(gate=Gate("mine", (torch.float32,), auto=chosen))
    assert kernels() == ["mine" if chosen else "sdpa"]
    assert kernels(softcapped) != ["mine"], "what it refuses goes to others"
    assert kernels(None, Q.double(), Q.double(), Q.double()) == ["sdpa"], "and so does what its gate refuses"


@pytest.mark.parametrize("chosen", [False, True])
def test_autotune_measures_it_where_its_gate_says_so(
    chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEPASS_CACHE", str(tmp_path))
    tried: list[fx.Node] = []

    def milliseconds(original: fx.Node, end: fx.Node, *rest: Any) -> float:
        tried.append(end)
        return 1.0 if end is not original and len(tried) == 2 else 9.0

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    register(gate=Gate("mine", (torch.float32,), auto=chosen))
    assert kernels(kernel="autotune") == ["mine" if chosen else "sdpa"], "the first candidate is the fastest"


def test_measurements_take_the_place_of_its_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    register(gate=Gate("mine", (torch.float32,), auto=True))
    quick = costs.Curve("sdpa", "full", 16, costs.FORWARD, 0.01, ((8.0, 1e-3), (64.0, 1e-3)))
    slow = costs.Curve("mine", "full", 16, costs.FORWARD, 9.0, ((8.0, 1.0), (64.0, 1.0)))
    hopper(monkeypatch)
    monkeypatch.setattr(costs, "device_name", lambda: "any")
    for curves, chosen in (((quick,), "mine"), ((quick, slow), "sdpa"), ((), "mine")):
        profile = costs.Profile(("any",), {}, curves)
        monkeypatch.setattr(costs, "profile", lambda name, profile=profile: profile)
        graph = fake_graph(plain, *[(2, 4, 8, 16)] * 3, dtype=torch.float32)
        with fusepass.collect() as seen:
            fusepass.fuse(graph)
        assert [site.kernel for site in seen.sites] == [chosen]


def test_a_kernel_that_rounds_serves_by_name_only() -> None:
    with pytest.raises(ValueError, match="leave auto=True out"):
        register(rounds=True, gate=Gate("mine", (torch.float32,), auto=True))
    register(rounds=True)
    assert rounds("mine") and not rounds("sdpa") and rounds("fp8")
    assert kernels(kernel="mine", validate=True) == ["mine"]
    assert kernels(kernel="auto") == ["sdpa"]


def test_training_needs_a_backward_pass() -> None:
    x = Q.clone().requires_grad_()
    register(gate=Gate("mine", (torch.float32,), backward=False))
    (site,) = fusepass.explain(Attention(), x, x, x, fusepass_options={"kernel": "mine"}).sites
    assert site.reason == "mine: it has no backward pass"
    register(replace=True)
    assert kernels(None, x, x, x, kernel="mine") == ["mine"]


# ------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda build, out: build.op("transpose", out, 1, 2), "[2, 8, 4, 16] of torch.float32, and a site"),
        (lambda build, out: build.op("select", out, 0, 0), "[4, 8, 16] of torch.float32, and a site"),
        (lambda build, out: build.cast(out, torch.float64), "of torch.float64, and a site needs"),
    ],
    ids=["shape", "dimensions", "dtype"],
)  # fmt: skip
def test_a_result_that_no_site_needs_is_refused(wrong: Any, words: str) -> None:
    register(lambda site, build, target: wrong(build, emit(site, build, target)))
    (site,) = fusepass.explain(Attention(), Q, Q, Q, fusepass_options={"kernel": "mine"}).sites
    assert not site.fused and words in str(site.reason)


def test_a_call_that_no_exported_graph_can_hold_is_refused() -> None:
    def python(site: Site, build: Builder, target: Target) -> fx.Node:
        scale, x = scaled(site, build, operands(site, build))
        return build.call(torch.nn.functional.scaled_dot_product_attention, x.q, x.k, x.v, scale=scale)

    register(python)
    assert kernels(kernel="mine") == ["mine"]
    with fusepass.collect() as seen:
        fusepass.fuse(torch.export.export(Attention(), (Q, Q, Q)), kernel="mine")
    assert "it writes a call of 'scaled_dot_product_attention'" in str(seen.sites[0].reason)


def test_a_fault_costs_the_kernel_alone(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def broken(site: Site, build: Builder, target: Target) -> fx.Node:
        operands(site, build)
        raise ZeroDivisionError("a bug of mine")

    register(broken, gate=Gate("mine", (torch.float32,), auto=True))
    with pytest.raises(Exception, match="a bug of mine"):
        kernels()
    monkeypatch.delenv("FUSEPASS_STRICT", raising=False)
    with caplog.at_level(logging.WARNING, "fusepass"):
        assert kernels() == ["sdpa"]
    assert "kernel 'mine' failed while it was written" in caplog.text


def test_it_may_refuse_by_its_operands() -> None:
    def later(site: Site, build: Builder, target: Target) -> fx.Node:
        raise Refused("its queries are of the wrong colour")

    register(later)
    (site,) = fusepass.explain(Attention(), Q, Q, Q, fusepass_options={"kernel": "mine"}).sites
    assert site.reason == "mine: its queries are of the wrong colour"


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("sdpa", {}, "fusepass has a kernel of this name"),
        ("auto", {}, "fusepass has a kernel of this name"),
        ("fp8", {}, "fusepass has a kernel of this name"),
        ("my kernel", {}, "letters, digits and underscores"),
        ("other", {}, "its gate is of 'mine'"),
    ],
)
def test_a_wrong_registration(name: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fusepass.register_kernel(name, emit, takes=Takes(()), gate=GATE, **more)
    assert not registry.registered()


def test_a_name_is_registered_once() -> None:
    register()
    with pytest.raises(ValueError, match=r"kernels\.test_registry has registered this name.*replace=True"):
        register()
    register(replace=True)


# ------------------------------------------------------------ where it is shown


def test_doctor_lists_it() -> None:
    there = Package("pytest", "pytest", "__init__.py", "pip install pytest")
    absent = Package("mine-attention", "no_such_module", "", "pip install mine-attention")
    for gate, runs, words in (
        (GATE, True, "registered by tests.kernels.test_registry; by name only"),
        (Gate("mine", (torch.float32,), auto=True), True, "`auto` may choose it"),
        (Gate("mine", (torch.float16,), (9,)), False, "it needs an NVIDIA GPU"),
        (Gate("mine", (torch.float32,), package=there), True, f"pytest {pytest.__version__}; registered by"),
        (
            Gate("mine", (torch.float32,), package=absent),
            False,
            "mine-attention is not installed: pip install",
        ),
    ):
        register(gate=gate, replace=True)
        row = next(s for s in doctor.diagnose().kernels if s.kernel == "mine")
        assert row.runs is runs and words in row.why
    register(gate=GATE, replace=True)
    (row,) = (s for s in doctor.diagnose().kernels if s.kernel == "mine")
    assert (row.dtypes, row.gpus) == ("fp32 float64", "any")
    json.dumps(doctor.diagnose().to_json())


def test_bench_measures_it() -> None:
    register()
    settings = {"device": "cpu", "dtype": "float32", "tokens": 32, "width": 64, "repeats": 1}
    work = bench.jobs(["full"], [16], [16], ["forward"], ["auto", *bench.by_name()[-1:]], **settings)
    with pytest.MonkeyPatch.context() as patch:
        import torch._inductor.compile_fx

        patch.setattr(torch._inductor.compile_fx, "compile_fx", lambda gm, inputs, **kwargs: gm.forward)
        rows = bench.run(work)
    assert [(row.contender, row.kernel) for row in rows] == [("auto", "sdpa"), ("mine", "mine")]
    assert rows[1].milliseconds is not None
    head, ((*_, shown),) = bench_report._head_and_lines(rows)
    assert head[-1] == "mine" and float(shown) > 0
    assert [s.kernel for s in bench_report.samples(rows)] == ["mine"], "a profile learns it"


# ------------------------------------------------------------ how it is found


MODULE = """
import torch, fusepass
from fusepass.kernels import Gate, Takes, Scale, operands, scaled

def emit(site, build, target):
    scale, x = scaled(site, build, operands(site, build))
    return build.call(torch.nn.functional.scaled_dot_product_attention, x.q, x.k, x.v, scale=scale)

def register():
    fusepass.register_kernel("found", emit, takes=Takes((Scale,)), gate=Gate("found", (torch.float32,)))
"""
MODEL = """
import torch
def model():
    return (lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v), tuple(torch.randn(3, 2, 4, 8, 16))
"""


@pytest.mark.parametrize("way", ["entry point", "environment"])
def test_commands_find_it(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = MODULE if way == "entry point" else MODULE + "\nregister()\n"
    (tmp_path / "their_kernels.py").write_text(text)
    (tmp_path / "models.py").write_text(MODEL)
    if way == "entry point":
        info = tmp_path / "theirs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[fusepass.kernels]\nfound = their_kernels:register\n")
    else:
        monkeypatch.setenv("FUSEPASS_KERNELS", "their_kernels")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    command = [sys.executable, "-m", "fusepass", "explain", "models.py:model", "--kernel", "found", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["graphs"][0]["sites"][0]["kernel"] == "found"


def test_a_package_that_fails_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(kernel_names, "_looked", set())
    monkeypatch.setenv("FUSEPASS_KERNELS", "no_such_module")
    point = metadata.EntryPoint("theirs", "no_such_package.kernels", kernel_names.GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    monkeypatch.setenv("FUSEPASS_STRICT", "0")
    for _ in range(2):
        assert kernels() == ["sdpa"]
    said = [r.getMessage() for r in caplog.records if r.name == "fusepass"]
    assert len(said) == 2, "each is said once"
    assert "entry point 'theirs' (no_such_package.kernels)" in said[0]
    assert "FUSEPASS_KERNELS names 'no_such_module'" in said[1]
