"""What the fused ops share: layouts, dtypes, threads, seeds, transforms, modules, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Backend
from oracle import (
    LAYOUTS,
    drop_scale,
    keep_mask,
    normal,
)
from test_bias_dropout_add import SEED, Function, P, assert_all_equal, with_gradients
from test_dropout_add_norm import plain
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyfast

F = pyfast.nn.functional
LAYOUTS_OF_ROWS: dict[str, Callable[[], Tensor]] = {
    "misaligned": lambda: normal(8 * 129 + 1)[1:].view(8, 129),
    "misaligned rows of 8": lambda: normal(8 * 16 + 1)[1:].view(8, 16),
    **{name: make for name, make in LAYOUTS.items() if make().dim() == 2 and "long" not in name},
}


def layer(x: Tensor, residual: Tensor, weight: Tensor | None, p: float = P, **o: Any) -> Tensor:
    y, z = F.dropout_add_norm(x, residual, weight, None, p, prenorm=True, **o)
    return y * z


# The fused ops with one signature: x, residual, a vector over the columns, p, options.
FUSED: dict[str, Function] = {
    "bias_dropout_add": lambda x, r, v, p=P, **o: F.bias_dropout_add(x, v, r, p, **o),
    "layer": layer,
    "rms": lambda x, r, v, p=P, **o: F.dropout_add_norm(x, r, None, v, p, norm="rms", **o),
}
each_fused = pytest.mark.parametrize("name", FUSED)


def operands(backend: Backend, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    tensors = (*normal(2, *shape), normal(shape[-1]))
    return [t.to(dtype).to(backend.device) for t in tensors]


def run(name: str, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The result, and the gradients of x, residual and the vector, for a fixed seed."""
    options = {"seed": SEED, **options}
    grad = (inputs[0] + inputs[1]).cos()
    return with_gradients(lambda *t: FUSED[name](*t, **options), grad, *inputs)


@each_fused
@pytest.mark.parametrize("layout", LAYOUTS_OF_ROWS)
def test_noncontiguous(backend: Backend, layout: str, name: str) -> None:
    """Strided and misaligned operands, expanded gradients, one tensor as two operands."""
    x = LAYOUTS_OF_ROWS[layout]().to(backend.device).requires_grad_()
    vector = normal(2 * x.shape[-1])[::2].to(backend.device).requires_grad_()
    before = x.detach().clone()
    y = FUSED[name](x, x, vector, seed=SEED)
    y.sum().backward()
    copies = [t.detach().contiguous().clone().requires_grad_() for t in (x, vector)]
    expected = FUSED[name](copies[0], copies[0], copies[1], seed=SEED)
    expected.backward(torch.ones_like(expected))
    actual = [y, x.grad, vector.grad]
    expected = [expected, *(t.grad for t in copies)]
    assert y.is_contiguous() and torch.equal(x, before)
    if backend.name == "reference":  # torch's sums depend on strides
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    else:
        assert_all_equal(actual, expected)


@each_fused
@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float32 float16", "bfloat16 float16"])
def test_mixed_dtypes(backend: Backend, dtypes: str, name: str) -> None:
    """x and residual are promoted as torch promotes them; gradients have their dtypes."""
    wanted = [getattr(torch, dtype) for dtype in (dtypes + " float16").split()]
    inputs = [t.to(d) for t, d in zip(operands(backend, 9, 37), wanted, strict=True)]
    results = run(name, inputs)
    expected = run(name, [t.float() for t in inputs])
    assert [t.dtype for t in results] == [(inputs[0] + inputs[1]).dtype, *wanted]
    assert_all_equal(results, [e.to(r.dtype) for e, r in zip(expected, results, strict=True)])


@each_fused
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)], ids=str)
def test_empty(backend: Backend, shape: tuple[int, ...], name: str) -> None:
    *results, grad_vector = run(name, operands(backend, *shape))
    assert {tuple(t.shape) for t in results} == {shape}
    assert tuple(grad_vector.shape) == shape[-1:] and not grad_vector.any()


@each_fused
@pytest.mark.backends("cpu")
def test_deterministic(backend: Backend, name: str) -> None:
    """Any number of threads: the sums are cut into chunks that do not depend on it."""
    torch.set_num_threads(1)
    expected = run(name, operands(backend, 300, 257))
    for num_threads in (2, 2, 3):
        torch.set_num_threads(num_threads)
        assert_all_equal(run(name, operands(backend, 300, 257)), expected, f"{num_threads}")


