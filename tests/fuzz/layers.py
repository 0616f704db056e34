"""The steps of attention: scores, their modifiers, weights, results."""

from tests.fuzz.masks import hide, hiding_bias, mask
from tests.fuzz.operands import Operands, grouped, prepared
from tests.fuzz.sketch import Sketch

ODD = (
    *(
        "torch.full((Q, 1), 3.0).bool()",
        "torch.full((K,), 0.5).bool()",
        "torch.full((Q, 1), 258).to(torch.uint8)",
    ),
    *(
        "torch.full((Q, 1), 2.9).int()",
        "torch.full((1, K), 2.9).to(torch.int64)",
        "torch.full((Q, 1), 0.1).half()",
    ),
    *(
        "torch.full((), 0.1, dtype=torch.float64)",
        "torch.tensor(2)",
        "torch.tensor(0.1, dtype=torch.float16)",
    ),
    *("torch.full((Q, 1), 0.1, dtype=torch.bfloat16)", "torch.full((Q, 1), 0.1, dtype=torch.float64)"),
    *("torch.tensor(True)", "torch.tensor(258).to(torch.uint8)", "torch.full((K,), -1).to(torch.uint8)"),
    *("torch.ones(Q, 1, dtype=torch.int8) * 100 * 2", "torch.full((Q, 1), 200, dtype=torch.uint8) * 2"),
)
SCALES = (
    *(
        "{s} * 0.5",
        "0.5 * {s}",
        "{s} / 2",
        "{s} / math.sqrt(D)",
        "{s} * D ** -0.5",
        *("{s} / {q}.shape[-1] ** 0.5",) * 3,
        "{s} * {q}.size(-1) ** -0.5",
    ),
    *(
        "{s}.mul(0.3)",
        "torch.div({s}, 3.0)",
        "-{s}",
        "{s}.neg()",
        "{s} * -0.5",
        "{s} * 0.0",
        "{s} * 0",
        "{s} * 4",
    ),
    *(
        "{s} * torch.rsqrt(torch.tensor(4.0))",
        "{s} / torch.tensor(2.0)",
        "{s} * True",
        "torch.mul({s}, 0.25)",
    ),
    *(
        "{s} * {odd}",
        "{s} / {odd}",
        "{odd} * {s}",
        "{s} * {odd}",
        "{s} * {t}",
        "{s} / ({t}.abs() + 1)",
        "{s} * 1e-3",
    ),
    "{s} / (1 / 3)",
)
CAPS = (
    *(
        "torch.tanh({s} / 5) * 5",
        "3.0 * ({s} / 3.0).tanh()",
        "torch.tanh({s})",
        "{s}.tanh() * 2",
        "{s}.sigmoid()",
    ),
    *(
        "{s}.clamp(-2, 2)",
        "{s}.clamp(min=-1e9)",
        "{s}.clamp(max=1)",
        "torch.clamp({s}, min=-1e4)",
        "{s}.relu()",
    ),
    *(
        "{s}.nan_to_num()",
        "{s}.nan_to_num(0.0)",
        "{s}.nan_to_num(neginf=-1e4)",
        "torch.nan_to_num({s}, 0.0, 1.0, -1.0)",
    ),
    *(
        "{s}.abs()",
        "F.softplus({s})",
        "{s} * {s}",
        "{s}.exp()",
        "F.relu({s}.clone(), inplace=True)",
        "{s}.square()",
    ),
    *("torch.where({s} == -inf, -5.0, {s})", "torch.where({s}.isnan(), 0.0, {s})", "F.hardtanh({s}, -1, 1)"),
    *("F.silu({s})", "F.gelu({s})", "{s} * torch.sigmoid(1.7 * {s})", "F.elu({s})", "F.logsigmoid({s})"),
    *(
        "{s} / (1 + {s}.abs())",
        "torch.log1p(torch.exp({s}))",
        "{s}.pow(3)",
        "F.gelu({s}, approximate='tanh')",
    ),
    *("torch.maximum({s}, {t})", "{s} * torch.sigmoid({s} + {t})", "F.hardswish({s})", "F.mish({s})"),
    *("{s}.masked_fill({s} == 0, -1e9)", "torch.maximum({s}, torch.tensor(-10.0))", "{s}.clip(-1e3, 1e3)"),
)
UNDONE = (
    *("torch.tanh({s})", "{s} * 0.0", "{s} * {t}", "-{s}", "(-{s}).clamp(min=-1e9)", "{s}.nan_to_num(0.0)"),
    *(
        "{s}.half()",
        "{s}.clamp(min=-1)",
        "{s}.nan_to_num()",
        "{s}.float().half()",
        "{s}.relu()",
        "{s}.sigmoid()",
        "F.silu({s})",
        "F.softplus({s})",
    ),
    *(
        "{s}.half().float()",
        "{s}.clamp(-1e4, 1e4)",
        "{s} * 1e-9",
        "{s} + 1e9",
        "{s} / {odd}",
        "{s}.bfloat16()",
    ),
)
CASTS = (
    *("{s}.float()", "{s}.half()", "{s}.half().float()", "{s}.double()", "{s}.to(torch.bfloat16)"),
    *("{s}.to(torch.float32)", "{s}.type(torch.float64)", "{s}.bfloat16().float()", "{s}.to(torch.float16)"),
)
VIEWS = (
    *(
        "{s} + 0",
        "{s}.clone()",
        "{s}.contiguous()",
        "{s}.mT.contiguous().mT",
        "{s}.view({s}.shape)",
        "{s}[...]",
    ),
    *(
        "{s}.unsqueeze(0).squeeze(0)",
        "{s}.flip(0).flip(0)",
        "{s}.detach()",
        "{s} * 1",
        "{s} - 1",
        "{s} + 1e4",
    ),
    *(
        "{s} - {s}.amax(-1, keepdim=True)",
        "{s} - {s}.max(dim=-1, keepdim=True)[0]",
        "{s} - {s}.mean(-1, keepdim=True)",
    ),
    *("{s} - {s}.detach().amax(-1, keepdim=True)", "{s} - {s}[..., :1]", "{s}.flip(-1).flip(-1)", "{s}.data"),
)
SOFTMAX = (
    *("{s}.softmax(-1)", "{s}.softmax(-1)", "torch.softmax({s}, dim=-1)", "F.softmax({s}, dim=-1)"),
    *(
        "F.softmax({s}, dim=-1, dtype=torch.float32)",
        "{s}.softmax(-1, dtype=torch.float64)",
        "{s}.softmax({s}.dim() - 1)",
    ),
    *("{s}.log_softmax(-1).exp()", "torch.exp({s} - {s}.logsumexp(-1, keepdim=True))", "F.softmin(-{s}, -1)"),
    *(
        "{s}.float().softmax(-1)",
        "{s}.softmax(-1).to({s}.dtype)",
        "torch.log_softmax({s}, -1, dtype=torch.float32).exp()",
    ),
    *("{s}.half().softmax(-1)", "{s}.double().softmax(-1)", "F.softmax({s}, dim=-1, dtype=torch.float16)"),
)
SINKS = (
    "F.pad({s}, (0, 1), value={f}).softmax(-1)[..., :-1]",
    "F.pad({s}, (1, 0), value={f}).softmax(-1)[..., 1:]",
    "F.pad({s}, (0, 1)).softmax(-1)[..., :K]",
    "torch.cat([{s}, torch.full((*{s}.shape[:-1], 1), {f}, dtype={s}.dtype)], -1).softmax(-1)[..., :-1]",
    "torch.cat([{s}, {s}.new_zeros(*{s}.shape[:-1], 1)], -1).softmax(-1)[..., :K]",
)
WEIGHTS = (
    *("{w} * {m}", "{w}.masked_fill(~{m}, 0.0)", "torch.where({m}, {w}, 0.0)", "{w}.masked_fill(~{m}, 0)"),
    *(
        "{w}.nan_to_num()",
        "{w}.nan_to_num(0.0)",
        "{w} * 0.5",
        "{w} / 2",
        "{w} + 0",
        "{w}.clone()",
        "{w} * {t}",
    ),
    *(
        "{w} / {w}.sum(-1, keepdim=True)",
        "{w} / ({w}.sum(-1, keepdim=True) + 1e-6)",
        "{w}.detach()",
        "{w}.contiguous()",
    ),
    *(
        "F.dropout({w}, 0.0)",
        "F.dropout({w}, 0.5, training=False)",
        "torch.where({w}.isnan(), 0.0, {w})",
        "-{w}",
    ),
    *(
        "{w}.half().float()",
        "{w} * {odd}",
        "{w} + 1e-3",
        "{w}.clamp(min=0)",
        "torch.where({w} > 0, {w}, 0.0)",
    ),
    *(
        "torch.where({m}, {w}, nan)",
        "{w} * {m}.to({w}.dtype)",
        "{w}.masked_fill(~{m}, 1.0)",
        "F.normalize({w}, p=1, dim=-1)",
    ),
)
AFTER = (
    *(
        "{o} * 2",
        "{o} / {t}",
        "{o} * {t}",
        "{o}.contiguous()",
        "{o}.transpose(0, 1)",
        "{o}.flatten()",
        "{o} + 1",
    ),
    *(
        "{o}.nan_to_num()",
        "{o}.detach()",
        "{o}.tanh()",
        "{o}.float()",
        "{o}.sum(-1)",
        "{o}.mT.contiguous()",
        "{o}[..., :1]",
    ),
)


