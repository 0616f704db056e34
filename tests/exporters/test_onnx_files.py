"""`optimize_onnx` on files: damaged, foreign, with inner graphs, functions and weights elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import fusepass
from fusepass.exporters.staging import ModelError
from tests.exporters.test_onnx_optimize import plain
from tests.onnx_models import Attention, drawn, nodes, run, sharpened

QKV = ["B", 2, "S", 8]


def floats(name: str, shape: Any = QKV) -> Any:
    """A value in float32."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def attention(q: str = "q", k: str = "k", v: str = "v", end: str = "", opset: int = 20) -> list[Any]:
    """``y = softmax(q k^T) v``, nodes of tensors ``[B, H, S, D]``."""
    return [
        helper.make_node("Transpose", [k], [f"t{end}"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [q, f"t{end}"], [f"s{end}"]),
        helper.make_node("Softmax", [f"s{end}"], [f"w{end}"], axis=3 if opset < 13 else -1),
        helper.make_node("MatMul", [f"w{end}", v], [f"y{end}"]),
    ]


def model_of(steps: list[Any], inputs: Any = None, outputs: Any = None, opset: int = 20, **more: Any) -> Any:
    """A model of the given nodes; by default with inputs ``q, k, v`` and the output ``y``."""
    weights = more.pop("weights", [])
    graph = helper.make_graph(
        steps, "g", inputs or [floats(n) for n in "qkv"], outputs or [floats("y")], weights
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("somebody", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, **more)


def attention_proto(opset: int = 20, extra: list[Any] | None = None) -> Any:
    """``softmax(q k^T) v`` as a hand-made model."""
    steps = [*attention(opset=opset), *(extra or [])]
    return model_of(steps, outputs=[floats("z" if extra else "y")], opset=opset)


def test_unknown_operators_are_left_alone(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    foreign = helper.make_node("Secret", ["y"], ["z"], domain="somebody")
    onnx.save(attention_proto(extra=[foreign]), before)
    report = fusepass.optimize_onnx(before, after)
    assert report.fused == 1 and [n.domain for n in nodes(after, "Secret")] == ["somebody"]
    assert not report.checks and "not verified" in report.notes[0], "nobody can run it"


def test_what_could_not_be_read_is_named(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    model = attention_proto()
    model.graph.node[2].input[0] = "other"
    model.graph.node.insert(2, helper.make_node("Pad", ["s", "pads"], ["other"], name="odd"))
    model.graph.input.append(helper.make_tensor_value_info("pads", TensorProto.INT64, [8]))
    onnx.save(model, before)
    report = fusepass.optimize_onnx(before, after)
    assert report.softmaxes == 1 and "'Pad' (odd)" in str(report.graph.sites[0].reason)


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21, 23, 24])
@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_every_opset(target: str, opset: int, tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(attention_proto(opset), before)
    report = fusepass.optimize_onnx(before, after, target=target)
    assert (report.fused, report.softmaxes) == (1, 0) and report.max_error <= 1e-5
    assert report.versions[""] == 24


def test_a_softmax_over_several_axes_is_none_over_keys(tmp_path: Path) -> None:
    """Before opset 13 ``axis=1`` meant all axes from the first on."""
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    steps = attention(opset=11)
    steps[2].attribute[0].i = 1
    onnx.save(model_of(steps, opset=11), before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == (0, 1) and report.max_error == 0
    assert "another axis" in str(report.graph.sites[0].reason)


# ---------------------------------------------------------------------------------------- inner graphs


def test_inner_graphs_read_what_is_computed_before_them(tmp_path: Path) -> None:
    """One attention in both branches of an If, and again after it: each has a node of its own."""
    branches = [helper.make_graph(attention(end=n), n, [], [floats(f"y{n}", None)]) for n in ("a", "b")]
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    choose = helper.make_node("If", ["flag"], ["chosen"], then_branch=branches[0], else_branch=branches[1])
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    inputs, outputs = [*(floats(n) for n in "qkv"), flag], [floats("chosen"), floats("yz")]
    onnx.save(model_of([choose, *attention(end="z")], inputs, outputs), before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused, report.softmaxes) == (3, 3, 0)
    assert len(nodes(after, "Attention")) == 3 and report.checks and report.max_error <= 1e-5


def looped(shape: Any) -> Any:
    """Attention three times in a loop, with the queries as its state."""
    state = [floats("state", shape), floats("y_inner", shape)]
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [])
    flags = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("more", "more_out")]
    same = helper.make_node("Identity", ["more"], ["more_out"])
    body = helper.make_graph(
        [same, *attention("state", end="_inner")], "body", [number, flags[0], state[0]], [flags[1], state[1]]
    )
    counts = [numpy_helper.from_array(np.array(n), name) for n, name in ((3, "times"), (True, "always"))]
    return model_of([helper.make_node("Loop", ["times", "always", "q"], ["y"], body=body)], weights=counts)


def test_attention_in_a_loop(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(looped(QKV), before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == (1, 0) and report.max_error <= 1e-5


def test_a_state_without_a_shape_is_named(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(looped(None), before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == (0, 1)
    assert report.graph.sites[0].reason == (
        "the shape or dtype of 'state', which it depends on, is not known"
    )


def test_attention_in_a_scan(tmp_path: Path) -> None:
    """One sequence after another, three dimensions each."""
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    steps = attention("a", "b", "c", end="_inner")
    steps[0].attribute[0].ints[:] = [0, 2, 1]
    steps[2].attribute[0].i = -1
    inner = [2, "S", 8]
    body = helper.make_graph(steps, "body", [floats(n, inner) for n in "abc"], [floats("y_inner", inner)])
    scan = helper.make_node("Scan", ["q", "k", "v"], ["y"], body=body, num_scan_inputs=3)
    onnx.save(model_of([scan]), before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == (1, 0) and report.max_error <= 1e-5


def test_functions_of_the_model(tmp_path: Path) -> None:
    """A function that calls another one, twice: they are inlined, and both sites are fused."""
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("somebody", 1)]
    inner = helper.make_function("somebody", "Mix", list("abc"), ["y"], attention(*"abc"), imports)
    factor = helper.make_node("Constant", [], ["f"], value=numpy_helper.from_array(np.float32(0.3)))
    outer = [
        factor,
        helper.make_node("Mul", ["a", "f"], ["g"]),
        helper.make_node("Mix", ["g", "b", "c"], ["y"], domain="somebody"),
    ]
    functions = [inner, helper.make_function("somebody", "Scaled", list("abc"), ["y"], outer, imports)]
    twice = [
        helper.make_node("Scaled", ["q", "k", "v"], ["first"], domain="somebody"),
        helper.make_node("Scaled", ["first", "k", "v"], ["y"], domain="somebody"),
    ]
    onnx.save(model_of(twice, functions=functions), before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused, report.softmaxes) == (2, 2, 0) and report.max_error <= 1e-5


# ---------------------------------------------------------------------------------------- reasons


@pytest.mark.parametrize("where", ["before", "inside"])
def test_an_unknown_operator_is_named(where: str, tmp_path: Path) -> None:
    """It comes before the product of queries and keys, or between that and the softmax."""
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    steps = attention("q" if where == "inside" else "other")
    read = "s" if where == "inside" else "q"
    foreign = helper.make_node("Secret", [read], ["other"], domain="somebody", name="odd")
    if where == "inside":
        steps[2].input[0] = "other"
    steps.insert(2 if where == "inside" else 0, foreign)
    onnx.save(model_of(steps), before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.sites, report.fused, report.softmaxes) == (1, 0, 1)
    assert "'Secret' (odd)" in str(report.graph.sites[0].reason)


def test_dimensions_without_names_are_named(tmp_path: Path) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    shape = [None, 2, None, 8]
    onnx.save(model_of(attention(), [floats(n, shape) for n in "qkv"], [floats("y", shape)]), before)
    report = fusepass.optimize_onnx(before, after)
    reason = str(report.graph.sites[0].reason)
    assert report.fused == 0 and "[q_0, 2, q_2, 8] and [k_0, 2, 8, k_2]; sizes of different names" in reason


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("opset", [9, 27])
def test_unsupported_opsets(opset: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(attention_proto(opset), path)
    before = path.read_bytes()
    with pytest.raises(ModelError, match=rf"uses opset {opset}; versions 11 to 26 are read"):
        fusepass.optimize_onnx(path, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a\x12\x04abcd" * 5])
def test_corrupt_files(content: bytes, tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot read"):
        fusepass.optimize_onnx(path, out)
    assert not out.exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    plain(sharpened(Attention()), path, drawn())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot read"):
        fusepass.optimize_onnx(path, out)
    assert not out.exists()


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_missing_external_data(damage: str, tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    fusepass.export_onnx(sharpened(Attention()), (drawn(),), path, external_data=True, verify=False)
    data = tmp_path / "model.onnx.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:64])
    with pytest.raises(ModelError, match=r"model.onnx.data"):
        fusepass.optimize_onnx(path, out)
    assert not out.exists()


def in_other_files(where: str, path: Path) -> None:
    """A model whose keys are in ``data.bin``: a weight, a weight of an inner graph, or a constant."""
    shape = [2, 2, 64, 8]
    keys = numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype("f4"), "k")
    inputs, outputs = [floats(n, shape) for n in "qv"], [floats("y", shape)]
    if where == "weight":
        model = model_of(attention(), inputs, outputs, weights=[keys])
    elif where == "constant":
        model = model_of([helper.make_node("Constant", [], ["k"], value=keys), *attention()], inputs, outputs)
    else:
        then = helper.make_graph(attention(end="a"), "a", [], [floats("ya", shape)], [keys])
        other = helper.make_graph([helper.make_node("Neg", ["v"], ["yb"])], "b", [], [floats("yb", shape)])
        choose = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)
        flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
        model = model_of([choose], [*inputs, flag], outputs)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location="data.bin",
        size_threshold=10,
        convert_attribute=True,
    )


@pytest.mark.parametrize("where", ["weight", "inner graph", "constant"])
def test_weights_in_other_files(where: str, tmp_path: Path) -> None:
    before, after, data = tmp_path / "before.onnx", tmp_path / "after.onnx", tmp_path / "data.bin"
    in_other_files(where, before)
    report = fusepass.optimize_onnx(before, after)
    assert (report.fused, report.softmaxes) == (1, 0) and report.checks and report.max_error <= 1e-5
    after.unlink()
    content = data.read_bytes()
    for damage in (lambda: data.write_bytes(content[:-1]), data.unlink):
        damage()
        with pytest.raises(ModelError, match=r"cannot read .*data\.bin"):
            fusepass.optimize_onnx(before, after)
        assert not after.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("length", "12", "has 8192 bytes, but the model gives it only 12 of 'data.bin'"),
        ("offset", "99999", "ends at byte 8192"),
        ("location", "../../etc/passwd", "not in the model's folder"),
        ("location", "/etc/passwd", "not in the model's folder"),
        ("length", "many", "not a valid ONNX model"),
    ],
)
def test_wrong_places_of_weights(key: str, value: str, message: str, tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    in_other_files("weight", path)
    model = onnx.load(path, load_external_data=False)
    place = model.graph.initializer[0].external_data
    kept = {e.key: e.value for e in place} | {key: value}
    del place[:]
    for name, text in kept.items():
        place.add(key=name, value=text)
    onnx.save(model, path)
    with pytest.raises(ModelError, match=message):
        fusepass.optimize_onnx(path, out)
    assert not out.exists()


def invalid(how: str) -> Any:
    """Models that onnx's checker refuses."""
    steps = attention()
    if how == "no such value":
        steps[1].input[0] = "nothing"
    elif how == "not sorted":
        steps.reverse()
    elif how == "no such operator":
        steps.insert(0, helper.make_node("Frobnicate", ["q"], ["other"]))
        steps[2].input[0] = "other"
    elif how == "no operator set":
        steps.insert(0, helper.make_node("Secret", ["q"], ["other"], domain="elsewhere"))
        steps[2].input[0] = "other"
    outputs = [floats("y"), floats("w", None)] if how == "no shape" else None
    if how == "two results of one name":
        steps.append(helper.make_node("Neg", ["q"], ["y"]))
    return model_of(steps, outputs=outputs)


@pytest.mark.parametrize(
    "how",
    [
        "no such value",
        "not sorted",
        "no such operator",
        "no operator set",
        "no shape",
        "two results of one name",
    ],
)
def test_invalid_models(how: str, tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(invalid(how).SerializeToString())
    with pytest.raises(ModelError, match=r"cannot read .*model\.onnx.*: it is not a valid ONNX model"):
        fusepass.optimize_onnx(path, out)
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_damaged_bytes(tmp_path: Path) -> None:
    """Any damage leads to an error that names the file, or to a model that onnx's checker accepts."""
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    whole, generator = attention_proto().SerializeToString(), np.random.default_rng(0)
    refused: list[str] = []
    for _ in range(60):
        damaged = bytearray(whole)
        for at in generator.integers(len(whole), size=3):
            damaged[at] = generator.integers(256)
        path.write_bytes(bytes(damaged))
        out.unlink(missing_ok=True)
        try:
            fusepass.optimize_onnx(path, out)
            onnx.checker.check_model(str(out))
        except ModelError as error:
            refused.append(str(error))
        assert {f.name for f in tmp_path.iterdir()} <= {"model.onnx", "out.onnx"}
    assert len(refused) > 30 and all("cannot read" in text or "opset" in text for text in refused)


@pytest.mark.parametrize("apart", [False, True])
def test_a_full_disk(apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails halfway: the old file stays."""

    def fails(model: Any, path: Any, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(attention_proto(), path)
    out.write_bytes(b"as it was")
    monkeypatch.setattr(ir, "save", fails)
    with pytest.raises(ModelError, match=r"cannot write 'out\.onnx': .*No space left on device"):
        fusepass.optimize_onnx(path, out, external_data=apart)
    assert out.read_bytes() == b"as it was" and len(list(tmp_path.iterdir())) == 2


def test_external_data_stays_external(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    fusepass.export_onnx(sharpened(Attention()), (drawn(),), path, external_data=True, verify=False)
    fusepass.optimize_onnx(path, path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert run(path, x=drawn())[0].shape == (2, 6, 32)
