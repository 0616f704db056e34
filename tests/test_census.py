"""How the demo's models are recognised: a change of the rules must not alter this unnoticed.

The table is the expected reading of every attention site, in order of the forward pass;
`benchmarks/census.py` measures the same for all of `transformers`.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusepass
from benchmarks import census
from examples import demo
from fusepass.report import collect

GROUPED = "grouped heads 4:2"
KINDS: dict[str, list[tuple[str, str]]] = {  # model -> (recognised as, kernel on a CPU) of each site
    "gpt2": [("causal", "sdpa")] * 2,
    "llama": [(f"causal, {GROUPED}", "sdpa")] * 2,
    "mistral": [(f"window(255), {GROUPED}", "sdpa")] * 2,
    "gemma2": [(f"window(255), softcap, {GROUPED}", "flex"), (f"causal, softcap, {GROUPED}", "flex")],
    "t5": [("bias[hij]", "sdpa")] * 2 + [("causal, bias[hij]", "sdpa"), ("full", "sdpa")] * 2,
    "bert": [("key padding", "sdpa")] * 2,
    "vit": [("full", "sdpa")] * 2,
}


def test_every_model_of_the_demo_is_in_the_table() -> None:
    assert set(KINDS) == set(demo.CASES)


@pytest.mark.parametrize("name", KINDS)
def test_sites_of_the_demo(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = demo.CASES[name][1]()
    with torch.no_grad():
        explanation = fusepass.explain(model, **inputs)
    assert [(site.kind, site.kernel) for site in explanation.sites] == KINDS[name], str(explanation)
    assert not explanation.left and not explanation.collector.notes


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + 1.0, dim=-1) @ v


def routed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax that no product follows."""
    return torch.softmax(q @ k.mT, dim=-1).amax(-1, keepdim=True) * v


@pytest.mark.parametrize(("program", "sites"), [(attention, 1), (routed, 0)])
def test_the_census_counts_without_the_pass(program: Callable[..., Tensor], sites: int) -> None:
    counts: Counter[str] = Counter()
    inputs = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    torch.compile(program, backend=census.counting(counts))(*inputs)
    assert (counts["sites"], counts["calls"]) == (sites, 0)
    counts.clear()
    options: dict[str, Any] = {"inner": census.counting(counts)}
    torch.compile(program, backend="fusepass", options=options)(*inputs)
    assert (counts["sites"], counts["calls"]) == (0, sites)


def test_a_family_in_a_process_of_its_own() -> None:
    options = census.arguments(["vit", "--inner", "aot_eager", "--no-inductor"])
    assert options.names == ["vit"] and options.out is None
    row = census.in_process("vit", options)
    assert census.verdict(row) == "fused", row
    assert (row["sites"], row["left"], row["kinds"]) == (2, 0, {"full": 2})
    assert "| vit | 2 | 2 | ? | full ×2 | sdpa ×2 |" in census.markdown([row], "aot_eager")


def test_a_family_that_takes_too_long_is_ended() -> None:
    options = census.arguments(["vit", "--timeout", "0.01"])
    row = census.in_process("vit", options)
    assert census.verdict(row) == "failed" and "0.01 s" in row["failed"]


def test_a_large_share_is_measured_with_inductor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "family": "vit", "sites": 2, "left": 0, "inductor": 0, "kinds": {"full": 2}, "kernels": {"sdpa": 2},
        "reasons": {}, "error": 0.0, "pass_s": 0.2, "compile_s": 1.0,
    }  # fmt: skip
    asked = []

    def measured(family: str, options: Any) -> dict[str, Any]:
        asked.append((family, options.inner))
        return row | {"compile_s": 50.0}

    monkeypatch.setattr(census, "in_process", measured)
    options = census.arguments(["vit", "--inner", "aot_eager"])
    more = census.with_inductor_too(row, options)
    assert more is not None and asked == [("vit", "inductor")]
    assert "| 20.0%; 0.4% with Inductor |" in census.markdown([more], "aot_eager")
    assert census.with_inductor_too(more, options) is None
    assert census.with_inductor_too(row | {"compile_s": 10.0}, options) is None


def causal_with_documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor, table: Tensor) -> Tensor:
    n = torch.arange(8)
    same = (document[:, None] == document) & ((n[:, None] - n) % 3 != 1)
    return (q @ k.mT + table).masked_fill(~same, -torch.inf).softmax(-1) @ v


def test_what_a_call_reads_is_listed_with_its_formula() -> None:
    given = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    document, table = torch.arange(8) // 4, torch.randn(8, 8)
    torch._dynamo.reset()
    with collect() as seen:
        compiled: Callable[..., Tensor] = torch.compile(causal_with_documents, backend="fusepass")
        compiled(*given, document, table)
    (site,) = seen.sites
    formulas = {d.name: (d.formula, d.stored) for d in site.dense}
    assert formulas["bias[ij]"] == ("l_table_[i, j]", True)
    mask, stored = next(value for name, value in formulas.items() if name.startswith("mask"))
    assert "l_document_[i]" in mask and "l_document_[j]" in mask and not stored
    assert census.reads(site) == "stored over pairs"


@pytest.mark.parametrize("after", ["", "\n## Sites that stay\n\n- none\n"])
def test_a_section_is_replaced(after: str) -> None:
    rows = [{"family": "m", "reads": {"nothing": 2}, "terms": [["mask[ij]", "(i | j)", False, 2]]}]
    section = census.quality_section(rows)
    once = census.with_section(f"# Census\n{after}", section)
    again = census.with_section(once, section)
    assert again == once and once.count(census.SECTION) == 1 and "(i \\| j)" in once
    assert after.strip() in once
