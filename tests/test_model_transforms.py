"""The demo's model, patched, under what torch does to whole models: autocast and GradScaler,
activation checkpointing, torch.func, copies and pickles, CUDA graphs."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_compiled_model import (
    CONFIGS,
    assert_same,
    loss_of,
    make_int8_model,
    make_model,
    make_optimizer,
    needs_gpu,
    results,
    tokens,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import pyfast
from pyfast.demo.model import GPT

Params = dict[str, Tensor]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def output_dtypes(model: GPT, x: Tensor) -> list[torch.dtype]:
    """Of the blocks and of the model. (Hooks inside of a block would switch its fused ops off.)"""
    seen = []
    modules = (model.dropout, *model.blocks, model.head, model)
    handles = [m.register_forward_hook(lambda *a: seen.append(a[2].dtype)) for m in modules]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    """The dtypes of torch's model, and no more than twice its error, without dropout."""
    x = tokens(4, 31).to(device)
    exact = make_model(0.0, patched=False).double().to(device)
    ours, torchs = (make_model(0.0, patched).to(device) for patched in (True, False))

    def cast(model: GPT) -> list[Tensor]:
        def loss() -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return loss_of(model, x)

        return results(loss, model)

    with torch.autocast(device, torch.bfloat16):
        dtypes = output_dtypes(ours, x)
        assert dtypes == output_dtypes(torchs, x)
    assert set(dtypes) == {torch.float32, torch.bfloat16}
    expected = results(lambda: loss_of(exact, x), exact)
    for mine, other, wanted in zip(cast(ours), cast(torchs), expected, strict=True):
        assert mine.dtype == other.dtype == torch.float32
        error, allowed = ((t - wanted).norm() / wanted.norm() for t in (mine, other))
        assert error <= 2 * allowed + 1e-4
        assert error < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler(device: str) -> None:
    """Unscaled in the step, or before it to be clipped; a step with Inf is skipped. Both models get
    the gradients of one: bfloat16 would make a rounding of the parameters one of the gradients."""
    models = [make_model(0.0).to(device) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    pyfast.patch_optimizer(optimizers[0])
    scalers = [torch.amp.GradScaler(device, init_scale=2.0**10) for _ in models]
    for step in range(5):
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(models[0], tokens(seed=step).to(device))
        for scaler in scalers:
            scaled = scaler.scale(loss)
        scaled.backward()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.grad = p.grad.clone()
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            before = [p.detach().clone() for p in model.parameters()]
            if step == 2:
                model.head.bias.grad[0] = torch.inf
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, model.parameters(), before)) == (step == 2)
            assert scaler.get_scale() == (2.0**10 if step < 2 else 2.0**9)
            optimizer.zero_grad()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def checkpointed(model: GPT, x: Tensor, **options: Any) -> Tensor:
    """The loss of the model with every block recomputed in the backward pass."""
    length = x.shape[1] - 1
    y = model.dropout(model.bytes(x[:, :-1]) + model.positions.weight[:length])
    for block in model.blocks:
        y = checkpoint(block, y, model.mask[:length, :length], None, True, **options)
    return F.cross_entropy(model.head(model.norm(y)).flatten(0, 1), x[:, 1:].flatten())


def ops_of(function: Callable[[], Any]) -> Counter[str]:
    return Counter(served.op for served in pyfast.explain(function))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """The recomputed masks are those of the forward pass."""
    model, x = make_model(0.3), tokens()
    expected = results(lambda: loss_of(model, x), model)
    call = functools.partial(checkpointed, model, x, use_reentrant=use_reentrant)
    for a, e in zip(results(call, model), expected, strict=True):
        assert torch.equal(a, e)
    unlike = results(lambda: call(preserve_rng_state=False), model)
    with pytest.raises(AssertionError):
        assert_same(unlike, expected)
    assert ops_of(lambda: results(call, model))["attention"] == 2 * len(model.blocks)


