"""bench: variants compute what they say, rows survive their file, profiles come from rows; on the CPU."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusepass.__main__ import main
from fusepass.compilation.rewrite import _TorchGraph, rewrite_graph
from fusepass.host.config import Options
from fusepass.kernels import flex_blocks
from fusepass.selection import clock as bench_clock
from fusepass.selection import costs
from fusepass.selection.machine import machine
from fusepass.selection.work import kind_of
from fusepass.tools.bench import measuring as bench
from fusepass.tools.bench import plot as bench_plot
from fusepass.tools.bench import report as bench_report
from fusepass.tools.bench.cases import VARIANTS
from tests.capture import dynamo_graph

CPU = torch.device("cpu")
TINY = {"device": "cpu", "dtype": "float32", "tokens": 64, "width": 64, "repeats": 2}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_recognised_as_its_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = VARIANTS[name]
    # Longer than the window, so that it hides something.
    shape = variant.shape(2048, 16, 2048, 32)
    given = variant.inputs(shape, CPU, torch.float32)
    for learned in variant.learns:
        given[learned].requires_grad_()
    kinds: list[str] = []
    settled = _TorchGraph.settled

    def watched(self, node, sites, shared):  # type: ignore[no-untyped-def]
        for site in sites:
            kinds.append(kind_of(site.spec, flex_blocks.thin_biases(site), self._learned(node, site)))
        return settled(self, node, sites, shared)

    monkeypatch.setattr(_TorchGraph, "settled", watched)
    graph = dynamo_graph(variant.program, *given.values(), dynamic=False)
    rewrite_graph(graph, Options(kernel="reference"))
    assert kinds == [variant.kind]


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "dropout"])
def test_calls_by_hand_compute_the_same(name: str) -> None:
    variant = VARIANTS[name]
    given = variant.inputs(variant.shape(64, 16, 128, 64), CPU, torch.float32)
    want = variant.program(**given)
    for hand, call in variant.hand.items():
        if hand in ("hand sdpa", "hand flex"):
            torch.testing.assert_close(call(**given), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "name", "module", "options"),
    [
        ("causal", "flash2", "flash_attn.flash_attn_interface", {"causal": True}),
        ("window", "flash3", "flash_attn_interface", {"window_size": (1023, 0)}),
        ("full", "flash4", "flash_attn.cute", {}),
        ("alibi", "flash2", "flash_attn.flash_attn_interface", {"causal": True, "alibi_slopes": "slopes"}),
        ("sink", "flash4", "flash_attn.cute", {"causal": True, "learnable_sink": "sinks"}),
    ],
)
def test_flash_attn_by_hand_is_called_as_it_is_documented(
    variant: str, name: str, module: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
        seen.update(given)
        return q, None

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))
    case = VARIANTS[variant]
    given = case.inputs(case.shape(64, 16, 128, 64), CPU, torch.float32)
    assert torch.equal(case.hand[f"hand {name}"](**given), given["q"].flatten(2))
    assert seen == {key: given.get(value, value) for key, value in options.items()}


@pytest.mark.parametrize("name", ["full", "causal", "window", "gqa", "cross", "decode"])
def test_visible_pairs(name: str) -> None:
    variant = VARIANTS[name]
    shape = variant.shape(1500, 16, 1500, 16)
    i, j = torch.arange(shape.queries)[:, None], torch.arange(shape.keys)
    seen = {"causal": j <= i, "gqa": j <= i, "window": (j <= i) & (i - j < 1024)}.get(
        name, (i >= 0) & (j >= 0)
    )
    assert variant.pairs(shape) == int(seen.sum())


def test_a_run_and_what_is_made_of_it(tmp_path: Path) -> None:
    work = bench.jobs(
        ["causal"], [16, 32], [16], ["forward", "training"], ["eager", "auto", "sdpa", "flash4"], **TINY
    )
    assert len(work) == 16
    rows = bench.run(work)
    problems = bench_report.problems(rows)
    assert list(problems) == ["flash4, causal: stays: flash4: it runs on NVIDIA GPUs, and this is cpu"]
    done = [r for r in rows if r.contender != "flash4"]
    assert all(r.milliseconds is not None and r.milliseconds > 0 for r in done)
    assert {r.kernel for r in done if r.contender == "auto"} == {"sdpa"}
    place = tmp_path / "deep" / "rows.csv"
    bench.write_csv(rows, place, machine("cpu"))
    again, about = bench.read_csv(place)
    assert sorted(map(str, again)) == sorted(map(str, rows)) and about["torch"] == torch.__version__
    profile = bench_report.profile_of(again, about)
    assert {(f.kernel, f.kind) for f in profile.curves} == {("sdpa", "causal")}
    assert bench_report.summary(rows).row_count == 4


def test_samples_count_what_a_kernel_sees() -> None:
    def row(contender: str) -> bench.Row:
        pairs = 2.0 * 3 * 1000
        return bench.Row(
            "padding",
            "forward",
            4096,
            64,
            2,
            3,
            1,
            4096,
            4096,
            pairs,
            contender,
            contender,
            1.0,
            1.0,
            None,
            None,
        )

    keys = {
        s.kernel: s.keys
        for s in bench_report.samples([row(c) for c in ("flex", "sdpa", "compile", "auto", "hand sdpa")])
    }
    assert keys == {"flex": 1000 / 4096, "sdpa": 4096, "unfused": 4096}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, profile = tmp_path / "b.csv", tmp_path / "p.json"
    sizes = "--lengths 16 --head-dims 16 --modes forward --device cpu --dtype float32 --repeats 2"
    sizes += " --tokens 32 --width 32"
    assert (
        main(["bench", "--variants", "full", *sizes.split(), "--contenders", "eager,auto", "--out", str(out)])
        == 0
    )
    assert "2 measurements" in capsys.readouterr().out and out.is_file()
    assert main(["bench", "--read", str(out)]) == 0
    assert "full" in capsys.readouterr().out
    assert main(["bench", "--read", str(out), "--profile-to", str(profile)]) == 0
    assert costs.load(profile).curves == ()
    assert main(["bench", "--variants", "fulll"]) == 2
    assert "unknown variant 'fulll'" in capsys.readouterr().err
    assert main(["bench", "--read", str(tmp_path / "no.csv")]) == 2
    assert main(["bench", "--lengths", "a"]) == 2


def test_flops_are_of_what_is_visible() -> None:
    (row,) = bench.run(bench.jobs(["causal"], [16], [16], ["forward"], ["eager"], **TINY))
    assert row.tflops is not None and row.milliseconds is not None
    pairs = 16 * 17 / 2 * row.batch * row.heads
    assert math.isclose(row.tflops, 4 * pairs * 16 / row.milliseconds / 1e9)


# ---------------------------------------------------------------------------------------- processes


def test_measuring_in_processes_gives_the_same_rows() -> None:
    work = bench.jobs(["full"], [16], [16], ["forward"], ["eager", "sdpa", "flash4"], **TINY)
    alone, spread_out = bench.run(work), bench.run(work, workers=2)
    key = [(r.length, r.contender, r.kernel, r.problem) for r in sorted(alone, key=str)]
    assert sorted(key) == sorted((r.length, r.contender, r.kernel, r.problem) for r in spread_out)


def test_contenders_of_a_case_are_measured_together() -> None:
    """Except unfused attention, which is slow and takes much memory."""
    work = bench.jobs(["full"], [16, 32], [16], bench.MODES, ["auto", "compile", "sdpa", "hand"], **TINY)
    groups = bench.together(work)
    assert sorted(job.contender for group in groups for job in group) == sorted(j.contender for j in work)
    assert all(len({replace(j, contender="") for j in group}) == 1 for group in groups)
    assert sorted(len(group) for group in groups) == [1] * 4 + [2 + len(VARIANTS["full"].hand)] * 4


def test_what_one_contender_takes_along_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench.jobs(["full"], [16], [16], ["forward"], ["eager", "sdpa", "flash4", "auto"], **TINY)
    seen: list[list[str]] = []

    def measured(group: Sequence[bench.Job]) -> list[bench.Row]:
        seen.append([job.contender for job in group])
        rows = [bench._row(job) for job in group]
        if len(group) > 1:
            return [replace(row, problem=f"{bench._LOST}CUDA error") for row in rows]
        return [replace(row, milliseconds=1.0) for row in rows]

    monkeypatch.setattr(bench, "measured", measured)
    rows = bench.run(work)
    assert seen == [["eager"], ["sdpa", "flash4", "auto"], ["sdpa"], ["flash4"], ["auto"]]
    assert sorted(row.contender for row in rows) == ["auto", "eager", "flash4", "sdpa"]
    assert all(row.milliseconds == 1.0 and not row.problem for row in rows)


def test_nothing_is_kept_of_a_case() -> None:
    """Its tensors and recordings would otherwise fill the GPU."""
    (row,) = bench.run(bench.jobs(["full"], [16], [16], ["training"], ["eager"], **TINY))
    assert row.milliseconds and not any(type(o) is bench._Ready for o in gc.get_objects())


def test_steps_are_timed_in_turn() -> None:
    order: list[str] = []
    steps = [lambda: order.append("a"), lambda: order.append("b")]
    spent = bench_clock.in_turn(steps, torch.device("cpu"), 3)
    assert "".join(order) == "ababab" and all(0 < s < 100 for s in spent)


def test_on_a_gpu_the_order_of_turns_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that return 1 for the first step, 2 for the second and 3 for the third."""
    turns: list[int] = []
    steps = [lambda: 1, lambda: 2, lambda: 3]

    def events(step: Callable[[], int], count: int) -> list[float]:
        turns.append(step())
        return [float(step())] * count

    monkeypatch.setattr(bench_clock, "_events", events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench_clock.in_turn(steps, torch.device("cuda"), 20) == [1.0, 2.0, 3.0]
    rounds = [tuple(turns[n : n + 3]) for n in range(len(turns) - 3 * bench_clock._ROUNDS, len(turns), 3)]
    assert all(sorted(r) == [1, 2, 3] for r in rounds) and len(set(rounds)) > 2


@pytest.mark.parametrize(("milliseconds", "recorded"), [(0.01, [1, 20]), (3.0, [1])])
def test_short_steps_are_recorded_several_times(
    milliseconds: float, recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many times depends on the GPU's time for one step, not on the host's time to launch it."""
    captures: list[int] = []

    def capture(step: Callable[[], object], times: int) -> Callable[[], object]:
        captures.append(times)
        return lambda: None

    monkeypatch.setattr(bench_clock, "_capture", capture)
    monkeypatch.setattr(bench_clock, "_events", lambda step, count: [milliseconds] * count)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    _, times, problem = bench_clock.recorded(lambda: None, torch.device("cuda"))
    assert captures == recorded and times == recorded[-1] and not problem


def test_a_page_of_the_results() -> None:
    (row,) = bench.run(bench.jobs(["full"], [16], [16], ["forward"], ["eager"], **TINY))
    auto = replace(row, contender="auto", kernel="sdpa", milliseconds=2.0, gpu_milliseconds=1.0)
    hand = replace(row, contender="hand sdpa", milliseconds=1.0, gpu_milliseconds=0.9)
    page = bench_report.markdown([row, auto, hand], {"torch": "2"}, "rows.csv")
    assert "| 0.9 sdpa | 1 | sdpa |  | 0.90 | 0.50 |" in page and page.endswith(
        "relative to that call):\n\n- full: forward 16 × 16 (0.90)\n"
    )


def test_a_page_tells_calls_by_hand_that_repair_rows_from_those_that_do_not() -> None:
    (row,) = bench.run(bench.jobs(["padding"], [16], [16], ["forward"], ["eager"], **TINY))
    times = {"auto": 1.0, "hand flex": 0.5, "repaired flex": 3.0, "repaired flex_flash": 2.0}
    rows = [replace(row, contender=name, milliseconds=t, gpu_milliseconds=t) for name, t in times.items()]
    page = bench_report.markdown([row, *rows], {"torch": "2"}, "rows.csv")
    assert "| 2 flex_flash | 1 | eager |  | 2.00 | 2.00 |" in page and "## Rows that see no key" in page
    assert page.endswith("| padding | forward | 16 | 16 | 0.5 | flex | 1 | 0.50 |\n")


def test_a_page_of_kernels_by_name() -> None:
    (row,) = bench.run(bench.jobs(["full"], [16], [16], ["forward"], ["eager"], **TINY))
    plain = replace(row, contender="compile", milliseconds=3.0)
    rows = [plain, replace(row, contender="sdpa", milliseconds=2.0)]
    page = bench_report.markdown(rows, {"torch": "2"}, "rows.csv")
    assert "| variant | pass | D | S | compile | sdpa |" in page
    assert page.endswith("| full | forward | 16 | 16 | 3 | 2 (1.50×) |\n")


def test_a_picture_says_how_many_times_as_fast_auto_is(tmp_path: Path) -> None:
    (row,) = bench.run(bench.jobs(["full"], [16], [16], ["forward"], ["eager"], **TINY))
    times = {"compile": 6.0, "auto": 2.0, "hand sdpa": 1.0}
    rows = [replace(row, contender=name, milliseconds=t, gpu_milliseconds=t) for name, t in times.items()]
    results = [(rows, {"device": "NVIDIA H100 80GB HBM3", "torch": "2"}), (rows[1:], {"device": "a CPU"})]
    lines = list(bench_plot.lines_of(results, "full", "forward", 16))
    assert [line.machine for line in lines] == ["H100", "a CPU"]
    said = "Attention without a mask: 3.0 times as fast as torch.compile\nand 0.50 times as fast"
    assert bench_plot.message("full", lines).startswith(said)
    pytest.importorskip("matplotlib")
    (place,) = bench_plot.plot(results, tmp_path)
    assert place.name == "full.svg" and place.read_text().startswith("<?xml")


MEASURED = {
    "attention-h100": "auto-nvidia-h100-80gb-hbm3",
    "attention": "auto-nvidia-h200",
    "cpu": "cpu-bfloat16",
    "cpu-float32": "cpu-float32",
}


@pytest.mark.parametrize("page", MEASURED)
def test_a_measured_page_is_what_the_command_writes(page: str) -> None:
    root, results = Path(__file__).parents[2], f"benchmarks/results/{MEASURED[page]}.csv"
    written = bench_report.markdown(*bench.read_csv(root / results), results)
    assert written == (root / f"docs/{page}.md").read_text(encoding="utf-8")
