"""The ``backend`` parameter: every implementation that can run here, each for the same tests.

``cpu-<level>`` is the native CPU kernel at one instruction-set level. Without a GPU, Triton runs in
its interpreter, and the CUDA kernels run as host code in a session of their own:

    pytest --emulate-cuda
"""

from __future__ import annotations

import binascii
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
import triton_interpreter
from device_under_test import use_device

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

CPU_LEVELS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
# Of these alone, by a word in the name of a test's module; others have the level below.
SPECIAL_LEVELS = {"avx512_vnni": ("int8", "linear"), "amx": ("int8", "linear", "attention")}


class Backend(NamedTuple):
    """One backend under test. ``is_slow``: interpreted, so shapes stay small."""

    id: str
    name: str
    level: str | None
    device: torch.device
    is_slow: bool

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        every = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        return every[:3] if self.name == "triton" else every

    @property
    def exact_dtypes(self) -> tuple[torch.dtype, ...]:
        """Those without bfloat16 where Triton's interpreter rounds it to zero, subnormals too."""
        return tuple(d for d in self.dtypes if not (self.is_slow and d == torch.bfloat16))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-cuda",
        action="store_true",
        help="run the CUDA kernels as host code: the backend parameter cuda, and nothing else",
    )
    parser.addoption(
        "--part", metavar="I/N", help="run one test in N: several processes share them"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_GPU:
        with contextlib.suppress(ImportError):  # no triton: its tests are skipped
            triton_interpreter.mend()
    config.addinivalue_line("markers", "backends(*names): restrict the backend parameter to these")
    # Here and not in a fixture: @settings reads the profile when a test module is imported.
    hypothesis.settings.register_profile(
        "fixed",
        derandomize=True,
        deadline=None,
        database=None,
        # Without shrinking: cases are small as drawn, and a hundred more take minutes interpreted.
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("fixed")
    if config.getoption("--emulate-cuda"):
        if "pyfast" in sys.modules:
            raise pytest.UsageError("--emulate-cuda: pyfast was imported before its native module")
        from cuda_emulation.build import load_emulated

        load_emulated()


def _backends(emulate_cuda: bool) -> list[Backend]:
    cpu = torch.device("cpu")
    gpu = torch.device("cuda" if HAS_GPU else "cpu")
    if emulate_cuda:
        return [Backend("cuda", "cuda", None, cpu, is_slow=False)]
    return [
        Backend("reference", "reference", None, cpu, is_slow=False),
        *(Backend(f"cpu-{level}", "cpu", level, cpu, is_slow=False) for level in CPU_LEVELS),
        Backend("triton", "triton", None, gpu, is_slow=not HAS_GPU),
        Backend("cuda", "cuda", None, gpu, is_slow=False),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("backends")
    module = metafunc.module.__name__
    chosen = [
        backend
        for backend in _backends(metafunc.config.getoption("--emulate-cuda"))
        if (marker is None or backend.name in marker.args)
        and any(word in module for word in SPECIAL_LEVELS.get(backend.level, ("",)))
    ]
    metafunc.parametrize("backend", chosen, ids=[b.id for b in chosen], indirect=True)


def _is_spared(item: pytest.Item) -> bool:
    """Attention takes a second a call in Triton's interpreter, and its compiler several a kernel:
    there each case of it runs in one dtype, which differs from case to case."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or "attention" not in item.path.name:
        return False
    backend, dtype = (callspec.params.get(name) for name in ("backend", "dtype"))
    if not (isinstance(backend, Backend) and isinstance(dtype, torch.dtype)):
        return False
    if backend.name != "triton":
        return False
    rest = item.nodeid.replace(str(dtype), "")
    turn = (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    return binascii.crc32(rest.encode()) % 3 != turn


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    emulate_cuda = config.getoption("--emulate-cuda")
    part, parts = map(int, (config.getoption("--part") or "0/1").split("/"))

    def runs(item: pytest.Item) -> bool:
        if _is_spared(item) or binascii.crc32(item.nodeid.encode()) % parts != part:
            return False
        callspec = getattr(item, "callspec", None)
        has_backend = callspec is not None and isinstance(callspec.params.get("backend"), Backend)
        return has_backend or not emulate_cuda

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


def _why_skipped(backend: Backend, module: str, emulate_cuda: bool) -> str:
    import pyfast

    table = pyfast.backends()
    op = module.rpartition(".")[2].removeprefix("test_")
    status = table.get(op, table["dropout"])[backend.name]
    if backend.name == "cuda" and not (HAS_GPU or emulate_cuda):
        return "needs a GPU, or --emulate-cuda"
    if not status.usable:
        return status.reason
    if backend.level is not None:
        info = pyfast._backend.native.build_info()
        if backend.level not in info["isa_compiled"]:
            return f"the native module was built without {backend.level}"
        if CPU_LEVELS.index(backend.level) > CPU_LEVELS.index(info["isa_detected"]):
            return f"this processor has {info['isa_detected']} at most"
    return ""


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs the test with this backend forced."""
    import pyfast

    chosen: Backend = request.param
    reason = _why_skipped(
        chosen, request.module.__name__, request.config.getoption("--emulate-cuda")
    )
    if reason:
        pytest.skip(reason)
    native: Any = pyfast._backend.native
    before = native.selected_isa() if native is not None else None
    if chosen.level is not None:
        native.set_selected_isa(chosen.level)
    try:
        with pyfast.use_backend(chosen.name), use_device(chosen.device):
            yield chosen
    finally:
        if before is not None:
            native.set_selected_isa(before)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
