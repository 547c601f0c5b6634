"""``python -m pyfast demo --nproc 2``: torchrun, two processes, and what they learn together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pyfast.demo.options import Options, UsageError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
STEPS = 20
TEXT = b"def add(left, right):\n    return left + right\n\n\n" * 400  # the same for any Python


def run_demo(folder: Path, nproc: int) -> dict[str, Any]:
    text = folder / "text.py"
    text.write_bytes(TEXT)
    options = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4"]
    options += ["--steps", str(STEPS), "--text", str(text), "--out", str(folder / "report")]
    done = subprocess.run(
        [sys.executable, "-m", "pyfast", "demo", "--nproc", str(nproc), *options],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Report:") == 1  # one process speaks
    content: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return content


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (run_demo(folder, i + 1) for i, folder in enumerate(folders))
    assert "--nproc 2" in two["command"] and "--nproc" not in one["command"]
    for name in ("stock", "patched"):
        # The first step has the same weights and batch, and other masks.
        losses = [content["curves"][name]["training_loss"] for content in (one, two)]
        assert [len(curve) for curve in losses] == [STEPS, STEPS]
        assert abs(losses[0][0] - losses[1][0]) < 0.05
        assert losses[1][-1] < losses[1][0] - 0.5
        assert abs(losses[0][-1] - losses[1][-1]) < 0.2
    assert abs(losses[0][-1] - losses[0][0]) > 0.5  # more than what is allowed


def test_batch_must_divide() -> None:
    options = Options(batch=3, nproc=2)
    with pytest.raises(UsageError, match=r"--batch must be a multiple of --nproc \(2\), got 3"):
        options._check()
    with pytest.raises(UsageError, match="--nproc must be at least 1, got 0"):
        Options(nproc=0)._check()