@each_fused
@pytest.mark.backends("reference", "cpu", "cuda")
def test_gradcheck(backend: Backend, name: str) -> None:
    inputs = operands(backend, 2, 3, dtype=torch.float64)
    for t in inputs:
        t.requires_grad_()
    for check_gradients in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_gradients(lambda *t: FUSED[name](*t, seed=SEED), inputs)


@each_fused
def test_seeds(backend: Backend, name: str) -> None:
    """One draw a call, that of F.dropout, and its mask."""
    inputs = operands(backend, 5, 24)
    calls = []
    for _ in range(2):
        torch.manual_seed(3)
        calls.append([run(name, inputs, seed=None) for _ in range(2)])
    for twice in zip(*calls, strict=True):
        assert_all_equal(*twice)
    first, second = (results[1].cpu() != 0 for results in calls[0])  # grad_x is 0 where dropped
    torch.manual_seed(3)
    assert torch.equal(first, F.dropout(torch.ones_like(inputs[0]), P).cpu() != 0)
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(3)
    assert_all_equal(run(name, inputs, seed=None, generator=generator), calls[0][0])
    for seed in (SEED - 2**64, torch.tensor(SEED - 2**64)):
        assert_all_equal(run(name, inputs, seed=seed), run(name, inputs))


@each_fused
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend: Backend, use_reentrant: bool, name: str) -> None:
    def block(x: Tensor) -> Tensor:
        return FUSED[name](x.tanh(), x, x[0])

    gradients = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        x = normal(8, 37).to(backend.device).requires_grad_()
        torch.manual_seed(1)
        call(x).exp().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def unfused(name: str, x: Tensor, r: Tensor, v: Tensor) -> Tensor:
    if name == "bias_dropout_add":
        return r + torch.where(keep_mask((4, 6), P, SEED), (x + v) * drop_scale(P), 0.0)
    y, z = plain(x, r, *((v, None) if name == "layer" else (None, v)), name, True)
    return y * z if name == "layer" else y


func, OVER_X = torch.func, (0, None, None)


def slope(f: Function) -> Function:
    return func.grad(lambda *t: f(*t).sin().sum(), (0, 1, 2))


TRANSFORMS: dict[str, Function] = {
    "vmap": lambda f, x, r, v: func.vmap(f, OVER_X)(x, r, v),
    "vmap over the vector": lambda f, x, r, v: func.vmap(f, (None, None, 0))(x[0], r, r),
    "grad": lambda f, x, r, v: slope(f)(x[0], r, v),
    "grad of vmap": lambda f, x, r, v: slope(lambda *t: func.vmap(f, OVER_X)(*t))(x, r, v),
    "vmap of grad": lambda f, x, r, v: func.vmap(slope(f), OVER_X)(x, r, v),
    "vjp": lambda f, x, r, v: func.vjp(f, x[0], r, v)[1](r),
    "jvp": lambda f, x, r, v: func.jvp(f, (x[0], r, v), (r, x[1], v)),
    "hessian": lambda f, x, r, v: func.hessian(lambda v: f(x[0], r, v).sin().sum())(v),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(transform: str, name: str) -> None:
    inputs = (normal(5, 4, 6).double(), normal(4, 6).double(), normal(6).double())
    actual = TRANSFORMS[transform](partial(FUSED[name], seed=SEED), *inputs)
    torch.testing.assert_close(actual, TRANSFORMS[transform](partial(unfused, name), *inputs))


@pytest.mark.parametrize("name", FUSED)
def test_vmap_draws_seeds_as_it_is_told(name: str) -> None:
    inputs = (torch.ones(2, 4, 6), normal(4, 6), normal(6))
    with pytest.raises(RuntimeError, match="randomness"):
        func.vmap(FUSED[name], OVER_X)(*inputs)
    for randomness in ("same", "different"):
        y = func.vmap(FUSED[name], OVER_X, randomness=randomness)(*inputs)
        assert torch.equal(y[0], y[1]) == (randomness == "same")


NN = pyfast.nn
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], list[str]]] = {  # text: (make, keys)
    "BiasDropoutAdd(8, p=0.25, bias=True)": (lambda: NN.BiasDropoutAdd(8, 0.25), ["bias"]),
    "BiasDropoutAdd(8, p=0.5, bias=False)": (lambda: NN.BiasDropoutAdd(8, bias=False), []),
    "DropoutAddNorm(8, p=0.1": (lambda: NN.DropoutAddNorm(8, 0.1), ["weight", "bias"]),
    "DropoutAddNorm(8, p=0.5, norm=rms": (lambda: NN.DropoutAddNorm(8, norm="rms"), ["weight"]),
    "DropoutAddNorm(8, p=0.5": (lambda: NN.DropoutAddNorm(8, bias=False), ["weight"]),
    "DropoutAddNorm(8": (lambda: NN.DropoutAddNorm(8, elementwise_affine=False), []),
}


