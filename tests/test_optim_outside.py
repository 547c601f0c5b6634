"""What others do to parameters, gradients and states between steps: nothing of it may crash or be
silently wrong."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor

import pyfast
import pyfast.optim as optim


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int = 1) -> None:
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()


def test_float64_after_int8_states() -> None:
    """model.double() leaves states behind that the kernel cannot take: codes of one byte."""
    p = torch.ones(3000).requires_grad_()
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9, state_dtype="int8")
    train(optimizer, [p])
    p.data = p.data.double()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"momentum_buffer .* does not fit"):
        optimizer.step()


def test_int8_states_of_a_centered_checkpoint() -> None:
    p = torch.ones(1000).requires_grad_()
    other = torch.optim.RMSprop([p], centered=True)
    train(other, [p])
    optimizer = optim.RMSprop([p], state_dtype="int8")
    optimizer.load_state_dict(other.state_dict())
    before = p.detach().clone()
    with pytest.raises(ValueError, match="int8"):
        train(optimizer, [p])
    assert torch.equal(p, before)


def test_states_replaced_by_another_thread() -> None:
    """What a step works on stays alive until it is done."""
    params = [torch.ones(1 << 18).requires_grad_() for _ in range(4)]
    optimizer = optim.AdamW(params)
    train(optimizer, params)
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for p in params:
                optimizer.state[p]["exp_avg"] = torch.zeros(1 << 18)

    thread = threading.Thread(target=replace)
    thread.start()
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        optimizer.step()
    stop.set()
    thread.join()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("change", ["mul", "clamp", "zero", "inf"])
def test_master_weights_changed_from_outside(backend: Backend, change: str) -> None:
    p = torch.randn(4000, device=backend.device).bfloat16().requires_grad_()
    optimizer = optim.AdamW([p], lr=0.01, master_weights=True)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        with torch.no_grad():
            if change == "mul":
                p.mul_(torch.rand(4000, device=p.device) < 0.5)
            elif change == "clamp":
                p.clamp_(min=0)
            else:
                p[::7] = 0.0 if change == "zero" else float("inf")
    assert not p.isnan().any()


def test_gradient_with_shared_memory_is_not_written(backend: Backend) -> None:
    p = torch.ones(1000, device=backend.device).requires_grad_()
    optimizer = optim.SGD([p], lr=1.0, zero_grads=True)
    p.grad = torch.ones(1, device=backend.device).expand(1000)
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        optim.clip_grad_norm_([p], 1.0)


class Weight(torch.nn.Parameter):
    pass


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adamax"])
def test_scaler_with_what_torch_steps(name: str) -> None:
    """Of a subclass of Parameter, GradScaler unscales the gradients itself."""
    results = []
    for library in (torch.optim, optim):
        p = Weight(torch.ones(5))
        optimizer = getattr(library, name)([p], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((p * p).sum()).backward()
        scaler.step(optimizer)
        assert p.grad is not None
        results.append((p.detach(), p.grad))
    torch.testing.assert_close(results[0], results[1])


def test_clip_grad_norm_of_float64() -> None:
    for scale in (1.0, 1e100):
        p = torch.ones(100, dtype=torch.float64).requires_grad_()
        p.grad = torch.randn(100, dtype=torch.float64) * scale
        expected = p.grad / p.grad.norm()
        optim.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(p.grad, expected, rtol=1e-6 / scale + 1e-12, atol=1e-12)


def test_groups_that_name_the_norm() -> None:
    p, q = torch.ones(3).requires_grad_(), torch.ones(3).requires_grad_()
    optim.AdamW([{"params": [p], "max_grad_norm": 1.0}, {"params": [q]}], max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm must be that of the whole optimizer"):
        optim.AdamW([{"params": [p], "max_grad_norm": 2.0}], max_grad_norm=1.0)


def test_average_between_forward_and_backward() -> None:
    """Parameters are read, not changed: the graph stays valid."""
    p = torch.ones(3).requires_grad_()
    average = optim.EMA([p])
    loss = (p * p).sum()
    average.update()
    loss.backward()
    assert p.grad is not None and torch.equal(p.grad, torch.full((3,), 2.0))


def test_checkpoint_with_wrong_extras() -> None:
    """Refused before anything is taken over."""
    p = torch.ones(3).requires_grad_()
    optimizer = optim.AdamW([p], lr=0.5)
    state_dict = optim.AdamW([p], lr=0.1).state_dict()
    state_dict["param_groups"][0]["max_grad_norm"] = -5
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_step_count_of_another_dtype() -> None:
    p = torch.ones(3).requires_grad_()
    other = torch.optim.AdamW([p])
    train(other, [p], 2)
    state_dict = other.state_dict()
    state_dict["state"][0]["step"] = torch.tensor(2)
    optimizer = optim.AdamW([p])
    optimizer.load_state_dict(state_dict)
    train(optimizer, [p])
    assert optimizer.state[p]["step"].item() == 3


@pytest.mark.parametrize("kind", ["complex64", "float64 states"])
def test_parameters_of_several_kinds_are_stepped_together_or_not_at_all(kind: str) -> None:
    """Complex parameters are torch's, and come first: a state that does not fit stops them too."""
    p = torch.ones(40, dtype=torch.complex64).requires_grad_()
    q, r = (torch.ones(40).requires_grad_() for _ in range(2))
    optimizer = optim.AdamW([p, q, r], lr=0.1)
    train(optimizer, [p, q, r])
    if kind == "complex64":
        optimizer.state[r]["exp_avg"] = torch.zeros(3)
    else:
        del optimizer.state[q]["exp_avg_sq"]  # made anew, and gone again after the error
        optimizer.state[r]["exp_avg_sq"] = torch.zeros(41)
    before = [x.detach().clone() for x in (p, q, r)]
    counts = [optimizer.state[x]["step"].item() for x in (p, q, r)]
    keys = [list(optimizer.state[x]) for x in (p, q, r)]
    for x in (p, q, r):
        x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.step()
    for x, value, count, names in zip((p, q, r), before, counts, keys, strict=True):
        assert torch.equal(x, value)
        assert optimizer.state[x]["step"].item() == count
        assert list(optimizer.state[x]) == names