def scores(sk: Sketch, ops: Operands) -> tuple[str, Operands]:
    """Names of the scores and of the operands behind them."""
    q, k, v = prepared(sk, ops.q, "q"), prepared(sk, ops.k, "k"), prepared(sk, ops.v, "v")
    if len(sk.lead) == 2:
        k, v = grouped(sk, k, "k", "D"), grouped(sk, v, "v", "E")
    ops = Operands(q, k, v)
    if sk.chance(0.35):
        k = sk.new("kt", sk.pick(f"{k}.mT", f"{k}.transpose(-1, -2)", f"{k}.transpose(-2, -1)"))
        return sk.new("s", sk.pick(f"{q} @ {k}", f"torch.matmul({q}, {k})"), scores=True), ops
    forms = [f"{q} @ {k}.mT", f"torch.matmul({q}, {k}.transpose(-2, -1))", f"({k} @ {q}.mT).mT"]
    forms += [f"torch.einsum('...qd,...kd->...qk', {q}, {k})", f"({q} * 0.5) @ {k}.mT", f"{q} @ ({k} / 2).mT"]
    if len(sk.lead) == 1:
        forms += [f"torch.bmm({q}, {k}.mT)"] * 2
        bias = sk.pick("torch.zeros(1, 1, 1)", "BIAS") if sk.dtype == "torch.float32" else ""
        if bias:
            beta = sk.pick("1", "0.5", "0")
            base = f"{bias}.detach()" if beta == "0" else bias  # its gradients are zero, or zero times NaN
            forms.append(f"torch.baddbmm({base}, {q}, {k}.mT, beta={beta}, alpha=0.5)")
    else:
        forms.append(f"torch.bmm({q}.flatten(0, 1), {k}.flatten(0, 1).mT).view(B, H, Q, K)")
        forms.append(f"torch.einsum('bhqd,bhkd->bhqk', {q}, {k})")
    form = sk.rng.choice(forms)
    if "BIAS" in form:
        form = form.replace("BIAS", sk.learned("b", *sk.lead, "Q", "K"))
    return sk.new("s", form, scores=True), ops


