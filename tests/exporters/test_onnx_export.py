"""`export_onnx`: every feature as the operator that a runtime has for it, with PyTorch's numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fusepass
from fusepass.exporters.onnx import export as onnx_export
from fusepass.exporters.onnx import verify as onnx_verify
from fusepass.exporters.onnx.files import Disagreement
from fusepass.exporters.staging import ModelError
from fusepass.specification import attention as spec
from tests.onnx_models import (
    MODELS,
    Attention,
    attributes,
    drawn,
    dynamic,
    exported,
    nodes,
    run,
    sharpened,
    used,
)

BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length")
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


PLAIN = [True] * 3
#: settings -> (inputs that are present, attributes that are set)
FEATURES: dict[str, tuple[dict[str, Any], list[bool], dict[str, Any]]] = {
    "plain": ({}, PLAIN, {"scale": 8**-0.5}),
    "causal": ({"causal": True}, PLAIN, {"scale": 8**-0.5, "is_causal": 1}),
    "grouped heads": ({"kv": 2, "causal": True}, PLAIN, {"scale": 8**-0.5, "is_causal": 1}),
    "softcap": ({"cap": 5.0, "causal": True}, PLAIN, {"scale": 8**-0.5, "is_causal": 1, "softcap": 5.0}),
    "window": ({"causal": True, "window": 3}, [True] * 4, {"scale": 8**-0.5, "is_causal": 1}),
    "bias": ({"bias": True, "causal": True}, [True] * 4, {"scale": 8**-0.5}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_becomes_the_operators(feature: str, tmp_path: Path) -> None:
    settings, inputs, expected = FEATURES[feature]
    path = tmp_path / "model.onnx"
    model = sharpened(Attention(**settings))
    report = exported(model, path, drawn(), dynamic_shapes=({0: BATCH, 1: LENGTH},))
    assert (report.sites, report.fused, report.softmaxes) == (1, 1, 0)
    assert report.max_error <= 1e-5
    written = attributes(path)
    assert {k: pytest.approx(v) for k, v in expected.items()} == written
    assert used(path) == inputs
    assert not nodes(path, "Expand") or feature in ("window", "bias")
    assert len({c.inputs for c in report.checks}) == 2, "checked at two shapes"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_evaluator_agrees(feature: str, padded: bool, tmp_path: Path) -> None:
    """onnx's own evaluator is a second oracle; it is right for masks that have all queries, as here."""
    from onnx.reference import ReferenceEvaluator

    path = tmp_path / "model.onnx"
    model = sharpened(Attention(**FEATURES[feature][0]))
    given = (drawn(), MASK) if padded else (drawn(),)
    exported(model, path, *given)
    feeds = dict(zip(("x", "mask"), (drawn(seed=9).numpy(), MASK.flip(0).numpy()), strict=True))
    loaded = ReferenceEvaluator(str(path))
    (got,) = loaded.run(None, {n: feeds[n] for n in loaded.input_names})
    with torch.no_grad():
        want = model(*map(torch.from_numpy, (feeds[n] for n in ("x", "mask")[: len(given)]))).numpy()
    assert np.abs(got - want).max() < 1e-5


