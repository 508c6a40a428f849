"""Guided sampling against a closed form, through the host's own sampling path.

Data x_0 ~ N(0, 1) per element, a measurement y = x_0 + tau * noise. With the exact denoiser and the exact gradient of
log p(y | x_t), guided samples must follow the posterior N(y / (1 + tau^2), tau^2 / (1 + tau^2)).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

Y, TAU = 1.5, 0.5
MEAN, STD = Y / (1 + TAU**2), TAU / (1 + TAU**2) ** 0.5
TOLERANCE = 0.03
BLANK = [[None, {}]]

SCHEDULERS = {"EPS": "karras", "V_PREDICTION": "karras", "EDM": "karras", "FLOW": "simple", "FLUX": "simple"}
SAMPLERS = {
    "euler": 200, "euler_ancestral": 200, "heun": 100, "dpm_2": 100, "dpmpp_2m": 100, "dpmpp_2m_sde": 200,
    "dpmpp_sde": 100, "dpmpp_3m_sde": 200, "ddim": 200, "uni_pc": 100, "euler_cfg_pp": 200,
    "euler_ancestral_cfg_pp": 200, "dpmpp_2m_cfg_pp": 100,
}  # fmt: skip

# At 100 steps. Both leave sigma = 1, where a flow has no signal and is not guided, in one long unguided stride.
KNOWN_MISSES = {
    ("FLOW", "exp_heun_2_x0"), ("FLOW", "dpmpp_2s_ancestral_cfg_pp"), ("FLUX", "dpmpp_2s_ancestral_cfg_pp"),
}  # fmt: skip


class GaussianNet(torch.nn.Module):
    """The network whose output makes the model's own ``calculate_denoised`` give E[x_0 | x_t] exactly."""

    def __init__(self, flow: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dtype, self.flow, self.sampling = torch.float32, flow, None
        self.sigma = self.x = None

    def forward(self, xc: Tensor, t: Tensor, **unused) -> Tensor:
        sigma = self.sigma.view(-1, 1, 1, 1)
        alpha = 1 - sigma if self.flow else torch.ones_like(sigma)
        denoised = alpha * self.x / (alpha**2 + sigma**2)
        zero = torch.zeros_like(self.x)
        offset = self.sampling.calculate_denoised(self.sigma, zero, self.x)
        gain = self.sampling.calculate_denoised(self.sigma, zero + 1, zero)
        return (denoised - offset) / gain


@pytest.fixture(scope="module")
def gaussian_model(comfy):
    """gaussian_model(type name, noise_scale) -> MODEL of the host with exact denoised for N(0, 1) data."""

    class Config(comfy.supported_models_base.BASE):
        unet_config = {"disable_unet_model_creation": True}
        unet_extra_config = {}
        # ADM's schedule, up to sigma 157: a run that starts at SD's 14.6 has not forgotten y's mean, guided or not.
        sampling_settings = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 2e-2}

    class Gaussian(comfy.model_base.BaseModel):
        def _apply_model(self, x, t, *args, **kwargs):
            self.diffusion_model.x, self.diffusion_model.sigma = x, t
            return super()._apply_model(x, t, *args, **kwargs)

        def extra_conds(self, **unused):
            return {}

    def build(kind: str):
        config = Config(Config.unet_config)
        config.latent_format = SimpleNamespace(
            latent_channels=3, latent_dimensions=2, spacial_downscale_ratio=1, latent_rgb_factors=None,
            taesd_decoder_name=None, process_in=lambda x: x, process_out=lambda x: x, fix_empty_latent=lambda x: x,
        )  # fmt: skip
        config.unet_config["dtype"] = torch.float32
        model = Gaussian(config, comfy.model_base.ModelType[kind])
        model.diffusion_model = GaussianNet(flow=kind in ("FLOW", "FLUX"))
        model.diffusion_model.sampling = model.model_sampling
        device = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)

    return build


