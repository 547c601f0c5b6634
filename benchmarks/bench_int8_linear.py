"""int8 Linear against torch's Linear in floating point and against the int8 products of others.

As in a model, no call meets the weights of the call before: every row goes round a pool of copies
that do not fit into a cache. The row ``read`` sums the bytes of the int8 weights, which is how fast
they can come: with a few tokens nothing else takes time.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyfast.nn.functional as pyfast_F

from .bench_quantize_int8 import quantize_rows
from .cases import (
    BaseCase,
    Call,
    Prepared,
    first_line,
    normal,
    parametrize,
    run_with_pytest,
)

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

POOL_BYTES = 1 << 28  # of a row's weights; rows together take less than 3 GiB
SMALL, LARGE = (768, 3072), (4096, 4096)  # (in_features, out_features)
W8A8, WEIGHT_ONLY = "W8A8", "weight-only"
_FLOAT, _BFLOAT, _HALF = torch.float32, torch.bfloat16, torch.float16
_DTYPE_ROWS = {"torch bfloat16": _BFLOAT, "torch float32": _FLOAT}


@dataclass(frozen=True)
class LinearCase(BaseCase):
    """``shape`` is (tokens, in_features, out_features), ``name`` W8A8 or weight-only.

    ``torch`` is the Linear of the same dtype. The others: the Linear of other dtypes; ``dynamic``,
    torch's dynamic quantized Linear of the engine onednn, float32 in and out, one scale for all
    tokens; torch's int8 products alone, without what makes a Linear of them; other packages, of
    which bitsandbytes quantizes the input on GPUs alone.
    """

    pool_bytes: int = POOL_BYTES
    optional: ClassVar[tuple[str, ...]] = (
        "dynamic",
        "torch._int_mm",
        "torch._weight_int8pack_mm",
        "torchao",
        "bitsandbytes",
    )

    @property
    def num_elements(self) -> int:
        """Of the weight."""
        return self.shape[1] * self.shape[2]

    @property
    def num_bytes(self) -> int:
        """int8 weights with their scales and biases, input and output."""
        m, k, n = self.shape
        return k * n + 4 * n + (m * (k + n) + n) * self.dtype.itemsize

    @property
    def implementations(self) -> tuple[str, ...]:
        installed = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name)]
        others = [name for name, dtype in _DTYPE_ROWS.items() if dtype != self.dtype]
        if self.name == W8A8:
            others += ["dynamic", "torch._int_mm"]
        else:
            # For other dtypes a scalar loop; it crashes where in_features is no multiple of 16.
            if self.dtype == _BFLOAT and self.shape[1] % 16 == 0:
                others.append("torch._weight_int8pack_mm")
        return ("torch", *others, *installed, "read", "pyfast")

    def prepare(self, device: torch.device) -> PreparedLinear:
        return PreparedLinear(self, device)


class PreparedLinear(Prepared):
    """
    Attributes:
        x: [tokens, in_features], in the dtype of the case. ``bias``: [out_features].
        weight: [out_features, in_features] int8. ``scale``: [out_features] float32.
    """

    def __init__(self, case: LinearCase, device: torch.device) -> None:
        super().__init__(case, device)
        self.case = case
        m, k, n = case.shape
        self.x = normal((m, k), 0).to(device, case.dtype)
        self.bias = normal((n,), 1).to(device, case.dtype)
        weight, scale = quantize_rows(_weight(n, k))
        self.weight, self.scale = weight.to(device), scale.to(device)

    def like(self) -> Tensor:
        return self.x

    def copy_call(self) -> Call:
        """Copies of so many bytes, which do not sit in a cache either."""
        size = max(1, self.case.num_bytes // 2)
        count = _pool_size(self.case.pool_bytes, 2 * size)
        sources = torch.ones(count, size, dtype=torch.int8, device=self.device)
        pairs = zip(torch.zeros_like(sources), sources, strict=True)
        return _take_turns(lambda pair: pair[0].copy_(pair[1]), pairs)

    def call(self, implementation: str) -> Call:
        if implementation in ("torch", *_DTYPE_ROWS):
            return self._float_call(_DTYPE_ROWS.get(implementation, self.case.dtype))
        if implementation in _MODULES:
            return self._module_call(_MODULES[implementation])
        pool = self._pool(self.weight)
        return _take_turns(self._int8_calls()[implementation], pool)

    def _int8_calls(self) -> Mapping[str, Callable[[Tensor], Any]]:
        x, values, scale, bias = self.x, quantize_rows(self.x)[0], self.scale, self.bias
        short = scale.to(self.case.dtype)
        words = self.weight.numel() // 8
        is_weight_only = self.case.name == WEIGHT_ONLY
        return {
            "pyfast": lambda w: pyfast_F.int8_linear(x, w, scale, bias, weight_only=is_weight_only),
            "torch._int_mm": lambda w: torch._int_mm(values, w.t()),
            "torch._weight_int8pack_mm": lambda w: torch._weight_int8pack_mm(x, w, short),
            "read": lambda w: w.view(-1)[: 8 * words].view(torch.int64).sum(),
        }

    def _float_weight(self) -> Tensor:
        return self.weight.float() * self.scale[:, None]

    def _float_call(self, dtype: torch.dtype) -> Call:
        x, bias = self.x.to(dtype), self.bias.to(dtype)
        return _take_turns(
            lambda w: F.linear(x, w, bias), self._pool(self._float_weight().to(dtype))
        )

    def _module_call(self, quantize: Callable[[nn.Linear, LinearCase], nn.Module]) -> Call:
        """Quantized modules. Each is called once, and then has what it makes in its first call."""
        if quantize is _dynamic and self.device.type != "cpu":
            raise NotImplementedError("dynamic: torch has it on the CPU alone")
        _, k, n = self.case.shape
        linear = nn.Linear(k, n, device=self.device).requires_grad_(False)
        linear.weight.copy_(self._float_weight())
        linear.bias.copy_(self.bias)
        x = self.x.float() if quantize is _dynamic else self.x
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = _pool_size(self.case.pool_bytes, self.weight.nbytes)
            modules = [quantize(linear, self.case) for _ in range(count)]
            for module in modules:
                module(x)
        return _take_turns(lambda module: module(x), modules)

    def _pool(self, weight: Tensor) -> list[Tensor]:
        return [weight.clone() for _ in range(_pool_size(self.case.pool_bytes, weight.nbytes))]

    def check(self) -> str:
        """What is wrong with pyfast's result against the formula in float64; empty if nothing."""
        try:
            actual = self._int8_calls()["pyfast"](self.weight)
            exact, rounded = self._formula(torch.float64), self._formula(torch.float32)
        except Exception as error:
            return first_line(error)
        return _difference(actual, exact, rounded, self.case.dtype)

    def _formula(self, dtype: torch.dtype) -> Tensor:
        """With the same int8 values in every dtype; their sums are exact."""
        weight, scale, bias = (t.to(dtype) for t in (self.weight, self.scale, self.bias))
        if self.case.name == WEIGHT_ONLY:
            return (self.x.to(dtype) @ weight.t()) * scale + bias
        values, row_scale = (t.to(self.device) for t in quantize_rows(self.x.cpu()))
        sums = (values.double() @ self.weight.t().double()).to(dtype)
        return sums * row_scale[:, None].to(dtype) * scale + bias