@pytest.mark.parametrize("text", MODULES)
def test_modules(text: str) -> None:
    make, keys = MODULES[text]
    module = make()
    assert list(module.state_dict()) == keys and repr(module).startswith(text)
    assert all(t.requires_grad and t.shape == (8,) for t in module.parameters())
    x, residual = normal(2, 5, 8).requires_grad_()
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), make()]
    results = []
    for other in (module, *copies):
        torch.manual_seed(1)
        results.append(other(x, residual))
    assert all(torch.equal(y, results[0]) for y in results)
    results[0].sum().backward()
    assert all(t.grad is not None for t in module.parameters())
    for parameter in module.parameters():
        parameter.data = normal(8)
    copies[2].load_state_dict(module.state_dict())
    parameters = dict(copies[2].eval().named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    expected = residual + (x if bias is None else x + bias)
    if isinstance(module, NN.DropoutAddNorm):
        expected = plain(x, residual, weight, bias, module.norm, mask=x == x, scale=1.0)
    torch.testing.assert_close(copies[2](x, residual), expected)
    assert copies[2].bfloat16()(x.bfloat16(), residual.bfloat16()).dtype == torch.bfloat16


X = torch.ones(4, 6)
BAD = (TypeError, ValueError)
ERRORS: dict[str, tuple[Function, Any, str]] = {
    "no dimension": (lambda f: f(X[0, 0], X[0, 0], None), BAD, r"x must be .*got \(\)"),
    "integer x": (lambda f: f(X.long(), X, None), BAD, "x must be .*int64"),
    "residual shape": (lambda f: f(X, X[:1], None), BAD, r"residual must be \(4, 6\).*\(1, 6"),
    "residual device": (lambda f: f(X, X.to("meta"), None), BAD, "residual must be .*meta"),
    "vector shape": (lambda f: f(X, X, X[0, :5]), BAD, r"must be \(6,\).*got \(5,\)"),
    "complex residual": (lambda f: f(X, X.cfloat(), None), BAD, "residual must"),
    "complex vector": (lambda f: f(X, X, X[0].cfloat()), BAD, "(bias|weight) must"),
    "p": (lambda f: f(X, X, None, 1.5), ValueError, "between 0 and 1, but got 1.5"),
    "p of nothing": (lambda f: f(X[:0], X[:0], None, -1.0), ValueError, "between 0 and 1"),
    "seed": (lambda f: f(X, X, None, seed=1.5), TypeError, "seed must be an int .*got float"),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("error", ERRORS)
def test_rejects(error: str, name: str) -> None:
    """With the names of op and argument, what is expected, and what came."""
    call, kind, text = ERRORS[error]
    op = "bias_dropout_add: " if name == "bias_dropout_add" else "dropout_add_norm: "
    before = torch.get_rng_state()
    with pytest.raises(kind, match=text) as caught:
        call(FUSED[name])
    assert str(caught.value).startswith("dropout probability" if error[0] == "p" else op)
    assert torch.equal(torch.get_rng_state(), before)


ERRORS_OF_ONE: dict[str, Callable[[], object]] = {
    "residual must be .*None": lambda: F.bias_dropout_add(X, None, None),
    'norm must be "layer" or "rms", got': lambda: F.dropout_add_norm(X, X, None, norm="batch"),
    'norm must be "layer" or "rms",': lambda: NN.DropoutAddNorm(8, norm="batch"),
    "between 0 and 1, but got 2": lambda: NN.BiasDropoutAdd(8, 2.0),
    "between 0 and 1, but got -1": lambda: NN.DropoutAddNorm(8, -1.0),
}


@pytest.mark.parametrize("text", ERRORS_OF_ONE)
def test_rejects_of_one(text: str) -> None:
    with pytest.raises(BAD, match=text):
        ERRORS_OF_ONE[text]()
