"""Which backend serves a call, what importing costs, and every way in which a call reaches an op.

The op under test is dropout; all ops share the code.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from conftest import HAS_GPU, Backend
from oracle import LAYOUTS, RANKS, assert_bits_equal, drop_scale, normal, run_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfast

F = pyfast.nn.functional
forced = pyfast._backend.forced
native = pyfast._backend.native
needs_native = pytest.mark.skipif(native is None, reason=pyfast._backend.native_error or "-")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that calls of dropout reach, in order."""
    calls: list[str] = []
    kernels = pyfast.ops._op.registered()["dropout"].kernels

    def spy(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: calls.append(name) or kernel(*arguments)

    for name, kernel in list(kernels.items()):
        monkeypatch.setitem(kernels, name, spy(name, kernel))
    return calls


@needs_native
def test_use_backend_nests(served: list[str]) -> None:
    x = torch.ones(9)
    with pyfast.use_backend("reference"):
        F.dropout(x)
        with pyfast.use_backend("cpu"):
            F.dropout(x)
            with pytest.raises(KeyError), pyfast.use_backend("reference"):
                raise KeyError
            F.dropout(x, inplace=True)
        F.dropout(x, inplace=True)
    assert forced() is None
    assert served == ["reference", "cpu", "reference"]  # in-place on the cpu is another call


def test_use_backend_rejects_a_name() -> None:
    with (
        pytest.raises(ValueError, match="must be one of cpu, cuda, triton, reference, got 'mps'"),
        pyfast.use_backend("mps"),
    ):
        pass
    assert forced() is None


def test_use_backend_holds_for_one_thread_or_task() -> None:
    seen: list[object] = []

    async def task(name: str) -> None:
        with pyfast.use_backend(name):
            await asyncio.sleep(0)
            seen.append(forced() == name)

    async def both() -> None:
        await asyncio.gather(task("cpu"), task("reference"))
        seen.append(forced())

    with pyfast.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
        asyncio.run(both())
        assert seen == [None, True, True, "triton"]


def test_backends_tells_why() -> None:
    table = pyfast.backends()
    assert "dropout" in table and pyfast.backends(("dropout",)) == {"dropout": table["dropout"]}
    for op, row in table.items():
        assert set(row) == {"cpu", "cuda", "triton", "reference"}, op
        assert row["reference"].usable, op
        for status in row.values():
            assert status.usable == (not status.reason)
            assert str(status) == ("usable" if status.usable else f"not usable: {status.reason}")
    if not HAS_GPU and native is not None and not native.build_info()["cuda"]:
        assert table["dropout"]["cuda"].reason == "the native module was built without nvcc"


UNSERVED = {
    "cuda": (lambda: torch.ones(9), r"nvcc|no CUDA device"),
    "triton": (lambda: torch.ones(9, dtype=torch.float64), "float64|triton is not installed"),
    "cpu": (lambda: torch.ones(9, device="meta"), "needs a tensor on cpu, got one on meta"),
}
CALLS = {
    "plain": lambda x: F.dropout(x),
    "gradient": lambda x: F.dropout(x.requires_grad_()),
    "inplace": lambda x: F.dropout(x, inplace=True),
    "inplace on a view": lambda x: F.dropout(x[1:], inplace=True),
    "backward": lambda x: backward_in_another_backend(x),
    "transform": lambda x: torch.func.grad(lambda x: F.dropout(x).sum())(x),
    "forward mode": lambda x: forward_dropout(x),
}


def backward_in_another_backend(x: Tensor) -> None:
    name = forced()
    with pyfast.use_backend("reference"):
        y = F.dropout(x.requires_grad_())
    assert forced() == name
    y.backward(torch.ones_like(y))


def forward_dropout(x: Tensor) -> None:
    with forward_ad.dual_level():
        F.dropout(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.skipif(HAS_GPU, reason="these backends serve these calls on a GPU")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", UNSERVED)
def test_forced_backend_never_falls_back(name: str, call: str, served: list[str]) -> None:
    make, reason = UNSERVED[name]
    x = make()
    if x.is_meta and call == "transform":
        pytest.skip("the dispatcher keeps meta tensors from the backends")
    with pyfast.use_backend(name), pytest.raises(RuntimeError) as raised:
        CALLS[call](x)
    raised.match(f"dropout: the backend '{name}' was asked for, but .*({reason})")
    assert served in ([], ["reference"] if call == "backward" else [])
    assert x.is_meta or (x == 1).all()


@needs_native
def test_environment() -> None:
    code = "import threading, torch, pyfast; b = pyfast._backend; "
    show = "print(b.forced(), b.native.selected_isa()); "
    thread = "t = threading.Thread(target=lambda: print(b.forced())); t.start(); t.join()"
    result = run_python(code + show + thread, PYFAST_BACKEND="reference", PYFAST_CPU_ISA="generic")
    assert result.stdout.split() == ["reference", "generic", "reference"], result.stderr
    result = run_python("import pyfast", PYFAST_BACKEND="mps")
    text = "ValueError: PYFAST_BACKEND must be one of cpu, cuda, triton, reference, got 'mps'"
    assert result.stderr.strip().endswith(text)
    result = run_python("import pyfast", PYFAST_CPU_ISA="sse9")
    error = result.stderr.strip().splitlines()[-1]
    for part in ("ValueError", "PYFAST_CPU_ISA", "'sse9'", "generic, avx2, avx512"):
        assert part in error


@needs_native
def test_set_selected_isa_rejects_a_name() -> None:
    before = native.selected_isa()
    with pytest.raises(ValueError, match="'sse9': the levels are generic, avx2, avx512"):
        native.set_selected_isa("sse9")
    assert native.selected_isa() == before


def test_import_is_light() -> None:
    """No warning, no module but torch's and the standard library's, and 0.3 s at most."""
    code = """
import sys, time, warnings, torch
warnings.simplefilter("error")
before, start = set(sys.modules), time.perf_counter()
import pyfast
print(time.perf_counter() - start, "triton" in sys.modules)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*new - {"pyfast", "torch", *sys.stdlib_module_names})
"""
    times = []
    for _ in range(3):
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        first, others = result.stdout.split("\n")[:2]
        assert first.endswith("False") and others == ""
        times.append(float(first.split()[0]))
        if min(times) < 0.3:
            return
    raise AssertionError(f"importing pyfast took {times} s")


def test_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, pyfast
print(pyfast.backends()["dropout"]["triton"])
x = torch.ones(9, requires_grad=True)
pyfast.nn.functional.dropout(x).sum().backward()
with pyfast.use_backend("triton"):
    pyfast.nn.functional.dropout(x)
"""
    result = run_python(code)
    assert result.stdout.strip() == "not usable: triton is not installed"
    text = "RuntimeError: dropout: the backend 'triton' was asked for, but triton is not installed"
    assert result.stderr.strip().endswith(text)


def test_namespaces_are_those_of_torch() -> None:
    assert pyfast.nn.Conv1d is torch.nn.Conv1d and pyfast.nn.Module is torch.nn.Module
    assert pyfast.nn.functional.softmax is torch.nn.functional.softmax
    assert pyfast.optim.Adagrad is torch.optim.Adagrad
    pairs = ((pyfast.nn, torch.nn), (F, torch.nn.functional), (pyfast.optim, torch.optim))
    for ours, theirs in pairs:
        assert set(dir(theirs)) <= set(dir(ours))
        assert all(getattr(ours, name) is not None for name in ours.__dict__.get("__all__", ()))
        with pytest.raises(AttributeError):
            getattr(ours, "no_such_name")  # noqa: B009


@needs_native
def test_native_module_needs_no_torch_library() -> None:
    """One binary for every torch, and one OpenMP runtime: the one that torch has loaded."""
    needed = elf_needed(Path(native.__file__).read_bytes())
    assert any("libc.so" in name for name in needed)
    for library in ("torch", "c10", "cudart", "gomp", "omp", "mkl"):
        assert not any(name.startswith(f"lib{library}") for name in needed), needed


def elf_needed(data: bytes) -> list[str]:
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    offset, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    # type, flags, offset, vaddr, paddr, filesz, memsz, align
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + i * size) for i in range(count)]
    dynamic = next(header for header in headers if header[0] == 2)
    entries = [struct.unpack_from("<QQ", data, dynamic[2] + i) for i in range(0, dynamic[5], 16)]
    address = next(value for tag, value in entries if tag == 5)
    load = next(h for h in headers if h[0] == 1 and h[3] <= address < h[3] + h[5])
    names = address - load[3] + load[2]
    starts = [names + value for tag, value in entries if tag == 1]
    return [data[start : data.index(b"\0", start)].decode() for start in starts]


def test_batched_gradients(backend: Backend) -> None:
    """jacobian(vectorize=True) and is_grads_batched run the backward under torch's older vmap."""
    x = normal(9).to(backend.device)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: F.dropout(x, 0.3, seed=2), x, vectorize=True
    )
    assert_bits_equal(jacobian.diag(), F.dropout(torch.ones_like(x), 0.3, seed=2))


@pytest.mark.parametrize("inplace", [False, True])
def test_forward_mode(backend: Backend, inplace: bool) -> None:
    x = normal(65).to(backend.device)
    with forward_ad.dual_level():
        y = forward_ad.make_dual(x, torch.ones_like(x)) * 1
        y, tangent = forward_ad.unpack_dual(F.dropout(y, 0.3, inplace=inplace, seed=2))
    assert_bits_equal(y, F.dropout(x, 0.3, seed=2))
    assert_bits_equal(tangent, F.dropout(torch.ones_like(x), 0.3, seed=2))


def test_lazy_negation(backend: Backend) -> None:
    """The imaginary part of a conjugate is a view that torch negates on reading."""
    x = torch.complex(normal(65), normal(65)).to(backend.device).conj().imag
    assert x.is_neg()
    assert_bits_equal(F.dropout(x, 0.3, seed=2), F.dropout(x.resolve_neg(), 0.3, seed=2))


def test_lazy_zeros() -> None:
    """Tensors of torch's autograd that have no memory."""
    code = "import torch, pyfast; x = torch._efficientzerotensor(5)\n"
    result = run_python(code + "assert not pyfast.nn.functional.dropout(x).any()")
    assert result.returncode == 0, result.stderr


def test_function_transforms() -> None:
    x, ones = normal(4, 9), torch.ones(4, 9)
    function = partial(F.dropout, p=0.3, seed=2)

    def half_norm(x: Tensor) -> Tensor:
        return function(x).square().sum() / 2

    assert_bits_equal(torch.func.grad(half_norm)(x), function(function(x)))
    rows = torch.stack([function(function(row)) for row in x])
    assert_bits_equal(torch.func.vmap(torch.func.grad(half_norm))(x), rows)
    assert_bits_equal(torch.func.jacrev(function)(x[0]).diag(), function(ones[0]))
    assert_bits_equal(torch.func.hessian(half_norm)(x[0]).diag(), function(function(ones[0])))
    module = torch.nn.Sequential(torch.nn.Linear(9, 9), pyfast.nn.Dropout(seed=2))
    parameters = dict(module.named_parameters())
    assert_bits_equal(torch.func.functional_call(module, parameters, x), module(x))
    grads = torch.func.grad(lambda w: torch.func.functional_call(module, w, x).sum())(parameters)
    module(x).sum().backward()
    torch.testing.assert_close(grads["0.weight"], module[0].weight.grad)


def test_forward_transforms() -> None:
    """jvp and jacfwd; a tangent of zeros would be silently wrong."""
    x, ones = normal(4, 9), torch.ones(4, 9)
    function = partial(F.dropout, p=0.3, seed=2)
    y, tangent = torch.func.jvp(function, (x,), (ones,))
    assert_bits_equal(y, function(x))
    assert_bits_equal(tangent, function(ones))
    assert_bits_equal(torch.func.jacfwd(function)(x[0]).diag(), function(ones[0]))


def test_tensor_subclasses_and_modes() -> None:
    class Named(torch.Tensor):
        pass

    x = normal(9)
    expected = F.dropout(x, seed=2)
    y = F.dropout(x.as_subclass(Named), seed=2)
    assert type(y) is Named
    assert_bits_equal(y.as_subclass(Tensor), expected)
    with torch.device("meta"):
        assert_bits_equal(F.dropout(x, seed=2), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    scale, seed = drop_scale(0.3), torch.tensor(5)
    for x, mask_ndim in ((normal(3, 9), 2), (normal(6, 7, 5).permute(2, 0, 1), 1)):
        x = x.requires_grad_(requires_grad)
        arguments = (x, seed, round(0.3 * 65536), 1, scale, -0.0, 0.0, mask_ndim)
        torch.library.opcheck(torch.ops.pyfast.dropout, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_have_the_strides_of_real_ones(layout: str) -> None:
    x = LAYOUTS[layout]()
    with FakeTensorMode() as mode:
        fake = F.dropout(mode.from_tensor(x), 0.3)
        drawn = F.alpha_dropout(mode.from_tensor(x), 0.3, True, seed=1)
    y = F.dropout(x, 0.3)
    for other in (fake, drawn):
        assert (other.shape, other.stride(), other.dtype) == (y.shape, y.stride(), y.dtype)


def test_exports() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(9, 9), pyfast.nn.Dropout(0.3))
    x = normal(4, 9)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    run = exported.module()
    for inputs in (x, normal(7, 9)):
        torch.manual_seed(2)
        first, second = run(inputs), run(inputs)
        torch.manual_seed(2)
        assert_bits_equal(first, module(inputs))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_fullgraph(compiler: str) -> None:
    """Two masks a call, new ones in each; and those that eager mode draws from the same state."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.dropout(x.exp(), 0.3), F.dropout(x.exp(), 0.3), F.dropout(x, 0.3, seed=2**64 - 3)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    x = normal(16, 65).requires_grad_()
    torch.manual_seed(4)
    outputs, later = compiled(x), compiled(x)
    torch.manual_seed(4)
    for expected, results in ((function(x), outputs), (function(x), later)):
        for a, b in zip(expected, results, strict=True):
            assert torch.equal(a != 0, b != 0)
            torch.testing.assert_close(a, b)
    masks = [y != 0 for y in (*outputs, *later)]
    assert torch.equal(masks[2], masks[5])
    assert not any(torch.equal(a, b) for i, a in enumerate(masks[:5]) for b in masks[:i])
    sum(y.sum() for y in outputs).backward()  # exp is its own derivative, and so is its dropout
    expected = outputs[0] + outputs[1] + masks[2] * drop_scale(0.3)
    torch.testing.assert_close(x.grad, expected.detach())


def test_compiles_every_function() -> None:
    """In place too, for any size in one graph, and for another p."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for name, rank in RANKS.items():
        torch._dynamo.reset()
        counter.clear()
        function = getattr(F, name)

        def call(x: Tensor, p: float, inplace: bool, function: Callable = function) -> Tensor:
            return function(x * 1, p, True, inplace, seed=5)

        compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
        for n in (4, 6, 9):
            x = normal(*(n, 3, 5, 2, 2)[:rank])
            assert_bits_equal(compiled(x, 0.3, False), call(x, 0.3, False))
            if n == 4:
                graphs = counter.frame_count
        assert counter.frame_count == graphs, name
        for p, inplace in ((0.3, True), (0.4, False), (0.6, False)):
            assert_bits_equal(compiled(x, p, inplace), call(x, p, inplace))
