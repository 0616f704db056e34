"""Boolean masks in many spellings, and biases made of them."""

from tests.fuzz.sketch import Sketch

FILLS = (
    "-inf",
    "-inf",
    "-inf",
    *("torch.finfo({s}.dtype).min",) * 2,
    "-1e9",
    "-1e9",
    "-1e8",
    "-1e4",
    "-10000.0",
)
ODD_FILLS = ("-100.0", "0.0", "0", "nan", "inf", "-30000", "-1", "1e9")
ROW, KEY = "torch.arange(Q)[:, None]", "torch.arange(K)"
BYTE_ROW, BYTE_KEY = (
    "torch.arange(Q, dtype=torch.uint8)[:, None]",
    "torch.arange(K, dtype=torch.uint8)",
)
FULL = (
    "torch.ones(Q, K, dtype=torch.bool).tril()",
    "torch.ones(Q, K, dtype=torch.bool).tril(K - Q)",
    "torch.ones(Q, K, dtype=torch.bool).tril(-1)",
    "~torch.ones(Q, K, dtype=torch.bool).triu(1)",
    "torch.ones(Q, K).tril() != 0",
    "torch.ones(Q, K).triu(1) == 0",
    "torch.tril(torch.ones(Q, K)).bool()",
    "torch.full((Q, K), -inf).triu(1) == 0",
    f"{KEY} <= {ROW}",
    f"{ROW} >= {KEY}",
    f"{ROW} - {KEY} < 2",
    f"({ROW} - {KEY}).abs() <= 1",
    f"{ROW} // 2 == {KEY} // 2",
    f"({KEY} - {ROW}) % 3 != 1",
    f"torch.remainder({KEY} - {ROW}, -3) > -2",
    f"torch.div({KEY} - {ROW}, 2, rounding_mode='trunc') <= 0",
    "torch.eye(Q, K).bool()",
    "(torch.ones(Q, K, dtype=torch.uint8).tril() - 1) == 0",
    "(torch.ones(Q, K, dtype=torch.uint8).tril() - 1) > 0",
    "(torch.ones(Q, K, dtype=torch.uint8).tril() + 255) == 0",
    f"{BYTE_ROW} - {BYTE_KEY} < 128",
    f"{BYTE_KEY} - {BYTE_ROW} <= 0",
    f"{BYTE_ROW} - 1 >= {BYTE_KEY}",
    f"-{BYTE_KEY} <= {BYTE_ROW}",
    "torch.ones(Q, K, dtype=torch.int64).cumsum(-1) <= torch.arange(1, Q + 1)[:, None]",
    "torch.ones(Q, K).cumsum(0) >= torch.arange(1, K + 1)",
    "torch.ones(Q, K).tril().flip(-1) == 1",
    "torch.where(torch.ones(Q, K).tril() > 0, 1, 0).bool()",
)
ROWS = (
    f"{ROW} < 2",
    f"{ROW} != 0",
    f"{ROW} % 2 == 0",
    f"~({ROW} == Q - 1)",
    "(torch.arange(Q) > 0).unsqueeze(-1)",
    f"{BYTE_ROW} - 1 < 200",
    f"({ROW} > 0).expand(Q, K)",
    "torch.zeros(Q, 1, dtype=torch.bool)",
)
KEYS = (
    f"{KEY} < 2",
    f"{KEY} != 1",
    f"{KEY} < K - 1",
    f"{BYTE_KEY} * 100 < 150",
    "torch.arange(K, dtype=torch.int8) * 50 > -20",
    f"{BYTE_KEY} - 1 < 200",
    f"{BYTE_KEY} + 254 > 100",
    f"({KEY} > 0)[None]",
    f"~({KEY} > 1)",
    "torch.ones(K, dtype=torch.bool)",
)
ARGUMENTS = {
    "torch.bool": ("{m}", "{m}", "~{m}", "{m} == True"),
    "torch.uint8": (
        "{m}.bool()",
        "{m} != 0",
        "{m} == 1",
        "{m} - 1 == 0",
        "{m} - 1 > 0",
        "{m} * 128 * 2 == 0",
    ),
    "torch.int64": ("{m} > 0", "{m}.to(torch.bool)", "{m} == 1", "1 - {m} == 0", "{m} & 1 == 1"),
    "torch.float32": ("{m} > 0.5", "{m} != 0", "{m}.bool()", "(1.0 - {m}) == 0"),
}
WRAPPED = (
    *("{m}", "{m}", "{m}", "{m}", "~(~{m})", "{m}.to(torch.uint8) - 1 != 255", "{m}.int() * 3 == 3"),
    *(
        "{m}.float() > 0.5",
        "{m}.to(torch.uint8) * 255 + 1 == 0",
        "({m} * 2.9).int() == 2",
        "{m}.to(torch.int8) > 0",
    ),
    *("{m} * True", "torch.where({m}, 1, 0) == 1", "{m}.logical_not().logical_not()", "({m} * 0.3).bool()"),
)


