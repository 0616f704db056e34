"""Runs a program eagerly, in float64 and compiled, and tells whether the visible results agree."""

import contextlib
import itertools
import logging
import math
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.harness import compiled, run
from tests.fuzz.programs import Loaded, Program

#: Errors of AOT Autograd, which come or not depending on the order of compilations. It guards on the size of
#: an argument's base, for which Dynamo has no name; or it cannot give one base to arguments that are views of
#: one another, because a size is symbolic or because one of them was made without autograd.
OF_BASES = (
    "sources must not be empty for symbol",
    "Expected !size_bytes_is_heap_allocated_",
    "Aliased inputs share storage but have mixed autograd ._base states",
)

#: Large factors of scores: the errors of rounding and the gradients grow by the same factor.
LARGE = r"-1\)\.to\(torch\.uint8\)|\b200\b"

RIGHT, WRONG, FAILED, SKIPPED, TORCHS_OWN = "right", "wrong", "failed", "skipped", "torch's own"
_runs = itertools.count()


@dataclass(frozen=True)
class Verdict:
    """The outcome of a program."""

    kind: str
    reasons: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    """The kinds of its fused sites."""

    @property
    def bad(self) -> bool:
        return self.kind in (WRONG, FAILED)


@dataclass(frozen=True)
class Expected:
    """What eager PyTorch shows, what float64 shows if it can, and how coarse the numbers are."""

    eager: dict[str, Any]
    exact: dict[str, Any] = field(default_factory=dict)
    eps: float = 0.0


def judge(program: Program) -> Verdict:
    """The complete verdict. A failure that also occurs without the pass is PyTorch's."""
    with quiet():
        try:
            expected = expect(program)
        except Exception as error:
            return Verdict(SKIPPED, (first_line(error),))
        verdict = compare(program, expected, "fusepass", **program.options)
        if verdict.bad and (
            compare(program, expected, program.inner).bad
            or is_kernels_own(program, verdict)
            or is_unseen_by_autograd(program, verdict)
            or is_written_between_passes(program, verdict)
        ):
            return Verdict(TORCHS_OWN, verdict.reasons, verdict.fused)
        return verdict


def is_unseen_by_autograd(program: Program, verdict: Verdict) -> bool:
    """Do only gradients differ, because tensors that eager keeps for them are written through ``.data``?"""
    return bool(re.search(r"\.data\.\w+_\(", program.text)) and all(
        "gradient" in reason for reason in verdict.reasons
    )


def is_written_between_passes(program: Program, verdict: Verdict) -> bool:
    """Does PyTorch reject a write between forward and backward, by code outside the site's graph?

    A fused call keeps its keys. Eager keeps copies, one for every query head, which the write does not reach.
    """
    refused = any("modified by an inplace operation" in reason for reason in verdict.reasons)
    return refused and re.search(r"repeat|expand|arange\(H\)", program.text) is not None


def is_kernels_own(program: Program, verdict: Verdict) -> bool:
    """Does the difference vanish if eager's SDPA is computed by plain mathematics instead of its CPU kernel?

    That kernel's gradients are too large in rows that ``finfo.min`` hides: the log-sum-exp rounds away the
    logarithm of the number of keys, so each weight ``exp(s - logsumexp)`` is one.
    """
    if "scaled_dot_product_attention" not in program.text:
        return False
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = expect(program)
        plain = compare(program, expected, "fusepass", **program.options)
    names = [{reason.split(": ")[0] for reason in v.reasons} for v in (verdict, plain)]
    return plain.kind != FAILED and names[0].isdisjoint(names[1])


def expect(program: Program) -> Expected:
    """Run a program eagerly, and in float64 if that works; errors of eager PyTorch are raised."""
    eager = execute(program, program.text)
    exact = {}
    torch.set_default_dtype(torch.float64)
    try:
        exact = execute(program, program.exact_text)
    except Exception:
        pass  # the float64 run mixes dtypes where the original does not
    finally:
        torch.set_default_dtype(torch.float32)
    return Expected(eager, exact, coarseness(program))


def coarseness(program: Program) -> float:
    """The rounding unit of the least precise dtype that a program mentions."""
    single, half, brain = (torch.finfo(d).eps for d in (torch.float32, torch.float16, torch.bfloat16))
    units = {
        r"bfloat16": brain / 8,
        r"(?<!b)float16|half\(": half / 8,
        r"torch\.float64": single / 8,  # most masks and some softmaxes are of single precision
        r"-1e4|-10000|-30000|\* 100\b": 1e4 * single / 64,  # scores this large, and their log-sum-exp
        LARGE: 256 * single,  # scores this large, and their gradients
        r"\+= \w+\.sum\(": 4 * single,  # keys, and therefore scores, become many times as large
        r"softmax\([^()]*float16|\.half\(\)\.(log_)?softmax": half,  # rounded weights, and their gradients
    }
    coarse = [eps for text, eps in units.items() if re.search(text, program.text)]
    steep = 16 if re.search(r"float16|half\(", program.text) and re.search(LARGE, program.text) else 1
    return max(coarse, default=2 * single) * max(1, 4 * len(coarse) - 4) * steep


