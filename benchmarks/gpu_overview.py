"""Every op on an NVIDIA GPU in a minute: ``python -m pyfast.benchmarks.gpu_overview --out FILE``.

A row has the time of a call, and that of a call in a CUDA graph: of its kernels alone. The rows of
attention, of optimizers and those with a backward pass (f+b) have no graph. Nothing is checked
here: that is what the tests are for. ``--dry-run`` goes through everything on the CPU with tiny
shapes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyfast
import pyfast.nn.functional as F

from .cases import GRAPH_CALLS, graphed, time_block

Call = Callable[[], Any]
HALF = torch.bfloat16
CACHE_BYTES = 1 << 28  # of weights that take turns: more than a cache holds
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Overview:
    """
    Attributes:
        rows: {"name", "bytes", "flops", "eager_us", "graph_us", "refused"}, of which the last three
            are by implementation. ``bytes`` and ``flops``: what a call must move and compute.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_dry = device == "cpu"
        self.rows: list[dict[str, Any]] = []

    def size(self, n: int) -> int:
        return min(n, 32) if self.is_dry else n

    def normal(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, device=self.device, dtype=torch.int8)

    def time_us(self, call: Call, num_calls: int) -> float:
        if self.is_dry:
            call()
            return 0.0
        return 1e6 * time_block(call, num_calls, torch.device(self.device), False) / num_calls

    def median_us(self, call: Call, calls_at_once: int = 1) -> float:
        for _ in range(3):
            call()
        num_calls = int(1e4 / max(self.time_us(call, 3), 1))
        num_calls = max(3, min(200, num_calls))
        return statistics.median(self.time_us(call, num_calls) for _ in range(5)) / calls_at_once

    def add(
        self,
        name: str,
        calls: Mapping[str, Call],
        num_bytes: int = 0,
        flops: float = 0,
        with_graph: bool = True,
    ) -> None:
        row: dict[str, Any] = {"name": name, "bytes": num_bytes, "flops": flops}
        row |= {"eager_us": {}, "graph_us": {}, "refused": {}}
        for label, call in calls.items():
            try:
                row["eager_us"][label] = self.median_us(call)
                if with_graph and not self.is_dry:
                    row["graph_us"][label] = self.median_us(graphed(call), GRAPH_CALLS)
            except RuntimeError as error:
                if label == "pyfast":
                    raise
                row["refused"][label] = str(error).splitlines()[0][:200]
        times = (f"{k} {v:.1f}" for k, v in row["eager_us"].items())
        in_graph = (f"{k} {v:.1f}" for k, v in row["graph_us"].items())
        print(
            f"{name:44} {', '.join(times)} us; in a graph {', '.join(in_graph) or '-'}", flush=True
        )
        self.rows.append(row)


def with_gradients(function: Call, leaves: Sequence[Tensor], grad: Tensor) -> Call:
    return lambda: torch.autograd.grad(function(), leaves, grad)


