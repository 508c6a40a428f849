"""Samplers against DDIM and guided-diffusion's ancestral step, written out in their own scaling and in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import Convention, GuidanceRun, LatentFormat, Strength, Term, TextGuidance, TimestepTable, betas
from sdg_core.models import (
    ADMConfig,
    ADMDenoiser,
    ADMUNet,
    Prediction,
    euler,
    euler_ancestral,
    euler_ancestral_flow,
    initial,
    noise_like,
    normal_sigmas,
    paper,
    percent_to_sigma,
    posterior,
)

pytestmark = pytest.mark.usefixtures("float64")

FLOW_SIGMAS = torch.linspace(1, 0, 11, dtype=torch.float64)
TABLE = TimestepTable.from_name("linear")
TIMESTEPS = [999, 900, 750, 500, 300, 120, 40, 10, 1, 0]
SIGMAS = torch.cat([TABLE.sigma(torch.tensor(TIMESTEPS)), torch.zeros(1)]).double()
CONFIG = ADMConfig(
    image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=32
)


LATENT = LatentFormat("toy", 4, ((0.3, -0.2, 0.5, 0.1), (0.1, 0.4, -0.3, 0.2), (-0.5, 0.2, 0.1, 0.7)))


def random_unet(config: ADMConfig = CONFIG) -> ADMUNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = ADMUNet(config)
        for parameter in unet.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return unet.requires_grad_(False).eval()


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser of data near -1 and 1."""
    return torch.tanh(x / (0.2 + sigma.square().view(-1, 1, 1, 1)))


def last(steps) -> Tensor:
    *_, step = steps
    return step.x


class SpacedDiffusion:
    """The constants of guided-diffusion's GaussianDiffusion for respaced timesteps (ascending), float64."""

    def __init__(self, timesteps: list[int]) -> None:
        abar = np.cumprod(1 - betas("linear").numpy())[timesteps]
        self.abar, self.abar_prev = abar, np.append(1.0, abar[:-1])
        self.betas = 1 - abar / self.abar_prev
        self.posterior_variance = self.betas * (1 - self.abar_prev) / (1 - abar)

    def mean(self, i: int, x_0: np.ndarray, x_t: np.ndarray) -> np.ndarray:
        """q(x_{t-1} | x_t, x_0), eq. 7 of Ho et al. 2020."""
        first = self.betas[i] * np.sqrt(self.abar_prev[i]) / (1 - self.abar[i])
        second = (1 - self.abar_prev[i]) * np.sqrt(1 - self.betas[i]) / (1 - self.abar[i])
        return first * x_0 + second * x_t

    def log_variance(self, i: int, v: np.ndarray | float) -> np.ndarray:
        """Learned range: v = -1 is the posterior variance, v = 1 is beta."""
        fraction = (v + 1) / 2
        return fraction * np.log(self.betas[i]) + (1 - fraction) * np.log(self.posterior_variance[i])


@pytest.mark.parametrize("i", [0, 1, 4, 9])
@pytest.mark.parametrize("v", [None, -1.0, -0.3, 0.8, 1.0])
def test_posterior_equals_guided_diffusions_respaced_one(i, v, draw):
    diffusion = SpacedDiffusion(TIMESTEPS[::-1])
    x_0, x_t = draw(2, 3, 4, 4).double(), draw(2, 3, 4, 4, seed=1).double()
    prediction = Prediction(x_0, None if v is None else torch.full_like(x_0, (v + 1) / 2))
    mean, variance = posterior(prediction, x_t, diffusion.abar[i], diffusion.abar_prev[i])
    torch.testing.assert_close(mean, torch.from_numpy(diffusion.mean(i, x_0.numpy(), x_t.numpy())))
    wanted = diffusion.betas[0] if i == 0 else float(np.exp(diffusion.log_variance(i, -1.0 if v is None else v)))
    torch.testing.assert_close(variance, torch.full_like(x_0, wanted))


