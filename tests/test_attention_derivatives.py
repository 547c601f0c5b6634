"""Attention under autograd's second derivative, torch.func, compilers, checkpoint and autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_cases import Case, Function, Inputs, call, dense, make
from conftest import Backend
from oracle import assert_bits_equal, normal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import pyfast

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
attention = pyfast.nn.functional.scaled_dot_product_attention
SMALL = Case((2,), 2, 4, 5, 3)
CASES = {
    "plain": SMALL,
    "causal": replace(SMALL, causal=True, alignment="bottom_right"),
    "dropout": replace(SMALL, p=0.4),
    "softcap": replace(SMALL, softcap=1.5, scale=0.9),
    "window": replace(SMALL, window=(1, 1)),
    "bool mask": replace(SMALL, mask="bool bhls"),
    "additive mask": replace(SMALL, mask="float32 hls"),
    "groups": replace(SMALL, heads=4, key_heads=2, value_size=2),
    "sinks": replace(SMALL, sinks=True),
    "slopes": replace(SMALL, alibi="bh"),
    "all": Case(
        (2,),
        4,
        4,
        5,
        3,
        key_heads=2,
        mask="float32 bls",
        causal=True,
        alignment="bottom_right",
        window=(3, -1),
        softcap=1.5,
        alibi="h",
        sinks=True,
        p=0.3,
    ),
}


def split(case: Case, dtype: torch.dtype) -> tuple[list[str], list[Tensor], Inputs]:
    """Names and values of what is differentiable; a mask of -inf would have none by differences."""
    inputs, _ = make(case, torch.float32)
    inputs = inputs.map(lambda t: t.to(dtype).masked_fill(t == -torch.inf, -3.0))
    names = [
        name
        for name, t in zip(Inputs._fields, inputs, strict=True)
        if t is not None and t.is_floating_point()
    ]
    return names, [getattr(inputs, name) for name in names], inputs


@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", CASES)
def test_gradients_by_differences(backend: Backend, name: str) -> None:
    names, leaves, inputs = split(CASES[name], torch.float64)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, lse = call(CASES[name], inputs._replace(**dict(zip(names, tensors, strict=True))))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_double_backward(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """The gradient of a penalty on gradients, with the same dropout mask, against the oracle."""
    case = CASES[name]
    inputs, _ = make(case, dtype)
    inputs = inputs.map(lambda t: t.masked_fill(t == -torch.inf, -3.0))

    def second_order(function: Function, x: Inputs) -> list[Tensor]:
        x = x.map(lambda t: t.detach().clone().requires_grad_())
        if x.slopes is not None:
            x.slopes.requires_grad_(backend.name == "reference")
        leaves = [t for t in x if t is not None and t.requires_grad]
        out, lse = function(case, x)
        weight = normal(*out.shape)
        total = (out * weight).sum() + lse.masked_fill(lse.isinf(), 0).square().sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        penalty = sum(g.double().square().sum() for g in first) + out.double().square().sum()
        return list(torch.autograd.grad(penalty, leaves))

    actual, exact = second_order(call, inputs), second_order(dense, inputs.map(Tensor.double))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype or a.dtype == torch.float32
        assert (a - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


def simple(q: Tensor, k: Tensor, v: Tensor, case: Case = CASES["dropout"]) -> Tensor:
    return call(case, Inputs(q, k, v))[0]


def exact(q: Tensor, k: Tensor, v: Tensor, case: Case = CASES["dropout"]) -> Tensor:
    return dense(case, Inputs(q, k, v))[0]


def operands() -> tuple[Tensor, Tensor, Tensor]:
    inputs, _ = make(CASES["dropout"], torch.float32)
    return inputs.q, inputs.k, inputs.v


def test_transforms(backend: Backend) -> None:
    """grad, vjp and jacrev of torch.func."""
    tensors = operands()
    for transform in (
        lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))(*tensors),
        lambda f: torch.func.vjp(f, *tensors)[1](torch.ones(2, 2, 4, 3)),
        lambda f: torch.func.jacrev(f, argnums=(0, 2))(*tensors),
    ):
        torch.testing.assert_close(transform(simple), transform(exact))


def test_second_order_transforms(backend: Backend) -> None:
    tensors = operands()

    def norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: function(*t).square().sum()

    def twice(function: Callable[..., Tensor]) -> Tensor:
        first = torch.func.grad(norm(function))
        return torch.func.grad(lambda *t: first(*t).square().sum(), argnums=1)(*tensors)

    torch.testing.assert_close(twice(simple), twice(exact), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        *(torch.func.hessian(norm(f))(*tensors) for f in (simple, exact)), rtol=1e-4, atol=1e-4
    )


def test_forward_mode(backend: Backend) -> None:
    tensors = operands()
    tangents = tuple(normal(*t.shape) for t in tensors)
    for a, e in zip(
        torch.func.jvp(simple, tensors, tangents),
        torch.func.jvp(exact, tensors, tangents),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_vmap(backend: Backend) -> None:
    """Values and gradients by sample; each is a call of its own, with the mask of its seed."""
    tensors = tuple(normal(3, 2, 2, n, 8).to(backend.device) for n in (4, 5, 5))
    function = lambda *t: attention(*t, is_causal=True, dropout_p=0.3, seed=5)  # noqa: E731
    grad = torch.func.grad(lambda *t: function(*t).square().sum(), argnums=(0, 1, 2))
    wanted = [function(*sample) for sample in zip(*tensors, strict=True)]
    torch.testing.assert_close(torch.func.vmap(function)(*tensors), torch.stack(wanted))
    grads = [torch.stack(g) for g in zip(*map(grad, *tensors), strict=True)]
    for a, w in zip(torch.func.vmap(grad)(*tensors), grads, strict=True):
        torch.testing.assert_close(a, w)
    shared = torch.func.vmap(function, in_dims=(0, None, None))(
        tensors[0], *(t[0] for t in tensors[1:])
    )
    torch.testing.assert_close(shared[0], wanted[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_fullgraph(backend: Backend, dropout_p: float) -> None:
    """One graph forward and one backward: with a mask, and with every extra."""
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        first = attention(q, k, v, mask, dropout_p, seed=7)
        out, lse = attention(
            first,
            k,
            v,
            None,
            dropout_p,
            True,
            window=(5, 0),
            softcap=2.0,
            sinks=sinks,
            enable_gqa=True,
            causal_alignment="bottom_right",
            return_lse=True,
            seed=8,
        )
        return out * lse.sigmoid()[..., None]

    inputs = (
        normal(2, 2, 6, 8),
        normal(2, 2, 9, 8),
        normal(2, 2, 9, 8),
        normal(2, 1, 1, 9),
        normal(2),
    )
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().to(backend.device).requires_grad_() for t in inputs]
        out = run(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_draws_anew(backend: Backend) -> None:
    """Another mask in every call, what eager draws from the same state, and the same mask in the
    backward pass."""
    torch._dynamo.reset()
    q, k = (t.to(backend.device) for t in (torch.zeros(1, 2, 16, 8), normal(1, 2, 32, 8)))
    v = torch.eye(32, device=backend.device).expand(1, 2, 32, 32)
    function = lambda v: attention(q, k, v, dropout_p=0.5)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    leaf = v.clone().requires_grad_()
    first, second = compiled(leaf), compiled(leaf)
    torch.manual_seed(1)
    assert_bits_equal(first, function(v))
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first, leaf, torch.eye(16, 32).to(v).expand(1, 2, 16, 32))
    assert torch.equal(grad[..., :16] != 0, (first[..., :32] != 0).transpose(-1, -2))


def test_compiles_dynamic(backend: Backend) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = lambda q, k, m: attention(q, k, k, m, 0.2, seed=4)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    counts = set()
    for length, keys in ((6, 9), (7, 12), (16, 33)):
        shapes = (2, 2, length, 8), (2, 2, keys, 8), (length, keys)
        q, k, mask = (normal(*shape).to(backend.device) for shape in shapes)
        torch.testing.assert_close(compiled(q, k, mask), function(q, k, mask))
        counts.add(counter.frame_count)
    assert len(counts) == 1, "compiled again for another length"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_exports(backend: Backend, dropout_p: float) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = attention(q, k, k, mask, dropout_p, scale=0.5)
            return result

    tensors = normal(2, 2, 6, 8), normal(2, 2, 9, 8), normal(6, 9) > 0
    tensors = tuple(t.to(backend.device) for t in tensors)
    run = torch.export.export(Module(), tensors).module()
    torch.manual_seed(3)
    actual = run(*tensors)
    torch.manual_seed(3)
    torch.testing.assert_close(actual, Module()(*tensors))


def opcheck_arguments() -> dict[str, tuple[Any, ...]]:
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 16)
    rule = (19661, 0.3, 0.0, -1, -1, False)
    extras = (19661, 0.3, 1.5, 4, 0, True)
    seed, none = torch.tensor(5), None
    ends = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7])
    permuted = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    bias, slopes, sinks = normal(2, 1, 5, 7), normal(4)[None].abs(), normal(4)
    return {
        "plain": (q, k, v, none, none, none, none, none, seed, *rule),
        "tokens first": (*permuted, none, none, none, none, none, seed, *rule),
        "extras": (q, k, v, bias, slopes, sinks, none, none, seed, *extras),
        "bool mask": (q, k, v, bias > 0, none, none, none, none, seed, *rule),
        "packed": (q[:1], k[:1], v[:1], none, slopes, sinks, *ends, seed, *extras),
        "bfloat16": (
            *(t.bfloat16() for t in (q, k, v)),
            bias,
            none,
            sinks,
            none,
            none,
            seed,
            *rule,
        ),
        "no queries": (q[:, :, :0], k, v, none, none, none, none, none, seed, *rule),
        "large": (*normal(3, 1, 4, 1100, 64), *(none,) * 5, seed, *rule),
    }


@pytest.mark.parametrize("name", opcheck_arguments())
def test_opcheck(name: str) -> None:
    """Of what is chosen on this machine: the results have the strides that their fakes promise."""
    arguments = opcheck_arguments()[name]
    if name != "large":
        leaves = [t.requires_grad_() if i < 3 else t for i, t in enumerate(arguments)]
        torch.library.opcheck(torch.ops.pyfast.attention.default, tuple(leaves))
    fixed = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    out, lse = torch.ops.pyfast.attention(*fixed)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in fixed]
        for fake, real in zip(torch.ops.pyfast.attention(*fakes), (out, lse), strict=True):
            assert (fake.shape, fake.stride()) == (real.shape, real.stride())
    with_mask = fixed[3] is not None and fixed[3].is_floating_point()
    backward = normal(*out.shape).to(out.dtype), normal(*lse.shape), *fixed[:8], out, lse
    given = (*backward, *fixed[8:], with_mask, False)
    torch.library.opcheck(torch.ops.pyfast.attention_backward.default, given)


@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", ["plain", "extras", "packed"])
def test_opcheck_of_the_reference(backend: Backend, name: str) -> None:
    torch.library.opcheck(torch.ops.pyfast.attention.default, opcheck_arguments()[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend: Backend, use_reentrant: bool) -> None:
    """The forward pass that is repeated drops the same weights."""
    results = []
    for wrapped in (False, True):
        torch.manual_seed(6)
        q, k, v = (t.clone().requires_grad_() for t in normal(3, 1, 2, 16, 8).to(backend.device))
        function = lambda *t: attention(*t, dropout_p=0.5)  # noqa: E731
        if wrapped:
            out = checkpoint(function, q, k, v, use_reentrant=use_reentrant)
        else:
            out = function(q, k, v)
        out.square().sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for a, b in zip(*results, strict=True):
        assert_bits_equal(a, b)


def test_autocast(backend: Backend) -> None:
    """Computed in bfloat16, as torch does; gradients come back in the dtype of the leaves."""
    device = backend.device
    q, k, v = (t.clone().requires_grad_() for t in normal(3, 1, 2, 16, 8).to(device))
    for mask in (None, normal(16, 16).to(device), normal(16, 16).to(device) > 0):
        with torch.autocast(device.type, torch.bfloat16):
            out = attention(q, k, v, mask)
            torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
            mixed = attention(q.bfloat16(), k, v, mask)
        assert out.dtype == torchs.dtype == mixed.dtype == torch.bfloat16
        torch.testing.assert_close(out, torchs, rtol=0.02, atol=0.02, equal_nan=mask is not None)
        torch.testing.assert_close(mixed, out)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    packed = (t[0].transpose(0, 1) for t in (q, k, v))
    ends = torch.tensor([0, 16], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = pyfast.nn.functional.varlen_attention(*packed, ends, ends, 16, 16)
    assert out.dtype == torch.bfloat16


def test_saves_no_mask(backend: Backend) -> None:
    """For the backward pass: operands, result, lse; nothing of L x S."""
    saved: list[Tensor] = []
    q, k, v = (t.clone().requires_grad_() for t in normal(3, 1, 2, 100, 8).to(backend.device))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(q, k, v, dropout_p=0.5)
    assert sum(t.numel() for t in saved) == 4 * q.numel() + 2 * 100


def test_subclasses_and_modes(backend: Backend) -> None:
    class Named(torch.Tensor):
        pass

    q, k, v = normal(3, 1, 2, 9, 8).to(backend.device)
    wanted = attention(q, k, v)
    named = attention(q.as_subclass(Named), k, v)
    assert type(named) is Named
    assert_bits_equal(named.as_subclass(Tensor), wanted)
    out, _ = attention(q, k, v.as_subclass(Named), return_lse=True)
    assert_bits_equal(out.as_subclass(Tensor), wanted)
    with torch.inference_mode():
        assert_bits_equal(attention(q, k, v), wanted)
    negative = torch._neg_view(-q)
    assert_bits_equal(attention(negative, torch._neg_view(-k), v), wanted)


def test_partial_gradients(backend: Backend) -> None:
    """Of some operands only, and of lse alone."""
    inputs, grads = make(replace(SMALL, mask="float32 bhls", sinks=True), torch.float32)
    case = replace(SMALL, mask="float32 bhls", sinks=True)
    every = inputs.map(lambda t: t.clone().requires_grad_())
    torch.autograd.backward(call(case, every), grads)
    for name in ("q", "k", "v", "mask", "sinks"):
        leaf = getattr(inputs, name).clone().requires_grad_()
        torch.autograd.backward(call(case, inputs._replace(**{name: leaf})), grads)
        assert_bits_equal(leaf.grad, getattr(every, name).grad, name)
    q, other = (inputs.q.clone().requires_grad_() for _ in range(2))
    finite = lambda lse: lse.masked_fill(lse.isinf(), 0).sum()  # noqa: E731
    finite(call(case, inputs._replace(q=q))[1]).backward()
    finite(dense(case, inputs._replace(q=other))[1]).backward()
    torch.testing.assert_close(q.grad, other.grad)
