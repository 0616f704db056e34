"""Every kernel on a real GPU: results and gradients against float64, layouts, compilers, CUDA graphs.

Run with ``pytest -m gpu``; a kernel whose library is missing is skipped by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusepass
from fusepass.host.libraries import FLASH3, FRONTEND, GATES
from fusepass.kernels import blocks, fp8
from fusepass.kernels.gates import build_refuses, installed, lacks, machine_refuses
from fusepass.tools.bench import measuring as bench
from fusepass.tools.bench.cases import VARIANTS
from tests.attention_cases import CASES, Case, full
from tests.checking import Run, assert_same_accuracy, call, compiled
from tests.kernels.test_kernels_blocks import assert_gradients_agree, hiding_rows

pytestmark = pytest.mark.gpu

PAIRS = [(kernel, name) for name, case in CASES.items() for kernel in case.kernels.split()]


INFERRED = ("causal", "padding", "padding on the left", "window", "alibi, multi-head")


def need(kernel: str, *parts: str) -> None:
    """Skip the test if the kernel cannot run here, or its library was built without some parts."""
    gate = GATES.get(kernel)
    reason = None if gate is None else machine_refuses(gate, "cuda")
    if reason is None and gate is not None and gate.package is not None:
        reason = build_refuses(gate.package, parts, 1)
    if reason:
        pytest.skip(f"{kernel}: {reason}")


def learns(kernel: str) -> bool:
    """Has the installed build of a kernel's library a backward pass?"""
    package = GATES[kernel].package if kernel in GATES else None
    return package is None or "backward" not in lacks(package)


def check(case: Case, kernel: str, inner: str, grads: bool) -> Run:
    inputs = case.inputs()
    got = call(compiled(case.program, kernel, inner), inputs, case.dtype, grads)
    assert got.site.fused and got.site.kernel == kernel, got.site
    eager = call(case.program, inputs, case.dtype, grads)
    exact = call(case.program, inputs, torch.float64, grads)
    assert_same_accuracy(got, eager, exact)
    return got


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_results_and_gradients(kernel: str, name: str) -> None:
    need(kernel, *(["softcap"] if "softcap" in name else []))
    inner = "inductor" if kernel.startswith("flex") else "aot_eager"
    check(CASES[name], kernel, inner, grads=learns(kernel))


@pytest.mark.parametrize(("kernel", "name"), [p for p in PAIRS if p[1] in INFERRED])
def test_inference_under_inductor(kernel: str, name: str) -> None:
    """Forward only, everything in one graph: a case in which block tables were once fused away."""
    need(kernel)
    if kernel == "flex_flash":
        got = call(compiled(CASES[name].program, kernel, "inductor"), CASES[name].inputs())
        assert not got.site.fused and "score modifiers can read no tensors" in str(got.site.reason)
        return
    check(CASES[name], kernel, "inductor", grads=False)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex"])
def test_gradients_of_rows_that_a_bias_hides(kernel: str) -> None:
    assert_gradients_agree(hiding_rows("cuda"), kernel, "aot_eager" if kernel == "sdpa" else "inductor")