def test_variance_fraction_runs_from_beta_tilde_to_beta(draw):
    x, abar, abar_next = draw(1, 3, 4, 4).double(), 0.3, 0.6
    beta = 1 - abar / abar_next
    for fraction, wanted in [(1.0, beta), (0.0, beta * (1 - abar_next) / (1 - abar))]:
        _, variance = posterior(Prediction(x, torch.full_like(x, fraction)), x, abar, abar_next)
        torch.testing.assert_close(variance, torch.full_like(x, wanted))


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_paper_without_guidance_is_guided_diffusions_sampling_loop(learn_sigma, draw):
    unet = random_unet(replace(CONFIG, learn_sigma=learn_sigma))
    noise, diffusion, random = draw(2, 3, 16, 16), SpacedDiffusion(TIMESTEPS[::-1]), generator()
    x = noise.double().numpy()
    for i, t in reversed(list(enumerate(TIMESTEPS[::-1]))):
        out = unet(torch.from_numpy(x), torch.full((2,), float(t))).double().numpy()
        eps, v = np.split(out, 2, axis=1) if learn_sigma else (out, -1.0)
        x_0 = np.sqrt(1 / diffusion.abar[i]) * x - np.sqrt(1 / diffusion.abar[i] - 1) * eps
        x = diffusion.mean(i, x_0.clip(-1, 1), x)
        if i > 0:
            fresh = torch.randn(noise.shape, generator=random).double().numpy()
            x = x + np.exp(diffusion.log_variance(i, v) / 2) * fresh
    got = last(paper(ADMDenoiser(unet).predict, initial(noise, SIGMAS[0]), SIGMAS, generator()))
    assert float(got.std()) > 0.1
    torch.testing.assert_close(got.double(), torch.from_numpy(x), rtol=0, atol=1e-9)


def test_paper_shifts_the_mean_by_sigma_times_the_gradient(tiny_encoder, draw):
    """Algorithm 1 in VP scaling with integer timesteps, its gradient straight from autograd."""
    encoder, scale = tiny_encoder().requires_grad_(False), 40.0
    embed = F.normalize(draw(1, 5, seed=3), dim=-1)
    diffusion, random = SpacedDiffusion(TIMESTEPS[::-1]), generator()
    u = noise = draw(2, 3, 8, 8)
    for i, t in reversed(list(enumerate(TIMESTEPS[::-1]))):
        ratio = math.sqrt(1 / diffusion.abar[i] - 1)
        x_0 = curved(u * math.hypot(1, ratio), torch.tensor([ratio]))
        seen = u.clone().requires_grad_(True)
        score = scale * F.cosine_similarity(encoder(seen, torch.tensor([float(t)]), 3).embed, embed)
        (grad,) = torch.autograd.grad(score.sum(), seen)
        variance = diffusion.betas[0] if i == 0 else diffusion.posterior_variance[i]
        u = diffusion.mean(i, x_0, u) + variance * grad
        if i > 0:
            u = u + math.sqrt(variance) * torch.randn(u.shape, generator=random)
    run = GuidanceRun(
        (Term(TextGuidance(embed), encoder, scale),), Convention.VE, percent_to_sigma(TABLE), Strength("relative", 0.1)
    )
    got = last(paper(lambda x, s: Prediction(curved(x, s)), initial(noise, SIGMAS[0]), SIGMAS, generator(), run))
    free = last(paper(lambda x, s: Prediction(curved(x, s)), initial(noise, SIGMAS[0]), SIGMAS, generator()))
    torch.testing.assert_close(got, u, rtol=0, atol=1e-9)
    assert float((got - free).abs().max()) > 0.05


def test_paper_with_a_run_that_pulls_nowhere_is_unguided(tiny_encoder, draw):
    idle = Term(TextGuidance(draw(1, 5)), tiny_encoder(), 0.0)
    x, results = initial(draw(2, 3, 8, 8), SIGMAS[0]), []
    for run in (None, *(GuidanceRun(terms, Convention.VE, percent_to_sigma(TABLE)) for terms in ((), (idle,)))):
        results.append(last(paper(lambda x, s: Prediction(curved(x, s)), x, SIGMAS, generator(), run)))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 1.0])
