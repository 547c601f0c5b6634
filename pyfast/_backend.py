"""Which implementations are usable here, which one serves a call, and how to force one.

Automatic choice: CPU tensors go to ``cpu``, CUDA tensors to ``cuda``, or to ``triton`` where an op
or an install has no CUDA kernel, everything else (other devices and dtypes, or no kernel built) to
``reference``. A backend asked for by name serves the call or raises; it never falls back.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import types
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch  # before _C: the native module binds to the OpenMP runtime that torch loads
from torch.utils._python_dispatch import _disable_current_modes

NAMES = ("cpu", "cuda", "triton", "reference")
KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
# What kernels read: int8 comes to the quantized ops alone, every other op refuses it before.
_READ_DTYPES = KERNEL_DTYPES | {torch.int8}


def _load_native() -> tuple[types.ModuleType | None, str]:
    try:
        module = importlib.import_module("._C", __package__)
        with _disable_current_modes():  # a fake tensor would not do
            probe = torch.empty(2, 3, device="cpu")
        module.set_up(torch.Tensor, torch.nn.Parameter, probe)
        return module, ""
    except ImportError as error:
        if importlib.util.find_spec(f"{__package__}._C") is None:
            return None, "the native module was not built (installed with PYFAST_NATIVE=0?)"
        return None, f"the native module does not load: {error}"


native, native_error = _load_native()


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def _from_environment() -> str | None:
    level = os.environ.get("PYFAST_CPU_ISA")
    if level and native is not None:
        try:
            native.set_selected_isa(level)
        except ValueError as error:
            raise ValueError(f"PYFAST_CPU_ISA: {error}") from None
    name = os.environ.get("PYFAST_BACKEND")
    return _check_name(name, "PYFAST_BACKEND") if name else None


_environment_choice = _from_environment()
_forced: ContextVar[str | None] = ContextVar("pyfast_backend", default=_environment_choice)

forced = _forced.get


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every pyfast op in the block onto one backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or
    ``"reference"``.

    The environment variable ``PYFAST_BACKEND`` does the same for the whole process. The choice
    holds for the current thread (or task), and for a backward pass that runs in the block on the
    CPU; one on CUDA runs on a thread of autograd's own, which chooses automatically. Forward-mode
    AD is computed by the reference on every backend.

    Raises:
        ValueError: for an unknown name. A call that the backend cannot serve raises RuntimeError
            with the reason.
    """
    token = _forced.set(_check_name(name, "use_backend: name"))
    try:
        yield
    finally:
        _forced.reset(token)


class BackendStatus(NamedTuple):
    """Whether a backend can run an op on this machine, and if not, why."""

    usable: bool
    reason: str

    def __str__(self) -> str:
        return "usable" if self.usable else f"not usable: {self.reason}"


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_unusable(backend: str) -> str:
    """The reason why a backend cannot run at all on this machine, or an empty string."""
    if backend == "cpu":
        return native_error
    if backend == "cuda":
        if native is None:
            return native_error
        if not native.build_info()["cuda"]:
            return "the native module was built without nvcc"
        return "" if torch.cuda.is_available() or emulates_cuda() else "torch sees no CUDA device"
    if backend == "triton":
        if not has_triton():
            return "triton is not installed"
        if not torch.cuda.is_available() and not triton_interprets():
            return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    return ""


def emulates_cuda() -> bool:
    """True when the native module is the test build that runs CUDA kernels as host code."""
    return native is not None and bool(native.build_info()["cuda_emulation"])


def backends(ops: tuple[str, ...] | None = None) -> dict[str, dict[str, BackendStatus]]:
    """What is usable here: ``{op: {backend: BackendStatus}}`` for every op, or for those named.

    The backward pass of an op runs where its forward pass does and has no entry of its own.
    """
    from .ops._op import registered

    table = {}
    for name, op in registered().items():
        if name in ops if ops is not None else not name.endswith("_backward"):
            reasons = {
                backend: _why_unusable(backend)
                if backend in op.kernels
                else "not implemented for this op"
                for backend in NAMES
            }
            table[name] = {backend: BackendStatus(not why, why) for backend, why in reasons.items()}
    return table


def _why_not(backend: str, kernels: object, tensor: torch.Tensor) -> str:
    """The reason why a backend cannot serve this tensor, or an empty string."""
    if backend not in kernels:  # type: ignore[operator]
        return "it has no implementation of this op"
    reason = _why_unusable(backend)
    if reason or backend == "reference":
        return reason
    dtypes = _READ_DTYPES - {torch.float64} if backend == "triton" else _READ_DTYPES
    if tensor.dtype not in dtypes:
        return f"it does not compute in {str(tensor.dtype).removeprefix('torch.')}"
    wanted = "cpu" if backend == "cpu" else "cuda"
    if (backend == "triton" and triton_interprets()) or (backend == "cuda" and emulates_cuda()):
        wanted = "cpu"
    if tensor.device.type != wanted:
        return f"it needs a tensor on {wanted}, got one on {tensor.device}"
    return ""


# What was found once: asking torch and Triton takes longer than a launch.
_chosen_on_cuda: dict[tuple[str, torch.dtype], str] = {}


def choose(op: str, kernels: object, tensor: torch.Tensor) -> str:
    """The backend that serves a call of ``op`` whose first tensor is ``tensor``."""
    name = forced()
    if name is not None:
        reason = _why_not(name, kernels, tensor)
        if reason:
            raise RuntimeError(f"{op}: the backend {name!r} was asked for, but {reason}")
        return name
    if tensor.is_cpu and native is not None and tensor.dtype in _READ_DTYPES:
        return "cpu"
    if tensor.is_cuda:
        found = _chosen_on_cuda.get((op, tensor.dtype))
        if found is None:
            usable = (n for n in ("cuda", "triton") if not _why_not(n, kernels, tensor))
            found = _chosen_on_cuda[op, tensor.dtype] = next(usable, "reference")
        return found
    return "reference"


class Served(NamedTuple):
    """The backend that served a call of an op, why, and why every other did not."""

    op: str
    backend: str
    reason: str
    others: dict[str, str]


observers: list[list[Served]] = []  # what explain() listens with


def report(
    op: str, kernels: object, tensor: torch.Tensor, backend: str, reason: str, limit: str
) -> None:
    """Tell the observers. ``limit``: why no kernel but the reference can serve the call."""
    if not reason and forced() is not None:
        reason = "it was asked for"
    elif not reason and limit:
        reason = limit
    elif not reason and backend == "reference":
        reason = f"no kernel here serves {tensor.dtype} on {tensor.device}"
    elif not reason:
        reason = f"it is the first choice on {tensor.device.type} of those that can serve the call"
    others = {
        name: _why_not(name, kernels, tensor)
        or (limit if name != "reference" else "")
        or "it could serve the call, if asked for"
        for name in NAMES
        if name != backend
    }
    for record in observers:
        record.append(Served(op, backend, reason, others))