def mask(sk: Sketch, keep: bool | None = None) -> str:
    """The name of a mask, true where a key is seen; sometimes an earlier one is reused."""
    if sk.masks and sk.chance(0.35):
        return sk.rng.choice(sk.masks)
    value = _value(sk)
    if sk.masks and sk.chance(0.3):
        other = sk.rng.choice(sk.masks)
        value = sk.pick(
            f"({value}) & {other}",
            f"({value}) | {other}",
            f"torch.logical_and({value}, {other})",
            f"({value}) * {other}",
            f"({value}) ^ {other}",
            f"(({value}).int() + {other}.int()) > 1",
            f"torch.where({other}, {value}, {other})",
        )
    value = sk.rng.choice(WRAPPED).format(m=f"({value})")
    name = sk.new("m", value, "bool")
    sk.masks.append(name)
    return name


def _value(sk: Sketch) -> str:
    """A boolean expression that broadcasts to the scores."""
    kind = sk.rng.random()
    if sk.module and kind < 0.4:
        return _buffer(sk)
    if kind < 0.5:
        return sk.rng.choice(FULL)
    if kind < 0.62:
        return sk.rng.choice(ROWS)
    if kind < 0.72:
        return sk.rng.choice(KEYS)
    dtype = sk.pick(*ARGUMENTS)
    below = {"torch.uint8": 3, "torch.int64": 3}.get(dtype, 2)
    kind_of = {"torch.bool": "bool", "torch.float32": "float"}.get(dtype, "whole")
    name = sk.argument("g", sk.whole(*sk.broadcast(), below=below, dtype=dtype), kind_of)
    if dtype == "torch.float32":
        name = name if sk.chance(0.7) else f"{name}.to(torch.int32)"
    return sk.rng.choice(ARGUMENTS[dtype]).format(m=name)


def _buffer(sk: Sketch) -> str:
    """A mask that the module holds, and maybe changes."""
    name = sk.name("mask")
    contents = sk.pick(
        "torch.ones(12, 12, dtype=torch.bool).tril()",
        "torch.ones(12, 12).tril() != 0",
        "torch.ones(12, 12).tril()",
        "torch.ones(12, 12, dtype=torch.uint8)",
        "torch.arange(144).view(12, 12) % 3 != 0",
    )
    sk.state.append(f"self.register_buffer({name!r}, {contents}{sk.pick('', ', persistent=False')})")
    edit = sk.pick(
        *(
            "pass",
            "self.{m}[0] = 0",
            "self.{m}[:, 0] = 0",
            "self.{m}.fill_(1)",
            "self.{m} = self.{m}.flip(0)",
        ),
        *("self.{m}.copy_(self.{m}.clone().t())", "self.{m}.data.zero_()", "self.{m} = self.{m} != 1"),
    )
    sk.edits.append(edit.format(m=name))
    if sk.chance(0.1):
        sk.line(sk.pick(f"self.{name}[0] = 0", f"self.{name}.zero_()", f"self.{name}[:Q, :K].fill_(1)"))
    return sk.pick(f"self.{name}[:Q, :K] > 0", f"self.{name}[:Q, :K] != 0", f"self.{name}[:Q, :K].bool()")


def fill(sk: Sketch, scores: str) -> str:
    """A number that hides a key."""
    return sk.rng.choice(ODD_FILLS if sk.chance(0.12) else FILLS).format(s=scores)


def hiding_bias(sk: Sketch, scores: str) -> str:
    """A bias that is always zero or a fill, as an expression."""
    m, f = mask(sk), fill(sk, scores)
    return sk.pick(
        f"(1 - {m}.to({scores}.dtype)) * {f}",
        f"(1.0 - {m}.float()) * {f}",
        f"torch.where({m}, 0.0, {f})",
        f"torch.zeros({m}.shape).masked_fill(~{m}, {f})",
        f"torch.zeros(Q, K).masked_fill(~{m}, {f})",
        f"{m}.logical_not().to({scores}.dtype) * {f}",
        f"torch.full((Q, K), {f}).triu(1)",
        f"torch.zeros_like({scores}).masked_fill_(~{m}, {f})",
    )


def hide(sk: Sketch, s: str) -> str:
    """Scores behind a mask, as an expression; or their name, after a line that hides keys in place."""
    if sk.chance(0.3):
        return f"{s} + {hiding_bias(sk, s)}"
    m = mask(sk)
    f = fill(sk, s)
    if sk.chance(0.15):
        sk.line(
            sk.pick(
                f"{s}.masked_fill_(~{m}, {f})", f"{s}[(~{m}).expand({s}.shape)] = {f}", f"{s} += {m} * -100.0"
            )
        )
        return s
    return sk.pick(
        f"{s}.masked_fill(~{m}, {f})",
        f"{s}.masked_fill({m} == 0, {f})",
        f"torch.where({m}, {s}, {f})",
        f"torch.where(~{m}, {f}, {s})",
        f"torch.where({m}, {s}, torch.full_like({s}, {f}))",
        f"torch.where({m}, {s}, torch.tensor({f}, dtype={s}.dtype))",
        f"torch.masked_fill({s}, ~{m}, torch.tensor({f}))",
        f"{s} * {m} + (1 - {m}.to({s}.dtype)) * {f}",
    )