def _difference(actual: Tensor, exact: Tensor, rounded: Tensor, dtype: torch.dtype) -> str:
    """What is wrong: a value is off by more than one rounding to its dtype, and twice the error
    of ``rounded``, the formula in float32. Far less than a step of int8, also in bfloat16."""
    if actual.shape != exact.shape or actual.dtype != dtype:
        expected = f"{tuple(exact.shape)} {dtype}"
        return f"output is {tuple(actual.shape)} {actual.dtype}, not {expected}"
    allowed = 2 * (rounded.double() - exact).abs().max()
    allowed = allowed + torch.finfo(torch.float32).eps * exact.abs().max()
    allowed = allowed + torch.finfo(dtype).eps / 2 * exact.abs()
    error = (actual.double() - exact).abs()
    num_wrong = int((~(error <= allowed)).sum())  # NaN is wrong too
    if num_wrong == 0:
        return ""
    worst = (error - allowed).max().item()
    return f"output: {num_wrong} of {error.numel()} values are wrong, by up to {worst:.2g} too much"


@functools.lru_cache(maxsize=1)
def _weight(n: int, k: int) -> Tensor:
    return normal((n, k), 2) / math.sqrt(k)


def _pool_size(pool_bytes: int, num_bytes: int) -> int:
    return -(-pool_bytes // num_bytes)


def _take_turns(function: Callable[[Any], Any], pool: Iterable[Any]) -> Call:
    """Each call takes the next of the pool."""
    turns = itertools.cycle(list(pool))
    return lambda: function(next(turns))


def _dynamic(linear: nn.Linear, case: LinearCase) -> nn.Module:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})
    finally:
        torch.backends.quantized.engine = before
    module: nn.Module = model[0]
    return module


