"""Attention on an NVIDIA GPU against torch's best: ``python -m pyfast.benchmarks.gpu_attention``.

Every case is checked against the float64 formula on a small shape, then timed in turns with each of
torch's backends that takes it, with CUDA events; the best of these is the baseline. Decoding is
compared with a copy of as many bytes. Writes a JSON with the samples, and a plot. ``--dry-run``
goes through everything on the CPU with tiny shapes, for no figures that mean anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyfast

from .cases import time_block

ours = pyfast.nn.functional.scaled_dot_product_attention
BASELINES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TOKENS = 16384
HIDDEN = 2048


@dataclass
class Case:
    """``kind``: plain, dropout, bias or decode; ``bar``: the speed-up over torch's best, or for
    decoding the share of the copy, that is aimed at."""

    kind: str
    batch: int
    heads: int
    key_heads: int
    num_queries: int
    num_keys: int
    size: int
    causal: bool = False
    backward: bool = False
    bar: float = 0.0

    @property
    def name(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        words = [self.kind, *(["causal"] if self.causal else []), passes]
        return " ".join(words) + f" {self.batch}x{self.heads}x{self.num_keys}x{self.size}"

    @property
    def num_flops(self) -> float:
        products = (4 + 10 * self.backward) / (1 + self.causal)
        return products * self.batch * self.heads * self.num_queries * self.num_keys * self.size

    @property
    def num_bytes(self) -> int:
        return 2 * 2 * self.batch * self.key_heads * self.num_keys * self.size


@dataclass
class Result:
    case: Case
    samples_us: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # by torch, or far from its best
    peak_bytes: dict[str, int] = field(default_factory=dict)
    best: str = ""
    speedup: float = 0.0  # median over rounds of the best baseline's time by ours
    tflops: float | None = None
    share_of_copy: float | None = None


def cases(tokens: int, hidden: int, lengths: tuple[int, ...], decode_keys: int) -> list[Case]:
    found = []
    for length in lengths:
        batch = max(1, tokens // length)
        for size in (64, 128):
            heads = max(1, hidden // size)
            new = functools.partial(Case, "plain", batch, heads, heads, length, length, size)
            for causal in (False, True):
                found.append(new(causal, bar=0.75))
                found.append(new(causal, True))
        heads = max(1, hidden // 128)
        shape = (batch, heads, heads, length, length, 128)
        found += [Case("dropout", *shape, causal, True, 1.3) for causal in (False, True)]
        found.append(Case("bias", *shape, False, True, 1.5))
    found.append(Case("decode", 16, 32, 8, 1, decode_keys, 128, bar=0.8))
    return found


def inputs(case: Case, device: str, requires_grad: bool) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_(requires_grad)

    tensors = {
        "query": normal(case.batch, case.num_queries, case.heads, case.size),
        "key": normal(case.batch, case.num_keys, case.key_heads, case.size),
        "value": normal(case.batch, case.num_keys, case.key_heads, case.size),
    }
    if case.kind == "bias":
        shape = (1, case.heads, case.num_queries, case.num_keys)
        bias = torch.randn(shape, device=device, dtype=torch.bfloat16)
        tensors["attn_mask"] = bias.requires_grad_(requires_grad)
    return tensors


def call_of(
    case: Case, function: Callable[..., Any], x: dict[str, Tensor], grad: Tensor | None = None
) -> Callable[[], Any]:
    options: dict[str, Any] = {"is_causal": case.causal, "enable_gqa": case.heads > case.key_heads}
    if case.kind == "dropout":
        options["dropout_p"] = 0.1
    forward = functools.partial(function, **x, **options)
    if not case.backward:
        return forward
    if grad is None:
        grad = torch.randn_like(x["query"])
    return lambda: torch.autograd.grad(forward(), list(x.values()), grad)


def contenders(case: Case, device: str, dry: bool) -> dict[str, Callable[[], Any]]:
    x = inputs(case, device, case.backward)
    found: dict[str, Callable[[], Any]] = {}

    def with_backend(context: Callable[[], Any], call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with context():
                return call()

        return run

    name = "reference" if dry else "triton"
    found["pyfast"] = with_backend(
        functools.partial(pyfast.use_backend, name), call_of(case, ours, x)
    )
    for label, backend in BASELINES.items():
        if not dry or label == "math":
            call = call_of(case, F.scaled_dot_product_attention, x)
            found[label] = with_backend(functools.partial(sdpa_kernel, backend), call)
    if case.kind == "decode":
        source = torch.empty(case.num_bytes // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        found["copy"] = lambda: target.copy_(source)  # reads and writes num_bytes in all
    return found


def check(case: Case, device: str, name: str) -> None:
    """RuntimeError unless ours, and its gradients, are right on a small shape."""
    # Multiples of 16, as the sizes that are timed: for others Triton would compile again.
    num_queries, num_keys = min(case.num_queries, 208), min(case.num_keys, 272)
    small = replace(case, num_queries=num_queries, num_keys=num_keys)
    x = inputs(small, device, case.backward)
    exact = {n: t.detach().double().requires_grad_(case.backward) for n, t in x.items()}
    seeded = functools.partial(ours, seed=7) if case.kind == "dropout" else ours
    results = []
    for backend, tensors in ((name, x), ("reference", exact)):
        torch.manual_seed(0)
        grad = torch.randn(x["query"].shape, device=device, dtype=torch.bfloat16)
        with pyfast.use_backend(backend):
            found = call_of(small, seeded, tensors, grad.to(tensors["query"].dtype))()
        results.append(found if case.backward else [found])
    for actual, wanted in zip(*results, strict=True):
        error = ((actual.double() - wanted).norm() / wanted.norm()).item()
        if not error <= 0.02:
            raise RuntimeError(f"{case.name}: off by {error:.2g} of its norm")


def time_us(call: Callable[[], Any], device: str, num_calls: int) -> float:
    return 1e6 * time_block(call, num_calls, torch.device(device), False) / num_calls


def measure(case: Case, device: str, rounds: int, dry: bool) -> Result:
    result = Result(case)
    running = {}
    for name, call in contenders(case, device, dry).items():
        try:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                torch.cuda.synchronize()
                result.peak_bytes[name] = torch.cuda.max_memory_allocated() - before
            running[name] = call
        except RuntimeError as error:  # a backend that does not take the call, or out of memory
            if name == "pyfast":
                raise
            result.refused[name] = str(error).splitlines()[0][:200]
    warm = {name: time_us(call, device, 1 if dry else 3) for name, call in running.items()}
    fastest = min(t for name, t in warm.items() if name not in ("pyfast", "copy"))
    for name, t in warm.items():
        if name not in ("pyfast", "copy") and t > 2 * fastest:
            del running[name]
            result.refused[name] = f"too slow to be the best: {t:.0f} us"
        else:
            result.samples_us[name] = []
    for _ in range(rounds):
        for name, call in running.items():
            result.samples_us[name].append(time_us(call, device, 1 if dry else 5))
    medians = {name: statistics.median(s) for name, s in result.samples_us.items()}
    rivals = {n: t for n, t in medians.items() if n not in ("pyfast", "copy")}
    our_samples = result.samples_us["pyfast"]
    result.best = min(rivals, key=rivals.__getitem__)
    pairs = zip(result.samples_us[result.best], our_samples, strict=True)
    result.speedup = statistics.median(theirs / mine for theirs, mine in pairs)
    result.tflops = case.num_flops / medians["pyfast"] * 1e-6
    if "copy" in medians:
        pairs = zip(result.samples_us["copy"], our_samples, strict=True)
        result.share_of_copy = statistics.median(copy / mine for copy, mine in pairs)
    return result


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.28 * len(results) + 1))
    names = [f"{r.case.name} (torch: {r.best})" for r in results]
    axes.barh(names, [r.speedup for r in results])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.plot([r.case.bar or float("nan") for r in results], names, "|", color="red", markersize=10)
    axes.invert_yaxis()
    axes.set_xlabel("torch's best time / pyfast's (red: what is aimed at)")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON; a plot goes beside it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 16384])
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run goes through it on the CPU")
    device = "cpu" if dry else "cuda"
    chosen = (
        cases(64, 256, (32,), 64) if dry else cases(TOKENS, HIDDEN, tuple(arguments.lengths), 8192)
    )
    results = []
    for case in chosen:
        check(case, device, "reference" if dry else "triton")
        result = measure(case, device, 2 if dry else arguments.rounds, dry)
        results.append(result)
        versus = f"{result.speedup:.2f}x torch's {result.best}"
        share = f", {100 * result.share_of_copy:.0f}% of a copy" if result.share_of_copy else ""
        print(f"{case.name}: {result.tflops:.0f} TFLOP/s, {versus}{share}", flush=True)
    environment = {
        "command": "python -m pyfast.benchmarks.gpu_attention --out " + str(arguments.out),
        "device": "dry run" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "pyfast": pyfast.__version__,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    if not dry:
        plot(results, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
