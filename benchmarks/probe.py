"""Facts to find out on a GPU; every part is on its own, and what fails says why."""

import importlib.metadata as md, json, math, os, sys, time, traceback
import torch
import torch.nn.functional as F

OUT = sys.argv[1] if len(sys.argv) > 1 else "."
facts = {}


def note(key, value):
    facts[key] = value
    print(f"{key}: {value}", flush=True)


def part(f):
    t = time.time()
    try:
        f()
    except Exception as e:
        note(f.__name__ + " FAILED", f"{type(e).__name__}: {str(e)[:300]}")
        traceback.print_exc(limit=3)
    print(f"  [{f.__name__} {time.time() - t:.1f} s]", flush=True)
    with open(os.path.join(OUT, "probe.json"), "w") as h:
        json.dump(facts, h, indent=1, default=str)


def ms(f, n=20):
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    ts = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        torch.cuda.synchronize()
        ts.append(a.elapsed_time(b))
    return round(sorted(ts)[n // 2], 4)


def burst(f, n=50):
    for _ in range(3):
        f()
    torch.cuda.synchronize()
    t = time.perf_counter()
    for _ in range(n):
        f()
    torch.cuda.synchronize()
    return round((time.perf_counter() - t) / n * 1e3, 4)


def err(a, b):
    return float((a.float() - b.float()).abs().max())


def qkv(B=2, H=32, G=8, S=4096, D=128, grad=False, K=None):
    torch.manual_seed(0)
    return [
        torch.randn(B, n, h, D, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
        for h, n in ((H, S), (G, K or S), (G, K or S))
    ]


def ref(q, k, v, left=None, right=None, scale=None, cap=0.0):
    q, k, v = (t.transpose(1, 2).double() for t in (q, k, v))
    g = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if cap:
        s = cap * torch.tanh(s / cap)
    gap = (
        torch.arange(s.shape[-1], device="cuda")
        - torch.arange(s.shape[-2], device="cuda")[:, None]
        - (s.shape[-1] - s.shape[-2])
    )
    if right is not None:
        s = s.masked_fill(gap > right, -math.inf)
    if left is not None:
        s = s.masked_fill(gap < -left, -math.inf)
    return (s.softmax(-1) @ v).transpose(1, 2)


def versions():
    note("torch", torch.__version__)
    note("gpu", torch.cuda.get_device_name())
    note("cudnn", torch.backends.cudnn.version())
    for p in (
        "triton",
        "flash-attn-4",
        "flash-attn",
        "nvidia-cudnn-frontend",
        "nvidia-cutlass-dsl",
        "quack-kernels",
    ):
        try:
            note(p, md.version(p))
        except Exception as e:
            note(p, "absent")


def aten_window():
    op = torch.ops.aten._flash_attention_forward
    note("aten schema", str(op.default._schema)[:900])
    for G in (8, 2):
        q, k, v = qkv(2, 8, G, 512, 64, True)

        def run(a, b, c):
            return op(
                a,
                b,
                c,
                None,
                None,
                512,
                512,
                0.0,
                False,
                False,
                scale=0.1,
                window_size_left=63,
                window_size_right=0,
            )[0]

        out = run(q, k, v)
        want = ref(q, k, v, 63, 0, 0.1)
        w = torch.randn_like(out)
        g1 = torch.autograd.grad((out * w).sum(), (q, k, v))
        g2 = torch.autograd.grad((want * w).sum(), (q, k, v))
        note(f"aten window G={G}", [err(out, want)] + [err(a, b) for a, b in zip(g1, g2)])
    q, k, v = qkv(grad=True)

    def fwd():
        return op(
            q,
            k,
            v,
            None,
            None,
            4096,
            4096,
            0.0,
            False,
            False,
            scale=0.1,
            window_size_left=1023,
            window_size_right=0,
        )[0]

    g = torch.randn_like(q)
    note("aten window 1024 ms fwd, fwd+bwd", [ms(fwd), ms(lambda: torch.autograd.grad(fwd(), (q, k, v), g))])


def flash4():
    import fusepass.kernels.flash_ops as ops

    op = torch.ops.fusepass.flash4
    for D in (64, 128, 256):
        for name, (left, right, cap) in {
            "full": (None, None, 0.0),
            "causal": (None, 0, 0.0),
            "window": (1023, 0, 0.0),
            "softcap": (None, 0, 50.0),
        }.items():
            if D != 128 and name in ("softcap",):
                continue
            try:
                q, k, v = qkv(S=2048, D=D, grad=True, H=16, G=4)
                out = op(q, k, v, None, 0.1, left, right, cap, 0.0)[0]
                want = ref(q, k, v, left, right, 0.1, cap)
                w = torch.randn_like(out)
                g1 = torch.autograd.grad((out * w).sum(), (q, k, v))
                g2 = torch.autograd.grad((want * w).sum(), (q, k, v))
                errors = [round(err(out, want), 4)] + [round(err(a, b), 4) for a, b in zip(g1, g2)]
                del want, g2
                q, k, v = qkv(D=D, grad=True)

                def fwd():
                    return op(q, k, v, None, 0.1, left, right, cap, 0.0)[0]

                g = torch.randn_like(q)
                note(
                    f"flash4 {name} D={D} errors; ms fwd, fwd+bwd",
                    [errors, ms(fwd), ms(lambda: torch.autograd.grad(fwd(), (q, k, v), g))],
                )
            except Exception as e:
                note(f"flash4 {name} D={D} FAILED", f"{type(e).__name__}: {str(e)[:200]}")


def sdpa():
    for D in (64, 128, 256):
        for causal in (False, True):
            q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in qkv(D=D))

            def fwd():
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

            def cud():
                return torch.ops.aten._scaled_dot_product_cudnn_attention(
                    q, k, v, None, True, 0.0, causal, False
                )[0]

            g = torch.randn_like(q)
            row = [ms(fwd), ms(lambda: torch.autograd.grad(fwd(), (q, k, v), g))]
            try:
                row += [ms(cud), ms(lambda: torch.autograd.grad(cud(), (q, k, v), g)), err(cud(), fwd())]
            except Exception as e:
                row.append(str(e)[:150])
            note(f"sdpa gqa causal={causal} D={D}: ms default fwd, fb; cudnn op fwd, fb, difference", row)


def overheads():
    import fusepass.kernels.flash_ops as ops

    q, k, v = qkv(1, 4, 4, 128, 64)
    t = [x.transpose(1, 2) for x in (q, k, v)]
    note(
        "host ms: flash4 op", burst(lambda: torch.ops.fusepass.flash4(q, k, v, None, 0.1, None, 0, 0.0, 0.0))
    )
    note("host ms: sdpa", burst(lambda: F.scaled_dot_product_attention(*t, is_causal=True)))
    note(
        "host ms: cudnn op",
        burst(lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(*t, None, False, 0.0, True, False)),
    )
    from flash_attn.cute import flash_attn_func

    note("host ms: flash_attn_func", burst(lambda: flash_attn_func(q, k, v, causal=True)))


def fp8():
    import fusepass.kernels.fp8_ops as ops

    for causal in (False, True):
        for B, H, G, S in ((1, 32, 8, 8192), (1, 64, 8, 16384)):
            q, k, v = (x.transpose(1, 2) for x in qkv(B, H, G, S))
            s = [float(x.float().abs().amax()) / 448 for x in (q, k, v)]
            q8, k8, v8 = ((x / f).to(torch.float8_e4m3fn) for x, f in zip((q, k, v), s))
            d = torch.full((1, 1, 1, 1), s[0] * s[1], device="cuda")

            def run():
                return torch.ops.fusepass.fp8_cudnn(q8, k8, v8, d, 128**-0.5, causal)

            out = run().float() * s[2]
            want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).float()
            snr = 10 * math.log10(float((want**2).sum() / ((out - want) ** 2).sum()))
            fl = 4 * B * H * S * S * 128 / (2 if causal else 1)
            a, b = (
                ms(run),
                ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)),
            )
            note(
                f"fp8 cudnn causal={causal} S={S} H={H}: SQNR to bf16 dB, ms, TFLOP/s, bf16 ms",
                [round(snr, 2), a, round(fl / a / 1e9), b],
            )
            for scale in (1.0, 448.0):
                ops.WEIGHT_SCALE = scale
                ops.constants.cache_clear()
                o2 = run().float() * s[2]
                note(
                    f"   with weight scale {scale}: SQNR",
                    round(10 * math.log10(float((want**2).sum() / ((o2 - want) ** 2).sum())), 2),
                )
            ops.WEIGHT_SCALE = 256.0
            ops.constants.cache_clear()


def inductor():
    from fusepass.report import collect

    sys.path.insert(0, ".")
    from tests.test_kernels_gpu import CASES

    for D, S in ((64, 128), (64, 512), (128, 2048)):
        q, k, v = qkv(4, 8, 8, S, D)
        for kernel in ("plain", "sdpa", "cudnn", "flash4"):
            t = time.time()
            torch._dynamo.reset()
            f = (
                torch.compile(CASES["causal"].program)
                if kernel == "plain"
                else torch.compile(CASES["causal"].program, backend="fusepass", options={"kernel": kernel})
            )
            try:
                with torch.no_grad():
                    f(q, k, v)
                    c = time.time() - t
                    row = [round(c, 1), ms(lambda: f(q, k, v)), burst(lambda: f(q, k, v))]
            except Exception as e:
                row = str(e)[:200]
            note(f"compiled causal S={S} D={D} {kernel}: compile s, event ms, burst ms", row)


if __name__ == "__main__":
    for f in (versions, sdpa, aten_window, flash4, overheads, fp8, inductor):
        part(f)