def compare(program: Program, expected: Expected, backend: str, **options: str) -> Verdict:
    """Compile a program with a backend and compare it with the expected results."""
    from fusepass.reports.collector import collect

    torch._dynamo.reset()
    with collect() as report:
        try:
            got = execute(program, program.text, backend, **options)
        except Exception as error:
            kind = TORCHS_OWN if is_of_bases(error) else FAILED
            return Verdict(kind, (first_line(error),), tuple(site.kind for site in report.fused))
    fused = tuple(f"{site.kernel}: {site.kind}" for site in report.fused)
    reasons = []
    for name, want in expected.eager.items():
        mine, exact = _seen(name, got.get(name)), expected.exact.get(name)
        if exact is not None and overflows(program, want, exact):
            want = exact.to(want.dtype)
        if reason := differs(_seen(name, want), mine, exact, expected.eps):
            reasons.append(f"{name}: {reason}")
    return Verdict(WRONG if reasons else RIGHT, tuple(reasons), fused)


def is_of_bases(error: Exception) -> bool:
    """Did PyTorch fail because of the base of an argument (see `OF_BASES`)?"""
    frames = traceback.extract_tb(error.__traceback__)
    unnamed = isinstance(error, IndexError) or "IndexError" in str(error)
    return any(text in str(error) for text in OF_BASES) or (unnamed and frames[-1].name == "issue_guard")


def overflows(program: Program, want: Any, exact: Any) -> bool:
    """Is a number NaN only because exponentials overflow, from which no maximum was subtracted?

    Such exponentials over their sum are read as a softmax, whatever the size of the scores.
    """
    if "exp(" not in program.text or not isinstance(want, Tensor) or not isinstance(exact, Tensor):
        return False
    return want.shape == exact.shape and bool((want.isnan() & exact.isfinite()).any())


def _seen(name: str, value: Any) -> Any:
    """A value to compare: sums of infinite gradients are infinite or NaN, depending on their order."""
    if "gradient" in name and isinstance(value, Tensor):
        return value.masked_fill(value.isinf(), math.nan)
    return value


def execute(program: Program, text: str, backend: str | None = None, **options: str) -> dict[str, Any]:
    """Everything that a caller can see."""
    loaded = Loaded(text, f"<fuzz {next(_runs)}>")
    try:
        f = loaded.start()
        if backend is not None:
            f = compiled(f, backend, program.dynamic, **options)
        space = loaded.space
        return run(f, space["inputs"], space["edit"], len(program.sizes), program.mode)
    finally:
        loaded.forget()


def differs(want: Any, got: Any, exact: Any, eps: float) -> str:
    """The difference of a value from the eager one, as text; empty if there is none."""
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        same = type(want) is type(got) and (isinstance(want, Tensor) or want == got)
        return "" if same else f"{_short(want)} eager, {_short(got)} compiled"
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{_short(want)} eager, {_short(got)} compiled"
    if not want.is_floating_point():
        return "" if torch.equal(want, got) else "differs"
    if not same_places(want, got):
        finite = f"{int(want.isfinite().sum())} eager, {int(got.isfinite().sum())} compiled"
        return f"finite {finite}, of {want.numel()}"
    return _error(want, got, exact, eps)


def same_places(one: Tensor, other: Tensor) -> bool:
    """Are NaN, inf and -inf in the same places?"""
    finite = torch.tensor(0.0, dtype=torch.float64)
    places = [torch.where(t.isfinite(), finite, t.double()) for t in (one, other)]
    return torch.equal(places[0].nan_to_num(nan=3.0), places[1].nan_to_num(nan=3.0))


def _error(want: Tensor, got: Tensor, exact: Any, eps: float) -> str:
    """The error, if it is too large: twice eager's error against float64 is allowed, and some roundings more.

    If eager itself is far from float64, an element must be close to one or the other.
    """
    finite = want.isfinite()
    if not finite.any():
        return ""
    eager, fused = want.double()[finite], got.double()[finite]
    eps = max(eps, torch.finfo(want.dtype).eps)
    comparable = isinstance(exact, Tensor) and exact.shape == want.shape and same_places(want, exact)
    truth = exact.double()[finite] if comparable else eager
    size = max(1.0, truth.abs().max().item())
    allowed, error = 64 * eps * size, (eager - truth).abs().max().item()
    distance = (fused - truth).abs()
    if not comparable:
        allowed *= 8
    elif error > max(0.01 * size, allowed):
        distance = torch.minimum(distance, (fused - eager).abs())
        allowed = max(allowed, 1e-3 * size)
    else:
        allowed += 2 * error
    worst = distance.max().item()
    return f"error {worst:.2g}, allowed {allowed:.2g}" if not worst <= allowed else ""


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return str(value)


def first_line(error: BaseException) -> str:
    """An error's name and what it says first; for an error of a backend, the one behind it."""
    cause = getattr(error, "inner_exception", None) or error
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"[:160]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Faults of the pass are raised, and neither warnings nor logs are shown."""
    before, heard = os.environ.get("FUSEPASS_STRICT"), logging.root.manager.disable
    os.environ["FUSEPASS_STRICT"] = "1"
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(heard)
        os.environ.pop("FUSEPASS_STRICT")
        if before is not None:
            os.environ["FUSEPASS_STRICT"] = before
