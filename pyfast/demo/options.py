"""The options of the demo, their checks, and the command line that repeats a run."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE_DTYPES = ("float32", "bfloat16", "int8")
MIN_STEPS = 5


class UsageError(Exception):
    """A wrong option, in one line for the user."""


@dataclass(frozen=True)
class Options:
    """What a user can choose; the defaults take about two minutes on two slow CPU cores."""

    steps: int = 200
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128
    batch: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    state_dtype: str | None = None
    seed: int = 0
    nproc: int = 1
    text: Path | None = None
    out: Path = Path("report")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Options:
        """The checked options. Touches nothing; raises UsageError."""
        options = cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})
        options._check()
        return options

    def _check(self) -> None:
        smallest = {"steps": MIN_STEPS, "seed": 0}
        for name in ("steps", "layers", "width", "heads", "context", "batch", "seed", "nproc"):
            least, value = smallest.get(name, 1), getattr(self, name)
            if value < least:
                raise UsageError(f"--{name} must be at least {least}, got {value}")
        if self.width % self.heads:
            raise UsageError(
                f"--width must be a multiple of --heads ({self.heads}), got {self.width}"
            )
        if self.batch % self.nproc:
            raise UsageError(
                f"--batch must be a multiple of --nproc ({self.nproc}), got {self.batch}"
            )
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"--device must be cpu or cuda, got {self.device}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device must be cpu here, got cuda: torch sees no CUDA device")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype must be {' or '.join(DTYPES)}, got {self.dtype}")
        if self.state_dtype not in (None, *STATE_DTYPES):
            names = f"{', '.join(STATE_DTYPES[:-1])} or {STATE_DTYPES[-1]}"
            raise UsageError(f"--state-dtype must be {names}, got {self.state_dtype}")
        folder = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--out must be a folder that can be written, got {self.out}")

    def command(self) -> str:
        """The command that repeats this run: the options that differ from the defaults."""
        words = ["python", "-m", "pyfast", "demo"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m pyfast demo``; :func:`pyfast.demo.main` takes the result."""
    texts = {
        "steps": "training steps of each of the two models",
        "layers": "transformer layers",
        "width": "width of the model, a multiple of --heads",
        "heads": "attention heads",
        "context": "bytes that the model sees",
        "batch": "sequences in a step",
        "nproc": "processes of this machine that train together, through torchrun and FSDP2",
        "seed": "seed of the initial weights, the batches, the dropout masks and the sample",
    }
    for name, text in texts.items():
        default = getattr(Options, name)
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--device", default=Options.device, help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        default=Options.dtype,
        help="float32, or bfloat16 through torch.autocast (default: float32)",
    )
    parser.add_argument(
        "--state-dtype",
        default=Options.state_dtype,
        help="how the optimizer of the patched model stores its states: float32, bfloat16 or int8 "
        "(default: as torch does)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=Options.text,
        help="the file to learn (default: the sources of Python's standard library)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Options.out,
        help="folder for report.html and report.json (default: report)",
    )