def test_a_mask_of_rank_4_with_all_queries_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = sharpened(Attention())
    shapes = ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH})
    exported(model, path, drawn(), MASK, dynamic_shapes=shapes)
    mask = nodes(path, "Attention")[0].inputs[3]
    assert mask is not None and [str(n) for n in mask.shape or ()] == ["batch", "1", "length", "length"]
    assert ir.load(path).opset_imports[""] == 24 and ir.load(path).ir_version <= 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_no_key_keep_their_meaning(causal: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Under a finite fill they are the mean of the values, not zero as the operator would have it."""
    path = tmp_path / "model.onnx"
    model = sharpened(Attention(causal=causal)).to(dtype)
    exported(model, path, drawn().to(dtype), MASK)
    empty = torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1]])
    x = drawn(seed=3).to(dtype)
    (got,) = run(path, x=x, mask=empty)
    with torch.no_grad():
        want = model(x, empty).numpy()
    assert np.abs(got - want).max() < (1e-5 if dtype is torch.float32 else 1e-2)


class Masked(nn.Module):
    """Masks of -inf: rows that see no key are NaN, or zero if NaN weights are replaced."""

    def __init__(self, clean: bool) -> None:
        super().__init__()
        self.clean = clean

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        s = (q @ k.transpose(-2, -1)).masked_fill(~keep[:, None, None, :], -math.inf)
        w = s.softmax(-1)
        return (torch.nan_to_num(w) if self.clean else w) @ v


@pytest.mark.parametrize("clean", [False, True])
def test_rows_of_minus_infinity(clean: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    q, k, v = torch.randn(3, 2, 2, 6, 8)
    keep = torch.tensor([[True] * 6, [False] * 6])
    report = exported(Masked(clean), path, q, k, v, keep)
    assert report.fused == 1
    (got,) = run(path, q=q, k=k, v=v, keep=keep)
    assert np.isnan(got[1]).all() == (not clean) and np.isfinite(got[0]).all()
    assert not clean or not got[1].any()


class Counted(nn.Module):
    """Every sequence has as many keys as its length says."""

    def __init__(self, fill: float, clean: bool = False, mirrored: bool = False) -> None:
        super().__init__()
        self.fill, self.clean, self.mirrored = fill, clean, mirrored

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        n = torch.arange(k.shape[2])
        hidden = n[None, :] >= lengths[:, None] if self.mirrored else ~(lengths[:, None] > n[None, :])
        s = (q @ k.transpose(-2, -1) * 0.3).masked_fill(hidden[:, None, None, :], self.fill)
        w = s.softmax(-1)
        return (torch.nan_to_num(w) if self.clean else w) @ v


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize(
    "model",
    [Counted(-1e30), Counted(-math.inf), Counted(-math.inf, clean=True), Counted(-1e30, mirrored=True)],
    ids=["mean", "nan", "zero", "mirrored"],
)
def test_lengths_of_keys(model: Counted, opset: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    q, k, v = torch.randn(3, 3, 2, 6, 8)
    shapes = ({0: BATCH, 2: LENGTH},) * 3 + ({0: BATCH},)
    report = exported(
        model.eval(), path, q, k, v, torch.tensor([6, 2, 4]), dynamic_shapes=shapes, opset=opset
    )
    assert report.fused == 1
    assert used(path) == ([True] * 3 + [False] * 3 + [True] if opset == 24 else [True] * 4)
    lengths = torch.tensor([9, 0, -1])
    (got,) = run(path, q=q, k=k, v=v, lengths=lengths)
    want = model(q, k, v, lengths).numpy()
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.nanmax(np.abs(got - want)) < 1e-5


def test_lengths_of_keys_in_half_precision(tmp_path: Path) -> None:
    q, k, v = torch.randn(3, 3, 2, 6, 8).half()
    model, lengths = Counted(-math.inf, clean=True).eval(), torch.tensor([6, 2, 4])
    report = exported(model, tmp_path / "model.onnx", q, k, v, lengths, target="ort")
    assert report.operators == {"Attention": 1} and used(tmp_path / "model.onnx")[6]


def test_lengths_of_other_axes_are_no_lengths_of_keys(tmp_path: Path) -> None:
    class Swapped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, firsts: Tensor) -> Tensor:
            seen = torch.arange(q.shape[0])[:, None] < firsts[None, :]  # the first sequences see a key
            return (q @ k.transpose(-2, -1)).masked_fill(~seen[:, None, None, :], -1e30).softmax(-1) @ v

    path = tmp_path / "model.onnx"
    exported(Swapped().eval(), path, *torch.randn(3, 6, 2, 6, 8), torch.tensor([6, 1, 2, 3, 4, 5]))
    assert used(path) == [True] * 4


class Cached(nn.Module):
    """Causal attention with a cache; returns the joined cache."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        s = q @ k.transpose(-2, -1) * 0.3
        n, past = q.shape[2], past_k.shape[2]
        hidden = torch.arange(past + n)[None, :] > torch.arange(n)[:, None] + past
        return s.masked_fill(hidden, -math.inf).softmax(-1) @ v, k, v


def test_a_cache_becomes_past_and_present(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    new, past = torch.randn(3, 2, 2, 4, 8), torch.randn(2, 2, 2, 3, 8)
    before = torch.export.Dim("past")
    shapes = ({0: BATCH, 2: LENGTH},) * 3 + ({0: BATCH, 2: before},) * 2
    report = exported(Cached(), path, *new, *past, dynamic_shapes=shapes)
    assert report.fused == 1 and "causal+past" in report.graph.sites[0].spec
    assert attributes(path) == {"scale": pytest.approx(0.3), "is_causal": 1}
    assert used(path) == [True, True, True, False, True, True]
    (node,) = nodes(path, "Attention")
    assert [v.is_graph_output() for v in node.outputs] == [False, True, True] or node.outputs[
        1
    ].is_graph_output()
    assert not nodes(path, "Concat")
    one = [torch.randn(2, 2, 1, 8) for _ in range(3)]
    empty = [torch.zeros(2, 2, 0, 8) for _ in range(2)]
    for given in ((*one, *past), (*new, *empty)):
        names = ("q", "k", "v", "past_k", "past_v")
        got = run(path, **dict(zip(names, given, strict=True)))
        for mine, theirs in zip(got, Cached()(*given), strict=True):
            assert np.abs(mine - theirs.numpy()).max() < 1e-5


# ---------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_in_half_precision_is_multi_head_attention(causal: bool, tmp_path: Path) -> None:
    """This includes rows that see no key, on which runtimes do not agree."""
    path = tmp_path / "model.onnx"
    model = sharpened(Attention(kv=2, causal=causal)).half()
    shapes = ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH})
    report = exported(model, path, drawn().half(), MASK, target="ort", dynamic_shapes=shapes)
    assert report.operators == {"com.microsoft.MultiHeadAttention": 1}
    empty = torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1]])
    (got,) = run(path, x=drawn(seed=3).half(), mask=empty)
    with torch.no_grad():
        assert np.abs(got - model(drawn(seed=3).half(), empty).numpy()).max() < 1e-2


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
@pytest.mark.parametrize("settings", [{"causal": True, "window": 3}, {}, {"bias": True}])
def test_a_sink_elsewhere_is_one_more_key(settings: dict[str, Any], target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = sharpened(Attention(kv=2, sink=True, **settings))
    shapes = ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH})
    report = exported(model, path, drawn(), MASK, target=target, dynamic_shapes=shapes)
    assert report.operators == {"Attention": 1} and report.softmaxes == 0
    empty = torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1]])
    (got,) = run(path, x=drawn(seed=3), mask=empty)
    with torch.no_grad():
        assert np.abs(got - model(drawn(seed=3), empty).numpy()).max() < 1e-5, "rows that see the sink alone"


