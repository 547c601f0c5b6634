"""What the documentation says is true: examples run, tables agree with the code.

A block that runs is marked by a comment before it, which may say what must be installed, and may
hold code that readers need not see:

    <!-- run: name (needs transformers, peft)
    model = make_something()
    -->
    ```python
    pyfast.patch(model)
    ```
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from oracle import run_python

import pyfast
from pyfast.ops import attention, int8_linear

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/backends.md")
NOT_IMPLEMENTED = "not implemented for this op"
_MARK = re.compile(
    r"^<!-- run: (?P<name>[\w-]+)(?: \(needs (?P<needs>[^)]+)\))?[ ]*(?:\n(?P<hidden>.*?))?-->\n"
    r"```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """An example. ``hidden``: runs before ``code``. ``line``: where that begins, from 1."""

    name: str
    needs: tuple[str, ...]
    hidden: str
    code: str
    line: int


def runnable_blocks(text: str) -> list[Block]:
    """The marked blocks of a page; ValueError for a mark that no block of Python follows."""
    blocks = []
    for match in _MARK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        needs = tuple(name.strip() for name in (match["needs"] or "").split(",") if name.strip())
        blocks.append(Block(match["name"], needs, match["hidden"] or "", match["code"], line))
    if len(blocks) != text.count("<!-- run:"):
        raise ValueError(f"{text.count('<!-- run:')} marks, {len(blocks)} blocks")
    return blocks


def run_block(block: Block, folder: Path, timeout_s: float = 120) -> None:
    """Run an example in a process and a folder of its own. AssertionError, with what it printed, if
    it fails; the line numbers are those of the page."""
    code = "\n" * (block.line - 1) + block.code
    run = f"exec(compile({code!r}, 'page', 'exec'))"
    script = f"import os\nos.chdir({str(folder)!r})\n{block.hidden}\n{run}"
    path = os.environ.get("PYTHONPATH", "")
    done = run_python(script, timeout_s, PYTHONPATH=path, HF_HUB_OFFLINE="1")
    if done.returncode:
        output = done.stdout + done.stderr
        raise AssertionError(f"the example {block.name!r} fails:\n{output}")


EXAMPLES = {
    f"{page}-{block.name}": block
    for page in PAGES
    for block in runnable_blocks((ROOT / page).read_text())
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example: str, tmp_path: Path) -> None:
    block = EXAMPLES[example]
    for name in block.needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    run_block(block, tmp_path)


SAMPLE = """Text.

<!-- run: sums -->
```python
assert 1 + 1 == 2
```

```python
not run
```

<!-- run: hidden (needs torch, no_such_package)
x = 3
-->
```python
print(x)
assert x == 4
```
"""


def test_a_wrong_example_fails(tmp_path: Path) -> None:
    sums, hidden = runnable_blocks(SAMPLE)
    assert (sums.name, sums.needs, sums.line) == ("sums", (), 5)
    assert (hidden.name, hidden.needs) == ("hidden", ("torch", "no_such_package"))
    run_block(sums, tmp_path)
    with pytest.raises(AssertionError) as error:
        run_block(hidden, tmp_path)
    line = SAMPLE.splitlines().index("assert x == 4") + 1
    assert "'hidden' fails:\n3\n" in str(error.value)
    assert f"line {line}" in str(error.value) and "AssertionError" in str(error.value)
    with pytest.raises(ValueError, match="2 marks, 1 blocks"):
        runnable_blocks(SAMPLE.replace("```python\nprint", "```\nprint"))


def page() -> str:
    return (ROOT / "docs/backends.md").read_text()


def table_after(text: str, mark: str) -> list[list[str]]:
    """The rows of the first table behind a line, without its head."""
    rest = text[text.index(mark) :].split("\n\n")
    table = next(part for part in rest if re.search(r"^\|", part, re.MULTILINE))
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def implemented() -> list[list[str]]:
    """The rows that ``docs/backends.md`` must have."""
    rows = []
    for op, statuses in pyfast.backends().items():
        has = {name: status.reason != NOT_IMPLEMENTED for name, status in statuses.items()}
        first = next(name for name in ("cuda", "triton", "reference") if has[name])
        cells = ("yes" if has[name] else "no" for name in ("cpu", "cuda", "triton", "reference"))
        rows.append([f"`{op}`", *cells, first])
    return rows


def test_the_table_of_backends_is_true() -> None:
    documented = table_after(page(), "<!-- table: backends -->")
    assert sorted(documented) == sorted(implemented())
    assert [row for row in documented if row[2] == "no"], "the comparison sees no difference"


def test_every_registered_op_is_in_the_table() -> None:
    names = {row[0].strip("`") for row in table_after(page(), "<!-- table: backends -->")}
    registered = pyfast.ops._op.registered()
    assert names == {name for name in registered if not name.endswith("_backward")}


def test_limits_are_those_of_the_kernels() -> None:
    rows = dict(table_after(page(), "## What goes to the reference"))
    size, features = attention.MAX_HEAD_SIZE, int8_linear._MAX_NATIVE_K
    assert f"head sizes above {size}" in rows["`attention`, `attention_with_kv_cache`"]
    assert f"{features} input features" in rows["`int8_linear`"]
    for q, backend in (
        (torch.ones(1, 1, 2, size), "cpu"),
        (torch.ones(1, 1, 2, size + 1), "reference"),
        (torch.ones(1, 1, 2, 8, dtype=torch.float64), "reference"),
    ):
        if pyfast.backends()["attention"]["cpu"].usable:
            (served,) = pyfast.explain("scaled_dot_product_attention", q, q, q)
            assert served.backend == backend


def test_cpu_levels_are_named() -> None:
    native = pyfast._backend.native
    if native is None:
        pytest.skip(pyfast._backend.native_error)
    section = page().split("## CPU levels")[1].split("\n## ")[0]
    levels = [level for level in native.build_info()["isa_compiled"] if f"`{level}`" in section]
    assert levels == list(native.build_info()["isa_compiled"])


def test_variables_are_those_that_are_read() -> None:
    read = set()
    for path in (ROOT / "setup.py", *ROOT.glob("pyfast/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        read |= set(re.findall(r'environ(?:\.get\(|\[)"(PYFAST_\w+)"', path.read_text()))
    assert len(read) > 3
    assert {row[0].strip("`") for row in table_after(page(), "## Environment")} == read
