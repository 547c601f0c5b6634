"""torch.compile of whole training steps: the demo's model, patched, with pyfast's optimizer. Graphs
without breaks, one for all steps and lengths, with the masks and gradients of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyfast
from pyfast.demo.model import GPT
from pyfast.quantization import Int8DynamicActivationInt8Weight, Int8WeightOnly, quantize_

CONTEXT = 32
CONFIGS = {"weight-only": Int8WeightOnly, "dynamic": Int8DynamicActivationInt8Weight}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_model(dropout: float = 0.1, patched: bool = True, layers: int = 2) -> GPT:
    torch.manual_seed(0)
    model = GPT(layers=layers, width=32, heads=2, context=CONTEXT, dropout=dropout)
    if patched:
        pyfast.patch(model)
    return model


def make_int8_model(config: str) -> GPT:
    model = make_model(layers=1).eval()
    quantize_(model, CONFIGS[config]())
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return pyfast.patch_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))


def tokens(batch: int = 3, length: int = 16, seed: int = 0) -> Tensor:
    """One more than ``length``: inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, length + 1), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    logits = model(x[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


def results(loss: Callable[[], Tensor], model: nn.Module, seed: int = 7) -> list[Tensor]:
    """The loss with the masks of a seed, and the gradients of all parameters."""
    model.zero_grad()
    torch.manual_seed(seed)
    value = loss()
    value.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None for grad in grads)
    return [value.detach(), *(grad.clone() for grad in grads if grad is not None)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Up to rounding: compilers fuse and reorder float32 sums."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def compiled(
    function: Callable[..., Any], compiler: str = "aot_eager", **options: Any
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """One graph, and a counter of how often it was compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_loss_and_gradients_equal_eager(compiler: str) -> None:
    model, x = make_model(layers=1), tokens()
    call, counter = compiled(loss_of, compiler)
    expected = results(lambda: loss_of(model, x), model)
    other = results(lambda: loss_of(model, x), model, seed=8)
    # Without the probe that compiles a program for each instruction set.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        assert_same(results(lambda: call(model, x), model), expected)
        with pytest.raises(AssertionError):
            assert_same(results(lambda: call(model, x), model), other)
        assert_same(results(lambda: call(model, x), model, seed=8), other)
    assert counter.frame_count == 1


def test_every_step_has_masks_of_its_own() -> None:
    model, x = make_model(layers=1), tokens()
    call, counter = compiled(loss_of)
    with torch.no_grad():
        losses = [call(model, x).item() for _ in range(4)]
        assert len(set(losses)) == 4
        again = [(torch.manual_seed(0), call(model, x).item())[1] for _ in range(2)]
    assert len(set(again)) == 1 and counter.frame_count == 1


def test_two_dropouts_of_a_graph_differ() -> None:
    """Compilers merge equal expressions; draws must not be among them."""
    dropout = pyfast.nn.Dropout(0.5)
    call, _ = compiled(lambda x: (dropout(x), dropout(x)))
    first, second = call(torch.ones(4096))
    assert not torch.equal(first, second)


def test_training_compiles_once() -> None:
    """Steps change parameters in place, which no guard may mind."""
    ours, eager = make_model(), make_model()
    optimizers = [make_optimizer(model) for model in (ours, eager)]
    call, counter = compiled(loss_of)
    losses: list[list[float]] = [[], []]
    for step in range(5):
        x = tokens(seed=step)
        for i, loss in enumerate((call, loss_of)):
            torch.manual_seed(step)
            value = loss((ours, eager)[i], x)
            value.backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            losses[i].append(value.item())
    assert counter.frame_count == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    # Updates of AdamW are of the size of the learning rate, whatever that of the gradient is.
    for p, q in zip(ours.parameters(), eager.parameters(), strict=True):
        assert ((p - q).abs() > 1e-4).float().mean() < 0.01


def test_lengths_and_batches_share_a_graph() -> None:
    """The first shape is compiled as it is, the next one for all. No op may look at sizes."""
    model = make_model(layers=1)
    call, counter = compiled(loss_of)
    for batch, length in ((3, 16), (2, 9), (4, 31), (3, 16)):
        x = tokens(batch, length)
        expected = results(lambda x=x: loss_of(model, x), model)
        assert_same(results(lambda x=x: call(model, x), model), expected)
    assert counter.frame_count == 2


def norm(x: Tensor, residual: Tensor) -> Tensor:
    return pyfast.nn.functional.dropout_add_norm(x, residual, None, p=0.3, norm="rms")


DYNAMIC = {
    "dropconnect_linear": lambda x: pyfast.nn.functional.dropconnect_linear(x, x[0, :4], p=0.3),
    "bias_dropout_add": lambda x: pyfast.nn.functional.bias_dropout_add(x, x[0, 0], x, 0.3),
    "dropout_add_norm": lambda x: norm(x, x.sin()),
    "attention": lambda x: pyfast.nn.functional.scaled_dot_product_attention(
        *(x[:, None, None],) * 3, x @ x.mT, dropout_p=0.3
    ),
    "quantize_int8": lambda x: x * pyfast.nn.functional.fake_quantize(x, granularity="channel"),
}


@pytest.mark.parametrize("op", DYNAMIC)
def test_ops_do_not_look_at_sizes(op: str) -> None:
    """``torch.Size.numel`` does: it makes constants of symbols."""
    call, counter = compiled(DYNAMIC[op], dynamic=True)
    counts = []
    for batch, length in ((3, 7), (5, 11), (9, 6)):
        x = torch.randn(batch, length, 8, requires_grad=True)
        grads = []
        for function in (call, DYNAMIC[op]):
            torch.manual_seed(1)
            grads += torch.autograd.grad(function(x).square().sum(), x)
        assert_same(grads[:1], grads[1:])
        counts.append(counter.frame_count)
    # The first call may restart: p is a symbol at first.
    assert counts[0] == counts[-1]


def test_training_and_evaluation_are_two_graphs() -> None:
    model, x = make_model(layers=1), tokens()
    call, counter = compiled(loss_of)
    for _ in range(2):
        call(model.train(), x)
        with torch.no_grad():
            torch.testing.assert_close(call(model.eval(), x), loss_of(model, x))
    assert counter.frame_count == 2


def test_int8_model() -> None:
    """Weight-only models are among those of test_exported_model.py."""
    model = make_int8_model("dynamic")
    call, counter = compiled(model, dynamic=True)
    counts = []
    with torch.no_grad():
        for batch, length in ((3, 16), (4, 31)):
            x = tokens(batch, length)[:, :-1]
            torch.testing.assert_close(call(x), model(x))
            assert not torch.allclose(call(x), make_model(layers=1).eval()(x), atol=1e-6)
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1]  # the first call may restart: p is a symbol at first


def test_autocast_in_the_graph() -> None:
    model, x = make_model(layers=1), tokens()

    def loss(model: GPT, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, x)

    call, counter = compiled(loss)
    expected = results(lambda: loss(model, x), model)
    for a, e in zip(results(lambda: call(model, x), model), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2**-6, atol=2**-6 * float(e.abs().max()))
    assert counter.frame_count == 1


def make_step(optimizer: torch.optim.Optimizer) -> Callable[[GPT, Tensor], Tensor]:
    def step(model: GPT, x: Tensor) -> Tensor:
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def test_the_optimizer_breaks_the_graph() -> None:
    """It runs eagerly, in compiled code too: a step is one call of one kernel. ``fullgraph=True``
    says so; without, the graph ends before it."""
    losses: list[list[float]] = []
    counts = []
    for is_compiled in (True, False):
        model = make_model(layers=1)
        step = make_step(make_optimizer(model))
        if is_compiled:
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            step = torch.compile(step, backend=counter)
        losses.append([])
        for i in range(4):
            torch.manual_seed(i)
            losses[-1].append(step(model, tokens(seed=i)).item())
            counts.append(counter.frame_count)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(counts)) == 1
    model = make_model(layers=1)
    loss_of(model, tokens()).backward()
    optimizer = make_optimizer(model)
    call, _ = compiled(lambda: optimizer.step())
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"function `?\w*\.step"):
        call()
    assert not optimizer.state


@needs_gpu
def test_cuda_graphs_of_compiled_code() -> None:
    """``mode="reduce-overhead"`` replays one recording; every replay must draw anew."""
    model, x = make_model().cuda(), tokens().cuda()
    torch._dynamo.reset()
    call = torch.compile(loss_of, fullgraph=True, mode="reduce-overhead")
    losses = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        loss = call(model, x)
        loss.backward()
        losses.append(loss.item())
        model.zero_grad()
    assert len(set(losses)) == 6
    with torch.no_grad():
        torch.testing.assert_close(call(model.eval(), x), loss_of(model, x), rtol=1e-3, atol=1e-3)
