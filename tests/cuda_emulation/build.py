"""Builds the native module with its CUDA kernels as host C++, and mutants of it.

Objects are cached by the hash of what goes into them, so that a mutant costs one object and a link.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "cuda_emulation"
OPS = tuple(sorted(path.parent.name for path in ROOT.glob("kernels/*/*_cuda.cu")))
OWN_HEADER = re.compile(r'#include "(\w+\.cuh)"\n')
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-w",
    "-DPYFAST_WITH_CUDA",
    "-DPYFAST_CUDA_EMULATION",
    '-DPYFAST_COMPILER="emulation"',
    '-DPYFAST_CUDA_ARCHITECTURES="emulation"',
    f"-I{HERE}",
    f"-I{sysconfig.get_paths()['include']}",
    f"-I{pybind11.get_include()}",
]


def sources() -> list[Path]:
    boundary = [path for path in ROOT.glob("csrc/*.cpp")]
    common = [
        ROOT / "kernels/common" / name for name in ("isa.cpp", "parallel.cpp", "workspace.cpp")
    ]
    kernels = [*ROOT.glob("kernels/*/*_cpu.cpp"), *ROOT.glob("kernels/*/*.cu")]
    return sorted([*boundary, *common, *kernels, HERE / "cuda_emulation.cpp"])


def _headers_hash() -> str:
    digest = hashlib.sha256()
    for pattern in ("csrc/*.h", "kernels/*/*.h", "kernels/*/*.cuh", "tests/cuda_emulation/*.h"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile(source: Path, text: str, headers: str, include: Path) -> Path:
    """The object of a source whose text may have been changed; quoted includes see ``include``."""
    flags = list(FLAGS)
    if source.name.endswith("_cpu.cpp"):
        flags += ["-DPYFAST_ISA=generic", "-fopenmp"]
    key = hashlib.sha256("\0".join([str(source), text, headers, *flags]).encode()).hexdigest()[:24]
    target = CACHE / f"{source.stem}-{key}.o"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    # Beside the object, under the hash: the text that was compiled.
    copy = CACHE / f"{source.stem}-{key}.cpp"
    copy.write_text(text)
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    command = ["g++", "-x", "c++", *flags, f"-iquote{include}", "-c", str(copy), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{source.name} does not compile for the emulation:\n{done.stderr[:2000]}"
        )
    partial.replace(target)
    return target


def _with_own_headers(text: str, folder: Path) -> str:
    """``text`` with the .cuh files beside it in the place of their first includes."""
    included: set[str] = set()

    def content(match: re.Match[str]) -> str:
        name = match[1]
        if name in included:
            return ""
        included.add(name)
        header = (folder / name).read_text().replace("#pragma once\n", "")
        return OWN_HEADER.sub(content, header)

    return OWN_HEADER.sub(content, text)


def build(changes: Sequence[tuple[str, str, str]] = ()) -> Path:
    """The shared object of the module, with ``changes`` applied: (file name, old text, new text).

    The texts of a source are its own and those of the .cuh files beside it.

    Raises:
        ValueError: if an old text does not stand exactly once in its file: the mutant is stale.
    """
    headers = _headers_hash()

    def compiled(source: Path) -> Path:
        text = source.read_text()
        changed = [change for change in changes if change[0] == source.name]
        if changed:
            text = _with_own_headers(text, source.parent)
        for name, old, new in changed:
            if text.count(old) != 1:
                raise ValueError(f"{name} has {text.count(old)} places that read {old!r}")
            text = text.replace(old, new)
        return _compile(source, text, headers, source.parent)

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, sources())]
    key = hashlib.sha256("\0".join(objects).encode()).hexdigest()[:24]
    target = CACHE / key / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run(["g++", "-shared", *objects, "-o", str(partial)], check=True)
        partial.replace(target)
    return target


def load(path: Path, name: str) -> types.ModuleType:
    """Import a build under the package name ``name``."""
    spec = importlib.util.spec_from_file_location(f"{name}._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_emulated() -> None:
    """Make ``pyfast`` use the emulated module. Call it before pyfast is imported."""
    assert "pyfast" not in sys.modules, "pyfast was imported before its module could be replaced"
    sys.modules["pyfast._C"] = load(build(), "pyfast")
