"""The oracle of attention accepts right implementations and rejects wrong ones."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from attention_cases import (
    Case,
    Function,
    Inputs,
    check,
    dense,
    grouped,
    kept_of,
    scores_of,
    softmax_of,
)
from oracle import drop_scale
from torch import Tensor

INFINITY = float("inf")
BLOCK = 16


def in_float(x: Inputs) -> Inputs:
    return x.map(Tensor.float)


def plain(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """Right, in float32."""
    out, lse = dense(case, in_float(x))
    return out.to(x.q.dtype), lse


def with_weights(case: Case, x: Inputs, p: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return (p @ grouped(case, x.v.float())).to(x.q.dtype), lse


def blockwise(
    case: Case, x: Inputs, rescale: bool = True, last: bool = True
) -> tuple[Tensor, Tensor]:
    """The online softmax over blocks of keys."""
    dtype, x = x.q.dtype, in_float(x)
    s, visible = scores_of(case, x)
    s = s.masked_fill(~visible, -1e30)
    top = torch.full_like(s[..., :1], -1e30)
    total, out = torch.zeros_like(top), torch.zeros_like(x.q[..., : x.v.shape[-1]])
    num_keys = s.shape[-1] if last else s.shape[-1] // BLOCK * BLOCK
    for j in range(0, num_keys, BLOCK):
        block = s[..., j : j + BLOCK]
        new_top = torch.maximum(top, block.detach().amax(-1, keepdim=True))
        shrink = torch.exp(top - new_top)
        p = torch.exp(block - new_top)
        total = total * shrink + p.sum(-1, keepdim=True)
        out = out * (shrink if rescale else 1.0) + p @ x.v[..., j : j + BLOCK, :]
        top = new_top
    return (out / total).to(dtype), (total.log() + top)[..., 0]


def dropped_before_the_sum(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """Dropped keys miss in the denominator."""
    s, visible = scores_of(case, in_float(x))
    p, _ = softmax_of(s, visible & (kept_of(case, s.dtype) > 0), None)
    return with_weights(case, x, p, softmax_of(s, visible, None)[1])


def with_kept(case: Case, x: Inputs, kept: Tensor) -> tuple[Tensor, Tensor]:
    p, lse = softmax_of(*scores_of(case, in_float(x)), x.sinks)
    return with_weights(case, x, p * kept, lse)


def straight_softcap(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """The gradient passes the softcap unchanged."""
    capped, visible = scores_of(case, in_float(x))
    raw, _ = scores_of(replace(case, softcap=0.0), in_float(x))
    p, lse = softmax_of(capped.detach() + raw - raw.detach(), visible, x.sinks)
    return with_weights(case, x, p, lse)


def softcap_after_mask(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    s, visible = scores_of(replace(case, softcap=0.0), in_float(x))
    capped = case.softcap * torch.tanh(torch.where(visible, s, 0) / case.softcap)
    return with_weights(case, x, *softmax_of(capped, visible, x.sinks))


def interleaved_groups(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    groups = case.heads // case.key_heads
    k, v = (t.repeat(1, groups, 1, 1) for t in x[1:3])
    return plain(replace(case, key_heads=0), x._replace(k=k, v=v))


def without_sink(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    out, _ = plain(case, x._replace(sinks=None))
    return out, plain(case, x)[1]


def sink_gradient_of_one_row(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    assert x.sinks is not None
    (out, lse), (fixed, fixed_lse) = plain(case, x), plain(case, x._replace(sinks=x.sinks.detach()))
    first = torch.zeros_like(lse)
    first[..., 0] = 1
    return torch.lerp(fixed, out, first[..., None].to(out.dtype)), torch.lerp(fixed_lse, lse, first)


def uniform_where_nothing_is_seen(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = plain(case, x)
    mean = grouped(case, x.v).mean(-2, keepdim=True)
    return torch.where((lse == -INFINITY)[..., None], mean, out), lse


def rolled_mask(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    assert x.mask is not None
    return plain(case, x._replace(mask=x.mask.roll(1, -1)))


def mask_of_the_first_head(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    assert x.mask is not None
    return plain(case, x._replace(mask=x.mask[:, :1].expand_as(x.mask)))


def without_last_keys(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """The gradients of k and v miss the last rows of queries."""
    last = x.q.shape[-2] // BLOCK * BLOCK
    k, v = x.k.detach(), x.v.detach()
    whole, rest = plain(case, x), plain(case, x._replace(k=k, v=v))
    return (
        torch.cat([whole[0][..., :last, :], rest[0][..., last:, :]], -2),
        torch.cat([whole[1][..., :last], rest[1][..., last:]], -1),
    )


def never_written_tail(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = plain(case, x)
    last = out.shape[-2] // 4 * 4
    nan = torch.full_like(out[..., last:, :], float("nan"))
    return torch.cat([out[..., :last, :], nan], -2), lse


class Mutant(NamedTuple):
    case: Case
    function: Function


DEFAULT = Case(num_queries=33, num_keys=53)
CAUSAL = replace(DEFAULT, causal=True)
WINDOW = replace(DEFAULT, window=(5, 3))
SOFTCAP = replace(DEFAULT, softcap=1.5)
DROPOUT = replace(DEFAULT, p=0.3, num_keys=33)
BOOL = replace(DEFAULT, mask="bool bhls")
ADDITIVE = replace(DEFAULT, mask="float32 bhls")
ALIBI = replace(DEFAULT, alibi="h")
SINKS = replace(DEFAULT, sinks=True)
GROUPS = replace(DEFAULT, heads=4, key_heads=2)


def changed(case: Case, **keywords: object) -> Mutant:
    """A right implementation of another call."""
    return Mutant(case, lambda c, x: plain(replace(c, **keywords), x))  # type: ignore[arg-type]


def detached(case: Case, *names: str) -> Mutant:
    def function(c: Case, x: Inputs) -> tuple[Tensor, Tensor]:
        return plain(c, x._replace(**{name: getattr(x, name).detach() for name in names}))

    return Mutant(case, function)


MUTANTS = {
    "bool mask shifted by one": Mutant(BOOL, rolled_mask),
    "additive mask shifted by one": Mutant(ADDITIVE, rolled_mask),
    "mask of the first head for all": Mutant(BOOL, mask_of_the_first_head),
    "accumulator not rescaled": Mutant(DEFAULT, lambda c, x: blockwise(c, x, rescale=False)),
    "tail columns dropped": Mutant(DEFAULT, lambda c, x: blockwise(c, x, last=False)),
    "lse without the maximum": Mutant(
        DEFAULT, lambda c, x: (plain(c, x)[0], plain(c, x)[1] - scores_of(c, x)[0].amax(-1))
    ),
    "lse of base two": Mutant(DEFAULT, lambda c, x: (plain(c, x)[0], plain(c, x)[1] * 1.442695)),
    "lse without gradient": Mutant(
        DEFAULT, lambda c, x: (plain(c, x)[0], plain(c, x)[1].detach() + 0 * x.q.sum())
    ),
    "lse of dropped weights": Mutant(
        DROPOUT, lambda c, x: (plain(c, x)[0], plain(c, x)[1] + kept_of(c, torch.float32).mean(-1))
    ),
    "dropout mask transposed": Mutant(
        DROPOUT, lambda c, x: with_kept(c, x, kept_of(c, torch.float32).transpose(-1, -2))
    ),
    "dropout mask of the first head": Mutant(
        DROPOUT,
        lambda c, x: with_kept(c, x, kept_of(c, torch.float32)[:, :1].expand(c.score_shape)),
    ),
    "dropout mask shifted by one": Mutant(
        DROPOUT, lambda c, x: with_kept(c, x, kept_of(c, torch.float32).roll(1, -1))
    ),
    "dropout not scaled": Mutant(
        DROPOUT, lambda c, x: with_kept(c, x, kept_of(c, torch.float32) / drop_scale(c.p))
    ),
    "dropout before the sum": Mutant(DROPOUT, dropped_before_the_sum),
    "no dropout": changed(DROPOUT, p=0.0),
    "alignment swapped": changed(CAUSAL, alignment="bottom_right"),
    "not causal": changed(CAUSAL, causal=False),
    "the diagonal hidden": Mutant(
        CAUSAL, lambda c, x: plain(c, x._replace(mask=~torch.eye(33, 53, dtype=torch.bool)))
    ),
    "left bound off by one": changed(WINDOW, window=(6, 3)),
    "right bound off by one": changed(WINDOW, window=(5, 2)),
    "window at the other end": changed(WINDOW, alignment="bottom_right"),
    "no softcap": changed(SOFTCAP, softcap=0.0),
    "softcap without derivative": Mutant(SOFTCAP, straight_softcap),
    "softcap after the mask": Mutant(replace(SOFTCAP, mask="float32 ls"), softcap_after_mask),
    "scale after the softcap": changed(replace(SOFTCAP, scale=0.5), softcap=0.75),
    "no alibi": Mutant(ALIBI, lambda c, x: plain(c, x._replace(slopes=x.slopes * 0))),
    "alibi added": Mutant(ALIBI, lambda c, x: plain(c, x._replace(slopes=-x.slopes))),
    "alibi at the other end": changed(ALIBI, alignment="bottom_right"),
    "alibi of the first head": Mutant(
        ALIBI, lambda c, x: plain(c, x._replace(slopes=x.slopes[:1].expand(2)))
    ),
    "groups interleaved": Mutant(GROUPS, interleaved_groups),
    "sink not in the denominator": Mutant(SINKS, without_sink),
    "sink gradient of one row": Mutant(SINKS, sink_gradient_of_one_row),
    "uniform where nothing is seen": Mutant(BOOL, uniform_where_nothing_is_seen),
    "no gradient of the mask": detached(ADDITIVE, "mask"),
    "no gradient of q": detached(DEFAULT, "q"),
    "no gradient of k": detached(CAUSAL, "k"),
    "no gradient of v": detached(DROPOUT, "v"),
    "no gradient of the slopes": detached(ALIBI, "slopes"),
    "k and v gradients without the last rows": Mutant(DEFAULT, without_last_keys),
    "scale of another size": changed(DEFAULT, scale=17**-0.5),
    "rows never written": Mutant(DEFAULT, never_written_tail),
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_accepts(dtype: torch.dtype) -> None:
    for case in {mutant.case for mutant in MUTANTS.values()}:
        check(plain, case, dtype)
    check(blockwise, DEFAULT, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_oracle_rejects(mutant: str, dtype: torch.dtype) -> None:
    case, function = MUTANTS[mutant]
    with pytest.raises(AssertionError, match="allowed"):
        check(function, case, dtype)
