"""Fused graphs for deployment: ONNX, `.pt2`, AOTInductor. Import it as `fusepass.exporters`.

No exporter is implemented yet: this package is the place where they will live.
"""