class Gated(nn.Module):
    """Every key's weight, or score, times its own number, with causality and optional padding."""

    def __init__(self, group: int = 1, on_weights: bool = True) -> None:
        super().__init__()
        self.group, self.on_weights = group, on_weights

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: ``[B, H, S, D]``; gate: ``[B, H | 1, 1, S]``; mask: ``[B, S]``."""
        k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
        n = torch.arange(q.shape[2])
        s = q @ k.transpose(-1, -2) * 0.25
        s = (s if self.on_weights else s * gate).masked_fill(
            n[None, :] > n[:, None], torch.finfo(q.dtype).min
        )
        if mask is not None:
            s = s.masked_fill(mask[:, None, None, :] == 0, torch.finfo(q.dtype).min)
        w: Tensor = s.softmax(-1)
        return (w * gate if self.on_weights else w) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", ["onnx", "ort", "tensorrt"])
@pytest.mark.parametrize("on_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_factors_of_keys_go_into_keys_and_values(
    padded: bool, on_weights: bool, target: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    q, k, v = (torch.randn(2, 4, 6, 16, dtype=dtype) for _ in range(3))
    gate = torch.rand(2, 4, 1, 6, dtype=dtype)
    given = (q, k, v, gate, MASK) if padded else (q, k, v, gate)
    shapes = (*({0: BATCH, 2: LENGTH},) * 3, {0: BATCH, 3: LENGTH}, *({0: BATCH, 1: LENGTH},) * padded)
    path = tmp_path / "model.onnx"
    report = exported(Gated(on_weights=on_weights), path, *given, target=target, dynamic_shapes=shapes)
    assert (report.fused, report.softmaxes) == (1, 0)


@pytest.mark.parametrize("on_weights", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_factors_of_heads_that_share_keys_stay(heads: int, on_weights: bool, tmp_path: Path) -> None:
    q, (k, v) = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 2, 6, 16)
    gate = torch.rand(2, heads, 1, 6)
    report = exported(Gated(group=2, on_weights=on_weights), tmp_path / "model.onnx", q, k, v, gate)
    assert (report.fused, report.softmaxes) == ((1, 0) if heads == 1 else (0, 1))
    assert heads == 1 or "varies over keys and heads" in str(report.graph.sites[0].reason)


def test_tensorrt_gets_what_its_importer_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = exported(sharpened(Attention(cap=5.0)), path, drawn(), target="tensorrt")
    assert report.fused == 0 and "softcap" in str(report.graph.sites[0].reason)
    exported(sharpened(Attention(causal=True)), path, drawn(), MASK, target="tensorrt")
    assert "is_causal" not in attributes(path) and used(path) == [True] * 4, "one mask, causality folded in"
    cache = (*torch.randn(3, 2, 2, 4, 8), *torch.randn(2, 2, 2, 3, 8))
    exported(Cached(), path, *cache, target="tensorrt")
    assert len(nodes(path, "Attention")[0].outputs) == 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_tensorrt_gets_nothing_else(feature: str, padded: bool, tmp_path: Path) -> None:
    """One output, no cache, no lengths, no softcap, causality or a mask, no operators of ONNX Runtime."""
    path = tmp_path / "model.onnx"
    given = (drawn(), MASK) if padded else (drawn(),)
    exported(sharpened(Attention(**FEATURES[feature][0])), path, *given, target="tensorrt")
    for node in ir.load(path).graph.all_nodes():
        assert node.domain == "" and node.op_type != "RotaryEmbedding"
        if node.op_type == "Attention":
            assert len(node.outputs) == 1 and len(node.inputs) <= 4 and "softcap" not in node.attributes
            assert len(node.inputs) == 3 or not node.attributes.get_int("is_causal", 0)


# ---------------------------------------------------------------------------------------- contract


def test_a_model_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"as it was")
    monkeypatch.setattr(spec.Attention, "is_causal", lambda spec, offset=0: bool(spec.masks))
    with pytest.raises(Disagreement, match=r"not written: '\w+': error .*, allowed 1e-05 \(x\[2, 6, 32\]"):
        fusepass.export_onnx(sharpened(Attention(causal=True)), (drawn(), MASK), path)
    assert path.read_bytes() == b"as it was" and [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_what_differs_as_much_without_fusion_is_written_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(onnx_verify.ALLOWED, "float32", 1e-9)
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(onnx_export, "_unfused", lambda *_: [])
    with pytest.raises(Disagreement, match="was not written"):
        fusepass.export_onnx(sharpened(Attention()), (drawn(),), path)
    monkeypatch.undo()
    monkeypatch.setitem(onnx_verify.ALLOWED, "float32", 1e-8)
    report = exported(sharpened(Attention()), path, drawn())
    assert any("without fusion" in note for note in report.notes)


def test_names_and_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    exported(sharpened(Attention()), path, drawn(), input_names=["x"], output_names=["y"], external_data=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    graph = ir.load(path).graph
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == ["x", "y"]
    assert run(path, x=drawn())[0].shape == (2, 6, 32)


def test_large_models_keep_their_weights_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protocol buffers are limited to two gigabytes; here the limit is two kilobytes."""
    monkeypatch.setattr("fusepass.exporters.onnx.files._INLINE_BYTES", 2000)
    monkeypatch.setattr("fusepass.exporters.onnx.files._SMALL", 256)
    steps: list[str] = []
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    model = sharpened(Attention(causal=True, kv=2))
    exported(model, path, drawn(), progress=steps.append)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (
        steps[0] == "PyTorch exports the model" and steps[-1] == "running the file and comparing with PyTorch"
    )
    assert any(step.startswith("writing weights: 1 of ") for step in steps)
    fusepass.optimize_onnx(path, out)
    assert (tmp_path / "out.onnx.data").is_file()
    for file in (path, out):
        assert np.abs(run(file, x=drawn())[0] - model(drawn()).detach().numpy()).max() < 1e-5


