"""`optimize_onnx`: models of other exporters are fused if possible, otherwise untouched or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fusepass
from tests.onnx_models import MODELS, Attention, drawn, dynamic, nodes, run, sharpened

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def scripted(
    model: nn.Module, path: Path, inputs: dict[str, Tensor], opset: int, varying: bool | dict[int, str]
) -> None:
    """An export by TorchScript; axes that may vary have names (``True``: batch and sequence)."""
    named = {0: "batch", 1: "seq"} if varying is True else varying
    axes = dict.fromkeys(inputs, named) if named else None
    torch.onnx.export(
        model, tuple(inputs.values()), str(path), dynamo=False, opset_version=opset,
        input_names=list(inputs), output_names=["out"], dynamic_axes=axes,
    )  # fmt: skip


def plain(model: nn.Module, path: Path, *args: Any, opset: int = 20, **options: Any) -> None:
    """An export by PyTorch's exporter, without fused attention."""
    program = torch.onnx.export(model, args, dynamo=True, opset_version=opset, verbose=False, **options)
    assert program is not None
    ir.save(program.model, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_exports_by_torchscript(opset: int, varying: bool, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    model = sharpened(Attention(kv=2, causal=True))
    scripted(model, before, {"x": drawn(), "mask": MASK}, opset, varying)
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused, report.softmaxes) == (1, 1, 0), report.graph.sites
    assert report.max_error <= 1e-5 and report.versions[""] == 24
    assert [v is not None for v in nodes(after, "Attention")[0].inputs] == [True] * 4
    with torch.no_grad():
        want = model(drawn(seed=5), MASK).numpy()
    assert np.abs(run(after, x=drawn(seed=5), mask=MASK)[0] - want).max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_older_opsets_have_another_operator(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    scripted(sharpened(Attention(kv=2, causal=True)), before, {"x": drawn(), "mask": MASK}, 17, True)
    report = fusepass.optimize_onnx(before, after, target="ort", opset=18)
    assert report.operators == {"com.microsoft.MultiHeadAttention": 1} and report.versions[""] == 18
    assert report.max_error <= 1e-5


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_after_passes_of_onnxruntime(level: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    before, middle, after = (tmp_path / f"{n}.onnx" for n in ("before", "middle", "after"))
    plain(sharpened(Attention(causal=True)), before, drawn(), MASK)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(middle)
    ort.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
    report = fusepass.optimize_onnx(middle, after, target="ort")
    assert (report.fused, report.softmaxes) == (1, 0), report.graph.sites
    assert report.max_error <= 1e-5


class Pair(nn.Module):
    """Two layers, the second with a softcap, which onnxscript's patterns do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention(cap=5.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x, mask), mask)
        return out


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_what_onnxscript_has_left(target: str, tmp_path: Path) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    before, middle, after = (tmp_path / f"{n}.onnx" for n in ("before", "middle", "after"))
    plain(sharpened(Pair()), before, drawn(), MASK)
    optimized: Any = optimize_for_ort(ir.load(before))
    ir.save(optimized[0] if isinstance(optimized, tuple) else optimized, middle)
    theirs = [n for n in ir.load(middle).graph if n.domain == "com.microsoft" and "Attention" in n.op_type]
    assert len(theirs) == 1, "one is fused by onnxscript"
    report = fusepass.optimize_onnx(middle, after, target=target)
    assert (report.sites, report.fused, report.softmaxes) == (1, 1, 0), report.graph.sites
    assert report.operators == {f"com.microsoft.{theirs[0].op_type}": 1, "Attention": 1}
    assert report.checks and report.max_error <= 1e-5


def test_names_metadata_and_weights_stay(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(sharpened(Attention()), before, drawn(), input_names=["tokens"], output_names=["result"])
    model = ir.load(before)
    model.metadata_props["licence"] = "public domain"
    ir.save(model, before)
    fusepass.optimize_onnx(before, after)
    old, new = ir.load(before), ir.load(after)
    assert [v.name for v in (*new.graph.inputs, *new.graph.outputs)] == ["tokens", "result"]
    assert new.metadata_props == {"licence": "public domain"} and new.producer_name == old.producer_name
    for name, value in old.graph.initializers.items():
        kept = new.graph.initializers.get(name)
        assert kept is None or np.array_equal(kept.const_value.numpy(), value.const_value.numpy())
    assert {"q.bias", "out.bias"} <= set(new.graph.initializers)


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(sharpened(Attention()), before, drawn())
    fusepass.optimize_onnx(before, after)
    again = fusepass.optimize_onnx(after, after)
    assert again.sites == 0 and again.operators == {"Attention": 1}


def test_scores_that_are_read_elsewhere_stay(tmp_path: Path) -> None:
    class Weights(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            w = (q @ k.transpose(-2, -1)).softmax(-1)
            return w @ v, w

    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Weights().eval(), before, *torch.randn(3, 2, 2, 6, 8))
    report = fusepass.optimize_onnx(before, after)
    assert report.fused == 0 and report.softmaxes == 1
    assert "scores or weights are also used by" in str(report.graph.sites[0].reason)


class Repeated(nn.Module):
    """The same attention twice, the second time also as an output of the model."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def weights() -> Tensor:
            return (q @ k.transpose(-2, -1) * 0.3).softmax(-1)

        w = weights()
        again = w if self.shared else weights()
        first, second = w @ v, again @ v
        return first + 1, second, second * 2


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_attention_twice(shared: bool, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Repeated(shared).eval(), before, *torch.randn(3, 2, 2, 6, 8), optimize=False)
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused, report.softmaxes) == (2, 2, 0), report.graph.sites
    assert report.max_error <= 1e-5 and len(nodes(after, "Attention")) == 1


class Twice(nn.Module):
    """The same weights for two tensors of values; ``shown``: the weights are an output too."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self.shown = shown

    def forward(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        w = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        return (w @ v, w @ u, w) if self.shown else (w @ v, w @ u + 1)


@pytest.mark.parametrize("shown", [False, True])
def test_weights_of_two_products(shown: bool, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Twice(shown).eval(), before, *torch.randn(4, 2, 2, 6, 8))
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused, report.softmaxes) == ((2, 0, 1) if shown else (2, 2, 0))
    assert report.max_error <= 1e-5 and len(nodes(after, "Attention")) == report.fused


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_that_runs_at_its_own_sizes_only_is_checked_there(tmp_path: Path) -> None:
    class Itself(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=False)[0]

    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    scripted(Itself(32, 4, batch_first=True).eval(), before, {"x": drawn()}, 14, True)
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == (1, 0) and report.checks and report.max_error <= 1e-5


class Beside(nn.Module):
    """Keys in two tensors, normalised together; ``shown``: the weights are an output too."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self.shown = shown

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Any:
        w = torch.cat([q @ a.mT, q @ k.mT], -1).mul(0.3).softmax(-1)
        out = w[..., :4] @ b + w[..., 4:] @ v
        return (out, w) if self.shown else out


@pytest.mark.parametrize("shown", [False, True])
def test_keys_in_two_tensors(shown: bool, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Beside(shown).eval(), before, *torch.randn(3, 2, 2, 6, 8), *torch.randn(2, 2, 2, 4, 8))
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == ((0, 1) if shown else (1, 0)), report.graph.sites
    assert report.max_error <= 1e-5 and len(nodes(after, "Attention")) == report.fused


class Activated(nn.Module):
    """An activation function with an exponential in front of a linear layer is not attention."""

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        h = x @ first
        return torch.where(h > 0, h, h.clamp(max=0).exp() - 1) @ second


def test_activations_are_not_reported(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Activated().eval(), before, torch.randn(2, 6, 8), torch.randn(8, 8), torch.randn(8, 8))
    assert fusepass.optimize_onnx(before, after).sites == 0


class Differential(nn.Module):
    """The difference of two softmaxes with a factor (Ye et al., arXiv 2410.05258)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        first, second = (
            (a @ b.transpose(-2, -1) * 0.3).softmax(-1)
            for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        )
        out: Tensor = (first - factor * second) @ v
        return out


@pytest.mark.parametrize("target", ["onnx", "ort", "tensorrt"])
def test_a_difference_of_attentions(target: str, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Differential().eval(), before, *torch.randn(3, 2, 2, 6, 16), torch.rand(2, 1, 1))
    report = fusepass.optimize_onnx(before, after, target=target)
    assert (report.sites, report.fused, report.softmaxes) == (2, 2, 0), report.graph.sites
    assert report.max_error <= 1e-5 and len(nodes(after, "Attention")) == 2


class Late(nn.Module):
    """Weights that are divided by their sum after the product with the values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-2, -1) * 0.3
        w = (s - s.amax(-1, keepdim=True)).exp()
        return w @ v / w.sum(-1, keepdim=True)


def test_weights_that_are_normalised_late(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Late().eval(), before, *torch.randn(3, 2, 2, 6, 8))
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused) == (1, 1), report.graph.sites
    assert report.max_error <= 1e-5 and not nodes(after, "Exp")