def taking_turns(make: Callable[[], Tensor], num_bytes: int) -> Callable[[], Tensor]:
    turns = itertools.cycle([make() for _ in range(max(1, min(64, CACHE_BYTES // num_bytes)))])
    return lambda: next(turns)


def ceilings(view: Overview) -> None:
    n = view.size(1 << 30)
    source, target = (torch.empty(n, dtype=torch.uint8, device=view.device) for _ in range(2))
    view.add("copy of 1 GiB", {"torch": lambda: target.copy_(source)}, 2 * n)
    n = view.size(8192)
    a = view.normal(n, n)
    view.add("product of 8192 x 8192 bfloat16", {"torch": lambda: a @ a}, flops=2 * n**3)


def dropouts(view: Overview) -> None:
    both: dict[str, Any] = {"pyfast": F.dropout, "torch": torch_F.dropout}
    for n in map(view.size, (1 << 10, 1 << 16, 1 << 24)):
        x, leaf = view.normal(n), view.normal(n).requires_grad_()
        calls: dict[str, Call] = {k: functools.partial(f, x, 0.1) for k, f in both.items()}
        view.add(f"dropout {n}", calls, 4 * n)
        forwards = {k: functools.partial(f, leaf, 0.1) for k, f in both.items()}
        calls = {k: with_gradients(f, [leaf], x) for k, f in forwards.items()}
        view.add(f"dropout forward+backward {n}", calls, 8 * n, with_graph=False)


def norms(view: Overview) -> None:
    for m, n in ((8, 1024), (4096, 768), (16384, 1024), (16384, 4096), (4096, 16384)):
        norms_of(view, view.size(m), view.size(n), f"{m}x{n}")


def norms_of(view: Overview, m: int, n: int, where: str) -> None:
    x, residual, weight, bias = leaves = [
        view.normal(*shape).requires_grad_() for shape in ((m, n), (m, n), (n,), (n,))
    ]
    fused: dict[str, Call] = {
        "pyfast": functools.partial(F.dropout_add_norm, x, residual, weight, bias, 0.1),
        "torch": lambda: torch_F.layer_norm(torch_F.dropout(x, 0.1) + residual, (n,), weight, bias),
    }
    rms: dict[str, Call] = {
        "pyfast": functools.partial(F.dropout_add_norm, x, None, weight, None, 0.0, norm="rms"),
        "torch": functools.partial(torch_F.rms_norm, x, (n,), weight),
    }
    added: dict[str, Call] = {
        "pyfast": functools.partial(F.bias_dropout_add, x, bias, residual, 0.1),
        "torch": lambda: torch_F.dropout(x + bias, 0.1) + residual,
    }
    with torch.no_grad():
        view.add(f"dropout_add_norm {where}", fused, 6 * m * n)
        view.add(f"rms {where}", rms, 4 * m * n)
        view.add(f"bias_dropout_add {where}", added, 6 * m * n)
        view.add(f"quantize_int8 {where}", {"pyfast": lambda: F.quantize_int8(x)}, 3 * m * n)
    grad = view.normal(m, n)
    steps = {k: with_gradients(f, leaves, grad) for k, f in fused.items()}
    view.add(f"dropout_add_norm f+b {where}", steps, 16 * m * n, with_graph=False)
    steps = {k: with_gradients(f, [x, weight], grad) for k, f in rms.items()}
    view.add(f"rms f+b {where}", steps, 10 * m * n, with_graph=False)


def products(view: Overview) -> None:
    for k, n in ((768, 3072), (4096, 4096), (4096, 16384)):
        for m in (1, 4, 16, 64, 256, 512, 4096):
            products_of(view, view.size(m), view.size(k), view.size(n), f"{m}x{k}x{n}")


def products_of(view: Overview, m: int, k: int, n: int, where: str) -> None:
    x, bias, values = view.normal(m, k), view.normal(n), view.int8(m, k)
    scale = torch.rand(n, device=view.device)
    weight = taking_turns(functools.partial(view.int8, n, k), n * k)
    wide = taking_turns(functools.partial(view.normal, n, k), 2 * n * k)
    rivals: dict[str, Call] = {
        "torch": lambda: torch_F.linear(x, wide(), bias),
        "torch._int_mm": lambda: torch._int_mm(values, weight().t()),
    }
    calls: dict[str, Call] = {
        "W8A8": lambda: F.int8_linear(x, weight(), scale, bias),
        "weight-only": lambda: F.int8_linear(x, weight(), scale, bias, weight_only=True),
        "int8_mm": lambda: F.int8_mm(values, weight().t()),
    }
    for name, call in calls.items():
        others = rivals if name == "W8A8" else {}
        view.add(f"{name} {where}", {"pyfast": call, **others}, n * k, 2 * m * n * k)


def optimizers(view: Overview) -> None:
    cases = (
        ([(4096, 4096)] * 8, torch.float32),
        ([(4096, 4096)] * 8, HALF),
        ([(256, 256)] * 400, torch.float32),
        ([(1024,)] * 100 + [(1024, 1024)] * 50, HALF),
    )
    for shapes, dtype in cases:
        for name, options, states in (("AdamW", {}, 2), ("SGD", {"momentum": 0.9}, 1)):

            def step(
                package: Any, shapes: Any, dtype: torch.dtype, name: str, options: Any
            ) -> Call:
                parameters = [
                    view.normal(*map(view.size, shape), dtype=dtype).requires_grad_()
                    for shape in shapes
                ]
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                made: Call = getattr(package, name)(parameters, 1e-3, **options).step
                return made

            setting = shapes, dtype, name, options
            total = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
            calls = {
                "pyfast": step(pyfast.optim, *setting),
                "torch": step(torch.optim, *setting[:3], {**options, "fused": True}),
            }
            where = f"{name} {len(shapes)} tensors to {shapes[-1]} {dtype}"
            view.add(where, calls, (3 + 2 * states) * total, with_graph=False)


def attention(view: Overview) -> None:
    def forced(context: Any, call: Call) -> Call:
        def run() -> Any:
            with context():
                return call()

        return run

    ours = functools.partial(pyfast.use_backend, "reference" if view.is_dry else "triton")
    for batch, heads, length, size in ((4, 16, 4096, 128), (4, 32, 4096, 64), (16, 12, 512, 64)):
        length = view.size(length)
        shape = batch, length, heads, size
        q, k, v = (view.normal(*shape).transpose(1, 2).requires_grad_() for _ in range(3))
        grad = view.normal(*shape).transpose(1, 2)
        for p, causal in itertools.product((0.0, 0.1), (False, True)):
            flops = 4 * batch * heads * length**2 * size / (1 + causal)
            options: dict[str, Any] = {"dropout_p": p, "is_causal": causal}
            mine, theirs = (
                functools.partial(f, q, k, v, **options)
                for f in (F.scaled_dot_product_attention, torch_F.scaled_dot_product_attention)
            )
            name = f"{batch}x{heads}x{length}x{size}{' causal' * causal}{' dropout' * (p > 0)}"
            for passes, factor in (("forward", 1.0), ("f+b", 3.5)):
                calls = {"pyfast": forced(ours, mine)}
                if not view.is_dry:
                    for label, backend in BACKENDS.items():
                        context = functools.partial(sdpa_kernel, backend)
                        calls[label] = forced(context, theirs)
                if passes == "f+b":
                    leaves = [q, k, v]
                    calls = {n: with_gradients(c, leaves, grad) for n, c in calls.items()}
                view.add(f"attention {passes} {name}", calls, 0, factor * flops, False)


def decoding(view: Overview) -> None:
    for batch, heads, key_heads, keys, size in ((16, 32, 8, 8192, 128), (8, 32, 8, 2000, 64)):
        keys = view.size(keys)
        q = view.normal(batch, heads, 1, size)
        k, v = (view.normal(batch, key_heads, keys, size) for _ in range(2))
        lengths = torch.full((batch,), keys, device=view.device)
        calls: dict[str, Call] = {
            "pyfast": functools.partial(F.attention_with_kv_cache, q, k, v, cache_seqlens=lengths),
            "torch": functools.partial(
                torch_F.scaled_dot_product_attention, q, k, v, enable_gqa=True
            ),
        }
        where = f"decode {batch}x{heads}/{key_heads}x{keys}x{size}"
        view.add(where, calls, 4 * batch * key_heads * keys * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run goes through it on the CPU")
    view = Overview("cpu" if arguments.dry_run else "cuda")
    for part in (ceilings, dropouts, norms, products, optimizers, attention, decoding):
        part(view)
    environment = {
        "command": f"python -m pyfast.benchmarks.gpu_overview --out {arguments.out}",
        "device": "dry run" if view.is_dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "pyfast": pyfast.__version__,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(map(json.dumps, view.rows))
    text = f'{{"environment": {json.dumps(environment)},\n"rows": [\n{lines}\n]}}\n'
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
