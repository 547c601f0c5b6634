"""Many tensors are read through torch's C interface, on several threads; or through DLPack, on one.
Both must see what is there now, and neither keep anything from the step before.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_bits_equal
from torch import Tensor

import pyfast

native = pyfast._backend.native
pytestmark = pytest.mark.skipif(native is None, reason=pyfast._backend.native_error or "-")
N = 700  # enough for two threads
WAYS = ("interface", "DLPack")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use("interface")


def use(way: str) -> None:
    probe = torch.empty(2, 3) if way == "interface" else None
    assert native.set_up(Tensor, torch.nn.Parameter, probe) == (way == "interface")


def values(i: int) -> Tensor:
    return torch.randn(5 + i % 3, 4, generator=torch.Generator().manual_seed(i))


def many(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters of several layouts, with gradients of others."""
    made = []
    for i in range(N):
        p = values(i).to(dtype)
        p = (p, p.t(), p[:, ::2], torch.nn.Parameter(p))[i % 4].detach().requires_grad_()
        p.grad = values(N + i)[: p.shape[0]].new_ones(p.shape).mul_(i % 7 - 3).to(dtype)
        if i % 5 == 0:
            p.grad = p.grad.t().contiguous().t()
        made.append(p)
    return made


def adamw(params: list[Tensor], **extras: Any) -> pyfast.optim.AdamW:
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.01}]
    return pyfast.optim.AdamW(groups, lr=0.1, **extras)


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point():
            assert_bits_equal(x.detach(), y.detach())
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "extras",
    [{}, {"amsgrad": True, "zero_grads": True}, {"state_dtype": "int8"}, {"ema_decay": 0.9}],
    ids=str,
)
def test_both_ways_agree(dtype: torch.dtype, extras: dict[str, Any]) -> None:
    if dtype == torch.float64 and "state_dtype" in extras:
        pytest.skip("float64 parameters have float64 states")
    results = []
    for name in WAYS:
        use(name)
        params = many(dtype)
        optimizer = adamw(params, **extras)
        for _ in range(3):
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["exp_avg"] for p in params)])
    use("interface")
    assert_same(*results)


def test_threads_agree() -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = many()
        optimizer = adamw(params)
        for _ in range(3):
            optimizer.step()
        results.append(params)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def point_state_elsewhere(optimizer: Any, p: Tensor) -> None:
    optimizer.state[p]["exp_avg"].data = optimizer.state[p]["exp_avg"].clone()


def replace_state(optimizer: Any, p: Tensor) -> None:
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].clone()


def point_parameter_elsewhere(optimizer: Any, p: Tensor) -> None:
    p.data = p.data.clone()


def set_parameter(optimizer: Any, p: Tensor) -> None:
    with torch.no_grad():
        p.set_(p.detach().clone())


def swap_parameter(optimizer: Any, p: Tensor) -> None:
    grad, p.grad = p.grad, None
    other = p.detach().clone().requires_grad_()
    torch.utils.swap_tensors(p, other)
    p.grad = grad


def new_gradient(optimizer: Any, p: Tensor) -> None:
    p.grad = None if p.grad is None else p.grad.clone()


def move_storage(optimizer: Any, p: Tensor) -> None:
    """As libraries do that shard or offload: the storage is freed, and made again."""
    state = optimizer.state[p]["exp_avg"]
    kept, storage = state.clone(), state.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    hold.append(torch.empty(size))
    storage.resize_(size)
    state.copy_(kept)


hold: list[Tensor] = []


@pytest.mark.parametrize(
    "change",
    [
        point_state_elsewhere,
        replace_state,
        point_parameter_elsewhere,
        set_parameter,
        swap_parameter,
        new_gradient,
        move_storage,
    ],
)
def test_nothing_is_stale(way: str, change: Callable[[Any, Tensor], None]) -> None:
    params, wanted = many(), many()
    optimizer, plain = adamw(params), adamw(wanted)
    for step in range(3):
        optimizer.step()
        plain.step()
        for i in range(step, N, 3):
            change(optimizer, params[i])
    assert_same(params, wanted)


def test_tensors_of_another_kind_among_many(way: str) -> None:
    """A gradient whose memory holds the values with the other sign, a subclass, a sparse one."""
    for make in (
        lambda g: torch._neg_view(-g),
        lambda g: torch.complex(g * 0, -g).conj().imag,
        lambda g: g.as_subclass(type("Sub", (Tensor,), {})),
        lambda g: g.to_sparse(),
    ):
        params, wanted = many(), many()
        for p in (params[600], params[3]):
            p.grad = make(p.grad)
        optimizers = [
            cls(list_, lr=0.1, momentum=0.9)
            for cls, list_ in ((pyfast.optim.SGD, params), (torch.optim.SGD, wanted))
        ]
        for optimizer in optimizers:
            optimizer.step()
        for p, w in zip(params, wanted, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-6, atol=1e-6)