def _torchao(linear: nn.Linear, case: LinearCase) -> nn.Module:
    package: Any = importlib.import_module("torchao.quantization")
    configs = {
        W8A8: package.Int8DynamicActivationInt8WeightConfig,
        WEIGHT_ONLY: package.Int8WeightOnlyConfig,
    }
    model = copy.deepcopy(nn.Sequential(linear)).to(case.dtype)
    package.quantize_(model, configs[case.name]())
    module: nn.Module = model[0]
    return module


def _bitsandbytes(linear: nn.Linear, case: LinearCase) -> nn.Module:
    package: Any = importlib.import_module("bitsandbytes.nn")
    sizes = linear.in_features, linear.out_features
    module: nn.Module = package.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
    module.load_state_dict(linear.state_dict())
    return module.to(linear.weight.device)


_MODULES: Mapping[str, Callable[[nn.Linear, LinearCase], nn.Module]] = {
    "dynamic": _dynamic,
    "torchao": _torchao,
    "bitsandbytes": _bitsandbytes,
}


# How many times as fast as other rows pyfast should be; everywhere else not below 0.95 of torch.
_FLOORS: Mapping[tuple[str, tuple[int, ...], torch.dtype], Mapping[str, float]] = {
    **{
        (W8A8, (512, *sizes), _BFLOAT): {"torch": 1.9, "torch float32": 4.8, "dynamic": 1.0}
        for sizes in (SMALL, LARGE)
    },
    (W8A8, (16, *LARGE), _BFLOAT): {"torch": 3.5},
    (W8A8, (64, *LARGE), _BFLOAT): {"torch": 2.1},
    (WEIGHT_ONLY, (1, *LARGE), _BFLOAT): {"torch": 2.8, "torch float32": 5.0, "read": 0.8},
    (WEIGHT_ONLY, (1, *LARGE), _FLOAT): {"torch": 5.0, "read": 0.8},
    (WEIGHT_ONLY, (4, *LARGE), _BFLOAT): {"torch": 2.8},
    (WEIGHT_ONLY, (16, *LARGE), _BFLOAT): {"torch": 1.8},
}


def _case(name: str, sizes: tuple[int, int], tokens: int, dtype: torch.dtype) -> LinearCase:
    shape = (tokens, *sizes)
    floors = _FLOORS.get((name, shape, dtype), {"torch": 0.95})
    return LinearCase("int8_linear", name, shape, dtype, flops=_flops, floors=floors)


def _flops(shape: tuple[int, ...]) -> int:
    m, k, n = shape
    return 2 * m * k * n


CASES = [
    *(
        _case(W8A8, sizes, tokens, dtype)
        for sizes in (SMALL, LARGE)
        for dtype in (_BFLOAT, _FLOAT)
        for tokens in (1, 4, 16, 64, 128, 512)
    ),
    *(
        _case(WEIGHT_ONLY, sizes, tokens, dtype)
        for sizes in (SMALL, LARGE)
        for dtype in (_BFLOAT, _FLOAT)
        for tokens in (1, 4, 16, 64, 512)
    ),
    *(_case(W8A8, LARGE, tokens, _HALF) for tokens in (16, 512)),
    *(_case(WEIGHT_ONLY, LARGE, tokens, _HALF) for tokens in (1, 16, 512)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, CASES)


def test_int8_linear(benchmark: BenchmarkFixture, case: BaseCase, implementation: str) -> None:
    run_with_pytest(benchmark, case, implementation)