def test_paper_on_gaussian_data_has_the_variance_of_its_chain(fraction, draw):
    """x_0 ~ N(0, 1): x_{t-1} = sqrt(1 - beta) x_t + sqrt(Sigma) z, so its variance follows a scalar recursion."""

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        denoised = x / (1 + sigma.square().view(-1, 1, 1, 1))
        return Prediction(denoised, None if fraction is None else torch.full_like(x, fraction))

    diffusion, variance = SpacedDiffusion(TIMESTEPS[::-1]), 1.0
    for i in range(9, 0, -1):
        added = float(np.exp(diffusion.log_variance(i, 2 * (fraction or 0.0) - 1)))
        variance = (1 - diffusion.betas[i]) * variance + added
    variance *= 1 - diffusion.betas[0]
    x = last(paper(predict, initial(draw(4, 3, 64, 64), SIGMAS[0]), SIGMAS, generator()))
    assert float(x.mean()) == pytest.approx(0, abs=5 * math.sqrt(variance / x.numel()))
    assert float(x.std()) == pytest.approx(math.sqrt(variance), rel=5 / math.sqrt(2 * x.numel()))
    if fraction == 1.0:
        assert variance == pytest.approx(1, abs=1e-3)


def ddim(noise: Tensor, eta: float, random: torch.Generator) -> Tensor:
    """Song et al. 2021, eq. 12, in VP scaling and float64, over ``TIMESTEPS``."""
    abar = [*(1 / (1 + float(s) ** 2) for s in SIGMAS[:-1]), 1.0]
    u = noise.double()
    for now, after in pairwise(abar):
        x_0 = curved(u / math.sqrt(now), torch.tensor([math.sqrt(1 / now - 1)], dtype=torch.float64))
        eps = (u - math.sqrt(now) * x_0) / math.sqrt(1 - now)
        spread = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
        u = math.sqrt(after) * x_0 + math.sqrt(1 - after - spread**2) * eps
        if spread:
            u = u + spread * torch.randn(u.shape, generator=random).double()
    return u


def test_euler_is_ddim(draw):
    noise = draw(2, 3, 8, 8)
    got = last(euler(curved, initial(noise, SIGMAS[0]), SIGMAS))
    torch.testing.assert_close(got.double(), ddim(noise, 0.0, generator()), rtol=0, atol=1e-9)


