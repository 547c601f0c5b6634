"""``python -m pyfast info``: what is installed, what is usable and why not, and a self-test."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from typing import Any

import torch

from . import _backend
from ._self_test import self_test
from ._version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": p.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
        }
        for p in properties
    ]


def collect() -> dict[str, Any]:
    """Everything that ``info`` shows, as plain data."""
    native = _backend.native
    start = time.perf_counter()
    self_test_results = self_test()
    return {
        "versions": {
            "pyfast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        },
        "native": {"error": _backend.native_error} if native is None else native.build_info(),
        "cpu": {
            "name": cpu_name(),
            "isa": None if native is None else native.selected_isa(),
            "threads": torch.get_num_threads(),
        },
        "gpus": _gpus(),
        "backends": {
            op: {name: str(status) for name, status in row.items()}
            for op, row in _backend.backends().items()
        },
        "forced_backend": _backend.forced(),
        "self_test": self_test_results,
        "self_test_seconds": round(time.perf_counter() - start, 3),
    }


def main(arguments: argparse.Namespace) -> int:
    info = collect()
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        _print(info)
    return 0 if all(result == "ok" for result in info["self_test"].values()) else 1


def _print(info: dict[str, Any]) -> None:
    versions = ", ".join(
        f"{name} {value or 'not installed'}" for name, value in info["versions"].items()
    )
    print(f"versions    {versions}")
    native = info["native"]
    if native.get("error"):
        print(f"native      {native['error']}")
    else:
        toolkit = native["cuda_toolkit"]
        cuda = f"CUDA {toolkit} for {native['cuda_architectures']}" if native["cuda"] else "no CUDA"
        print(f"native      {native['compiler']}, {cuda}")
        levels = ", ".join(native["isa_compiled"])
        print(f"CPU levels  compiled: {levels}; this machine: {native['isa_detected']}")
    cpu = info["cpu"]
    print(f"CPU         {cpu['name']}, level in use: {cpu['isa']}, {cpu['threads']} threads")
    for gpu in info["gpus"]:
        print(f"GPU         {gpu['name']} (compute capability {gpu['compute_capability']})")
    if not info["gpus"]:
        print("GPU         none that torch can see")
    if info["forced_backend"]:
        print(f"forced      every op runs on {info['forced_backend']}")
    for op, row in info["backends"].items():
        print(op)
        for backend, status in row.items():
            print(f"  {backend:<10}{status}")
    print(f"self-test   {info['self_test_seconds']} s")
    for name, result in info["self_test"].items():
        print(f"  {name}: {result}")