def test_a_model_in_training_mode_that_drops(tmp_path: Path) -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

    with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
        fusepass.export_onnx(Dropping(), (drawn(),), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_written_unverified_where_nothing_runs_it(tmp_path: Path) -> None:
    model = sharpened(Attention(causal=True)).bfloat16()
    report = fusepass.export_onnx(model, (drawn().bfloat16(),), tmp_path / "model.onnx")
    assert report.fused == 1 and nodes(tmp_path / "model.onnx", "Attention")
    assert report.checks or report.notes[0].startswith("not verified: onnxruntime")


def test_bfloat16_goes_in_and_comes_out(tmp_path: Path) -> None:
    """The CPU provider casts bfloat16, so that a model of casts can be run."""
    from onnx import TensorProto, helper

    steps = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "one"], ["more"]),
        helper.make_node("Cast", ["more"], ["y"], to=TensorProto.BFLOAT16),
    ]
    kinds = {"x": TensorProto.BFLOAT16, "one": TensorProto.FLOAT, "y": TensorProto.BFLOAT16}
    values = {n: helper.make_tensor_value_info(n, kind, ["n"]) for n, kind in kinds.items()}
    graph = helper.make_graph(steps, "g", [values["x"], values["one"]], [values["y"]])
    path = tmp_path / "model.onnx"
    imports = [helper.make_opsetid("", 20)]
    ir.save(ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10)), path)
    x = torch.tensor([1.5, -2.0, torch.inf], dtype=torch.bfloat16)
    feeds = {"x": onnx_verify.array(x), "one": np.ones(3, np.float32)}
    got = onnx_verify.run(path, feeds)
    assert got["y"].dtype == feeds["x"].dtype and got["y"].tolist() == [2.5, -1.0, math.inf]
    (check,) = onnx_verify.compare(got, [onnx_verify.array(x + 1)], onnx_verify.coarsest([feeds["x"]]), "x")
    assert check.ok and check.allowed == 5e-2


