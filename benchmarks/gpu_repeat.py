"""Every op on a GPU, many times with the same inputs: each result must equal the first to the bit.

``python benchmarks/gpu_repeat.py REPEATS [cuda]``; with ``cuda`` only the CUDA C++ kernels, which
is what a sanitizer should see.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pyfast

F = pyfast.nn.functional


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda").requires_grad_()


def _with_gradients(function: Callable[[], Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    out = function()
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _step() -> list[Tensor]:
    """Two steps of AdamW over parameters of many sizes, from the same start."""
    generator = torch.Generator("cuda").manual_seed(1)
    new = functools.partial(torch.randn, device="cuda", generator=generator)
    parameters = [new(n).requires_grad_() for n in (1, 7, 1000, 4099, 70000)]
    for parameter in parameters:
        parameter.grad = new(parameter.shape)
    optimizer = pyfast.optim.AdamW(parameters, 1e-2)
    for _ in range(2):
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def calls() -> dict[str, Callable[[], list[Tensor]]]:
    """By "backend op": the op with its gradients."""
    x, residual = _normal(70, 1000), _normal(70, 1000)
    weight = _normal(1000, dtype=torch.float32)
    bias_row = _normal(1000)
    q, k, v = _normal(2, 8, 300, 64), _normal(2, 2, 333, 64), _normal(2, 2, 333, 64)
    bias = _normal(1, 8, 300, 333)
    found: dict[str, Callable[[], list[Tensor]]] = {}
    for backend in ("cuda", "triton"):
        found[f"{backend} dropout"] = lambda: _with_gradients(
            lambda: F.dropout(x, 0.1, seed=3), [x]
        )
        found[f"{backend} dropout_add_norm"] = lambda: _with_gradients(
            lambda: F.dropout_add_norm(x, residual, weight, p=0.1, norm="rms", seed=3),
            [x, residual, weight],
        )
        found[f"{backend} bias_dropout_add"] = lambda: _with_gradients(
            lambda: F.bias_dropout_add(x, bias_row, residual, 0.1, seed=3), [x, bias_row, residual]
        )
        found[f"{backend} quantize_int8"] = lambda: list(F.quantize_int8(x.detach()))
        found[f"{backend} optimizer_step"] = _step
    int8 = torch.randint(-127, 128, (500, 1000), dtype=torch.int8, device="cuda")
    scale = torch.rand(500, device="cuda")
    found["triton int8_linear W8A8"] = lambda: [F.int8_linear(x.detach(), int8, scale)]
    found["triton int8_linear weight-only"] = lambda: [
        F.int8_linear(x.detach(), int8, scale, weight_only=True)
    ]
    found["triton attention"] = lambda: _with_gradients(
        lambda: F.scaled_dot_product_attention(
            q, k, v, bias, 0.1, True, enable_gqa=True, softcap=20.0, seed=3
        ),
        [q, k, v, bias],
    )
    return found


def main(repeats: int, only: str) -> None:
    torch.manual_seed(0)
    for name, call in calls().items():
        backend = name.split()[0]
        if only not in name:
            continue
        with pyfast.use_backend(backend):
            first = call()
            for i in range(repeats):
                for a, b in zip(first, call(), strict=True):
                    if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                        raise SystemExit(f"{name}: repeat {i} differs from the first call")
        print(f"{name}: {repeats} repeats are equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
