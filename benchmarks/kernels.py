"""Regenerates the kernel measurements, their plots and the profile that `auto` uses on this kind of GPU.

    python benchmarks/kernels.py                 everything, on one GPU
    python benchmarks/kernels.py --limit 500     what fits into 500 seconds a part; head size 128 first

It is `python -m fusepass bench` with fixed arguments, and writes

- ``benchmarks/results/profile-GPU.csv``: every kernel by name, and `torch.compile`;
- ``fusepass/profiles/GPU.json``: the cost model fitted to that;
- ``benchmarks/results/kernels-GPU.csv``: eager, `torch.compile`, `auto` with that profile, and calls by hand;
- ``docs/kernels/``: pictures of the latter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fusepass.__main__ import main as fusepass

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", help="seconds a part after which no measurement begins")
    parser.add_argument("--part", choices=["all", "profile", "kernels"], default="all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py measures GPUs, and there is none here", file=sys.stderr)
        return 2
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    results = ROOT / "benchmarks" / "results"
    limit = ["--limit", arguments.limit] if arguments.limit else []
    common = ["bench", "--head-dims", "128,64,256", *limit]
    if arguments.part in ("all", "profile"):
        kernels = "compile,sdpa,cudnn,flash2,flash3,flash4,flex,flex_flash"
        place = str(ROOT / "fusepass" / "profiles" / f"{name}.json")
        lengths = ["--lengths", "128,512,1024,4096,16384"]
        out = ["--out", str(results / f"profile-{name}.csv")]
        fusepass([*common, *lengths, "--contenders", kernels, "--profile-to", place, *out])
    if arguments.part in ("all", "kernels"):
        out = ["--out", str(results / f"kernels-{name}.csv")]
        plots = ["--plot", str(ROOT / "docs" / "kernels")]
        fusepass([*common, "--contenders", "eager,compile,auto,hand", *out, *plots])
    return 0


if __name__ == "__main__":
    sys.exit(main())
