"""A kernel of your own: registered once, it serves attention in models that have never heard of it.

    python examples/own_kernel.py

A package registers its kernels in a module that its entry points name. Then `doctor`, `explain`, `bench` and
every `kernel=` know them, and nobody has to import the package:

    [project.entry-points."fusepass.kernels"]
    mine = "mypackage.kernels"
"""

import torch
from torch import Tensor, fx

import fusepass
from fusepass.kernels import (
    Attention,
    Builder,
    Gate,
    Mask,
    Scale,
    ScaleBy,
    Site,
    Takes,
    Target,
    operands,
    scaled,
)

BLOCK = 64


@torch.library.custom_op("example::blocked", mutates_args=())
def blocked(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(q kᵀ * scale) v of [B, H, Q, D], [B, H, K, D], [B, H, K, Dv], one block of keys after another.

    The maximum and the sum of the weights seen so far are kept, and the result is rescaled when the maximum
    grows (arXiv 2205.14135): no tensor over queries and keys is ever made.
    """
    highest = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, out = q.new_zeros(highest.shape), q.new_zeros((*q.shape[:3], v.shape[3]))
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    for start in range(0, k.shape[2], BLOCK):
        keys = slice(start, start + BLOCK)
        scores = q @ k[:, :, keys].mT * scale
        if causal:
            columns = start + torch.arange(scores.shape[-1], device=q.device)
            scores = scores.masked_fill(columns > rows, -torch.inf)
        top = torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights, faded = (scores - top).exp(), (highest - top).exp()
        total, out, highest = (
            total * faded + weights.sum(-1, keepdim=True),
            out * faded + weights @ v[:, :, keys],
            top,
        )
    return out / total


@blocked.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def emit(site: Site, build: Builder, target: Target) -> fx.Node:
    """Write the call; factors that a constant scale cannot express are already in the queries."""
    scale, x = scaled(site, build, operands(site, build))
    return build.call(torch.ops.example.blocked.default, x.q, x.k, x.v, scale, site.spec.is_causal())


def refuse(spec: Attention, target: Target) -> str | None:
    """Refuse what `takes` and the gate cannot express."""
    if spec.heads != spec.kv_heads:
        return "it has no grouped heads"
    return None if spec.is_causal() or not spec.masks else "its only mask is the causal one"


def register() -> None:
    """Register once per process; a package does so in the module that its entry point names."""
    fusepass.register_kernel(
        "blocked",
        emit,
        takes=Takes((Scale, ScaleBy, Mask)),  # in this order; everything else is refused
        refuse=refuse,
        gate=Gate("blocked", (torch.float32,), backward=False, auto=True),  # any device; `auto` may choose it
    )


def their_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Written long ago, by somebody else."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def main() -> None:
    """Register, explain, and run it: by name, and chosen by `auto`."""
    register()
    q, k, v = torch.randn(3, 2, 4, 200, 32)
    print(fusepass.explain(their_attention, q, k, v, fusepass_options={"kernel": "blocked"}))
    for kernel in ("blocked", "auto"):
        options = {"inner": "aot_eager", "kernel": kernel}
        fast = torch.compile(their_attention, backend="fusepass", options=options)
        with fusepass.collect() as seen:
            difference = (fast(q, k, v) - their_attention(q, k, v)).abs().max().item()
        print(f"kernel={kernel!r}: {seen.summary()}; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