def modified(sk: Sketch, s: str, ops: Operands) -> str:
    """The scores after one more step."""
    way = sk.rng.random()
    if way < 0.36:
        value = hide(sk, s)
        if sk.chance(0.15):
            value = _spelled(sk, sk.rng.choice(UNDONE), f"({value})", ops)
    elif way < 0.54:
        value = _spelled(sk, sk.rng.choice(SCALES), s, ops)
    elif way < 0.76:
        value = biased(sk, s)
    elif way < 0.84:
        value = _spelled(sk, sk.rng.choice(CAPS), s, ops)
    elif way < 0.89:
        value = sk.rng.choice(CASTS).format(s=s)
    elif way < 0.95:
        value = sk.rng.choice(VIEWS).format(s=s)
    else:
        return _stored(sk, s)
    return s if value == s else sk.new("s", value, scores=True)


def _spelled(sk: Sketch, form: str, x: str, ops: Operands) -> str:
    """A template with its names filled in; arguments and masks are made on demand."""
    names = {"s": x, "w": x, "o": x, "q": ops.q}
    if "{odd}" in form:
        names["odd"] = sk.rng.choice(ODD)
    if "{t}" in form:
        shape = sk.rng.choice([(), (), ("1",)])
        filled = "{s}" in form and any("-1e" in line or "finfo" in line for line in (*sk.body, x))
        learned = not filled and sk.chance(0.8)  # the gradient of a factor of fills is noise
        names["t"] = sk.learned("t", *shape) if learned else sk.argument("t", "torch.full((), 0.5)")
    if "{m}" in form:
        names["m"] = mask(sk)
    return form.format(**names)


