"""Writes to anything that has a name, through any view, in any spelling."""

from tests.fuzz.sketch import Live, Sketch

SAME = (
    "{x}",
    "{x}",
    "{x}",
    "{x}",
    "{x}",
    "{x}.detach()",
    "{x}.data",
    "{x}.mT",
    "{x}.unsqueeze(0)",
    "{x}[...]",
)
PARTS = (
    *("{x}[..., :1]", "{x}[..., 0]", "{x}[0]", "{x}.transpose(0, 1)", "{x}[:, 1:]", "{x}.select(-1, 0)"),
    *("{x}.narrow(-2, 0, 1)", "{x}.view(-1)", "{x}.diagonal(0, -2, -1)"),
    *(
        "{x}.unsqueeze(0).expand(1, *{x}.shape)",
        "{x}.flatten()[::2]",
        "{x}.chunk(2, -1)[0]",
        "{x}.split(1, -1)[0]",
    ),
)
WRITES = (
    *("{t}.mul_({c})", "{t}.mul_({c})", "{t}.add_({c})", "{t}.zero_()", "{t}.fill_({c})", "{t}.neg_()"),
    *(
        "{t}.sub_({c})",
        "{t}.div_(2)",
        "{t}.copy_({t} * {c})",
        "{t}.copy_(torch.zeros(()))",
        "{t}.clamp_(min=0)",
    ),
    *("{t}.masked_fill_(torch.ones({t}.shape[-1:]).cumsum(0) > 1, {c})", "F.relu({t}, inplace=True)"),
    *("{t}[..., 0] = {c}", "{t}[..., 1:] += {c}", "{t}[...] = {c}", "{t}[-1] = {c}", "{t}[0].mul_({c})"),
    *("{t}[torch.ones({t}.shape).cumsum(-1) > 1] = {c}", "{t}[{t} == 0] = {c}", "{t}[[0]] = {c}"),
    *("{t}.index_fill_(-1, torch.tensor([0]), {c})", "{t}.index_add_(0, torch.tensor([0]), {t}[:1] * {c})"),
    *(
        "{t}.scatter_(-1, torch.zeros_like({t}[..., :1], dtype=torch.int64), {c})",
        "torch.mul({t}, {c}, out={t})",
    ),
    *(
        "{t}.index_copy_(-1, torch.tensor([0]), torch.ones_like({t}[..., :1]))",
        "torch.add({t}, {t}, out={t})",
    ),
    *(
        "torch._foreach_mul_([{t}, {u}], {c})",
        "torch._foreach_add_([{t}], {c})",
        "{t}.copy_({u})",
        "{t}.add_({u})",
    ),
    *(
        "{t}.tanh_()",
        "{t}.set_({u})",
        "torch.ops.aten.mul_.Scalar({t}, {c})",
        "{t}.lerp_(torch.ones_like({t}), 0.5)",
    ),
    *(
        "{t}.index_put_((torch.tensor([0]),), torch.ones_like({t}[:1]))",
        "{t}.addcmul_({t}, {t})",
        "{t} += {u}",
    ),
    *("{t}.copy_({t}.flip(-1))", "{t}.square_()", "torch.neg({t}, out={t})", "{t}.mul_({t})", "{t}.triu_()"),
)
BOOLEAN = (
    *("{t}.fill_(True)", "{t}.zero_()", "{t}.logical_not_()", "{t}[..., 0] = True", "{t}[0] = False"),
    *("{t}.copy_(~{t})", "{t}.view(-1)[:1] = True", "{t}[..., :1].logical_not_()", "{t}.data.fill_(False)"),
)
WHOLE = ("{t}.zero_()", "{t}.add_(1)", "{t}.fill_(1)", "{t}[..., 0] = 0", "{t}.mul_(2)")


def write(sk: Sketch) -> list[str]:
    """A line that writes to something, and maybe one before it that names a view."""
    target = _target(sk)
    if target.kind != "float":
        return [sk.rng.choice(BOOLEAN if target.kind == "bool" else WHOLE).format(t=target.name)]
    others = [one for one in sk.live if one.kind == "float"]
    other = sk.rng.choice(others)
    form = sk.rng.choice(WRITES)
    whole = "foreach" in form or ".set_" in form or (target.scores and other.scores)
    u = other.name if whole else f"{other.name}.sum()"
    view = sk.rng.choice(SAME if sk.chance(0.65) else PARTS).format(x=target.name)
    if "{t} +=" in form:
        view = target.name
    line = form.format(t=view, u=u, c=sk.pick("2", "3.0", "0.5", "-1", "0", "7"))
    lines = []
    if view != target.name and sk.chance(0.3):
        alias = sk.name("u")
        sk.live.append(Live(alias, leaf=target.leaf))
        lines.append(f"{alias} = {view}")
        line = line.replace(view, alias)
    if target.leaf and not any(way in view for way in (".data", ".detach")) and sk.chance(0.9):
        line = "with torch.no_grad():\n    " + line
    return [*lines, line]


def _target(sk: Sketch) -> Live:
    """A choice that prefers new names to old ones."""
    recent = sk.live[-4:] if sk.chance(0.5) else sk.live
    return sk.rng.choice(recent)
