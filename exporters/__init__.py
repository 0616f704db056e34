"""Fused graphs for deployment: ONNX, `.pt2`, AOTInductor. Import it as `fusepass.exporters`.

The public functions are `fusepass.export_onnx`, `optimize_onnx`, `export_pt2` and `compile_aoti`.
"""
