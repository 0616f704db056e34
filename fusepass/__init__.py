"""fusepass: finds hand-written attention in PyTorch graphs and runs it on the fastest kernel.

Nothing heavy is imported here: every public name loads its module at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusepass.autoenable import disable, enable, enabled, is_enabled
    from fusepass.config import Options
    from fusepass.explanation import Explanation, explain
    from fusepass.exporters.onnx_export import export_onnx
    from fusepass.exporters.onnx_optimize import optimize_onnx
    from fusepass.exporters.packages import compile_aoti, export_pt2
    from fusepass.exporters.reports import ExportReport
    from fusepass.fusing import fuse
    from fusepass.registry import register_kernel
    from fusepass.report import Collector, GraphReport, SiteReport, collect
    from fusepass.verification import Verification, verify

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
    "fuse": "fusepass.fusing",
    "explain": "fusepass.explanation",
    "verify": "fusepass.verification",
    "enable": "fusepass.autoenable",
    "disable": "fusepass.autoenable",
    "enabled": "fusepass.autoenable",
    "is_enabled": "fusepass.autoenable",
    "Options": "fusepass.config",
    "collect": "fusepass.report",
    "Collector": "fusepass.report",
    "GraphReport": "fusepass.report",
    "SiteReport": "fusepass.report",
    "Explanation": "fusepass.explanation",
    "Verification": "fusepass.verification",
    "register_kernel": "fusepass.registry",
    "export_onnx": "fusepass.exporters.onnx_export",
    "optimize_onnx": "fusepass.exporters.onnx_optimize",
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
