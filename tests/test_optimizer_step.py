"""Every backend of the optimizers' step gives the bits of the reference, whatever the layouts,
dtypes and extras; broken arithmetic does not. Against torch: test_optim.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from pyfast.kernels.optimizer_step import optimizer_step_reference as reference
from torch import Tensor

import pyfast

GUARD = 7.0
CLASSES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"amsgrad": True, "weight_decay": 0.1, "betas": (0.3, 0.4)},
    "SGD": {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.5, "maximize": True},
    "Adamax": {"weight_decay": 0.1},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "ema": {"ema_decay": 0.9},
    "l1": {"l1": 0.1},
    "proximal": {"l1": 0.1, "l1_mode": "decoupled"},
    "float32": {"state_dtype": "float32"},
    "bfloat16": {"state_dtype": "bfloat16"},
    "int8": {"state_dtype": "int8"},
    "master": {"master_weights": True, "ema_decay": 0.5},
    "stochastic": {"stochastic_rounding": True, "seed": 5, "ema_decay": 0.75},
    "zero": {"zero_grads": True},
    "clip": {"max_grad_norm": 1.0},
    "all": {
        "master_weights": True,
        "state_dtype": "int8",
        "ema_decay": 0.5,
        "l1": 0.01,
        "max_grad_norm": 0.1,
        "zero_grads": True,
    },
}
SHAPES: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(300),
    "blocks": lambda: torch.randn(3, 256),
    "transposed": lambda: torch.randn(17, 33).t(),
    "channels_last": lambda: torch.randn(2, 5, 6, 7).to(memory_format=torch.channels_last),
    "misaligned": lambda: torch.randn(600)[1:],
    "gaps": lambda: torch.randn(20, 15)[::2, 1::3],
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.empty(0, 3),
    "one": lambda: torch.randn(1),
    "tail": lambda: torch.randn(4097),
}


def parameter(make: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A leaf with the strides of ``make()``, in memory that is filled with a guard value."""
    values = make()
    size = values.untyped_storage().nbytes() // values.element_size()
    memory = torch.full((size,), GUARD, dtype=dtype, device=device)
    place = (values.shape, values.stride(), values.storage_offset())
    leaf = torch.as_strided(memory, *place)
    return leaf.copy_(values).requires_grad_()


def gradient(p: Tensor, kind: int) -> Tensor:
    """A gradient that may lie in memory in another order than its parameter."""
    values = torch.randn(p.shape).to(p.device, p.dtype)
    if kind % 3 == 1 and p.dim() > 1:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if kind % 3 == 2 and p.dim() > 0 and p.numel():
        return values[:1].expand(p.shape)
    return values


