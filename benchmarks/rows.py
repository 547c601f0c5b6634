"""What a benchmark finds out about one implementation of one case."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Row:
    """What was found about one implementation of one case.

    Attributes:
        backend: what served pyfast's call; empty for the other implementations.
        problem: why there are no figures: a failed check or compilation. ``failed``: it fails the
            whole run.
        samples_us: the time of a call, one for each round, each a mean of ``num_calls`` calls.
        copy_bandwidth_gbps: of a copy that moves as many bytes, in the same rounds.
        time_over_copy: median over the rounds of the time by that of the copy: "time over moving
            these bytes once", to be at most ``bar``; ``percent_of_copy`` is its inverse.
        floors: how many times as fast as other rows pyfast should be at least, by row.
        ratios: how many times as fast as these it is: medians over the rounds.
        peak_bytes: the most memory that the first call took beyond what the process had, outputs
            included; of torch and pyfast.
        speedup: median over the rounds of torch's time by this one's. ``is_clear``: the quartile
            ranges of the two do not overlap.
    """

    op: str
    case: str
    shape: list[int]
    dtype: str
    device: str
    implementation: str
    num_bytes: int
    bar: float | None
    backend: str = ""
    problem: str = ""
    failed: bool = False
    num_flops: int | None = None
    num_calls: int | None = None
    samples_us: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    median_us: float | None = None
    q1_us: float | None = None
    q3_us: float | None = None
    iqr_us: float | None = None
    bandwidth_gbps: float | None = None
    gflops: float | None = None
    copy_bandwidth_gbps: float | None = None
    percent_of_copy: float | None = None
    time_over_copy: float | None = None
    speedup: float | None = None
    is_clear: bool = False
    floors: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def where(self) -> tuple[str, str, str, str]:
        """What the row is about, in words."""
        return self.op, self.case, "x".join(map(str, self.shape)), self.dtype

    def add_samples(
        self, seconds: list[float], num_calls: int, copy_s: list[float], torch_s: list[float]
    ) -> None:
        self.samples_us, self.num_calls = [1e6 * time for time in seconds], num_calls
        self.q1_us, self.median_us, self.q3_us = q1, median, q3 = _quartiles(self.samples_us)
        self.iqr_us = q3 - q1
        self.bandwidth_gbps = 1e-3 * self.num_bytes / median
        if self.num_flops is not None:
            self.gflops = 1e-3 * self.num_flops / median
        self.copy_bandwidth_gbps = 1e-9 * self.num_bytes / statistics.median(copy_s)
        self.time_over_copy = _median_ratio(seconds, copy_s)
        self.percent_of_copy = 100 / self.time_over_copy
        if torch_s:
            self.speedup = _median_ratio(torch_s, seconds)
            torch_q1, _, torch_q3 = _quartiles([1e6 * time for time in torch_s])
            self.is_clear = q3 < torch_q1 or torch_q3 < q1

    def add_ratios(self, seconds: list[float], others_s: dict[str, list[float]]) -> None:
        """Fill ``ratios``: of the rows that have a floor and figures."""
        self.ratios = {
            name: _median_ratio(others_s[name], seconds) for name in self.floors if name in others_s
        }


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))