def saves(op: Any) -> Callable[..., Any]:
    def policy(ctx: Any, called: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_saved = called is op
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*context_fn.*")
def test_selective_checkpoint(is_compiled: bool) -> None:
    """A policy sees ``torch.ops.pyfast.*``, in eager mode too; what it saves is not run again."""
    model, x = make_model(0.3), tokens()
    expected = results(lambda: loss_of(model, x), model)
    blocks = len(model.blocks)
    for op, runs in ((torch.ops.pyfast.attention.default, 1), (torch.ops.aten.mm.default, 2)):
        call = functools.partial(checkpointed, model, x, use_reentrant=False, context_fn=saves(op))
        if is_compiled:
            torch._dynamo.reset()
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_same(results(call, model), expected)
        counts = ops_of(functools.partial(results, call, model))
        assert counts["attention"] == runs * blocks
        assert counts["attention_backward"] == blocks
        assert counts["dropout_add_norm"] == 2 * blocks


def parameters_of(model: nn.Module) -> Params:
    return {name: p.detach() for name, p in model.named_parameters()}


def functional_loss(model: GPT, params: Params, x: Tensor) -> Tensor:
    logits = functional_call(model, params, (x[..., :-1],))
    return F.cross_entropy(logits.flatten(0, 1), x[..., 1:].flatten())


def test_functional_gradient() -> None:
    model, x = make_model(0.3), tokens()
    loss, *expected = results(lambda: loss_of(model, x), model)
    params = parameters_of(model)
    torch.manual_seed(7)
    grads, value = torch.func.grad_and_value(lambda p: functional_loss(model, p, x))(params)
    assert_same([value, *grads.values()], [loss, *expected])
    doubled = {name: 2 * p for name, p in params.items()}
    assert not torch.allclose(functional_loss(model, doubled, x), value)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_each_sample(training: bool) -> None:
    """``randomness="same"``: every sample has the masks of one seed."""
    model, x = make_model(0.3, layers=1).train(training), tokens()
    params = parameters_of(model)
    sample_gradient = grad(lambda p, sample: functional_loss(model, p, sample[None]))
    torch.manual_seed(7)
    randomness = "same" if training else "error"
    found = vmap(sample_gradient, in_dims=(None, 0), randomness=randomness)(params, x)
    for i, sample in enumerate(x):
        torch.manual_seed(7)
        expected = sample_gradient(params, sample)
        assert_same([found[name][i] for name in params], [expected[name] for name in params])
        if training:
            with pytest.raises(AssertionError):
                torch.manual_seed(8)
                other = sample_gradient(params, sample)
                assert_same([found[name][i] for name in params], [*other.values()])


def test_randomness_of_vmap() -> None:
    model = make_model(0.3).train()
    x = tokens(1).expand(3, -1)

    def rows(randomness: str) -> Tensor:
        torch.manual_seed(7)
        call = vmap(lambda sample: model(sample[None])[0], randomness=randomness)
        return call(x)  # type: ignore[no-any-return]

    same, different = rows("same"), rows("different")
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert all(not torch.allclose(different[i], different[i - 1]) for i in range(3))
    assert torch.equal(different, rows("different"))
    with pytest.raises(RuntimeError, match="randomness error mode"):
        rows("error")


def test_an_ensemble() -> None:
    models = [make_model().eval() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.5)
        params, buffers = stack_module_state(models)  # type: ignore[arg-type]
        x = tokens()[:, :-1]
        base = copy.deepcopy(models[0]).to("meta")
        y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(
            params, {**buffers, "mask": torch.stack([model.mask for model in models])}
        )
        for row, model in zip(y, models, strict=True):
            torch.testing.assert_close(row, model(x))


@pytest.mark.parametrize("training", [False, True])
def test_forward_mode(training: bool) -> None:
    """The derivative along a direction is the gradient times it, with one set of masks."""
    model, x = make_model(0.3, layers=1).train(training), tokens()
    model.double()
    params = parameters_of(model)
    tangents = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(p: Params) -> Tensor:
        return functional_loss(model, p, x)

    torch.manual_seed(7)
    value, derivative = jvp(loss, (params,), (tangents,))
    torch.manual_seed(7)
    grads = grad(loss)(params)
    expected = sum((grads[name] * tangents[name]).sum() for name in params)
    torch.testing.assert_close(derivative, expected)
    torch.manual_seed(7)
    torch.testing.assert_close(value, loss(params))
    assert derivative.abs() > 1e-3


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled, saved])
def test_copies_train_on(copy_of: Callable[[Any], Any]) -> None:
    """A model and its optimizer, copied in the middle of training: both go on alike, apart."""
    model = make_model(0.3)
    optimizer = make_optimizer(model)
    loss_of(model, tokens()).backward()
    optimizer.step()
    optimizer.zero_grad()
    twin, twin_optimizer = copy_of((model, optimizer))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert type(twin_optimizer) is pyfast.optim.AdamW
    losses = []
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        losses.append([])
        for step in range(3):
            torch.manual_seed(step)
            loss = loss_of(m, tokens(seed=step))
            loss.backward()
            o.step()
            o.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(model.parameters()).any()


def weights_alone(model: GPT) -> GPT:
    """Its state_dict through ``torch.load(weights_only=True)``, into a model made anew."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    mode = getattr(model.head, "mode", None)
    fresh = make_eval_model("float32" if mode is None else mode.replace("_", "-"))
    for value in fresh.state_dict().values():
        value.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def make_eval_model(name: str) -> GPT:
    return make_model(layers=1).eval() if name == "float32" else make_int8_model(name)


@pytest.mark.parametrize("name", ["float32", *CONFIGS])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled, saved, weights_alone])
@torch.no_grad()
def test_copies_give_the_same(name: str, copy_of: Callable[[GPT], GPT]) -> None:
    model = make_eval_model(name)
    for p in (model.norm.weight, model.norm.bias):
        p.uniform_(0.5, 2)
    x = tokens()[:, :-1]
    expected = model(x)
    twin = copy_of(model)
    assert torch.equal(twin(x), expected)
    model.norm.bias.add_(1)
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)


@needs_gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_cuda_graph_of_a_training_step(dropout: float) -> None:
    """A replay draws its seeds on the device: other masks every time, gradients as in eager mode
    where there is nothing to draw."""
    model, x = make_model(dropout).cuda(), tokens().cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the Triton kernels
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            loss_of(model, x).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(model, x)
        loss.backward()
    losses = []
    for _ in range(4):
        for p in model.parameters():
            p.grad.zero_()
        graph.replay()
        losses.append(loss.item())
    assert len(set(losses)) == (4 if dropout else 1)
    if not dropout:
        replayed = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
        for a, e in zip(replayed, results(lambda: loss_of(model, x), model), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