def biased(sk: Sketch, s: str) -> str:
    """Scores and a bias."""
    way = sk.rng.random()
    if way < 0.15:
        return f"{s} + {hiding_bias(sk, s)}"
    if way < 0.25:
        slope = sk.pick("-0.5", "0.25", "-1")
        distance = "(torch.arange(K) - torch.arange(Q)[:, None])"
        return f"{s} + {distance}{sk.pick('', '.abs()')} * {slope}"
    shape = sk.broadcast()
    value = sk.normal(*shape, learn=False)
    spoiled = sk.chance(sk.spoiled)
    if spoiled:
        bad = sk.pick("nan", "-inf", "-inf", "-inf", "inf", "-1e9", "torch.finfo(torch.float32).min")
        value += f".masked_fill({sk.whole(*shape, below=3)} == 0, {bad})"
    b = sk.argument("b", value + (".requires_grad_()" if sk.chance(sk.learns) else ""))
    if sk.module and not spoiled and sk.chance(0.3):  # the gradient of a factor of 1e9 is noise
        sk.state.append(f"self.{b} = torch.nn.Parameter(torch.zeros(()))")
        return f"{s} + {b} * self.{b}"
    b = sk.pick(b, b, b, f"{b}.detach()", f"{b} * 2", f"{b}.clone()")
    if sk.chance(0.12):
        sk.line(sk.pick(f"{s} += {b}", f"{s}.add_({b})", f"{s}.sub_({b})"))
        return s
    return sk.pick(f"{s} + {b}", f"{b} + {s}", f"{s} - {b}", f"torch.add({s}, {b}, alpha=2)", f"{s}.add({b})")


def _stored(sk: Sketch, s: str) -> str:
    """The scores are written to an argument, or to a new tensor, and read from there."""
    if sk.chance(0.4):
        buffer = sk.new("t", f"torch.zeros_like({s})", scores=True)
        sk.line(sk.pick(f"{buffer}.copy_({s})", f"{buffer}[:] = {s}", f"torch.mul({s}, 1, out={buffer})"))
        return buffer
    transposed = sk.chance(0.4)
    buffer = sk.argument(
        "t", f"torch.zeros({', '.join((*sk.lead, *(('K', 'Q') if transposed else ('Q', 'K'))))})"
    )
    view = sk.new("t", f"{buffer}.mT", scores=True) if transposed else buffer
    sk.line(sk.pick(f"{view}.copy_({s})", f"{view}[...] = {s}", f"{view}.add_({s})"))
    return view


