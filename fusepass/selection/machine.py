"""The machine and the versions that measurements were made with."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata

import torch

from fusepass.kernels.reference import multiplies_bfloat16


def machine(device: str = "cuda") -> dict[str, str]:
    """The present machine and versions, as a table."""
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        facts |= {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda or "",
            "cudnn": str(torch.backends.cudnn.version()),
        }
    else:
        facts["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        instructions = torch.backends.cpu.get_cpu_capability()
        facts["instructions"] = f"{instructions}{' with bfloat16 products' * multiplies_bfloat16()}"
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-frontend"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    return facts


__all__ = ["machine"]
