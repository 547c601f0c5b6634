"""What quantization did to a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._patch import class_name


@dataclass(frozen=True)
class QuantizationEntry:
    """What happened to one module.

    Attributes:
        path: where the module is in the model, ``"(root)"`` for the model itself; all places of a
            shared module, separated by ``", "``.
        source: the module's class before.
        target: the class it was given; None where it was left alone.
        reason: why it was left alone, or what else there is to know.
    """

    path: str
    source: type[torch.nn.Module]
    target: type[torch.nn.Module] | None
    reason: str


@dataclass(repr=False)
class QuantizationReport:
    """One entry for each module that has to do with quantization; ``print`` shows it as a table.

    Attributes:
        entries: in the order of ``model.named_modules()``.
        bytes_before, bytes_after: of all parameters and buffers of the model, shared ones once.
    """

    entries: list[QuantizationEntry]
    bytes_before: int
    bytes_after: int

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[QuantizationEntry]:
        return iter(self.entries)

    @property
    def changed(self) -> list[QuantizationEntry]:
        """The entries of the modules that were given another class."""
        return [entry for entry in self.entries if entry.target is not None]

    @property
    def skipped(self) -> list[QuantizationEntry]:
        """The entries of the modules that were left alone; each has a ``reason``."""
        return [entry for entry in self.entries if entry.target is None]

    def __repr__(self) -> str:
        return f"<QuantizationReport: {len(self.changed)} changed, {len(self.skipped)} skipped>"

    def __str__(self) -> str:
        rows = [("module", "from", "to, or why not")]
        for entry in self:
            to = entry.reason
            if entry.target is not None:
                to = class_name(entry.target) + (f" ({to})" if to else "")
            rows.append((entry.path, class_name(entry.source), to))
        width, source_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{path:{width}}  {source:{source_width}}  {to}" for path, source, to in rows]
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        lines.append(
            f"{len(self.changed)} of {len(self)} modules changed; "
            f"{before:.3f} MB before, {after:.3f} MB after"
        )
        return "\n".join(lines)


def num_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
