"""Noise schedules and conventions, against plain arithmetic and known numbers."""

from __future__ import annotations

import math

import pytest
import torch

from sdg_core.encoders import noisy
from sdg_core.method import Convention, TimestepTable, betas, encoder_noise, expand

SCHEDULES = ["linear", "cosine"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_sigma_inverts_timestep(name):
    table = TimestepTable.from_name(name)
    t = torch.tensor([0.0, 0.25, 1.0, 17.5, 250.0, 500.125, 998.75, 999.0])
    torch.testing.assert_close(table.timestep(table.sigma(t)), t.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_timestep_inverts_sigma(name):
    table = TimestepTable.from_name(name)
    low, high = float(table.ratio[0].log()), float(table.ratio[-1].log())
    ratio = torch.linspace(low, high, 200, dtype=torch.float64).exp()
    torch.testing.assert_close(table.sigma(table.timestep(ratio)), ratio, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_timesteps_have_the_tables_ratios(name):
    table = TimestepTable.from_name(name)
    t = torch.arange(1000)
    torch.testing.assert_close(table.sigma(t), table.ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(table.timestep(table.ratio), t.double(), rtol=0, atol=1e-9)


def test_noise_outside_the_schedule_goes_to_its_ends():
    table = TimestepTable.from_name("linear")
    assert table.timestep(torch.tensor([0.0, 1e-4, 1e4, math.inf])).tolist() == [0, 0, 999, 999]


def test_timestep_keeps_the_shape():
    table = TimestepTable.from_name("linear")
    assert table.timestep(torch.rand(2, 3).t()).shape == (3, 2)


def test_linear_schedule_has_the_known_numbers_of_adm():
    table = TimestepTable.from_name("linear")
    assert float(table.ratio[-1]) == pytest.approx(157.407, abs=1e-3)
    assert float(table.ratio[0]) == pytest.approx(0.0100005, abs=1e-7)
    assert float(table.abar[0]) == pytest.approx(1 - 1e-4, rel=1e-12)
    assert float(table.abar[-1]) == pytest.approx(4.0358e-5, rel=1e-4)


def test_linear_betas_are_an_arithmetic_sequence_whose_product_is_abar():
    abar, products = 1.0, []
    for i in range(1000):
        abar *= 1 - (1e-4 + (2e-2 - 1e-4) * i / 999)
        products.append(abar)
    wanted = torch.tensor(products, dtype=torch.float64)
    torch.testing.assert_close(TimestepTable.from_name("linear").abar, wanted, rtol=1e-9, atol=0)


def test_linear_betas_grow_as_steps_get_fewer():
    ends = betas("linear", 250)[[0, -1]]
    torch.testing.assert_close(ends, torch.tensor([4e-4, 8e-2], dtype=torch.float64))


def test_cosine_betas_are_ratios_of_a_squared_cosine_at_most_0_999():
    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    wanted = [min(1 - abar((i + 1) / 1000) / abar(i / 1000), 0.999) for i in range(1000)]
    torch.testing.assert_close(betas("cosine"), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert float(betas("cosine").max()) == 0.999


def test_unknown_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match=r'"quadratic".*"linear", "cosine" or "scaled_linear"'):
        betas("quadratic")


@pytest.mark.parametrize(("convention", "alpha"), [(Convention.VE, 1.0), (Convention.FLOW, 0.4), (Convention.VP, 0.8)])
def test_convention_gives_the_signal_scale(convention, alpha):
    assert float(convention.alpha(torch.tensor(0.6))) == pytest.approx(alpha)


def test_expand_broadcasts_over_pictures():
    assert expand(torch.arange(2), torch.zeros(2, 3, 4, 4)).shape == (2, 1, 1, 1)


def test_snr_matching_of_ve(tiny_encoder, draw):
    sigma = torch.tensor([0.02, 0.5, 1.0, 14.6, 150.0])
    ratio, norm = encoder_noise(tiny_encoder(), (4, 4), sigma, Convention.VE)
    torch.testing.assert_close(1 / (1 + ratio.square()), 1 / (1 + sigma.square()))
    torch.testing.assert_close(norm, (1 + sigma.square()).sqrt())


def test_snr_matching_of_flow(tiny_encoder, draw):
    s = torch.tensor([0.02, 0.5, 0.75, 0.99])
    ratio, norm = encoder_noise(tiny_encoder(), (4, 4), s, Convention.FLOW)
    power = (1 - s).square() + s.square()
    torch.testing.assert_close(1 / (1 + ratio.square()), (1 - s).square() / power)
    torch.testing.assert_close(norm, power.sqrt())


def test_snr_matching_of_vp_changes_nothing(tiny_encoder, draw):
    sigma = torch.tensor([0.02, 0.5, 0.99])
    ratio, norm = encoder_noise(tiny_encoder(), (4, 4), sigma, Convention.VP)
    torch.testing.assert_close(norm, torch.ones(3))
    torch.testing.assert_close(1 / (1 + ratio.square()), 1 - sigma.square())


def test_one_noisy_picture_is_the_same_to_the_encoder_in_every_convention(tiny_encoder, draw):
    x_0, eps = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1)
    encoder, snr_ratio = tiny_encoder(), 0.7
    vp = snr_ratio / math.sqrt(1 + snr_ratio**2)
    sigmas = {Convention.VE: snr_ratio, Convention.FLOW: snr_ratio / (1 + snr_ratio), Convention.VP: vp}
    seen = {}
    for convention, value in sigmas.items():
        sigma = torch.tensor([value])
        x_t = convention.alpha(sigma) * x_0 + sigma * eps
        ratio, norm = encoder_noise(encoder, x_t.shape[-2:], sigma, convention)
        seen[convention] = (x_t / norm, encoder.table.timestep(ratio))
    for u, t in seen.values():
        torch.testing.assert_close(u, seen[Convention.VP][0])
        torch.testing.assert_close(t, seen[Convention.VP][1], rtol=0, atol=1e-3)


def test_noisy_is_the_forward_process_at_each_samples_t(draw):
    table = TimestepTable.from_name("linear")
    x_0, eps, t = draw(3, 3, 4, 4), draw(3, 3, 4, 4, seed=1), [0, 400, 999]
    wanted = torch.stack(
        [float(table.abar[k]) ** 0.5 * x_0[i] + (1 - float(table.abar[k])) ** 0.5 * eps[i] for i, k in enumerate(t)]
    )
    torch.testing.assert_close(noisy(x_0, eps, torch.tensor(t), table), wanted)
