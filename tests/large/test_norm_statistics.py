"""A picture's group-norm statistics, put together from its parts: as good as torch's own over the whole, also far from 0."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lib_async_lowvram.large.norm_statistics import Moments, normalise, opmath


def parts(x: torch.Tensor, *cuts: int) -> Moments:
    moments = Moments()
    for top, bottom in zip((0, *cuts), (*cuts, x.shape[2]), strict=True):
        moments.add(x[:, :, top:bottom])
    return moments


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("cuts", [(), (1,), (3, 3, 17), tuple(range(1, 20))])
def test_from_unequal_parts(mean: float, cuts: tuple[int, ...]) -> None:
    tone = torch.linspace(-1, 1, 20)[:, None]  # no two parts alike
    x = mean + tone + torch.randn(2, 12, 20, 15)
    found = parts(x, *cuts).groups(3)
    groups = x.double().reshape(2, 3, -1)
    assert torch.allclose(found.mean, groups.mean(2), rtol=1e-6, atol=1e-7)
    assert torch.allclose(found.variance, groups.var(2, unbiased=False), rtol=1e-4 if mean > 100 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_applied_it_is_torchs_norm(dtype: torch.dtype) -> None:
    x = (5 + 2 * torch.randn(1, 8, 16, 16)).to(dtype)
    weight, bias = torch.randn(8).to(dtype), torch.randn(8).to(dtype)
    scale, shift = parts(x, 5, 6).groups(2).scale_and_shift(8, weight, bias, 1e-6, opmath(dtype))
    got = normalise(x, scale, shift, dtype)
    expected = functional.group_norm(x, 2, weight, bias, 1e-6)
    assert got.dtype == dtype
    spacing = torch.finfo(dtype).eps * expected.abs().clamp_min(1)
    assert ((got - expected).abs() <= 8 * spacing).all()


def test_the_error_is_told_in_standard_deviations() -> None:
    x = torch.randn(1, 4, 32, 32)
    true = parts(3 * x).groups(1)
    assert float(parts(3 * x + 1.5).groups(1).error(true)) == pytest.approx(0.5, rel=0.05)
    assert float(parts(3.3 * x).groups(1).error(true)) == pytest.approx(0.1, rel=0.05)
    assert float(true.error(true)) == 0.0


def test_nothing_seen() -> None:
    moments = Moments()
    moments.add(torch.zeros(1, 4, 0, 5))
    with pytest.raises(ValueError, match="no part"):
        moments.groups(1)
