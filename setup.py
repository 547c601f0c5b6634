"""Builds the native module with CMake and Ninja; everything else about the package is in
pyproject.toml.

PYFAST_NATIVE=0        install the pure-Python package (reference and Triton): no compiler needed
PYFAST_CUDA=auto|1|0   CUDA kernels: if nvcc is found (default), always, never
PYFAST_CUDA_ARCHS=...  a CMake architecture list; default "80-real;80-virtual;90a-real"
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """A build tool: the one that pip installed for this build, else the one on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"pyfast: {name} was not found; install it with: pip install {name}")
    return found


def check_compiler() -> None:
    if os.environ.get("CXX") or any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return
    raise SystemExit(
        "pyfast: no C++ compiler was found. Install g++ or clang++ (or set CXX), or set "
        "PYFAST_NATIVE=0 to install the pure-Python package, which runs on plain torch and Triton."
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        check_compiler()
        cuda = os.environ.get("PYFAST_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"pyfast: PYFAST_CUDA must be auto, 0 or 1, got {cuda!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp, which an editable install throws away: objects are kept.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-cuda-{cuda}"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "PYFAST_CUDA": cuda,
            "PYFAST_CUDA_ARCHS": os.environ.get("PYFAST_CUDA_ARCHS", "80-real;80-virtual;90a-real"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
        }
        configure = [tool("cmake"), "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        for command in (configure, [tool("cmake"), "--build", str(build)]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(
                    "pyfast: the native module did not build (see above). PYFAST_CUDA=0 builds for "
                    "the CPU alone; PYFAST_NATIVE=0 installs without native code."
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old module mapped.
        new = target.with_name(target.name + ".new")
        shutil.copyfile(build / target.name, new)
        new.replace(target)


if os.environ.get("PYFAST_NATIVE", "1") == "0":
    setup()
else:
    setup(ext_modules=[Extension("pyfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
