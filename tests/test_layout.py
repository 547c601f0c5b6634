"""The rules of the layout: where files are, what they include, how long they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parents[1]
CODE = (".py", ".cpp", ".h", ".cu", ".cuh")
TEXT = (*CODE, ".md", ".toml", ".txt", ".cfg", ".ini", ".yml", ".yaml", ".sh", ".json", ".in")
NAMES_WITHOUT_SUFFIX = {"Makefile", "run", "LICENSE", ".gitignore", ".clang-format"}
NOT_OURS = {"build", "dist", "shared", "report", "__pycache__"}
MAX_LINES = 400
LONGER_FILES: dict[str, str] = {}  # path: the reason why it is longer
ISA_HEADERS = {"immintrin.h", "cstdint", "cmath", "cstring"}
TORCH_LIBRARIES = ("torch/", "ATen/", "c10/", "caffe2/")

OPS = tuple(
    sorted(
        path.name
        for path in (ROOT / "kernels").iterdir()
        if path.is_dir() and path.name != "common" and not path.name.startswith("_")
    )
)
KERNEL_FILES = ("{0}.h", "{0}_cpu.cpp", "{0}_cuda.cu", "{0}_triton.py", "{0}_reference.py")
WITHOUT_SCHEMA = {"optimizer_step"}  # it changes lists of tensors in place
WITHOUT_CUDA = {"attention", "int8_linear"}  # CUDA tensors go to their Triton kernels
ON_CPU_ALONE = {"linear", "cross_entropy"}  # torch serves GPUs
OTHER_FILES = (
    "pyfast/ops/{0}.py",
    "csrc/{0}.cpp",
    "tests/test_{0}.py",
    "benchmarks/bench_{0}.py",
)


def files(*folders: str, suffixes: Iterable[str] = CODE) -> list[Path]:
    """Files of ours below the folders, or of the whole repository; no build output."""
    found = []
    for folder in folders or (".",):
        for path in sorted((ROOT / folder).rglob("*")):
            parts = path.relative_to(ROOT).parts
            hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
            ours = not hidden and not NOT_OURS & set(parts) and ".egg-info" not in str(path)
            if ours and path.is_file():
                found.append(path)
    return [path for path in found if path.suffix in suffixes or path.name in NAMES_WITHOUT_SUFFIX]


def includes(text: str) -> list[tuple[str, bool]]:
    """(name, is in quotes) of every include of a C++ source."""
    found = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, flags=re.MULTILINE)
    return [(name, mark == '"') for mark, name in found]


def forbidden_includes(text: str, forbidden: tuple[str, ...]) -> list[str]:
    return [name for name, _ in includes(text) if name.startswith(forbidden)]


def violations(paths: list[Path], check: Callable[[str], list[str]]) -> list[str]:
    assert paths, "the rule looks at no file"
    return [
        f"{path.relative_to(ROOT)}: {found}" for path in paths for found in check(path.read_text())
    ]


def test_kernels_include_neither_torch_nor_pybind11() -> None:
    forbidden = (*TORCH_LIBRARIES, "pybind11/", "Python.h")
    assert not violations(files("kernels"), lambda text: forbidden_includes(text, forbidden))


def test_the_boundary_does_not_include_torch() -> None:
    assert not violations(files("csrc"), lambda text: forbidden_includes(text, TORCH_LIBRARIES))


@pytest.mark.parametrize(
    "line", ["#include <torch/extension.h>", '  # include "ATen/ATen.h"', "#include<c10/Half.h>"]
)
def test_a_torch_include_is_found(line: str) -> None:
    assert forbidden_includes(f"// #include <torch/x.h>\n{line}\n", TORCH_LIBRARIES)


def test_there_are_ops() -> None:
    assert {"dropout", "bias_dropout_add", "dropout_add_norm"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_every_file(op: str) -> None:
    left_out = {"{0}_cuda.cu"} if op in WITHOUT_CUDA else set()
    if op in ON_CPU_ALONE:
        left_out = {"{0}_cuda.cu", "{0}_triton.py"}
    kernels = [name for name in KERNEL_FILES if name not in left_out]
    wanted = [f"kernels/{op}/" + name.format(op) for name in kernels]
    wanted += [name.format(op) for name in OTHER_FILES]
    assert not [name for name in wanted if not (ROOT / name).is_file()]


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name(op: str) -> None:
    """The same word in the schema, in the binding and in the build."""
    if op not in WITHOUT_SCHEMA:
        assert f'"{op}(Tensor ' in (ROOT / f"pyfast/ops/{op}.py").read_text()
        assert f'm.def("{op}"' in (ROOT / f"csrc/{op}.cpp").read_text()
    assert f"bind_{op}(m)" in (ROOT / "csrc/module.cpp").read_text()
    listed = re.search(r"set\(OPS ([^)]*)\)", (ROOT / "csrc/CMakeLists.txt").read_text())
    assert listed and op in listed[1].split()


@pytest.mark.parametrize("op", OPS)
def test_cpu_kernels_include_little(op: str) -> None:
    """They are compiled once per instruction-set level: what a heavy header defines inline would be
    linked from whichever level came last, and then run on processors that do not have it."""
    seen: set[Path] = set()
    queue = sorted(ROOT.glob(f"kernels/{op}/*_cpu.cpp"))
    wrong = []
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for name, quoted in includes(path.read_text()):
            if quoted:
                target = (path.parent / name).resolve()
                assert target.is_relative_to(ROOT / "kernels"), f"{path}: {name}"
                queue.append(target)
            elif name not in ISA_HEADERS:
                wrong.append(f"{path.relative_to(ROOT)}: <{name}>")
    assert len(seen) > 2 and not wrong


def test_files_are_short() -> None:
    """A file that cannot be read in one go is two files, or is listed with its reason."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in files(suffixes=CODE)
    }
    longer = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert set(longer) == set(LONGER_FILES), longer


