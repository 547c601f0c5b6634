"""pyfast.explain: which backend serves a call, and why; where Triton launches."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU, Backend
from oracle import normal
from torch.autograd import forward_ad

import pyfast
from pyfast import _backend

ROOT = Path(__file__).resolve().parents[1]
F = pyfast.nn.functional


def test_tells_backend_and_reasons() -> None:
    q = normal(2, 3, 5, 8)
    (served,) = pyfast.explain("scaled_dot_product_attention", q, q, q)
    assert (served.op, served.backend) == ("attention", "cpu")
    assert "first choice on cpu" in served.reason
    assert served.others["cuda"] == "it has no implementation of this op"
    assert served.others["reference"] == "it could serve the call, if asked for"
    text = str(pyfast.explain(F.scaled_dot_product_attention, q, q, q))
    assert text.startswith("attention: cpu, because") and "    not triton: " in text


def test_tells_limits() -> None:
    q = normal(1, 1, 5, 300)
    (served,) = pyfast.explain(F.scaled_dot_product_attention, q, q, q)
    assert served.backend == "reference" and "head sizes from 1 to 256" in served.reason
    assert "head sizes from 1 to 256" in served.others["cpu"]


def test_tells_what_was_asked_for() -> None:
    with pyfast.use_backend("reference"):
        (served,) = pyfast.explain(F.dropout, torch.ones(9))
    assert (served.backend, served.reason) == ("reference", "it was asked for")
    assert served.others["cpu"] == "it could serve the call, if asked for"


def test_sees_modules_gradients_and_forward_mode() -> None:
    layer = pyfast.nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
    x = normal(2, 5, 8)
    found = pyfast.explain(lambda: layer(x, x, x, need_weights=False)[0].sum().backward())
    assert [served.op for served in found][:1] == ["attention"]
    assert "attention_backward" in [served.op for served in found]

    def forward_mode() -> None:
        with forward_ad.dual_level():
            F.dropout(forward_ad.make_dual(x, torch.ones_like(x)))

    (served,) = pyfast.explain(forward_mode)
    assert served.backend == "reference" and "forward-mode" in served.reason
    assert str(pyfast.explain(torch.sin, x)) == "no pyfast op was called"


def test_forgets_after_an_error() -> None:
    with pytest.raises(AttributeError):
        pyfast.explain("no such function")
    with pytest.raises(ZeroDivisionError):
        pyfast.explain(lambda: 1 / 0)
    assert not _backend.observers


@pytest.mark.skipif(HAS_GPU, reason="the script itself runs there")
def test_gpu_benchmark_goes_through(tmp_path: Path) -> None:
    """All of it but the GPU: on the CPU, with the reference in the kernels' place."""
    out = tmp_path / "attention.json"
    command = [sys.executable, "-m", "pyfast.benchmarks.gpu_attention", "--dry-run", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"]["kind"] for row in rows} == {"plain", "dropout", "bias", "decode"}
    for row in rows:
        assert len(row["samples_us"]["pyfast"]) == 2 and row["speedup"] > 0
    refused = subprocess.run([*command[:3], "--out", out], capture_output=True, text=True)
    assert refused.returncode == 2 and "no CUDA device" in refused.stderr


@pytest.mark.skipif(HAS_GPU, reason="the script itself runs there")
def test_gpu_overview_goes_through(tmp_path: Path) -> None:
    out = tmp_path / "overview.json"
    command = [sys.executable, "-m", "pyfast.benchmarks.gpu_overview", "--dry-run", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    assert {row["name"].split()[0] for row in rows} > {"dropout", "W8A8", "AdamW", "decode"}
    assert all("pyfast" in row["eager_us"] for row in rows[2:])


def test_gpu_check_is_a_script() -> None:
    subprocess.run(["bash", "-n", ROOT / "benchmarks/gpu_check.sh"], check=True)


@pytest.mark.backends("triton")
@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_triton_launches_where_its_tensors_are(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: (seen.append(t), device_of(t))[1])
    x = normal(8, 4).to("cuda:1" if HAS_GPU else "cpu").requires_grad_()
    out = pyfast.nn.functional.dropout(x, 0.5, seed=3)
    out.sum().backward()
    with pyfast.use_backend("reference"):
        expected = pyfast.nn.functional.dropout(x.detach().cpu(), 0.5, seed=3)
    assert torch.equal(out.detach().cpu(), expected)
    assert [t.device for t in seen] == [x.device, x.device]


def test_attention_that_torch_serves_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyfast.ops.scaled_dot_product_attention")
    monkeypatch.setattr(module.attention_op, "backend_of", lambda tensor: "triton")
    why = module._why_torch

    def query(size: int = 64, dtype: torch.dtype = torch.bfloat16, length: int = 8) -> torch.Tensor:
        return torch.empty(1, 2, length, size, dtype=dtype, device="meta")

    q, mask = query(), torch.empty(8, 8, dtype=torch.bool, device="meta")
    assert all(why(q, q, q, None, p, causal) for p in (0.0, 0.1) for causal in (False, True))
    for other in (query(60), query(264), query(dtype=torch.float32)):
        assert not why(other, other, other, None, 0.0, False)
    assert not why(q, q, q, mask, 0.0, False) and not why(q, q, q, None, 1.0, False)
    assert not why(q, query(length=9), query(length=9), None, 0.0, True)
    with pyfast.use_backend("reference"):
        assert not why(q, q, q, None, 0.0, False)
    shard = query()
    shard.device_mesh = None  # as a DTensor has it: its mask must be that of the whole
    assert why(shard, shard, shard, None, 0.0, False)
    assert not why(shard, shard, shard, None, 0.1, False)


@pytest.mark.parametrize("size", [64, 1 << 20])
def test_every_dropout_is_seen(size: int) -> None:
    """Small ones with a gradient, and those in place, have paths of their own."""
    x = torch.ones(size, requires_grad=True)
    assert [s.op for s in pyfast.explain("dropout", x, 0.5)] == ["dropout"]
    assert [s.op for s in pyfast.explain("dropout", x * 1, 0.5, inplace=True)] == ["dropout"]
    assert [s.op for s in pyfast.explain("dropout", x.detach(), 0.5, inplace=True)] == ["dropout"]