def test_an_exported_program_is_taken_as_well(tmp_path: Path) -> None:
    program = torch.export.export(sharpened(Attention(causal=True)), (drawn(),))
    assert exported(program, tmp_path / "model.onnx", drawn()).fused == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onx"}, "unknown target 'onx'; accepted are onnx, ort, tensorrt.*mean 'onnx'"),
        ({"opset": 22}, "opset 22 has no Attention operator; use 23, 24"),
        ({"opset": 99}, "opset 99; expected a number from 18 to 26"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fusepass.export_onnx(Attention(), (drawn(),), tmp_path / "model.onnx", **options)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        fusepass.export_onnx(Attention(), (drawn(),), tmp_path / "none" / "model.onnx")


# ---------------------------------------------------------------------------------------- models


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, varying: bool, dtype: str, target: str, tmp_path: Path) -> None:
    make, sites = MODELS[name]
    model, inputs = make()
    kind = getattr(torch, dtype)
    model = model.to(kind)
    inputs = {n: t.to(kind) if t.is_floating_point() else t for n, t in inputs.items()}
    shapes = dynamic(inputs) if varying else None
    report = exported(model, tmp_path / "m.onnx", kwargs=inputs, dynamic_shapes=shapes, target=target)
    assert (report.sites, report.fused, report.softmaxes) == (sites, sites, 0)
    assert report.max_error <= (1e-5 if dtype == "float32" else 1e-2)