def test_every_folder_of_kernels_is_packaged() -> None:
    if tomllib is None:
        pytest.skip("tomllib came with Python 3.11")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"]["pyfast.kernels"] == "kernels"
    # kernels/ must never install under its own name: it belongs to another project.
    assert all(name == "pyfast" or name.startswith("pyfast.") for name in setuptools["packages"])
    packages = {}
    for top, package in (("pyfast", "pyfast"), ("kernels", "pyfast.kernels")):
        for path in (ROOT / top).rglob("__init__.py"):
            if "__pycache__" not in path.parts:
                parts = path.parent.relative_to(ROOT / top).parts
                packages[".".join((package, *parts))] = path
    assert set(packages) <= set(setuptools["packages"]), "a package is not listed"
    for folder in (ROOT / "kernels").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert (folder / "__init__.py").exists(), f"{folder} is not a package"


def test_build_files_are_portable() -> None:
    """No code for the machine that builds, and no arithmetic that is allowed to be wrong."""
    flags = ("-march=native", "-mtune=native", "-ffast-math", "-Ofast", "--use_fast_math")
    paths = [ROOT / "csrc/CMakeLists.txt", ROOT / "setup.py", ROOT / "pyproject.toml"]
    paths += [path for path in (ROOT / "Makefile",) if path.exists()]
    assert not violations(paths, lambda text: [flag for flag in flags if flag in text])


def test_nothing_leads_out_of_the_repository() -> None:
    """No path to a folder that a clone does not have, in any file."""
    outside = ["/".join((folder, "shared")) for folder in ("..", "work")]

    def check(text: str) -> list[str]:
        return [path for path in outside if path in text]

    assert check(f"see {outside[0]}/notes.md")
    assert not violations(files(suffixes=TEXT), check)


def test_no_empty_placeholders() -> None:
    """An empty file promises something; py.typed is empty by its specification."""
    empty = [path for path in files(suffixes=TEXT) if not path.read_text().strip()]
    assert not [str(path.relative_to(ROOT)) for path in empty]
