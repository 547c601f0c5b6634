"""``cross_entropy`` against the formula in float64, and torch for what the kernel does not do."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F
from conftest import Backend
from oracle import nan_memory, normal
from torch import Tensor, nn

import pyfast

F = pyfast.nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_kernel = pytest.mark.backends("cpu")
SHAPES = ((1, 1), (5, 7), (9, 130), (16, 16), (33, 1027), (3, 9000), (70, 64), (0, 5))


def rows(n: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits, and classes of which every third row has none."""
    x = (normal(n, c) * 3).to(dtype)
    target = torch.arange(n) * 7919 % c
    target[1::3] = -100
    return x, target


def formula(x: Tensor, target: Tensor, smoothing: float, ignore_index: int = -100) -> Tensor:
    """The losses of the rows, in float64."""
    x = x.double()
    used = target != ignore_index
    log_p = x - x.logsumexp(1, keepdim=True)
    picked = log_p.gather(1, target.where(used, 0)[:, None])[:, 0]
    loss = -(1 - smoothing) * picked - smoothing * log_p.mean(1)
    return loss.where(used, 0.0)


def reduced(losses: Tensor, target: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.sum() / (target != -100).sum()
    return losses.sum() if reduction == "sum" else losses


def check(function: Any, dtype: torch.dtype, shapes: Any = SHAPES) -> None:
    """Loss in float32, gradient in the dtype: a few roundings of float32, one to the dtype."""
    for n, c in shapes:
        x, target = rows(n, c, dtype)
        for smoothing in (0.0, 0.1):
            for reduction in ("mean", "sum", "none"):
                mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
                expected = reduced(formula(exact, target, smoothing), target, reduction)
                grad = normal(*expected.shape, 1)[..., 0] + 2
                with nan_memory():
                    loss = function(
                        mine,
                        target,
                        label_smoothing=smoothing,
                        reduction=reduction,
                        dtype=torch.float32,
                    )
                    loss.backward(grad)
                expected.backward(grad.double())
                message = f"{(n, c)} {dtype} {smoothing} {reduction}"
                assert loss.dtype == torch.float32 and mine.grad is not None
                torch.testing.assert_close(
                    loss.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=message
                )
                assert exact.grad is not None and mine.grad.dtype == dtype
                finfo = torch.finfo(dtype)
                allowed = finfo.eps * 0.51 * exact.grad.abs() + finfo.tiny * finfo.eps
                allowed += 2e-6 * grad.abs().max() if grad.numel() else 0.0
                error = (mine.grad.double() - exact.grad).abs()
                assert (error <= allowed)[~exact.grad.isnan()].all(), message


@on_kernel
@each_dtype
def test_matches_the_formula(backend: Backend, dtype: torch.dtype) -> None:
    check(F.cross_entropy, dtype)
    x, target = rows(9, 130, dtype)
    (served,) = pyfast.explain("cross_entropy", x, target)
    assert served.backend == "cpu"


MUTANTS = {
    "ignored rows count": lambda x, t, **o: (
        F.cross_entropy(x, t, **{**o, "reduction": "sum"}) / len(t)
        if o["reduction"] == "mean"
        else F.cross_entropy(x, t, **o)
    ),
    "smoothing left out": lambda x, t, **o: F.cross_entropy(x, t, **{**o, "label_smoothing": 0.0}),
    "last class left out": lambda x, t, **o: F.cross_entropy(
        torch.cat([x[:, :-1], x[:, -1:] - 30], 1), t, **o
    ),
    "gradient doubled": lambda x, t, **o: F.cross_entropy(2 * x - x.detach(), t, **o),
}


@pytest.mark.parametrize("name", MUTANTS)
@on_kernel
def test_the_check_rejects(backend: Backend, name: str) -> None:
    with pytest.raises(AssertionError):
        check(MUTANTS[name], torch.float32, ((9, 130),))


@on_kernel
@each_dtype
def test_extreme_rows(backend: Backend, dtype: torch.dtype) -> None:
    """Large logits, -Inf as a mask, and NaN and Inf, which reach their own row alone."""
    inf, nan = float("inf"), float("nan")
    x, target = normal(8, 70).to(dtype), torch.arange(8)
    x[1, 5], x[2, 5], x[3], x[4, 4] = nan, inf, -inf, -inf
    x[5], x[6], x[7, 10:] = torch.finfo(dtype).max / 2, -3e4, -inf
    loss = F.cross_entropy(x, target, reduction="none", dtype=torch.float32)
    expected = torch_F.cross_entropy(x.double(), target, reduction="none").float()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert loss.isnan().tolist() == [False, True, True, True, *[False] * 4]
    x = x[[0, 4, 7]].requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(x, target[[0, 3, 7]], reduction="sum"), x)
    assert (grad[:, :3].double().abs() <= 1).all() and (grad[2, 10:] == 0).all()


