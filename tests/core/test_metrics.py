"""Plain statistics of pictures and features, against closed forms."""

from __future__ import annotations

import pytest
import torch

from sdg_core.avatars.metrics import frechet_distance, grain, psnr


def test_flat_drawings_have_no_grain_and_noise_has_its_own(draw):
    """The Laplacian of white noise of deviation s has s sqrt(20), and a median absolute value of .6745 times that."""
    drawing = torch.ones(2, 3, 64, 64)
    drawing[:, :, 20:40, 10:50] = -0.5
    assert torch.equal(grain(drawing), torch.zeros(2))
    torch.testing.assert_close(
        grain(0.01 * draw(2, 3, 64, 64)), torch.full((2,), 0.6745 * 0.01 * 20**0.5), rtol=0.05, atol=0
    )


def test_psnr_counts_from_a_range_of_two():
    a = torch.zeros(1, 3, 8, 8)
    torch.testing.assert_close(psnr(a, a + 0.2), torch.tensor([20.0]))


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """Features with exactly these moments: |m - n|^2 + sum (sqrt s - sqrt t)^2 for covariances with common axes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator).double()
    x = x - x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())[0]
    s, t = torch.tensor([1.0, 4.0, 0.25, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25, 0.0]).double()
    a, b = (white * s.sqrt()) @ turn + 1, (white * t.sqrt()) @ turn
    wanted = 4 * 1.0 + float((s.sqrt() - t.sqrt()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