@pytest.mark.parametrize("kernel", ["flex", "flash4"])
@pytest.mark.parametrize("junk", [math.nan, 0.0, -math.inf])
def test_unwritten_memory_is_not_read(kernel: str, junk: float) -> None:
    """The log-sum-exp identifies rows without keys; without gradients it is written only on request."""
    need(kernel)
    case = CASES["padding on the left"]
    inputs, fused = case.inputs(), compiled(case.program, kernel, "inductor")
    call(fused, inputs)
    memory = [torch.full((2 * case.heads * case.queries,), junk, device="cuda") for _ in range(64)]
    del memory
    got = call(fused, inputs)
    assert_same_accuracy(got, call(case.program, inputs), call(case.program, inputs, torch.float64))


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash2", "flash3", "flash4"])
def test_no_copies_of_sequence_major_tensors(kernel: str) -> None:
    """``[B, S, H, D]`` in and out: nothing but the result is allocated, and the result is contiguous."""
    need(kernel)
    case = Case(full, kv_heads=8, queries=1024, keys=1024, head_dim=128)
    inputs = case.inputs()
    fused = compiled(case.program, kernel, "inductor")
    with torch.no_grad():
        fused(**inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = fused(**inputs)
        peak = torch.cuda.max_memory_allocated() - before
    assert out.is_contiguous()
    assert peak < 1.5 * out.numel() * out.itemsize, peak


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flash4", "flex"])
@pytest.mark.parametrize("grads", [False, True])
def test_cuda_graphs(kernel: str, grads: bool) -> None:
    """``torch.compile`` takes a mode or options, not both, so the pass is switched on by ``enabled``."""
    need(kernel)
    case = CASES["causal"]
    exact = call(case.program, case.inputs(), torch.float64, grads)
    eager = call(case.program, case.inputs(), grads=grads)
    with fusepass.enabled(kernel=kernel):
        fused = torch.compile(case.program, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            got = call(fused, case.inputs(), grads=grads)
    assert_same_accuracy(got, eager, exact)


@pytest.mark.parametrize("name", ["alibi", "padding on the left"])
def test_formulas_of_flash4_in_cuda_graphs(name: str) -> None:
    need("flash4")
    case = CASES[name]
    exact = call(case.program, case.inputs(), torch.float64)
    eager = call(case.program, case.inputs())
    with fusepass.enabled(kernel="flash4"):
        fused = torch.compile(case.program, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            got = call(fused, case.inputs())
    assert_same_accuracy(got, eager, exact)


@pytest.mark.parametrize("grads", [False, True])
def test_fixed_tables_are_taken_from_the_gpu(grads: bool) -> None:
    """Tables of a window read no tensor: they are put on the GPU when the graph is compiled."""
    need("flex")
    check(CASES["window"], "flex", "inductor", grads)
    assert blocks._resident
    for (visible, *sizes, both), device in blocks._resident:
        first, again = (blocks.tables_op([], visible, *sizes, device, both) for _ in range(2))
        want = blocks.tables_op([], visible, *sizes, torch.device("cpu"), both)
        for a, b, c in zip(first, again, want, strict=True):
            assert torch.equal(a.cpu(), c) and torch.equal(b.cpu(), c) and a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("kernel", ["flash2", "flash3", "flash4"])
def test_operators_are_sound(kernel: str) -> None:
    """Schema, fake kernel and autograd registration agree with what the library does."""
    need(kernel)
    q, k, v = (torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    arguments = (q, k, v, None, 0.125, None, 0, 0.0, 0.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.fusepass, kernel).default, arguments, test_utils=tests)


@pytest.mark.parametrize("variant", ["full", "causal", "gqa", "cross", "alibi"])
def test_what_the_benchmark_runs_copies_nothing(variant: str) -> None:
    """Heads copied "once" (``repeat_interleave(1)``) and transposed are read where they lie."""
    sizes = {"tokens": 4096, "width": 1024, "repeats": 3}
    kernel = "flex" if variant == "alibi" else "auto"
    (row,) = bench.run(bench.jobs([variant], [1024], [128], ["forward"], [kernel], **sizes))
    assert not row.problem and row.gpu_milliseconds is not None and row.peak_bytes is not None
    result = 2 * row.batch * row.heads * row.queries * row.head_dim
    assert row.peak_bytes < 1.3 * result, row


def test_autotune_measures_once_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPASS_CACHE", str(tmp_path))
    case = CASES["causal"]
    exact = call(case.program, case.inputs(), torch.float64)
    eager = call(case.program, case.inputs())
    first = call(compiled(case.program, "autotune", "inductor"), case.inputs())
    assert_same_accuracy(first, eager, exact)
    kept = json.loads((tmp_path / "autotune.json").read_text())
    torch._dynamo.reset()
    again = call(compiled(case.program, "autotune", "inductor"), case.inputs())
    assert again.site.kernel == first.site.kernel and first.site.fused
    assert json.loads((tmp_path / "autotune.json").read_text()) == kept and kept


@pytest.mark.parametrize("kernel", ["flex", "flash4"])
@pytest.mark.parametrize("grads", [False, True])
def test_tables_of_a_padding_follow_the_data(kernel: str, grads: bool) -> None:
    """The same compiled call with other lengths."""
    need(kernel)
    variant = VARIANTS["padding"]
    shape = variant.shape(512, 64, 2048, 256)
    fused = compiled(variant.program, kernel, "inductor")
    for seed in range(3):
        given = variant.inputs(shape, torch.device("cuda"), torch.bfloat16)
        lengths = torch.randint(1, 512, (shape.batch, 1), generator=torch.Generator().manual_seed(seed))
        given["keep"] = torch.arange(512, device="cuda") < lengths.cuda()
        exact = call(variant.program, given, torch.float64, grads)
        assert_same_accuracy(
            call(fused, given, torch.bfloat16, grads),
            call(variant.program, given, torch.bfloat16, grads),
            exact,
        )


def test_one_that_breaks_its_process_is_a_row_and_others_are_measured() -> None:
    """A bias of 2**32 elements: FlexAttention refuses it with a reason, and the others are measured."""
    work = bench.jobs(["bias", "full"], [16384], [128], ["forward"], ["flex", "sdpa"], repeats=2)
    rows = {(r.variant, r.contender): r for r in bench.run(work, workers=2)}
    assert "counts in 32 bits" in rows["bias", "flex"].problem
    assert all(rows[key].milliseconds for key in rows if key != ("bias", "flex"))


def sqnr(out: torch.Tensor, true: torch.Tensor) -> float:
    """The ratio of signal to noise in dB."""
    return 10 * math.log10((true.square().sum() / (out.double() - true).square().sum()).item())


def rounded(x: torch.Tensor, heads: int) -> torch.Tensor:
    """What a tensor is after rounding to e4m3 by batch and key/value head."""
    largest = (
        x.double().abs().unflatten(1, (heads, -1)).amax((2, 3, 4)).repeat_interleave(x.shape[1] // heads, 1)
    )
    scale = (largest / 448)[:, :, None, None]
    result: torch.Tensor = (x / scale).to(torch.float8_e4m3fn).double() * scale
    return result


@pytest.mark.parametrize("library", ["cudnn", "flash3"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("outliers", [False, True])
def test_fp8_is_as_accurate_as_its_inputs(library: str, causal: bool, outliers: bool) -> None:
    """Within 1.5 dB of exact arithmetic on inputs that were rounded alike; the rotation spreads outliers."""
    need("fp8")
    package = FRONTEND if library == "cudnn" else FLASH3
    if not installed(package):
        pytest.skip(f"{library}: {package.name} is not installed")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1024, h, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    if outliers:
        q, k = (t + 10 * torch.randn_like(t) * (torch.rand_like(t) < 1e-3) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.double() for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    true, quality = exact(q, k, v), {}
    for rotate in (False, True):
        out = fp8.fp8_attention(q, k, v, 128**-0.5, causal, rotate, library)
        assert out.dtype is q.dtype and out.shape == q.shape
        quality[rotate] = sqnr(out, true)
    alike = exact(*(rounded(t, 2) for t in (q, k, v)))
    if library == "cudnn":  # it writes e4m3
        alike = rounded(alike, 8)
    assert quality[False] > sqnr(alike, true) - 1.5, (quality, sqnr(alike, true))
    assert quality[True] > (quality[False] + 3 if outliers else 24), quality


@pytest.mark.parametrize("name", ["full", "causal"])
def test_fp8_through_the_compiler(name: str) -> None:
    need("fp8")
    case = replace(CASES[name], head_dim=128)
    with fusepass.enabled(precision="fp8"):
        got = call(torch.compile(case.program, fullgraph=True), case.inputs())
    assert got.site.kernel == "fp8" and got.site.reason is None
    exact = call(case.program, case.inputs(), torch.float64)
    assert sqnr(got.out, exact.out.double()) > 24