def test_euler_ancestral_is_ddim_with_eta_one(draw):
    noise = draw(2, 3, 8, 8)
    got = last(euler_ancestral(curved, initial(noise, SIGMAS[0]), SIGMAS, generator()))
    torch.testing.assert_close(got.double(), ddim(noise, 1.0, generator()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_adm_denoiser_turns_its_output_into_denoised(prediction, draw):
    unet = random_unet(replace(CONFIG, prediction=prediction))
    t = torch.tensor([0, 250, 999])
    u, abar = draw(3, 3, 16, 16), TABLE.abar[t].view(-1, 1, 1, 1)
    output, v = unet(u, t.double()).chunk(2, dim=1)
    if prediction == "eps":
        wanted = (u - (1 - abar).sqrt() * output) / abar.sqrt()
    else:
        wanted = abar.sqrt() * u - (1 - abar).sqrt() * output
    sigma = TABLE.sigma(t)
    got = ADMDenoiser(unet).predict(u * (1 + sigma.square()).sqrt().view(-1, 1, 1, 1), sigma)
    torch.testing.assert_close(got.denoised.double(), wanted.clamp(-1, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(got.variance_fraction.double(), (v + 1) / 2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_latents_are_not_clamped(prediction, schedule, draw):
    """The same sums in float64 for four channels; a large latent stays beyond -1..1."""
    unet = random_unet(replace(CONFIG, prediction=prediction, beta_schedule=schedule, channels=4, latent_format=LATENT))
    t = torch.tensor([5, 250, 600])
    table = TimestepTable.from_name(schedule)
    u, abar = 3 * draw(3, 4, 16, 16), table.abar[t].view(-1, 1, 1, 1)
    output, v = unet(u, t.double()).chunk(2, dim=1)
    if prediction == "eps":
        wanted = (u - (1 - abar).sqrt() * output) / abar.sqrt()
    else:
        wanted = abar.sqrt() * u - (1 - abar).sqrt() * output
    assert float(wanted.abs().max()) > 3
    sigma = table.sigma(t)
    denoiser = ADMDenoiser(unet)
    got = denoiser.predict(u * (1 + sigma.square()).sqrt().view(-1, 1, 1, 1), sigma)
    torch.testing.assert_close(got.denoised.double(), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.variance_fraction.double(), (v + 1) / 2, rtol=0, atol=1e-9)
    assert (denoiser.convention, denoiser.shape) == (Convention.VE, (4, 16, 16))


def test_a_flow_model_predicts_noise_minus_data(draw):
    """x_t = (1 - s) x_0 + s eps and the velocity eps - x_0, at timestep 1000 s: x_0 = x_t - s * velocity, unclamped."""
    unet = random_unet(replace(CONFIG, prediction="flow", learn_sigma=False, channels=4, latent_format=LATENT))
    x, s = 3 * draw(3, 4, 16, 16), torch.tensor([1.0, 0.437, 0.01])
    velocity = unet(x, torch.tensor([1000.0, 437.0, 10.0])).double()
    denoiser = ADMDenoiser(unet)
    got = denoiser.predict(x, s)
    torch.testing.assert_close(got.denoised.double(), x.double() - s.double().view(-1, 1, 1, 1) * velocity)
    assert got.variance_fraction is None
    assert float(got.denoised.abs().max()) > 3
    assert denoiser.convention is Convention.FLOW


def test_a_flow_model_starts_from_noise_alone_and_counts_a_straight_line(draw):
    denoiser = ADMDenoiser(random_unet(replace(CONFIG, prediction="flow", learn_sigma=False)))
    sigmas = denoiser.sigmas(4)
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    noise = draw(1, 3, 16, 16)
    assert torch.equal(denoiser.initial(noise, sigmas), noise)
    assert [denoiser.percent_to_sigma()(p) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_a_shifted_flow_has_so_many_times_the_noise_ratio():
    """At every step and at every part of the run."""
    ratios, parts = [], []
    for shift in (1.0, 2.5):
        config = replace(CONFIG, prediction="flow", learn_sigma=False, flow_shift=shift)
        denoiser = ADMDenoiser(random_unet(config))
        sigmas = denoiser.sigmas(5).double()
        assert (sigmas[0], sigmas[-1]) == (1, 0)
        part = denoiser.percent_to_sigma()(0.3)
        ratios.append(sigmas[1:] / (1 - sigmas[1:]))
        parts.append(part / (1 - part))
    torch.testing.assert_close(ratios[1], 2.5 * ratios[0], rtol=1e-5, atol=0)
    assert parts[1] == pytest.approx(2.5 * parts[0])


@pytest.mark.parametrize("v", [0.25, 1.0])
def test_euler_ancestral_flow_on_gaussian_data_reaches_its_moments(v, draw):
    """x_0 ~ N(m, v): with denoised = a x + b, every step is a line plus noise, and the end is near N(m, v).

    The step estimates data and noise, keeps k of the noise, and draws the rest anew (see the test after this).
    """
    m, steps = 0.4, 200
    sigmas, mean, variance = torch.linspace(1, 0, steps + 1), 0.0, 1.0
    for s, s_next in pairwise(sigmas.double().tolist()):
        alpha, alpha_next = 1 - s, 1 - s_next
        gain = alpha * v / (alpha**2 * v + s**2)  # denoised = m + gain * (x - alpha * m)
        k = s_next**2 / s * alpha_next / (1 - s_next**2 / s)
        pull = alpha_next - k * alpha / s
        mean = k / s * mean + pull * (m + gain * (mean - alpha * m))
        variance = (k / s + pull * gain) ** 2 * variance + s_next**2 - k**2

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        alpha = 1 - s
        return m + alpha * v / (alpha**2 * v + s**2) * (x - alpha * m)

    x = last(euler_ancestral_flow(denoise, draw(4, 3, 64, 64), sigmas, generator()))
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / x.numel()))
    assert float(x.std()) == pytest.approx(math.sqrt(variance), rel=5 / math.sqrt(2 * x.numel()))
    assert (mean, math.sqrt(variance)) == pytest.approx((m, math.sqrt(v)), abs=0.02)


def test_euler_ancestral_flow_keeps_a_part_of_the_noise_and_renews_the_rest(draw):
    """x' = alpha' x_0 + k eps + sqrt(s'^2 - k^2) z with k = s'^2 / s, its signal scaled to alpha', in float64."""
    noise, random = draw(2, 3, 8, 8), generator()
    x = noise.double()
    for s, s_next in pairwise(FLOW_SIGMAS.double().tolist()):
        x_0 = curved(x, torch.tensor([s], dtype=torch.float64))
        eps = (x - (1 - s) * x_0) / s
        k = s_next**2 / s * (1 - s_next) / (1 - s_next**2 / s)
        x = (1 - s_next) * x_0 + k * eps
        if s_next > 0:
            x = x + math.sqrt(s_next**2 - k**2) * torch.randn(noise.shape, generator=random).double()
    got = last(euler_ancestral_flow(curved, noise, FLOW_SIGMAS, generator()))
    torch.testing.assert_close(got.double(), x, rtol=0, atol=1e-9)


SAMPLERS = {
    "euler": lambda denoise, x: euler(denoise, x, SIGMAS),
    "euler_ancestral": lambda denoise, x, seed=5: euler_ancestral(denoise, x, SIGMAS, generator(seed)),
    "euler_ancestral_flow": lambda denoise, x, seed=5: euler_ancestral_flow(denoise, x, FLOW_SIGMAS, generator(seed)),
    "paper": lambda denoise, x, seed=5: paper(lambda x, s: Prediction(denoise(x, s)), x, SIGMAS, generator(seed)),
}


def sigmas_of(name: str) -> Tensor:
    return FLOW_SIGMAS if name.endswith("flow") else SIGMAS


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_yield_every_step_and_end_on_the_last_estimate(name, draw):
    steps = list(SAMPLERS[name](curved, initial(draw(2, 3, 8, 8), SIGMAS[0])))
    assert [step.index for step in steps] == list(range(10))
    assert {step.steps for step in steps} == {10}
    assert [step.sigma for step in steps] == sigmas_of(name)[:-1].tolist()
    torch.testing.assert_close(steps[-1].x, steps[-1].denoised, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_work_only_when_asked_and_can_be_abandoned(name, draw):
    seen = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.tolist())
        return curved(x, sigma)

    steps = SAMPLERS[name](counted, initial(draw(2, 3, 8, 8), SIGMAS[0]))
    assert seen == []
    for _ in range(3):
        next(steps)
    steps.close()
    assert seen == [[s, s] for s in sigmas_of(name)[:3].tolist()]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["euler_ancestral", "euler_ancestral_flow", "paper"])
def test_the_generator_alone_decides_the_picture(name, draw):
    x, results = initial(draw(2, 3, 8, 8), SIGMAS[0]), []
    for global_seed, seed in [(0, 5), (1, 5), (0, 6)]:
        torch.manual_seed(global_seed)
        results.append(last(SAMPLERS[name](curved, x, seed)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_leave_their_start_alone(name, draw):
    x = initial(draw(2, 3, 8, 8), SIGMAS[0])
    before = x.clone()
    last(SAMPLERS[name](curved, x))
    assert torch.equal(x, before)


def test_a_sampler_leaves_gradients_to_the_caller_between_steps(draw):
    for _ in euler(curved, initial(draw(1, 3, 8, 8), SIGMAS[0]), SIGMAS):
        assert torch.is_grad_enabled()


def test_normal_sigmas_are_equally_spaced_in_timesteps():
    sigmas = normal_sigmas(TABLE, 10)
    assert float(sigmas[0]) == pytest.approx(157.407, abs=1e-3)
    assert float(sigmas[-1]) == 0
    torch.testing.assert_close(sigmas[:-1], TABLE.ratio[torch.arange(999, -1, -111)].float())


def test_percent_counts_the_run_from_noise_to_picture():
    sigma = percent_to_sigma(TABLE)
    assert (sigma(0.0), sigma(-1.0), sigma(1.0)) == (math.inf, math.inf, 0.0)
    assert sigma(111 / 999) == pytest.approx(float(TABLE.ratio[888]), rel=1e-4)
    values = [sigma(p / 10) for p in range(11)]
    assert values == sorted(values, reverse=True)


def test_initial_has_the_size_of_noised_data(draw):
    noise = draw(1, 3, 8, 8)
    torch.testing.assert_close(initial(noise, torch.tensor(3.0)), noise * math.sqrt(10))


def test_noise_like_follows_x():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(noise_like(x, generator()), torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator()))