@on_kernel
def test_layouts(backend: Backend) -> None:
    x, target = rows(10, 40)
    expected = F.cross_entropy(x, target)
    strided = torch.empty(40, 20)[:, ::2].t()
    strided.copy_(x)
    wide = torch.zeros(20, dtype=torch.int64)
    wide[::2] = target
    for a, b in ((strided, target), (x, wide[::2]), (torch._neg_view(-x), target)):
        torch.testing.assert_close(F.cross_entropy(a, b), expected)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(leaf.t().contiguous().t(), target).backward()
    other = x.clone().requires_grad_()
    F.cross_entropy(other, target).backward()
    assert torch.equal(leaf.grad, other.grad)  # type: ignore[arg-type]


@on_kernel
def test_threads_agree(backend: Backend) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, target = rows(50, 9001)
        x.requires_grad_()
        loss = F.cross_entropy(x, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        results.append((loss.detach(), grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@on_kernel
def test_second_derivatives(backend: Backend) -> None:
    x, target = rows(4, 6)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: F.cross_entropy(t, target), x)
    y = x.detach().float().requires_grad_()

    def hessian_times_one(loss: Any, leaf: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss(leaf, target), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
        return second

    ours, theirs = (
        hessian_times_one(F.cross_entropy, y),
        hessian_times_one(torch_F.cross_entropy, y),
    )
    torch.testing.assert_close(ours, theirs)
    assert theirs.abs().max() > 1e-3


@on_kernel
def test_dtype_of_the_loss(backend: Backend) -> None:
    x, target = rows(9, 20, torch.bfloat16)
    assert F.cross_entropy(x, target).dtype == torch.bfloat16
    assert F.cross_entropy(x, target, dtype=torch.float32).dtype == torch.float32
    assert F.cross_entropy(x.double(), target, dtype=torch.float32).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cross_entropy(x, target).dtype == torch.float32


def test_few_logits_are_torchs() -> None:
    native = pyfast._backend.native
    if native is None:
        pytest.skip(pyfast._backend.native_error)
    for n, backend in ((1, "torch"), (127, "torch"), (128, "cpu")):
        (served,) = pyfast.explain("cross_entropy", *rows(n, 1024))
        assert served.backend == backend


@on_kernel
def test_everything_else_is_torchs(backend: Backend) -> None:
    x, target = rows(6, 9)
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, target.clamp(min=0), torch.rand(9)), {}),
        ((x, x.softmax(1)), {"label_smoothing": 0.2}),
        ((x.view(2, 9, 3), torch.ones(2, 3, dtype=torch.int64)), {"reduction": "sum"}),
        ((x[0], torch.tensor(3)), {}),
        ((x.double(), target), {"ignore_index": 3}),
        ((x, target), {"size_average": False}),
        ((x, target), {"reduce": False}),
    ]
    for arguments, options in cases:
        arguments = tuple(a.where(a != -100, 0) if a.dtype == torch.int64 else a for a in arguments)
        ours = F.cross_entropy(*arguments, **options)
        theirs = torch_F.cross_entropy(*arguments, **options)
        torch.testing.assert_close(ours, theirs)
    compiled = torch.compile(F.cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), torch_F.cross_entropy(x, target))
    per_row = torch.func.vmap(F.cross_entropy)(x[:, None], target[:, None].clamp(min=0))
    assert per_row.shape == (6,)
    _, tangent = torch.func.jvp(lambda t: F.cross_entropy(t, target), (x,), (x,))
    assert tangent.isfinite()
    assert F.cross_entropy(x.to("meta"), target.to("meta")).is_meta


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((normal(3, 4), torch.tensor([0, 4, 1])), {}),
        ((normal(3, 4), torch.tensor([0, -1, 1])), {}),
        ((normal(3, 4), torch.tensor([0, 1])), {}),
        ((normal(3, 4), torch.tensor([0, 1, 2])), {"reduction": "average"}),
        ((normal(3, 4), torch.tensor([0, 1, 2])), {"label_smoothing": 1.5}),
        ((normal(3, 4), torch.tensor([0, 1, 2], dtype=torch.int32)), {}),
    ],
)
@on_kernel
def test_errors_are_torchs(backend: Backend, arguments: Any, options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as torchs:
        torch_F.cross_entropy(*arguments, **options)
    with pytest.raises(type(torchs.value)) as ours:
        F.cross_entropy(*arguments, **options)
    assert str(ours.value) == str(torchs.value)


def test_native_refuses() -> None:
    native = pyfast._backend.native
    if native is None:
        pytest.skip(pyfast._backend.native_error)
    x, target = normal(3, 4), torch.tensor([0, 1, 2])
    loss = torch.full((3,), 7.0)
    for bad in (
        (x.double(), target, loss, loss),
        (x.t(), target, loss, loss),
        (x, target.int(), loss, loss),
        (x, target[:2], loss, loss),
        (x, target, loss[:2], loss),
        (x, target, loss, loss.double()),
    ):
        with pytest.raises(ValueError, match="cross_entropy"):
            native.cross_entropy(*bad, -100, 0.0, 1)
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        native.cross_entropy(x, torch.tensor([0, 1, 9]), loss, loss, -100, 0.0, 1)
    assert (loss == 7).all()


def test_module_and_patch() -> None:
    theirs = nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1)
    ours = pyfast.nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1)
    x, target = normal(5, 9), torch.tensor([0, 2, 4, 8, 1])
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    assert repr(ours) == repr(theirs) and pickle.loads(pickle.dumps(ours)).ignore_index == 2
    report = pyfast.patch(theirs)
    assert type(theirs) is pyfast.nn.CrossEntropyLoss
    report.undo()
    assert type(theirs) is nn.CrossEntropyLoss


@on_kernel
def test_loss_of_transformers(backend: Backend) -> None:
    """The same loss and gradients as before, in bfloat16 too, and undone."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=300,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.arange(60).view(2, 30)
    labels = tokens.clone()
    labels[0, :9] = -100

    def step(**options: Any) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=labels, **options).loss
        loss.backward()
        return loss.detach(), model.lm_head.weight.grad.clone()

    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model.to(dtype)
        original = model.loss_function
        for options in ({}, {"num_items_in_batch": torch.tensor(40)}, {"num_items_in_batch": 40}):
            loss, grad = step(**options)
            dry = pyfast.patch(model, dry_run=True)
            assert dry.losses == [model] and model.loss_function is original
            report = pyfast.patch(model)
            assert "the loss of LlamaForCausalLM is" in str(report)
            served = pyfast.explain(model, input_ids=tokens, labels=labels)
            assert [s.backend for s in served if s.op == "cross_entropy"] == ["cpu"]
            new_loss, new_grad = step(**options)
            report.undo()
            assert model.loss_function is original
            assert new_loss.dtype == loss.dtype == torch.float32
            torch.testing.assert_close(new_loss, loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                new_grad, grad, rtol=rtol, atol=rtol * float(grad.abs().max())
            )