def weights(sk: Sketch, s: str, ops: Operands) -> str:
    """The weights, ready to be multiplied with the values."""
    way = sk.rng.random()
    if way < 0.08:
        bottom = sk.pick("0.0", "-inf", "-1e9", "1.0", "torch.finfo(torch.float32).min")
        w = sk.new("w", sk.rng.choice(SINKS).format(s=s, f=bottom), scores=True)
    elif way < 0.16:
        shifted = sk.pick(s, f"{s} - {s}.amax(-1, keepdim=True)")
        e = sk.new("e", sk.pick(f"torch.exp({shifted})", f"({shifted}).exp()"), scores=True)
        if sk.chance(0.2):
            sk.line(f"{e} /= {e}.sum(-1, keepdim=True)")
            w = e
        else:
            bottom = sk.pick(
                f"{e}.sum(-1, keepdim=True)", f"{e}.sum(-1, keepdim=True)", f"(1 + {e}.sum(-1, keepdim=True))"
            )
            w = sk.new("w", f"{e} / {bottom}", scores=True)
    else:
        w = sk.new("w", sk.rng.choice(SOFTMAX).format(s=s), scores=True)
    if sk.masks and sk.chance(0.1):
        hidden = f"~{sk.rng.choice(sk.masks)}"
        w = sk.new("w", f"{w}.masked_fill({hidden}, {sk.pick('0.0', '0.0', '0', '1.0')})", scores=True)
    while sk.chance(0.2):
        w = sk.new("w", _spelled(sk, sk.rng.choice(WEIGHTS), w, ops), scores=True)
    return w


def product(sk: Sketch, w: str, v: str) -> str:
    """The weights' product with the values."""
    w = f"{w}.type_as({v})" if sk.chance(0.1) else f"{w}.to({v}.dtype)"
    if sk.chance(0.1):
        shape = ", ".join((*sk.lead, "Q", "E"))
        typed = "" if sk.dtype == "torch.float32" else f", dtype={sk.dtype}"
        buffer = sk.argument("buf", f"torch.zeros({shape}{typed})")
        if sk.chance(0.5):
            sk.line(sk.pick(f"torch.matmul({w}, {v}, out={buffer})", f"{buffer}.copy_({w} @ {v})"))
            return buffer
        if len(sk.lead) == 1:
            sk.line(sk.pick(f"torch.bmm({w}, {v}, out={buffer})", f"{buffer}.baddbmm_({w}, {v})"))
            return buffer
        return sk.new("o", f"{buffer} + {w} @ {v}")
    forms = [f"{w} @ {v}", f"{w} @ {v}", f"torch.matmul({w}, {v})", f"({v}.mT @ {w}.mT).mT"]
    forms.append(f"torch.einsum('...qk,...kd->...qd', {w}, {v})")
    if len(sk.lead) == 1:
        forms.append(f"torch.bmm({w}, {v})")
    else:
        forms.append(f"torch.bmm({w}.flatten(0, 1), {v}.flatten(0, 1)).view(B, H, Q, E)")
    return sk.new("o", sk.rng.choice(forms))


def after(sk: Sketch, o: str, ops: Operands) -> str:
    """A result after one more step."""
    return sk.new("o", _spelled(sk, sk.rng.choice(AFTER), o, ops))


def composite(sk: Sketch, ops: Operands) -> str:
    """PyTorch's own attention."""
    q, k, v = prepared(sk, ops.q, "q"), prepared(sk, ops.k, "k"), prepared(sk, ops.v, "v")
    if len(sk.lead) == 2:
        k, v = grouped(sk, k, "k", "D"), grouped(sk, v, "v", "E")
    way = sk.rng.random()
    if way < 0.25:
        given = "is_causal=True"
    elif way < 0.55:
        given = f"attn_mask={mask(sk)}.expand({', '.join((*sk.lead, 'Q', 'K'))})"
    elif way < 0.85:
        bias = sk.new("b", hiding_bias(sk, q))
        given = f"attn_mask=({bias} + torch.zeros(Q, K)).to({q}.dtype)"
    else:
        given = f"scale={sk.pick('0.5', '1.0', '0.0', '-1.0', 'None')}"
    scale = ", scale=0.3" if "scale" not in given and sk.chance(0.3) else ""
    return sk.new("o", f"F.scaled_dot_product_attention({q}, {k}, {v}, {given}{scale})")
