"""The text: bytes of the Python standard library's sources, or of a file."""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .options import UsageError

HELD_OUT_SHARE = 0.1
# Packages that are not the library, tests, and tables that would drown the code.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
)


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, uint8; the end of it is held out."""

    source: str
    train: Tensor
    held_out: Tensor


def load_corpus(text: Path | None, context: int) -> Corpus:
    """Read the text and split it; UsageError where it cannot be read or is too short."""
    if text is None:
        source, content = _standard_library()
    else:
        try:
            source, content = str(text), text.read_bytes()
        except OSError as error:
            raise UsageError(
                f"--text must be a file that can be read, got {text}: {error.strerror}"
            ) from None
    least = 2 * (context + 1)
    if len(content) < least:
        raise UsageError(
            f"--text must have at least {least} bytes for --context {context}, "
            f"got {source} with {len(content)}"
        )
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    split = len(data) - max(context + 1, round(HELD_OUT_SHARE * len(data)))
    return Corpus(source, data[:split], data[split:])


def _standard_library() -> tuple[str, bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise UsageError(f"--text must name a file here: no Python sources were found in {root}")
    source = f"the standard library of Python {platform.python_version()} ({len(files)} files)"
    return source, b"".join(path.read_bytes() for path in files)


def random_windows(
    data: Tensor, count: int, context: int, generator: torch.Generator
) -> Tensor:  # [count, context + 1]
    """Sequences from random places, each with the byte that follows it."""
    starts = torch.randint(len(data) - context, (count, 1), generator=generator)
    return data[starts + torch.arange(context + 1)].long()


def spaced_windows(data: Tensor, count: int, context: int) -> Tensor:  # [<= count, context + 1]
    """As many sequences, at most ``count``, as fit without overlap, spread over the text."""
    count = min(count, (len(data) - 1) // context)
    starts = torch.linspace(0, len(data) - context - 1, count).long()[:, None]
    return data[starts + torch.arange(context + 1)].long()