class Stored(nn.Module):
    """A causal mask that the model stores, sliced to the length of its input."""

    mask: Tensor

    def __init__(self, mask: Tensor, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, n = q @ k.transpose(-2, -1) * 0.3, q.shape[2]
        if self.how == "where":
            s = torch.where(self.mask[:, :, :n, :n].bool(), s, torch.finfo(s.dtype).min)
        elif self.how == "zero":
            s = s.masked_fill(self.mask[:, :, :n, :n] == 0, -torch.inf)
        elif self.how == "add":
            s = s + self.mask[:n, :n]
        else:  # rows first, then heads
            s = s.masked_fill(self.mask[:n, 0, :n], -torch.inf)
        return s.softmax(-1) @ v


def exported(model: nn.Module, path: Path, *inputs: Tensor, script: bool, longest: int | None = None) -> None:
    """Write ``model`` of (B, H, S, D) inputs with a dynamic S, by one of PyTorch's two exporters."""
    if script:
        scripted(model, path, {f"x{i}": x for i, x in enumerate(inputs)}, 14, {2: "seq"})
    else:
        plain(model, path, *inputs, dynamic_shapes=({2: torch.export.Dim("seq", max=longest)},) * len(inputs))


LOWER = torch.ones(16, 16).tril()
STORED = {
    "where": LOWER.to(torch.uint8)[None, None],
    "zero": LOWER[None, None],
    "add": torch.full((16, 16), -torch.inf).triu(1),
    "hidden": (LOWER == 0)[:, None],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", [True, False], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("how", STORED)
def test_stored_masks_are_proved_causal(how: str, script: bool, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    model = Stored(STORED[how], how).eval()
    q, k, v = torch.randn(3, 2, 2, 6, 8)
    exported(model, before, q, k, v, script=script, longest=16)
    report = fusepass.optimize_onnx(before, after)
    (node,) = nodes(after, "Attention")
    assert report.max_error <= 1e-5 and len(node.inputs) == 3 and node.attributes.get_int("is_causal", 0)


class Chunked(nn.Module):
    """Causal within chunks of four tokens (Llama 4); exporters write `//` as several operators."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(q.shape[2])
        seen = (n[:, None] // 4 == n[None, :] // 4) & (n[None, :] <= n[:, None])
        s = (q @ k.transpose(-2, -1)).masked_fill(~seen, -torch.inf)
        return s.softmax(-1) @ v


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", [True, False], ids=["torchscript", "dynamo"])
def test_chunks(script: bool, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    model, (q, k, v) = Chunked().eval(), torch.randn(3, 2, 2, 6, 8)
    exported(model, before, q, k, v, script=script)
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == (1, 0) and report.max_error <= 1e-5


def test_dropout_in_training_stays(tmp_path: Path) -> None:
    class Dropping(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5) @ v

    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(Dropping().eval(), before, *torch.randn(3, 2, 2, 6, 8))
    report = fusepass.optimize_onnx(before, after, verify=False)
    assert "export the model in eval mode" in str(report.graph.sites[0].reason)


def test_the_reference_evaluator_agrees(tmp_path: Path) -> None:
    """onnx's own evaluator is a second oracle; it is right for masks that have all queries."""
    from onnx.reference import ReferenceEvaluator

    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(sharpened(Attention(kv=2, causal=True, cap=5.0)), before, drawn(), MASK)
    fusepass.optimize_onnx(before, after)
    feeds = {"x": drawn(seed=7).numpy(), "mask": np.array([[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1]])}
    (want,) = run(before, **feeds)
    (got,) = ReferenceEvaluator(str(after)).run(None, feeds)
    assert np.abs(got - want).max() < 1e-5


# ---------------------------------------------------------------------------------------- models


@pytest.mark.slow
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, varying: bool, tmp_path: Path) -> None:
    make, sites = MODELS[name]
    model, inputs = make()
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    plain(model, before, kwargs=inputs, dynamic_shapes=dynamic(inputs) if varying else None)
    for target in ("onnx", "ort", "tensorrt"):
        report = fusepass.optimize_onnx(before, after, target=target)
        kept = sites if target == "tensorrt" and name == "gemma2" else 0  # no softcap in its importer
        assert (report.sites, report.sites - report.fused, report.softmaxes) == (sites, kept, kept)
        assert report.max_error <= 1e-5


class Flat(nn.Module):
    """A model with positional inputs and one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_by_torchscript(name: str, varying: bool, opset: int, tmp_path: Path) -> None:
    make, sites = MODELS[name]
    model, inputs = make()
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    scripted(Flat(model), before, inputs, opset, varying)
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused, report.softmaxes) == (sites, sites, 0)
    assert report.max_error <= 1e-5
