"""Queries, keys and values: their origins, and the memory that they share."""

from dataclasses import dataclass

from tests.fuzz.sketch import Live, Shape, Sketch


@dataclass(frozen=True)
class Operands:
    """The names of queries, keys and values."""

    q: str
    k: str
    v: str


def operands(sk: Sketch, equal: str) -> Operands:
    """The three, shaped to be multiplied.

    The letters of `equal` say which sizes are the same: L for Q and K, E for D and E, G for G and H.
    """
    heads = sk.lead[1:]
    kv = ("B", *("G" for _ in heads))
    given_q = _queries(sk, (*sk.lead, "Q", "D"))
    same = "L" in equal and (not heads or "G" in equal)
    k, v = _keys_and_values(sk, kv, given_q if same else None, "E" in equal)
    dims = {"B": f"{given_q}.shape[0]", "Q": f"{given_q}.shape[-2]", "D": f"{given_q}.shape[-1]"}
    dims |= {"H": f"{given_q}.shape[1]", "K": f"{k}.shape[-2]", "E": f"{v}.shape[-1]", "G": f"{k}.shape[1]"}
    sk.dims = dims | sk.dims
    return Operands(given_q, k, v)


def _queries(sk: Sketch, shape: Shape) -> str:
    """The queries, an argument."""
    rest = ", ".join(f"{size}" for size in shape)
    way = sk.rng.random()
    if way < 0.1:
        return sk.argument("q", f"{sk.normal(*shape)}[..., :]")
    if way < 0.2:
        turned = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        return sk.argument("q", f"{sk.normal(*turned)}.transpose(-3, -2)")
    if way < 0.25:
        return sk.argument("q", f"{sk.normal(*shape[:-2], 'D', 'Q')}.mT")
    if way < 0.3:
        return sk.argument("q", f"{sk.normal('1', *shape[1:])}.expand({rest})")
    return sk.learned("q", *shape)


def _keys_and_values(sk: Sketch, lead: Shape, q: str | None, equal: bool) -> tuple[str, str]:
    """Arguments; they may be the queries, each other, or parts of one tensor."""
    k_shape, v_shape = (*lead, "K", "D"), (*lead, "K", "E")
    way = sk.rng.random()
    if way < 0.06 and q is not None:
        k = q if sk.chance(0.4) else _alias(sk, "k", q)
        return k, sk.learned("v", *v_shape)
    if way < 0.12 and equal:
        k = sk.learned("k", *k_shape)
        return k, k if sk.chance(0.4) else _alias(sk, "v", k)
    if way < 0.3:
        return _cache(sk, lead), sk.learned("v", *v_shape)
    if way < 0.36 and equal:
        pair = sk.name("kv")
        sk.inputs.append(f"{pair} = {sk.normal(*lead, 'K + 1', 'D')}")
        k, v = sk.name("k"), sk.name("v")
        sk.inputs.extend([f"{k} = {pair}[..., :K, :]", f"{v} = {pair}[..., 1:, :]"])
        return sk.given(k, leaf=True), sk.given(v, leaf=True)
    if way < 0.42 and equal:
        pair = sk.learned("kv", "2", *k_shape)
        sk.dims = {"K": f"{pair}.shape[-2]", "E": f"{pair}.shape[-1]", "G": f"{pair}.shape[2]"}
        names = sk.name("k"), sk.name("v")
        sk.live.extend(Live(name, leaf=True) for name in names)
        sk.line(sk.pick(f"{', '.join(names)} = {pair}.unbind(0)", f"{', '.join(names)} = {pair}"))
        return names
    if way < 0.46:
        sizes = " * ".join(k_shape)
        strides = ", ".join(" * ".join(k_shape[n + 1 :]) or "1" for n in range(len(k_shape)))
        value = f"{sk.normal(f'{sizes} + 3')}.as_strided(({', '.join(k_shape)}), ({strides}), 2)"
        return sk.argument("k", value), sk.learned("v", *v_shape)
    if way < 0.5:
        k = sk.argument("k", f"{sk.normal(*lead[:-1], '1', 'K', 'D')}.expand({', '.join(k_shape)})")
        return k, sk.learned("v", *v_shape)
    other = sk.pick("torch.float64", "torch.bfloat16", "torch.float32") if sk.chance(0.06) else None
    return sk.learned("k", *k_shape), sk.learned("v", *v_shape, dtype=other)


def _alias(sk: Sketch, prefix: str, of: str) -> str:
    """Another argument on the same memory, in some or all calls."""
    name = sk.name(prefix)
    shared = sk.pick(of, of, f"{of} if turn else {of}.detach().clone()", f"{of}.detach()", f"{of}[...]")
    sk.inputs.append(f"{name} = {shared}")
    return sk.given(name, leaf=True)


def _cache(sk: Sketch, lead: Shape) -> str:
    """Keys that are part of a cache, which is an argument too."""
    before = sk.pick("0", "1", "2")
    cache = sk.learned("cache", *lead, f"K + {before} + 1", "D")
    part = f"[..., {before}:-1, :]"
    if sk.chance(0.5):
        keys = sk.name("k")
        shared = f"{cache}{part}"
        shared = sk.pick(shared, shared, f"{shared} if turn else {shared}.detach().clone()")
        sk.inputs.append(f"{keys} = {shared}")
        return sk.given(keys, leaf=True)
    sk.dims = {"K": f"{cache}.shape[-2] - {int(before) + 1}", "G": f"{cache}.shape[1]"}
    return sk.new("k", cache + part)


def prepared(sk: Sketch, name: str, prefix: str) -> str:
    """The operand after a step that changes little: a copy, a view, a projection."""
    if not sk.chance(0.25):
        return name
    step = sk.pick(
        *(
            "{x} * 1",
            "{x}.clone()",
            "{x} + 0",
            "{x}.contiguous()",
            "{x}.mT.mT",
            "{x}.detach()",
            "{x} * 2",
            "{x} / 2",
        ),
        *(
            "{x}.flip(-2)",
            "{x}.view({x}.shape)",
            "{x}[..., :]",
            "{x}.tanh()",
            "{x}.unsqueeze(0)[0]",
            "{x}.float()",
        ),
        *(
            "{x} @ w",
            "torch.cat([{x}[..., :1, :], {x}[..., 1:, :]], -2)",
            "{x}.transpose(0, 1).transpose(0, 1)",
        ),
        "torch.nn.functional.normalize({x}, dim=-1, eps=1e-3)",  # zeros of half precision stay finite
    )
    if step == "{x} @ w":
        width = "E" if prefix == "v" else "D"
        step = "{x} @ (" + sk.learned("w", width, width) + " / 4)"  # scores stay of usual size
    return sk.new(prefix, step.format(x=name))


def grouped(sk: Sketch, name: str, prefix: str, width: str) -> str:
    """Keys or values repeated for every query head."""
    length = "K"
    way = sk.pick(
        "{x}.repeat_interleave(H // G, dim=1)",
        f"{{x}}[:, :, None].expand(B, G, H // G, {length}, {width}).reshape(B, H, {length}, {width})",
        "{x}.unsqueeze(2).repeat(1, 1, H // G, 1, 1).flatten(1, 2)",
        "{x}[:, torch.arange(H) // (H // G)]",
        "torch.repeat_interleave({x}, H // G, 1)",
    )
    return sk.new(prefix, way.format(x=name))
