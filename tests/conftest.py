"""Settings for all tests: a fixed seed, a clean compiler, fair use of cores."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

# The first example of a test may compile something, so time limits per example would only be noise.
hypothesis.settings.register_profile("fusepass", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("fusepass")

# The exporters' tests need the packages of the `onnx` extra; without them there is nothing to test.
if not all(map(importlib.util.find_spec, ("onnx", "onnx_ir", "onnxruntime", "onnxscript"))):
    collect_ignore_glob = ["*/test_onnx_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Give each pytest-xdist worker its share of the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seed torch; forget registered kernels and compiled code: a full cache would fall back to eager."""
    torch.manual_seed(0)
    yield
    if "fusepass.kernels.registry" in sys.modules:
        registry = sys.modules["fusepass.kernels.registry"]
        for name in list(registry.registered()):
            registry.unregister_kernel(name)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def instant_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Inductor that runs the graph uncompiled, to save time."""
    import torch._inductor.compile_fx

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda gm, inputs, **kwargs: gm.forward)


@pytest.fixture
def idle_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that reports every softmax and changes nothing."""
    from tests import engines

    engines.install(monkeypatch, engines.idle)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Two ranks that only pretend to communicate."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()
