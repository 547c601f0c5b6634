"""Calls the Triton ops twice, with a driver that compiles for sm_90 and launches nothing, and
prints where what a plan launched differs from what Triton itself did."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches: list[tuple[Any, ...]] = []


class Utilities:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.kernel = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        launches.append((self.kernel, (x, y, z), *rest[5:]))


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def described(argument: Any, inputs: Sequence[Tensor]) -> str:
    """A tensor by which input it is, or else by its kind; a seed by its type."""
    if not isinstance(argument, Tensor):
        is_seed = isinstance(argument, int) and argument >= 1 << 40
        return "a seed" if is_seed else f"{type(argument).__name__} {argument}"
    place = next((i for i, t in enumerate(inputs) if t.data_ptr() == argument.data_ptr()), None)
    kind = f"{tuple(argument.shape)} {argument.stride()} {argument.dtype}"
    return f"new {kind}" if place is None else f"input {place} {kind}"


def run(function: Callable[..., Any], *inputs: Tensor) -> list[list[str]]:
    launches.clear()
    function(*inputs)
    return [
        [kernel, str(grid), *(described(argument, inputs) for argument in arguments)]
        for kernel, grid, *arguments in launches
    ]


def main() -> None:
    driver.set_active(Driver())
    from pyfast.kernels.attention.attention_backward_triton import attention_backward_triton
    from pyfast.kernels.attention.attention_triton import (
        attention_triton,
        attention_with_kv_cache_triton,
    )
    from pyfast.kernels.common.launch_triton import Plans
    from pyfast.kernels.int8_linear.int8_linear_triton import int8_linear_triton, int8_mm_triton
    from pyfast.kernels.quantize_int8.quantize_int8_triton import quantize_int8_triton

    def half(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    def int8(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8)

    seeds = iter(range(1 << 50, 1 << 51))
    rule = (6554, 0.25, 0.0, -1, -1, False)

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
        attention_triton(q, k, v, mask, None, None, None, None, next(seeds), *rule)

    def backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Tensor) -> None:
        grad, grad_lse, out, lse = rest
        vectors = (None,) * 4
        attention_backward_triton(
            grad, grad_lse, q, k, v, mask, *vectors, out, lse, next(seeds), *rule, True
        )

    def decode(*tensors: Tensor) -> None:
        attention_with_kv_cache_triton(*tensors, None, None, 0, 0.25, 0.0, -1, 0)

    def linear(x: Tensor, weight: Tensor, scale: Tensor, weight_only: bool) -> None:
        options = (None, None, None, weight_only, "gelu", torch.bfloat16)
        int8_linear_triton(x, weight, scale, *options)

    operands = lambda: [half(2, 4, 48, 16), half(2, 2, 80, 16), half(2, 2, 80, 16)]  # noqa: E731
    cases: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]]]] = {
        "forward": (forward, lambda: [*operands(), torch.rand(2, 1, 1, 80) > 0.5]),
        "backward": (
            backward,
            lambda: [
                *operands(),
                half(1, 4, 1, 80),
                half(2, 4, 48, 16),
                torch.randn(2, 4, 48),
                half(2, 4, 48, 16),
                torch.randn(2, 4, 48),
            ],
        ),
        "decode": (
            decode,
            lambda: [
                half(2, 8, 1, 16),
                int8(2, 2, 512, 16),
                int8(2, 2, 512, 16),
                torch.rand(2, 2, 512),
                torch.rand(2, 2, 512),
                torch.tensor([500, 300]),
            ],
        ),
        "W8A8": (
            lambda *t: linear(*t, False),
            lambda: [half(3, 512), int8(64, 512), torch.rand(64)],
        ),
        "weight-only": (
            lambda *t: linear(*t, True),
            lambda: [half(40, 512), int8(64, 512), torch.rand(64)],
        ),
        "int8_mm": (int8_mm_triton, lambda: [int8(5, 64), int8(64, 32)]),
        "quantize": (
            lambda x: quantize_int8_triton(x, None, None, 40000, False),
            lambda: [half(2, 40000)],
        ),
    }
    found, keep, counted = {}, Plans.keep, []

    def counting(self: Plans, *arguments: Any) -> None:
        counted.append(len(self._plans))
        keep(self, *arguments)

    Plans.keep = counting  # type: ignore[method-assign]
    for name, (function, make) in cases.items():
        first = run(function, *make())
        num_plans = len(counted)
        second = run(function, *make())
        found[name] = {
            "kernels": [launch[0] for launch in first],
            "plans": num_plans,
            "plans of the repeated call": len(counted) - num_plans,
            "differences": [
                (a, b)
                for one, other in zip(first, second, strict=True)
                for a, b in zip(one, other, strict=True)
                if a != b
            ],
        }
        counted.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
