"""fusepass: finds hand-written attention in PyTorch graphs and runs it on the fastest kernel.

Nothing heavy is imported here: every public name loads its module at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusepass.compilation.autoenable import disable, enable, enabled, is_enabled
    from fusepass.compilation.fusing import fuse
    from fusepass.exporters.onnx.export import export_onnx
    from fusepass.exporters.onnx.optimize import optimize_onnx
    from fusepass.exporters.packages import compile_aoti, export_pt2
    from fusepass.exporters.reports import ExportReport
    from fusepass.host.config import Options
    from fusepass.kernels.registry import register_kernel
    from fusepass.reports.collector import Collector, collect
    from fusepass.reports.report import GraphReport, SiteReport
    from fusepass.tools.explanation import Explanation, explain
    from fusepass.tools.verification import Verification, verify

__version__ = "0.2.0"

__all__ = [
    "fuse",
    "explain",
    "verify",
    "enable",
    "disable",
    "enabled",
    "is_enabled",
    "Options",
    "collect",
    "Collector",
    "GraphReport",
    "SiteReport",
    "Explanation",
    "Verification",
    "register_kernel",
    "export_onnx",
    "optimize_onnx",
    "export_pt2",
    "compile_aoti",
    "ExportReport",
    "__version__",
]

_HOME = {
    "fuse": "fusepass.compilation.fusing",
    "explain": "fusepass.tools.explanation",
    "verify": "fusepass.tools.verification",
    "enable": "fusepass.compilation.autoenable",
    "disable": "fusepass.compilation.autoenable",
    "enabled": "fusepass.compilation.autoenable",
    "is_enabled": "fusepass.compilation.autoenable",
    "Options": "fusepass.host.config",
    "collect": "fusepass.reports.collector",
    "Collector": "fusepass.reports.collector",
    "GraphReport": "fusepass.reports.report",
    "SiteReport": "fusepass.reports.report",
    "Explanation": "fusepass.tools.explanation",
    "Verification": "fusepass.tools.verification",
    "register_kernel": "fusepass.kernels.registry",
    "export_onnx": "fusepass.exporters.onnx.export",
    "optimize_onnx": "fusepass.exporters.onnx.optimize",
    "export_pt2": "fusepass.exporters.packages",
    "compile_aoti": "fusepass.exporters.packages",
    "ExportReport": "fusepass.exporters.reports",
}

#: The packages of the extra ``onnx``.
_ONNX = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fusepass' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        value: object = getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in _ONNX:
            advice = (
                f"fusepass.{name} needs {error.name!r}, which is not installed: pip install 'fusepass[onnx]'"
            )
            raise ModuleNotFoundError(advice, name=error.name) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