def run(
    name: str, backend: str, dtype: torch.dtype, device: torch.device, steps: int = 3, **extras: Any
) -> dict[str, Tensor]:
    """All memory of parameters, states and gradients after some steps."""
    torch.manual_seed(0)
    params = [parameter(make, dtype, device) for make in SHAPES.values()]
    options = CLASSES[name] | extras
    optimizer = getattr(pyfast.optim, name)(params, lr=0.01, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(p, i + step)
            if extras.get("zero_grads"):
                p.grad = p.grad.clone()
        with pyfast.use_backend(backend):
            optimizer.step()
    found = {}
    for kind, p in zip(SHAPES, params, strict=True):
        flat = p.detach()
        size = flat.untyped_storage().nbytes() // flat.element_size()
        found[f"{kind} parameter"] = torch.as_strided(flat, (size,), (1,), 0)
        assert p.grad is not None
        found[f"{kind} gradient"] = p.grad
        found |= {f"{kind} {key}": value for key, value in optimizer.state[p].items()}
    return found


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in a bit, but for the sign of NaN."""
    assert actual.keys() == expected.keys()
    wrong = []
    for name, tensor in actual.items():
        other = expected[name].to(tensor.device)
        assert tensor.dtype == other.dtype, name
        same = (tensor == other) | (tensor.isnan() & other.isnan())
        if not bool(same.all()):
            wrong.append(name)
    return wrong


def skip_unsupported(backend: Backend, dtype: torch.dtype, extras: dict[str, Any]) -> None:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    if dtype == torch.float64 and extras.get("state_dtype") in ("int8", "bfloat16"):
        pytest.skip("float64 parameters have float64 states")
    if dtype == torch.float16 and extras.get("stochastic_rounding"):
        pytest.skip("float16 is not rounded stochastically")


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.backends("cpu", "cuda", "triton")
def test_matches_reference(backend: Backend, name: str, dtype: torch.dtype, extras: str) -> None:
    """To the bit: float32 arithmetic is the same everywhere, and so are roundings and codes."""
    skip_unsupported(backend, dtype, EXTRAS[extras])
    device = backend.device
    actual = run(name, backend.name, dtype, device, **EXTRAS[extras])
    expected = run(name, "reference", dtype, torch.device("cpu"), **EXTRAS[extras])
    if "max_grad_norm" in EXTRAS[extras]:  # the norm is summed in another order
        close(actual, expected)
    else:
        assert not differences(actual, expected)


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "Adam, decay": ("Adam", {"weight_decay": 0.1}),
    "amsgrad": ("AdamW", {"amsgrad": True}),
    "other lerp": ("AdamW", {"betas": (0.3, 0.9)}),
    "SGD": ("SGD", {"weight_decay": 0.1}),
    "momentum": ("SGD", {"momentum": 0.9, "dampening": 0.25}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "RMSprop": ("RMSprop", {"weight_decay": 0.1}),
    "RMSprop, momentum": ("RMSprop", {"momentum": 0.5}),
    "centered": ("RMSprop", {"centered": True}),
    "Adamax": ("Adamax", {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("gradients", ["read", "zeroed", "unscaled"])
@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.backends("cpu", "cuda", "triton")
def test_plain_tensors_match_reference(
    backend: Backend, case: str, dtype: torch.dtype, state_dtype: str | None, gradients: str
) -> None:
    """Dense and aligned, of which CUDA has kernels of their own: on both sides of an item, of what
    a block does at once, and of 16 bytes."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    name, options = PLAIN[case]
    if gradients == "unscaled" and name in ("RMSprop", "Adamax"):
        pytest.skip(f"{name} has no fused, which unscales")
    options = options | ({} if state_dtype is None else {"state_dtype": state_dtype})
    if gradients != "read":
        options |= {"zero_grads": True} if gradients == "zeroed" else {"fused": True}

    def stepped(backend: str, device: torch.device) -> dict[str, Tensor]:
        torch.manual_seed(0)
        sizes = (1, 4, 8, 1031, 2048, 4096, 4099, 8200)
        params = [torch.randn(n).to(device, dtype).requires_grad_() for n in sizes]
        optimizer = getattr(pyfast.optim, name)(params, lr=0.01, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape).to(device, dtype)
            if gradients == "unscaled":
                optimizer.found_inf = torch.tensor(0.0, device=device)
                optimizer.grad_scale = torch.tensor(4.0, device=device)
            with pyfast.use_backend(backend):
                optimizer.step()
        found = {}
        for p in params:
            assert p.grad is not None
            found |= {f"{p.numel()} parameter": p.detach(), f"{p.numel()} gradient": p.grad}
            found |= {f"{p.numel()} {key}": value for key, value in optimizer.state[p].items()}
        return found

    actual = stepped(backend.name, backend.device)
    expected = stepped("reference", torch.device("cpu"))
    assert not differences(actual, expected)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name, options", [*CLASSES.items(), ("RMSprop", {"alpha": 1.5})])
@pytest.mark.backends("cpu", "cuda", "triton")
def test_int8_states_of_values_that_are_not_finite(
    backend: Backend, name: str, options: dict[str, Any], value: float
) -> None:
    """The same bytes, whatever bits a processor gives to NaN, and in the other blocks as ever.
    An alpha above 1, which torch allows, makes squares negative."""

    def states(backend: str, device: torch.device, value: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        p = torch.randn(1000).to(device).requires_grad_()
        optimizer = getattr(pyfast.optim, name)([p], lr=0.01, state_dtype="int8", **options)
        for step in range(3):
            p.grad = torch.randn(1000).to(device)
            if step == 1:
                p.grad[300:302] = value
            with pyfast.use_backend(backend):
                optimizer.step()
        found = {key: state for key, state in optimizer.state[p].items() if key != "step"}
        return found | {"parameter": p.detach()}

    actual = states(backend.name, backend.device, value)
    expected = states("reference", torch.device("cpu"), value)
    assert not differences(actual, expected)
    usual = states("reference", torch.device("cpu"), 0.0)
    others = torch.arange(1000) // 256 != 1
    for key, tensor in actual.items():
        size = 256 if key.endswith("scale") else 1
        assert not differences({key: tensor[others[::size]]}, {key: usual[key][others[::size]]})


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in actual.items():
        if tensor.dtype in (torch.uint8, torch.int16):
            continue
        finfo = torch.finfo(tensor.dtype)
        tolerance = {"rtol": 8 * finfo.eps, "atol": 8 * finfo.eps}
        if any(value.dtype == torch.uint8 for value in actual.values()):
            tolerance = {"rtol": 0.15, "atol": 1e-3}  # a code may fall on the other side
        torch.testing.assert_close(tensor.cpu(), expected[name].cpu(), **tolerance, msg=name)


@pytest.mark.parametrize("extras", ["none", "ema", "l1", "proximal", "clip", "zero"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.backends("cpu", "cuda")
def test_matches_reference_in_float64(backend: Backend, name: str, extras: str) -> None:
    actual = run(name, backend.name, torch.float64, backend.device, **EXTRAS[extras])
    expected = run(name, "reference", torch.float64, torch.device("cpu"), **EXTRAS[extras])
    for key, tensor in actual.items():
        torch.testing.assert_close(tensor.cpu(), expected[key], rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.backends("cpu", "cuda", "triton")
@pytest.mark.parametrize("defect", ["decay", "states", "dither", "rounding", "remainder", "tail"])
def test_mutants_are_found(backend: Backend, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails where the reference is another."""
    broken = {
        "decay": ("_blend", lambda a, b, w: a + (b - a) * (w * 1.0001), {}),
        "states": ("_sqrt", lambda x: x.sqrt() * (1 + 2e-7), {}),
        "dither": ("is_signed_state", lambda rule, i: i == 1, EXTRAS["int8"]),
        "rounding": ("stochastic_bfloat16", lambda x, key: x.bfloat16(), EXTRAS["stochastic"]),
        "remainder": (
            "split_master",
            lambda x: (x.bfloat16(), torch.zeros_like(x, dtype=torch.int16)),
            EXTRAS["master"],
        ),
        "tail": ("BLOCK_SIZE", 128, EXTRAS["int8"]),
    }
    name, value, extras = broken[defect]
    dtype = torch.bfloat16 if defect in ("rounding", "remainder") else torch.float32
    actual = run("AdamW", backend.name, dtype, backend.device, **extras)
    monkeypatch.setattr(reference, name, value)
    try:
        expected = run("AdamW", "reference", dtype, torch.device("cpu"), **extras)
    except (RuntimeError, ValueError):
        return  # the broken one does not even run
    assert differences(actual, expected)


@pytest.mark.backends("cpu", "cuda", "triton")
def test_not_finite(backend: Backend) -> None:
    """NaN and Inf in a gradient reach the parameter, also through int8 states."""
    for state_dtype in (None, "int8"):
        p = torch.ones(300, device=backend.device).requires_grad_()
        optimizer = pyfast.optim.AdamW([p], state_dtype=state_dtype)
        p.grad = torch.ones(300, device=backend.device)
        p.grad[5], p.grad[299] = float("nan"), float("inf")
        with pyfast.use_backend(backend.name):
            optimizer.step()
            assert p[5].isnan() and p[299].isnan()
            p.grad = torch.ones(300, device=backend.device)
            optimizer.step()
        assert p[5].isnan() and p[299].isnan()
        assert p[0].isfinite() or state_dtype == "int8"


@pytest.mark.backends("cpu", "cuda", "triton")
def test_square_sum(backend: Backend) -> None:
    with pyfast.use_backend(backend.name):
        for dtype in backend.dtypes:
            grads = [make().to(backend.device, dtype) for make in SHAPES.values()]
            exact = sum(float(g.double().square().sum()) for g in grads)
            found = pyfast.ops.optimizer_step.square_sum(grads)
            assert found.dtype == torch.float64
            assert float(found) == pytest.approx(exact, rel=1e-13)


@pytest.mark.backends("cpu", "cuda")
def test_step_counts_on_the_device(backend: Backend) -> None:
    """As with fused=True and capturable=True on a GPU: counted, or not where Inf was found."""
    params = [torch.ones(5, device=backend.device).requires_grad_() for _ in range(3)]
    optimizer = pyfast.optim.AdamW(params, fused=True)
    for found_inf in (0.0, 1.0, 0.0):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.found_inf = torch.tensor(found_inf, device=backend.device)
        optimizer.grad_scale = torch.tensor(4.0, device=backend.device)
        with pyfast.use_backend(backend.name):
            optimizer.step()
    for p in params:
        assert optimizer.state[p]["step"].item() == 2
        assert p.grad is not None and torch.equal(p.grad, torch.full_like(p, 0.25))


def test_int8_codes_are_unbiased() -> None:
    """Every float32 between two codes is rounded to either, with the right mean."""
    for is_signed in (True, False):
        x = torch.rand(256).mul(-20).exp2()
        x[0] = 1
        if is_signed:
            x[1::2] *= -1
        mean = torch.zeros(256, dtype=torch.float64)
        salts = torch.randint(1 << 32, (4000,)).tolist()
        for salt in salts:
            codes, scale = reference.encode_int8(x, is_signed, salt)
            mean += reference.decode_int8(codes, scale, is_signed).double() / len(salts)
        # A step is an eighth of an octave; of a mean of 4000, five standard errors.
        error = (mean - x).abs()
        allowed = 5 * (x.abs() / 8 + 2.0**-18) * 0.5 / len(salts) ** 0.5
        assert bool((error <= allowed).all())