@pytest.mark.parametrize("stride", [1, 2], ids=["same elements", "interleaved"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_parameters_that_share_memory(name: str, stride: int) -> None:
    """One after the other, as torch's for-loop does, however many threads there are."""

    def trained(package: Any) -> Tensor:
        torch.manual_seed(0)
        memory = torch.randn(stride * 300_000)
        params = [memory[i % stride :: stride].requires_grad_() for i in range(4)]
        arguments = {"foreach": False} if package is torch.optim else {}
        optimizer = getattr(package, name)(params, lr=0.1, **arguments)
        train(optimizer, params, 3)
        return memory

    with torch.no_grad():
        expected = trained(torch.optim)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for _ in range(3):
                torch.testing.assert_close(trained(optim), expected, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


def test_parameters_that_come_to_share_memory() -> None:
    p, q = (torch.zeros(100_000).requires_grad_() for _ in range(2))
    optimizer = optim.SGD([p, q], lr=1.0)
    train(optimizer, [p, q])
    p.data = q.data
    q.data.zero_()
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert torch.equal(q, torch.full_like(q, -2.0))


@pytest.mark.parametrize("what", ["parameter", "state"])
def test_memory_with_the_other_sign(what: str) -> None:
    """As that of z.conj().imag: memory does not show the values."""
    p = torch.zeros(5).requires_grad_()
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5)
    p.grad = torch.ones(5)
    optimizer.step()
    negated = torch.full((5,), 3.0j).conj().imag  # -3
    if what == "parameter":
        p.data = negated
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((5,), -4.5))
    else:
        optimizer.state[p]["momentum_buffer"] = negated
        before = p.detach().clone()
        with pytest.raises(ValueError, match=r"momentum_buffer .* does not fit"):
            optimizer.step()
        assert torch.equal(p, before)


def test_inference_tensors_are_refused_unchanged() -> None:
    with torch.inference_mode():
        frozen = torch.ones(4)
    q = torch.ones(4).requires_grad_()
    optimizer = optim.AdamW([q], lr=0.1)
    q.grad = torch.ones(4)
    optimizer.param_groups[0]["params"].append(frozen)
    frozen.grad = None
    with torch.inference_mode():
        frozen.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="nference"):
        optimizer.step()
    assert torch.equal(q, torch.ones(4)) and torch.equal(frozen, torch.ones(4))
    assert not optimizer.state


@pytest.mark.parametrize("written", ["zeroed", "unscaled"])
@pytest.mark.backends("cpu", "cuda", "triton", "reference")
def test_a_written_gradient_of_two_parameters(backend: Backend, written: str) -> None:
    p, q = (torch.zeros(5, device=backend.device).requires_grad_() for _ in range(2))
    p.grad = q.grad = torch.full((5,), 16.0, device=backend.device)
    optimizer = optim.SGD([p, q], lr=1.0, zero_grads=written == "zeroed")
    if written == "unscaled":
        optimizer.grad_scale = torch.tensor(4.0, device=backend.device)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=backend.device)  # type: ignore[attr-defined]
    with pyfast.use_backend(backend.name), pytest.raises(RuntimeError, match="the same one"):
        optimizer.step()
    assert torch.equal(p, torch.zeros_like(p)) and torch.equal(q, torch.zeros_like(q))
    assert p.grad is not None and torch.equal(p.grad, torch.full_like(p, 16.0))


def test_a_gradient_of_two_parameters_is_clipped_once() -> None:
    p, q = (torch.zeros(8).requires_grad_() for _ in range(2))
    p.grad = q.grad = torch.ones(8)
    assert float(optim.clip_grad_norm_([p, q], 2.0)) == 4.0
    torch.testing.assert_close(p.grad, torch.full((8,), 0.5))


def test_an_incomplete_int8_state() -> None:
    p = torch.ones(300).requires_grad_()
    optimizer = optim.AdamW([p], lr=0.1, state_dtype="int8")
    train(optimizer, [p])
    del optimizer.state[p]["exp_avg_scale"]
    train(optimizer, [p])
    assert optimizer.state[p]["exp_avg_scale"].shape == (2,)


def test_gradients_without_memory_and_params_in_a_tuple() -> None:
    p = torch.ones(4).requires_grad_()
    optimizer = optim.SGD([p], lr=0.1, weight_decay=1.0)
    p.grad = torch._efficientzerotensor(4)
    optimizer.param_groups[0]["params"] = (p,)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9))


def test_copies_of_everything_that_an_optimizer_has() -> None:
    p = torch.ones(4).requires_grad_()
    optimizer = optim.SGD([p], lr=0.1)
    train(optimizer, [p])
    assert set(copy.deepcopy(vars(optimizer))) == set(vars(optimizer))
    assert set(pickle.loads(pickle.dumps(vars(optimizer)))) == set(vars(optimizer))


def test_a_refused_step_leaves_the_norm() -> None:
    p = torch.ones(4).requires_grad_()
    optimizer = optim.AdamW([p], max_grad_norm=1.0)
    train(optimizer, [p])
    norm = optimizer.grad_norm
    optimizer.state[p]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="does not fit"):
        train(optimizer, [p])
    assert norm is not None and optimizer.grad_norm is norm
