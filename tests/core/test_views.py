"""Views: the picture and the noise that an encoder reads off a model's tensor, against sums written out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdg_core.method import PIXEL_VIEW, DecodedView, LatentFormat, LinearView

pytestmark = pytest.mark.usefixtures("float64")

FACTORS = ((0.3, -0.2, 0.5, 0.1), (0.1, 0.4, -0.3, 0.2), (-0.5, 0.2, 0.1, 0.7))
BIAS = (0.1, -0.3, 0.2)
SPACE = LatentFormat("toy", 4, FACTORS, BIAS, scale=0.5, shift=0.25, downscale=4)


def unpack(x: Tensor) -> Tensor:
    """(B, 16, H, W) -> (B, 4, 2 H, 2 W): channel 4 c + 2 i + j is channel c of the pixel at row i, column j."""
    return F.pixel_shuffle(x, 2)


PACKED = LinearView(
    "packed", torch.tensor(FACTORS, dtype=torch.float64), torch.tensor(BIAS, dtype=torch.float64), unpack, patch=2
)
LINEAR = [(SPACE.linear_view(), 4), (PACKED, 16)]


def linear_by_hand(x: Tensor, signal: Tensor) -> Tensor:
    """A x + signal b in float64, one colour and one channel at a time. x (B, 4, H, W)."""
    colours = [
        sum(FACTORS[r][c] * x[:, c].double() for c in range(4)) + BIAS[r] * signal.double().view(-1, 1, 1)
        for r in range(3)
    ]
    return torch.stack(colours, dim=1)


def test_pixels_are_the_picture(draw):
    x = draw(2, 3, 6, 4)
    assert PIXEL_VIEW.picture(x, torch.tensor([1.0, 0.5])) is x
    assert PIXEL_VIEW.noise(x) is x
    assert PIXEL_VIEW.size(6, 4) == (6, 4)


def test_linear_view_is_factors_times_x_plus_bias_by_signal(draw):
    x, signal = draw(3, 4, 6, 5), torch.tensor([1.0, 0.3, 0.0])
    got = SPACE.linear_view().picture(x, signal)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got.double(), linear_by_hand(x, signal), rtol=0, atol=1e-9)


def test_a_packed_latent_is_unpacked_first(draw):
    x, signal = draw(2, 16, 3, 5), torch.tensor([1.0, 0.4])
    got = PACKED.picture(x, signal)
    assert got.shape == (2, 3, 6, 10)
    for i in (0, 1):
        for j in (0, 1):
            wanted = linear_by_hand(x[:, 2 * i + j :: 4], signal)
            torch.testing.assert_close(got[:, :, i::2, j::2].double(), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("view", "channels"), LINEAR)
def test_the_picture_has_the_size_that_the_view_says(view, channels, draw):
    picture = view.picture(draw(1, channels, 6, 10), torch.ones(1))
    assert tuple(picture.shape[2:]) == view.size(6, 10)


@pytest.mark.parametrize(("view", "channels"), LINEAR)
def test_noise_and_data_add_up_to_the_noisy_picture(view, channels, draw):
    """alpha x_0 + sigma eps is seen as alpha times the clean picture plus sigma times the noise of the view."""
    x_0, eps, alpha, sigma = draw(2, channels, 6, 6), draw(2, channels, 6, 6, seed=1), 0.6, 1.7
    got = view.picture(alpha * x_0 + sigma * eps, torch.full((2,), alpha))
    wanted = alpha * view.picture(x_0, torch.ones(2)) + sigma * view.noise(eps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("view", "channels"), LINEAR)
def test_unit_noise_has_the_covariance_and_stays_white(view, channels, draw):
    wanted = torch.tensor([[sum(a * b for a, b in zip(p, q, strict=True)) for q in FACTORS] for p in FACTORS])
    torch.testing.assert_close(view.covariance.double(), wanted, rtol=0, atol=1e-6)  # factors may be float32
    seen = view.noise(draw(8, channels, 64, 64))
    flat = seen.transpose(0, 1).flatten(1)
    error = 6 * float(wanted.diag().max()) / math.sqrt(flat.shape[1])  # four standard errors or more
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], wanted, rtol=0, atol=error)
    for one, other in [(seen[..., :-1], seen[..., 1:]), (seen[..., :-1, :], seen[..., 1:, :])]:  # neighbours
        products = torch.einsum("brhw,bshw->rs", one, other) / one[:, 0].numel()
        torch.testing.assert_close(products, torch.zeros(3, 3), rtol=0, atol=error)


@pytest.mark.parametrize(
    ("view", "channels"),
    [*LINEAR, (PIXEL_VIEW, 3), (SPACE.tiny_view(nn.ConvTranspose2d(4, 3, 4, stride=4).requires_grad_(False)), 4)],
)
def test_views_take_every_sample_by_itself(view, channels, draw):
    x, signal = draw(3, channels, 4, 4), torch.tensor([1.0, 0.5, 0.2])
    batch = view.picture(x, signal)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], view.picture(x[i : i + 1], signal[i : i + 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_seen_in_float32(dtype, draw):
    x = draw(1, 4, 6, 6).to(dtype)
    got = SPACE.linear_view().picture(x, torch.ones(1, dtype=dtype))
    torch.testing.assert_close(got, SPACE.linear_view().picture(x.float(), torch.ones(1)), rtol=0, atol=0)


def test_the_decoded_view_scales_latents_back_and_pictures_to_minus_one_to_one(draw):
    decoder = nn.ConvTranspose2d(4, 3, 4, stride=4).requires_grad_(False)
    x = draw(2, 4, 3, 5)
    view = SPACE.tiny_view(decoder)
    picture = view.picture(x, torch.ones(2))
    assert tuple(picture.shape[2:]) == view.size(3, 5) == (12, 20)
    torch.testing.assert_close(picture, decoder(x / 0.5 + 0.25) * 2 - 1)
    assert view.modules == (decoder,)


def test_the_decoded_view_refuses_noise(draw):
    view = DecodedView(lambda x: x, 8)
    with pytest.raises(ValueError, match="finished latents only, not noisy ones"):
        view.noise(draw(1, 4, 3, 3))


def test_latent_formats_survive_json():
    assert LatentFormat.from_json(json.loads(json.dumps(asdict(SPACE)))) == SPACE
    short = LatentFormat("short", 4, FACTORS)
    assert LatentFormat.from_json(json.loads(json.dumps(asdict(short)))) == short


def test_the_linear_view_is_named_after_its_latent_format():
    assert SPACE.linear_view().name == "linear:toy"