def wrong_shape(state: dict[str, Any]) -> None:
    state["exp_avg"] = torch.zeros(3)


def wrong_dtype(state: dict[str, Any]) -> None:
    state["exp_avg_sq"] = state["exp_avg_sq"].to(torch.int32)


def no_tensor(state: dict[str, Any]) -> None:
    state["exp_avg"] = "none"


def freed(state: dict[str, Any]) -> None:
    state["exp_avg"].untyped_storage().resize_(0)


def wrong_step(state: dict[str, Any]) -> None:
    state["step"] = torch.zeros(2)


@pytest.mark.parametrize("spoil", [wrong_shape, wrong_dtype, no_tensor, freed, wrong_step])
def test_one_wrong_state_among_many(way: str, spoil: Callable[[dict[str, Any]], None]) -> None:
    params = many()
    optimizer = adamw(params)
    optimizer.step()
    spoil(optimizer.state[params[N - 2]])
    before, versions = [p.detach().clone() for p in params], [p._version for p in params]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        optimizer.step()
    assert "exp_avg" in str(error.value) or "step" in str(error.value)
    assert_same(params, before)
    assert versions == [p._version for p in params]
    assert all(optimizer.state[p]["step"] == 1 for p in params[: N - 2])


@pytest.mark.parametrize("zero_grads", [False, True])
def test_autograd_sees_the_change(way: str, zero_grads: bool) -> None:
    params = many()
    optimizer = adamw(params, zero_grads=zero_grads)
    optimizer.step()
    before = [(p._version, p.grad._version) for p in params]
    optimizer.step()
    for p, (version, grad_version) in zip(params, before, strict=True):
        assert p._version == version + 1
        assert p.grad._version == grad_version + zero_grads
    x = params[0]
    loss = (x * x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_clipping_is_seen(way: str) -> None:
    params = many()
    versions = [p.grad._version for p in params]
    pyfast.optim.clip_grad_norm_(params, 0.5)
    assert [p.grad._version for p in params] == [version + 1 for version in versions]


def test_fewer_tensors_than_before(way: str) -> None:
    """The addresses that a step fetches ahead are those of the last one, freed by now."""
    params, wanted = many(), many()
    optimizer, plain = adamw(params), adamw(wanted)
    optimizer.step()
    plain.step()
    for list_ in (params, wanted):
        for p in list_[::2]:
            p.grad = None
    optimizer.step()
    plain.step()
    assert_same(params, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_in_a_forked_child() -> None:
    params, wanted = many(), many()
    optimizer, plain = adamw(params), adamw(wanted)
    optimizer.step()
    plain.step()
    child = os.fork()
    if child == 0:
        optimizer.step()  # must not wait for threads that are not there
        os._exit(0 if all(optimizer.state[p]["step"] == 2 for p in params) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_interface_is_turned_down() -> None:
    """For a probe that it does not read as DLPack does."""
    try:
        for probe in (None, 3, torch.empty(2, 3).numpy(), torch._neg_view(torch.ones(3))):
            assert not native.set_up(Tensor, torch.nn.Parameter, probe)
            assert_bits_equal(pyfast.nn.functional.dropout(torch.ones(9), 0.0), torch.ones(9))
    finally:
        use("interface")


# A wrapper asks Python for its sizes, which waits for the thread that waits for all to be read.
WRAPPED_STATE = """
import torch, pyfast
from torch.utils._pytree import tree_map
torch.set_num_threads(2)

class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, dispatch_sizes_strides_policy="sizes")
    def __init__(self, inner):
        self.inner = inner
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = lambda x: x.inner if isinstance(x, Wrapper) else x
        return function(*tree_map(inner, args), **tree_map(inner, kwargs or {}))

params = [torch.ones(4, requires_grad=True) for _ in range(700)]
for p in params:
    p.grad = torch.ones(4)
optimizer = pyfast.optim.AdamW(params)
optimizer.step()
optimizer.state[params[-1]]["exp_avg"] = Wrapper(torch.zeros(4))
for _ in range(2):
    try:
        optimizer.step()
    except ValueError:
        print("refused")
"""


def test_a_state_that_calls_python() -> None:
    command = [sys.executable, "-c", WRAPPED_STATE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["refused", "refused"]


def test_imported_under_a_fake_mode() -> None:
    code = """
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    import pyfast
import torch
params = [torch.nn.Parameter(torch.ones(4)) for _ in range(700)]
for p in params:
    p.grad = torch.ones(4)
optimizer = pyfast.optim.SGD(params, lr=1.0)
optimizer.step()
calls, is_neg = [], torch.Tensor.is_neg  # asked for each tensor by the way through DLPack alone
torch.Tensor.is_neg = lambda self: calls.append(0) or is_neg(self)
optimizer.step()
assert len(calls) < 10, len(calls)
assert all(float(p.sum()) == -4 for p in params)
"""
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
