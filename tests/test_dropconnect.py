"""DropConnect against plain torch with a masked weight. test_dropout.py holds the op beneath."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import Backend
from oracle import assert_bits_equal, drop_scale, keep_mask, normal
from torch import Tensor

import pyfast

F = pyfast.nn.functional
BATCHES: dict[str, tuple[int, ...]] = {
    "vector": (),
    "matrix": (5,),
    "batch": (2, 3),
    "one row": (1,),
    "no rows": (0,),
}


def masked(weight: Tensor, p: float, seed: int, stream: int = 2) -> Tensor:
    mask = keep_mask(tuple(weight.shape), p, seed, stream).to(weight.device)
    return torch.where(mask, weight * drop_scale(p), 0.0)


def leaves(*batch: int, dtype: torch.dtype = torch.float32, device: object = "cpu") -> list[Tensor]:
    """(input, weight, bias) for 9 features in and 17 out."""
    shapes = ((*batch, 9), (17, 9), (17,))
    return [normal(*s).to(device, dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bias", [True, False])
def test_matches_torch(backend: Backend, batch: str, bias: bool) -> None:
    for dtype in backend.exact_dtypes:
        x, weight, b = leaves(*BATCHES[batch], dtype=dtype, device=backend.device)
        b = b if bias else None
        for p in (0.3, 1.0):
            y = F.dropconnect_linear(x, weight, b, p, seed=7)
            assert_bits_equal(y, torch_functional.linear(x, masked(weight, p, 7), b))


def test_comparison_rejects_mutants() -> None:
    """No mask, that of the transposed weight, of another stream or seed, or no scale."""
    x, weight, bias = leaves(5)
    y = F.dropconnect_linear(x, weight, bias, 0.3, seed=7)
    for wrong in (
        weight,
        masked(weight.t(), 0.3, 7).t(),
        masked(weight, 0.3, 7, stream=1),
        masked(weight, 0.3, 7) * (1 - 0.3),
        masked(weight, 0.3, 8),
    ):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(y, torch_functional.linear(x, wrong, bias))


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients(backend: Backend, batch: str) -> None:
    x, weight, bias = leaves(*BATCHES[batch], device=backend.device)
    grad = torch.randn(*BATCHES[batch], 17, device=backend.device)
    ours = torch.autograd.grad(
        F.dropconnect_linear(x, weight, bias, 0.3, seed=7), (x, weight, bias), grad
    )
    expected = torch.autograd.grad(
        torch_functional.linear(x, masked(weight, 0.3, 7), bias), (x, weight, bias), grad
    )
    torch.testing.assert_close(ours, expected)
    assert ((ours[1] == 0) | keep_mask((17, 9), 0.3, 7, 2).to(backend.device)).all()


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(needed: tuple[int, ...]) -> None:
    inputs = [t.detach().requires_grad_(i in needed) for i, t in enumerate(leaves(2, 3))]
    F.dropconnect_linear(*inputs, 0.3, seed=7).square().sum().backward()
    plain = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    weight = masked(plain[1], 0.3, 7)
    torch_functional.linear(plain[0], weight, plain[2]).square().sum().backward()
    for ours, theirs in zip(inputs, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_strided_inputs_and_gradients(backend: Backend) -> None:
    x = normal(9, 3, 4).to(backend.device).permute(2, 1, 0).requires_grad_()
    weight = normal(9, 34).to(backend.device).t()[::2].requires_grad_()
    y = F.dropconnect_linear(x, weight, None, 0.3, seed=7)
    expected = torch_functional.linear(x, masked(weight, 0.3, 7))
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y.sum(), (x, weight))  # an expanded gradient
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), (x, weight)))


@pytest.mark.backends("reference", "cpu", "cuda")
def test_gradcheck(backend: Backend) -> None:
    inputs = leaves(2, 2, dtype=torch.float64, device=backend.device)

    def function(*inputs: Tensor) -> Tensor:
        return F.dropconnect_linear(*inputs, 0.4, seed=6)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_saves_no_masked_weight(backend: Backend) -> None:
    saved: list[Tensor] = []
    x, weight, bias = leaves(5, device=backend.device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.dropconnect_linear(x, weight, bias)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}
        saved.clear()
        F.dropconnect_linear(x, weight, bias, seed=torch.tensor(5))
    assert sorted(t.nbytes for t in saved) == sorted([x.nbytes, weight.nbytes, 8])


def test_identity_is_linear() -> None:
    x, weight, bias = leaves(5)
    before = torch.get_rng_state()
    expected = torch_functional.linear(x, weight, bias)
    assert_bits_equal(F.dropconnect_linear(x, weight, bias, 0.5, False), expected)
    assert_bits_equal(F.dropconnect_linear(x, weight, bias, 0.0), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropped_infinities_are_zero(backend: Backend) -> None:
    weight = torch.full((17, 9), float("inf"), device=backend.device)
    x = torch.ones(5, 9, device=backend.device)
    assert not F.dropconnect_linear(x, weight, None, 1.0).any()


def test_draws_one_seed_a_call(backend: Backend) -> None:
    x, weight, bias = leaves(5, device=backend.device)
    torch.manual_seed(3)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    y = F.dropconnect_linear(x, weight, bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert_bits_equal(y, F.dropconnect_linear(x, weight, bias, seed=seed))
    assert not torch.equal(y, F.dropconnect_linear(x, weight, bias))
    generator = torch.Generator().manual_seed(3)
    assert_bits_equal(F.dropconnect_linear(x, weight, bias, generator=generator), y)


def test_rejects_arguments() -> None:
    x, weight, bias = leaves(5)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="has to be between 0 and 1"):
            F.dropconnect_linear(x, weight, bias, p)
        with pytest.raises(ValueError, match="has to be between 0 and 1"):
            pyfast.nn.DropConnect(9, 17, p=p)
    with pytest.raises(ValueError, match=r"weight must be \(out_features, in_features\)"):
        F.dropconnect_linear(x, bias)
    with pytest.raises(TypeError, match="dropconnect_linear: seed must be"):
        F.dropconnect_linear(x, weight, seed=1.0)
    for mistake in ((x[:, 1:], weight, bias), (x.double(), weight, bias), (x, weight, bias[1:])):
        with pytest.raises(RuntimeError) as theirs:
            torch_functional.linear(*mistake)
        with pytest.raises(RuntimeError) as ours:
            F.dropconnect_linear(*mistake)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.backends("reference", "cpu")
def test_autocast(backend: Backend) -> None:
    x, weight, bias = leaves(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.dropconnect_linear(x, weight, bias, 0.3, seed=7)
        expected = torch_functional.linear(x, masked(weight.bfloat16(), 0.3, 7), bias)
    assert_bits_equal(y, expected)
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_module() -> None:
    module = pyfast.nn.DropConnect(9, 17, p=0.3, seed=7)
    twin = torch.nn.Linear(9, 17)
    assert isinstance(module, torch.nn.Linear)
    assert repr(module) == "DropConnect(in_features=9, out_features=17, bias=True, p=0.3)"
    assert module.load_state_dict(twin.state_dict()) and twin.load_state_dict(module.state_dict())
    x = normal(5, 9)
    expected = torch_functional.linear(x, masked(twin.weight, 0.3, 7), twin.bias)
    assert_bits_equal(module(x), expected)
    assert_bits_equal(copy.deepcopy(module)(x), expected)
    assert_bits_equal(module.eval()(x), twin(x))
    plain = pyfast.nn.DropConnect(9, 17, False, 0.5, "meta", torch.bfloat16)
    assert plain.bias is None and plain.weight.is_meta and plain.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    inputs = [t.detach().requires_grad_(requires_grad) for t in leaves(2, 3)]
    torch.library.opcheck(torch.ops.pyfast.dropconnect_linear, (*inputs, torch.tensor(5), 19661))


def test_compiles_fullgraph() -> None:
    x, weight, bias = leaves(5)
    torch._dynamo.reset()
    compiled = torch.compile(F.dropconnect_linear, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    y, later = compiled(x, weight, bias, 0.3), compiled(x, weight, bias, 0.3)
    torch.manual_seed(4)
    expected = F.dropconnect_linear(x, weight, bias, 0.3)
    torch.testing.assert_close(y, expected)
    assert not torch.equal(y, later)
    ours = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    theirs = torch.autograd.grad(expected.square().sum(), (x, weight, bias))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sizes", [(3, 0, 4), (3, 4, 0), (0, 4, 5)], ids=str)
def test_empty_dimensions(sizes: tuple[int, int, int]) -> None:
    rows, in_features, out_features = sizes
    shapes = ((rows, in_features), (out_features, in_features), (out_features,))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y = pyfast.nn.functional.dropconnect_linear(*tensors, p=0.5)
    y.sum().backward()
    assert y.shape == (rows, out_features)
    assert [t.grad.shape for t in tensors] == [t.shape for t in tensors]
    assert torch.equal(tensors[2].grad, torch.full((out_features,), float(rows)))