@pytest.fixture(scope="module")
def posterior(pack):
    """An SDG_GUIDANCE whose score is log p(y | x_t), read by an encoder that hands on u and abar."""

    class Encoder(torch.nn.Module):
        reads, view = "noisy", "pixels"
        table = pack.method.TimestepTable.from_name("linear")
        full_depth = 2

        def __call__(self, image, t, depth):
            ratio = self.table.sigma(t).float()
            return pack.method.Features((image,), 1 / (1 + ratio.square()))

        def noise_gain(self, height, width):
            return 1.0

    @dataclass(frozen=True)
    class LogLikelihood:
        def depth(self, encoder):
            return 1

        def target(self, look):
            return pack.method.Features(())

        def score(self, features, target):
            u, abar = features.maps[0], features.embed.view(-1, 1, 1, 1)
            return -((Y - abar.sqrt() * u).square() / (2 * (1 - abar + TAU**2))).flatten(1).sum(1)

    encoder = Encoder()
    term = pack.method.Term(LogLikelihood(), encoder, 1.0)
    return pack.host.HostGuidance((term,), (pack.memory.patch_module(encoder),))


@pytest.fixture(scope="module")
def sampled(pack, run, posterior):
    """Mean and standard deviation of guided samples (or, for comparison, of unguided ones)."""

    def go(
        model, sampler: str, scheduler: str, steps: int, cfg: float, size: int = 64, guide: bool = True
    ) -> tuple[float, float]:
        guided = model
        if guide:
            guided = run("SDGApplyGuidance", model=model, guidance=posterior, strength="absolute", cap=0.0)
        x = run(
            "SDGGuidedKSampler", model=guided, seed=3, steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler,
            latent_image={"samples": torch.zeros(1, 3, size, size)}, denoise=1.0, strength="absolute", cap=1.0,
            positive=BLANK, negative=BLANK,
        )["samples"]  # fmt: skip
        return x.mean().item(), x.std().item()

    return go


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_guided_samples_follow_the_posterior(gaussian_model, sampled, kind, sampler, cfg):
    mean, std = sampled(gaussian_model(kind), sampler, SCHEDULERS[kind], SAMPLERS[sampler], cfg)
    print(f"{kind:13s} {sampler:24s} cfg {cfg:g}: mean {mean:.3f} ({MEAN:.3f}), std {std:.3f} ({STD:.3f})")
    assert abs(mean - MEAN) < TOLERANCE
    assert abs(std - STD) < TOLERANCE


@pytest.mark.parametrize("kind", SCHEDULERS)
def measure_every_sampler(comfy, gaussian_model, sampled, kind):
    """The whole table, unguided beside guided: `make closed-form`. No sampler may miss guided that is right unguided,
    but ``KNOWN_MISSES``."""
    strays = []
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        rows = []
        for guide, mean, std in ((False, 0.0, 1.0), (True, MEAN, STD)):
            with contextlib.suppress(Exception):
                got = sampled(gaussian_model(kind), sampler, SCHEDULERS[kind], 100, 1.0, 48, guide)
                off = max(abs(got[0] - mean), abs(got[1] - std))
                rows.append((*got, off < 2 * TOLERANCE))
        if len(rows) < 2:
            print(f"| {kind} | {sampler} | does not run on this toy model |")
            continue
        (plain_mean, plain_std, right), (mean, std, hit) = rows
        verdict = "" if hit else ("misses" if right else "misses, also unguided")
        print(f"| {kind} | {sampler} | {plain_mean:.3f} | {plain_std:.3f} | {mean:.3f} | {std:.3f} | {verdict} |")
        strays += [sampler] if right and not hit else []
    print(f"{kind}: wrong only when guided: {strays or 'none'}")
    assert {(kind, sampler) for sampler in strays} <= KNOWN_MISSES


def test_flow_with_another_noise_scale_follows_the_posterior(gaussian_model, sampled):
    model = gaussian_model("FLOW")
    scale = 2.0
    model.model.model_sampling.noise_scale = scale
    if model.model.model_sampling.noise_scaling(torch.tensor([0.5]), torch.ones(1), torch.zeros(1)) != 0.5 * scale:
        pytest.skip("This ComfyUI has no flow models with another noise scale (0.21.1 and newer do).")

    def forward(xc, t, **unused):
        net = model.model.diffusion_model
        s = net.sigma.view(-1, 1, 1, 1)
        denoised = (1 - s) * net.x / ((1 - s) ** 2 + (s * scale) ** 2)
        return (net.x - denoised) / s

    model.model.diffusion_model.forward = forward
    mean, std = sampled(model, "euler", "simple", 200, 1.0)
    assert abs(mean - MEAN) < TOLERANCE
    assert abs(std - STD) < TOLERANCE
