"""`.pt2` files, also without the ONNX libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_ONNX = """
import sys
for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):
    sys.modules[name] = None  # what Python takes for a module that is not there
import torch, fusepass

class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        with torch.no_grad():
            first = (q @ k.mT).softmax(-1) @ v
        return (first @ k.mT).softmax(-1) @ v

given = torch.randn(3, 2, 4, 6, 8).unbind()
report = fusepass.export_pt2(Attention(), given, sys.argv[1])
assert (report.sites, report.fused, report.softmaxes, report.notes) == (2, 2, 0, []), report
got = torch.export.load(sys.argv[1]).module()(*given)
torch.testing.assert_close(got, Attention()(*given), rtol=1e-5, atol=1e-5)
try:
    fusepass.export_onnx
except ImportError as error:
    assert "pip install 'fusepass[onnx]'" in str(error), error
else:
    raise AssertionError("export_onnx works without its libraries")
"""


def test_pt2_needs_no_onnx(tmp_path: Path) -> None:
    """Sites and softmaxes of inner graphs (a ``no_grad`` block) count like others."""
    subprocess.run([sys.executable, "-c", WITHOUT_ONNX, str(tmp_path / "m.pt2")], check=True)
