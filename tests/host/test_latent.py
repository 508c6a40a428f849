"""Latent models of every prediction, seen through every view, in a real host: against the core and the host itself.

Besides the small ADMs of conftest: networks of the host's own, Stable Diffusion 1.5 and Wan, of one block and random
weights.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import math
import os
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdg_core.files import save
from sdg_core.models import ADMUNet, read_adm

BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
PREDICTIONS = ["eps", "v", "flow"]
ROUTES = ["noisy linear", "clean linear", "clean decoded"]
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "use_spatial_transformer": True, "use_linear_in_transformer": False,
    "context_dim": 16, "adm_in_channels": None, "legacy": False, "use_checkpoint": False,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 96, "num_heads": 1,
    "ffn_dim": 128, "num_layers": 1, "patch_size": (1, 2, 2), "freq_dim": 32, "text_dim": 16,
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
KL = {
    "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def sample(run):
    """sample(model, guidance, **changes) -> the Guided KSampler's latents (B, 4, 16, 16)."""

    def go(model, guidance=None, batch=2, **changes) -> Tensor:
        inputs = {
            "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
            "latent_image": {"samples": torch.zeros(batch, 4, 16, 16)},
        }  # fmt: skip
        return run("SDGGuidedKSampler", model=model, guidance=guidance, **(inputs | changes))["samples"]

    return go


@pytest.fixture(scope="module")
def text(run):
    """text(encoder, scale) -> guidance by a text in the whole run, or in a part of it."""

    def make(encoder, scale=200.0, **interval):
        return run("SDGTextGuidance", noisy_clip=encoder, text="a red hat", scale=scale, **(WHOLE | interval))

    return make


@pytest.fixture(scope="module")
def routes(text, linear_noisy_clip, clean_clip, autoencoder) -> dict[str, dict]:
    """Inputs of Apply Guidance for every way to look at the latents of the small ADMs."""
    return all_routes(text, linear_noisy_clip, clean_clip, autoencoder)


@pytest.fixture
def exact_latent_adm(run, exact):
    """The small ADM of latents that predicts eps, in float64."""
    return exact(run("SDGLoadADM", adm_name="latent_eps.safetensors"))


@pytest.fixture
def exact_routes(pack, run, exact, text, models_folder, monkeypatch) -> dict[str, dict]:
    """The routes in float64."""
    noisy = exact(run("SDGLoadNoisyCLIP", noisy_clip_name="latent.safetensors"))
    clean = exact(run("SDGLoadCLIP", clip_name=pack.host.BUNDLED_NAME, architecture="RN50", pretrained=""))
    monkeypatch.setattr(pack.files, "BUNDLED", models_folder)
    return all_routes(text, noisy, clean, exact(run("SDGLoadAutoencoder")))


def all_routes(text, linear_noisy_clip, clean_clip, autoencoder) -> dict[str, dict]:
    """Strength is relative: random encoders pull little."""
    noisy, clean = ({"guidance": text(e), "strength": "relative", "cap": 0.5} for e in (linear_noisy_clip, clean_clip))
    return {
        "noisy linear": noisy,
        "clean linear": clean | {"view": "linear"},
        "clean decoded": clean | {"view": "decoded", "vae": autoencoder},
    }


@pytest.fixture(scope="module")
def host_model(comfy):
    """host_model(family, config of the network) -> a MODEL of the host's own kind with random weights."""

    def build(family: str, unet: dict):
        config = getattr(comfy.supported_models, family)(dict(unet))
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        model = config.get_model({}, device=cpu)
        draw(model.diffusion_model).eval()
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return build


def draw(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep the size of what passes through, from a fixed seed; norms and biases that do nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.requires_grad_(False).named_parameters():
        values = torch.randn(p.shape, generator=generator) * math.prod(p.shape[1:]) ** -0.5
        p.copy_(values if p.ndim > 1 else torch.full_like(p, float(name.endswith("weight"))))
    return model


@pytest.fixture(scope="module")
def sd15(host_model):
    return host_model("SD15", SD15)


@pytest.fixture(scope="module")
def prompts() -> dict[str, list]:
    """Positive and negative for the host's networks."""
    generator = torch.Generator().manual_seed(1)
    names = ("positive", "negative")
    return {name: [[torch.randn(1, 7, 16, generator=generator), {}]] for name in names}


@pytest.fixture(scope="module")
def taesd_file(comfy, tmp_path_factory) -> Iterator[Path]:
    """A decoder in TAESD's layout with random weights, in models/vae_approx."""
    from comfy.taesd.taesd import Decoder

    folder = tmp_path_factory.mktemp("vae_approx")
    save_file(draw(Decoder(latent_channels=4)).state_dict(), folder / "taesd_decoder.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(comfy.folder_paths.folder_names_and_paths, "vae_approx", ([str(folder)], {".safetensors"}))
        yield folder / "taesd_decoder.safetensors"


@pytest.fixture(scope="module")
def kl_vae(comfy):
    """A VAE object of the host around its own AutoencoderKL, small, with random weights."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {"params": {"ddconfig": KL, "embed_dim": 4}}
    with torch.inference_mode():
        state = draw(AutoencoderKL(ddconfig=KL, embed_dim=4)).state_dict()
        return comfy.sd.VAE(sd=state, config=config)


def ksampler(comfy, model, prompts=None, batch=2, cfg=1.0, denoise=1.0, latent=None):
    """The host's own KSampler, at the settings of ``sample``."""
    prompts = prompts or {"positive": BLANK, "negative": BLANK}
    latent = latent or {"samples": torch.zeros(batch, 4, 16, 16)}
    with torch.inference_mode():
        return comfy.nodes.common_ksampler(
            model, 7, 4, cfg, "euler", "normal", prompts["positive"], prompts["negative"], latent, denoise
        )[0]["samples"]


def change(guided: Tensor, plain: Tensor) -> float:
    """RMS of the difference over that of the latent."""
    return ((guided - plain).square().mean() / plain.square().mean()).sqrt().item()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# Every prediction through every view


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_guidance_or_scale_it_is_the_hosts_ksampler(
    comfy, sample, text, latent_adm, linear_noisy_clip, clean_clip, autoencoder, prediction
):
    model = latent_adm(prediction)
    plain = ksampler(comfy, model)
    assert plain.isfinite().all()
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(model, text(linear_noisy_clip, 0.0)), plain)
    assert torch.equal(sample(model, text(clean_clip, 0.0), view="decoded", vae=autoencoder), plain)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guided_gives_another_finite_latent_and_the_same_one_again(sample, latent_adm, routes, prediction, route):
    model = latent_adm(prediction)
    guided = sample(model, **routes[route])
    assert guided.isfinite().all()
    assert change(guided, sample(model)) > 1e-3
    assert torch.equal(sample(model, **routes[route]), guided)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_host_euler_gives_the_cores_latent(
    comfy, pack, run, models_folder, latent_adm, routes, autoencoder, prediction, route
):
    """The core's own denoiser and views, from the same files, in the latents' own scale."""
    load = pack.models
    denoiser = load.ADMDenoiser(load.load_adm(models_folder / f"adm/latent_{prediction}.safetensors"))
    space = denoiser.unet.config.latent_format
    decoder = load.load_tiny_autoencoder(models_folder / "latent/autoencoder.safetensors").decoder
    view = space.tiny_view(decoder) if route == "clean decoded" else space.linear_view()
    terms = routes[route]["guidance"].terms
    state = pack.method.GuidanceRun(
        terms, denoiser.convention, denoiser.percent_to_sigma(), pack.method.Strength("relative", 0.5),
        lambda encoder: view, 1.0,
    )  # fmt: skip
    sigmas = denoiser.sigmas(6)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    *_, last = pack.models.euler(pack.models.guided(denoiser, state), denoiser.initial(noise, sigmas), sigmas)
    model = run("SDGApplyGuidance", model=latent_adm(prediction), **routes[route])
    seen = custom(comfy, model, sigmas, noise)
    assert difference(seen, last.x / space.scale + space.shift) < 1e-3


def custom(comfy, model, sigmas: Tensor, noise: Tensor, cfg=1.0, positive=BLANK, negative=BLANK, callback=None):
    """What SamplerCustom does with euler, from an empty latent."""
    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, cfg, euler, sigmas.clone(), positive, negative, torch.zeros_like(noise), callback=callback,
            disable_pbar=True, seed=7,
        )  # fmt: skip


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusion_model_never_sees_autograd_through_any_view(sample, latent_adm, routes, prediction):
    model, seen = latent_adm(prediction), []

    def look(module, inputs, output):
        seen.append((torch.is_grad_enabled(), inputs[0].requires_grad, output.requires_grad))

    hook = model.model.diffusion_model.register_forward_hook(look)
    try:
        for inputs in routes.values():
            sample(model, **inputs)
    finally:
        hook.remove()
    assert len(seen) == 3 * 4
    assert set(seen) == {(False, False, False)}


# One network as all three


@pytest.fixture(scope="module")
def angle_file(models_folder, tmp_path_factory) -> Path:
    """A random network of the angle, as large as the small ADMs and on their latents."""
    config = replace(read_adm(models_folder / "adm/latent_v.safetensors")[0], time="angle")
    path = tmp_path_factory.mktemp("faces") / "model.safetensors"
    save(path, "adm", asdict(config), draw(ADMUNet(config)).state_dict())
    return path


@pytest.fixture
def face(pack, run, angle_file, monkeypatch):
    """face("eps", "v" or "flow") -> the one file as a MODEL, by the name of a bundled one."""
    monkeypatch.setattr(pack.files, "latent_model_file", lambda prediction, folder: (angle_file, prediction))
    return lambda prediction: run("SDGLoadADM", adm_name=f"avatars latent {prediction} (bundled)")


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 16), (torch.float16, 1), (torch.bfloat16, 1)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_faces_of_one_file_give_the_cores_denoised(pack, face, angle_file, prediction, dtype, roundings):
    """The core in float64; the host in float32 or half, where what x_vp and eps are rounded by counts sigma times.

    Times near 1000 are rounded too, in float32 whatever the network computes in: that is most of what float32 shows.
    """
    model = face(prediction).model
    model.manual_cast_dtype, model.diffusion_model.dtype = None, dtype
    with torch.inference_mode():
        model.diffusion_model.to(dtype)
    denoiser = pack.models.ADMDenoiser(pack.models.load_adm(angle_file, prediction).double())
    sigmas = model.model_sampling.sigmas[[0, 40, 300, 750, 999]]
    x = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * (1 + sigmas.view(-1, 1, 1, 1))
    with torch.inference_mode():
        seen, wanted = model.apply_model(x, sigmas).double(), denoiser(x.double(), sigmas.double())
    apart = (seen - wanted).square().mean(dim=(1, 2, 3)).sqrt()
    assert (model.manual_cast_dtype or model.get_dtype()) == dtype
    assert wanted[-1].std() > 0.3  # of v, with next to no signal left
    assert (apart < roundings * torch.finfo(dtype).eps * (1 + sigmas)).all()


def test_faces_of_one_file_sample_one_latent(comfy, exact, face):
    """Euler's steps of x_t / alpha are the same in every convention, at the same sigma / alpha."""
    noise, seen = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7)), {}
    for prediction in PREDICTIONS:
        model = exact(face(prediction))
        if prediction != "flow":
            ratios = torch.cat([model.model.model_sampling.sigmas[[990, 700, 400, 150, 20]], torch.zeros(1)])
        seen[prediction] = custom(comfy, model, ratios / (1 + ratios) if prediction == "flow" else ratios, noise)
    assert seen["v"].std() > 0.1
    for prediction in ("eps", "flow"):
        assert difference(seen[prediction], seen["v"]) < 1e-5


# Decoders


def decoded_view(pack, model, clip, vae=None):
    return pack.views.choose_view(model, clip.model, pack.views.ViewChoice("decoded", vae)).view


def test_guided_through_taesd(comfy, sample, text, sd15, prompts, clean_clip, taesd_file):
    plain = ksampler(comfy, sd15, prompts)
    guided = sample(sd15, text(clean_clip), view="decoded", strength="relative", cap=0.5, **prompts)
    assert guided.isfinite().all()
    assert change(guided, plain) > 1e-3


def test_taesd_view_is_the_hosts_own_taesd(pack, sd15, clean_clip, taesd_file):
    from comfy.taesd.taesd import TAESD

    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = TAESD(None, str(taesd_file), latent_channels=4).decode(x)
        seen = decoded_view(pack, sd15, clean_clip).picture(x, torch.ones(2))
    assert seen.shape == wanted.shape == (2, 3, 64, 96)
    assert wanted.std() > 0.1
    assert (seen - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("values", ["-1..1", "0..1"])
def test_vae_view_is_the_hosts_own_decode(comfy, pack, sd15, clean_clip, kl_vae, monkeypatch, values):
    """Some VAEs' models give pictures in 0..1 (TAEHV): their objects say so by leaving them as they are."""
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    if values == "0..1":
        monkeypatch.setattr(kl_vae, "process_output", lambda image: image)
    with torch.inference_mode():
        wanted = kl_vae.decode(sd15.model.latent_format.process_out(x)).movedim(-1, 1)
        seen = (decoded_view(pack, sd15, clean_clip, kl_vae).picture(x, torch.ones(2)) + 1) / 2
    assert seen.shape == wanted.shape == (2, 3, 64, 96)
    assert (seen if values == "0..1" else seen.clamp(0, 1)).sub(wanted).abs().max() < 1e-5


def test_gradient_through_a_vae_is_the_finite_difference(pack, sd15, text, clean_clip, kl_vae):
    term = text(clean_clip).terms[0]
    ones = torch.ones(1)
    sight = pack.method.Sight(decoded_view(pack, sd15, clean_clip, kl_vae), ones, torch.zeros(1))
    target = pack.method.Target(term.guidance.target(None))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradient(x):
        with torch.inference_mode():
            return pack.method.score_gradient(term.encoder, [term], ones[None], [target], x, sight)

    grad, _ = gradient(x)
    direction, step = grad / grad.norm(), 0.004
    ahead, behind = (gradient(x + sign * step * direction)[1].item() for sign in (1, -1))
    assert grad.norm() > 1e-4
    assert (ahead - behind) / (2 * step) == pytest.approx(grad.norm().item(), rel=0.02)


def test_autoencoder_is_a_vae_of_the_host(comfy, pack, models_folder, latent_adm, autoencoder):
    load, space = pack.models, latent_adm("eps").model.diffusion_model.config.latent_format
    model = load.load_tiny_autoencoder(models_folder / "latent/autoencoder.safetensors")
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latent = {"samples": latent_adm("eps").model.process_latent_out(x)}
        (image,) = comfy.nodes.VAEDecode().decode(autoencoder, latent)
        (encoded,) = comfy.nodes.VAEEncode().encode(autoencoder, image)
        wanted = (space.tiny_view(model.decoder).picture(x, torch.ones(2)) + 1) / 2
        assert (image.movedim(-1, 1) - wanted.clamp(0, 1)).abs().max() < 1e-5
        assert (encoded["samples"] - model.encoder(image.movedim(-1, 1))).abs().max() < 1e-5


def test_a_pixel_vae_changes_nothing_for_a_pixel_model(comfy, sample, text, adm, clean_clip):
    vae = comfy.nodes.VAELoader().load_vae("pixel_space")[0]
    start = {"latent_image": {"samples": torch.zeros(1, 3, 16, 16)}}
    assert torch.equal(sample(adm, text(clean_clip), vae=vae, **start), sample(adm, text(clean_clip), **start))


def test_decoder_memory_is_reserved(pack, sd15, clean_clip, kl_vae):
    """Beside what the encoder takes, what decoding each latent takes."""
    guidance, asked = pack.host.HostGuidance((), (clean_clip,)), []
    shape, choices = torch.Size([16, 4, 32, 32]), [("linear",), ("decoded", kl_vae)]
    for choice in choices:
        sights = pack.views.see(sd15, guidance, pack.views.ViewChoice(*choice))
        pack.seam._memory_reserver(sights)(lambda model, shape, conds: asked.append(shape[0]), sd15, shape, {})
    one, needed = sd15.memory_required([2, 4, 32, 32]), pack.memory.decoder_bytes(kl_vae.first_stage_model, shape, 8)
    assert asked[0] > 16
    assert abs((asked[1] - asked[0]) * one - 16 * needed) <= one


# What does not fit is refused


def refused(sample, message, model, guidance, **inputs):
    with pytest.raises(ValueError, match=message):
        sample(model, guidance, **inputs)


def test_a_noisy_clip_of_another_view_is_refused_by_name(
    sample, text, adm, latent_adm, sd15, prompts, noisy_clip, linear_noisy_clip
):
    pixels, linear = text(noisy_clip), text(linear_noisy_clip)
    start = {"latent_image": {"samples": torch.zeros(1, 3, 16, 16)}}
    wanted = 'made for "{}", but this model is seen as "{}".*Load a noisy CLIP made for "{}"'
    refused(sample, wanted.format("pixels", *["linear:made up"] * 2), latent_adm("eps"), pixels)
    refused(sample, wanted.format("linear:made up", *["pixels"] * 2), adm, linear, **start)
    refused(sample, wanted.format("linear:made up", *["linear:SD15"] * 2), sd15, linear, **prompts)


def test_views_that_a_model_does_not_have_are_refused(sample, text, adm, latent_adm, clean_clip):
    clean, start = text(clean_clip), {"latent_image": {"samples": torch.zeros(1, 3, 16, 16)}}
    refused(sample, r"The view is pixels.*\(made up\) have 4 channels", latent_adm("eps"), clean, view="pixels")
    refused(sample, "The view is linear, but this model draws pixels", adm, clean, view="linear", **start)
    wanted = r"no tiny decoder for this model's latents \(made up\)\. Connect a VAE, or choose the view linear\."
    refused(sample, wanted, latent_adm("eps"), clean, view="decoded")


def test_a_noisy_clip_is_refused_for_the_decoded_view(sample, text, latent_adm, linear_noisy_clip, pair, autoencoder):
    wanted = "The view is decoded, but a noisy CLIP.*Load CLIP"
    for encoder in (linear_noisy_clip, pair(-1)):
        refused(sample, wanted, latent_adm("eps"), text(encoder), view="decoded", vae=autoencoder)


def test_a_missing_taesd_is_named_with_its_folder(
    comfy, sample, text, sd15, prompts, clean_clip, monkeypatch, tmp_path
):
    folders = comfy.folder_paths.folder_names_and_paths
    monkeypatch.setitem(folders, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    missing = r"needs taesd_decoder\.safetensors \(or \.pth\) in models/vae_approx"
    refused(sample, missing, sd15, text(clean_clip), view="decoded", **prompts)


def test_a_latent_without_linear_picture_is_seen_decoded_or_refused(
    pack, sample, text, latent_adm, clean_clip, linear_noisy_clip, autoencoder
):
    model = latent_adm("eps").clone()
    latent = type(model.model.latent_format)()
    latent.latent_rgb_factors = None
    model.add_object_patch("latent_format", latent)
    wanted = r"no linear picture of this model's latents \(made up\).*view decoded and connect a VAE"
    refused(sample, wanted, model, text(clean_clip), view="linear")
    refused(sample, wanted, model, text(linear_noisy_clip))
    refused(sample, r"no tiny decoder for this model's latents \(made up\)\. Connect a VAE\.$", model, text(clean_clip))
    choice = pack.views.ViewChoice("auto", autoencoder)
    assert pack.views.choose_view(model, clean_clip.model, choice).view.name == "decoded"


def test_nested_latents_are_refused(comfy, sample, text, latent_adm, clean_clip):
    """Video with audio: the host hands it to samplers flattened."""
    both = comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 16, 16), torch.zeros(1, 8, 10)])
    refused(sample, "Nested latents", latent_adm("flow"), text(clean_clip), latent_image={"samples": both})


# What the host's samplers do around a run


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_outside_a_noise_mask_guidance_leaves_the_bits(sample, latent_adm, routes, prediction, route):
    model = latent_adm(prediction)
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    inputs = {"latent_image": {"samples": latent, "noise_mask": mask}}
    guided, plain = sample(model, **routes[route], **inputs), sample(model, **inputs)
    assert torch.equal(guided[..., :8], plain[..., :8])
    assert (guided[..., 8:] - plain[..., 8:]).abs().min(dim=1).values.mean() > 1e-4


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_two_halves_of_ksampler_advanced_are_one_run(comfy, run, latent_adm, routes, prediction, route):
    """To the bit: with no rounding of the host's between the halves, by a latent's scale or a flow's (1 - sigma)."""
    model = run("SDGApplyGuidance", model=latent_adm(prediction), **routes[route])
    latent = type(model.model.latent_format)()
    latent.process_in = latent.process_out = lambda x: x
    model.add_object_patch("latent_format", latent)
    if prediction == "flow":
        kept = copy.copy(model.get_model_object("model_sampling"))
        kept.noise_scaling = lambda sigma, noise, latent_image, max_denoise=False: sigma * noise + latent_image
        kept.inverse_noise_scaling = lambda sigma, latent: latent
        model.add_object_patch("model_sampling", kept)

    def part(latent, start, end, noise, leftover) -> dict:
        with torch.inference_mode():
            return comfy.nodes.KSamplerAdvanced().sample(
                model, noise, 7, 6, 1.0, "euler", "normal", BLANK, BLANK, latent, start, end, leftover
            )[0]

    empty = {"samples": torch.zeros(2, 4, 16, 16)}
    whole = part(empty, 0, 6, "enable", "disable")["samples"]
    halves = part(part(empty, 0, 3, "enable", "enable"), 3, 6, "disable", "disable")["samples"]
    assert torch.equal(halves, whole)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_part_of_the_noise_is_guided_in_the_hosts_ksampler_too(comfy, run, sample, latent_adm, routes, prediction):
    model, route = latent_adm(prediction), routes["clean linear"]
    latent = {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))}
    guided = sample(model, **route, denoise=0.4, latent_image=latent)
    applied = run("SDGApplyGuidance", model=model, **route)
    assert torch.equal(ksampler(comfy, applied, denoise=0.4, latent=latent), guided)
    assert change(guided, sample(model, denoise=0.4, latent_image=latent)) > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("where", ["everywhere", "area", "mask"])
def test_guidance_adds_the_cores_shift_to_what_cfg_areas_and_masks_gave(
    comfy, pack, run, sd15, prompts, text, clean_clip, cfg, where
):
    """One step of euler to sigma 0 gives denoised itself."""
    positive, negative = prompts["positive"], prompts["negative"]
    if where == "area":
        (part,) = comfy.nodes.ConditioningSetArea().append(negative, 64, 64, 64, 32, 1.5)
        positive = positive + part
    if where == "mask":
        mask = torch.zeros(1, 128, 128)
        mask[:, :64] = 1
        (part,) = comfy.nodes.ConditioningSetMask().append(negative, mask, "default", 1.5)
        positive = positive + part
    guidance = text(clean_clip, 2000.0)
    sigma, noise = torch.tensor([2.0, 0.0]), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    scale = sd15.model.latent_format.scale_factor
    plain, guided = (
        custom(comfy, model, sigma, noise, cfg, positive, negative) * scale
        for model in (sd15, run("SDGApplyGuidance", model=sd15, guidance=guidance, strength="absolute", cap=1.0))
    )
    sights = pack.views.see(sd15, guidance, pack.views.ViewChoice())
    state = pack.seam.open_run(sd15, guidance.terms, pack.method.Strength(), sights)
    shift = pack.method.guidance_shift(plain, noise * 2, sigma[:1], state)
    assert shift.square().mean().sqrt() > 1e-2
    assert (guided - plain - shift).abs().max() < 1e-3 * shift.abs().max()


# Video


@pytest.fixture(scope="module")
def video(host_model, sample, prompts):
    """video(guidance, **changes) -> two videos of five latent frames, from Wan, in one step from half of its noise."""
    model = host_model("WAN21_T2V", WAN)
    latent = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))

    def go(guidance=None, **changes) -> Tensor:
        start = {"steps": 1, "denoise": 0.5, "scheduler": "simple", "cfg": 3.0, "latent_image": {"samples": latent}}
        return sample(model, guidance, **start | prompts | {"strength": "relative", "cap": 0.5} | changes)

    return go


def test_guidance_frames_guide_only_the_frames_they_name(run, video, text, clean_clip):
    every = text(clean_clip)
    plain, all_frames = video(), video(every)
    some = video(run("SDGGuidanceFrames", guidance=every, frames="0, -2"))
    moved = (all_frames - plain).square().mean(dim=(1, 3, 4)).sqrt()
    assert plain.isfinite().all()
    assert (moved > 1e-2).all()
    for frame in (1, 2):
        assert torch.equal(some[:, :, frame], plain[:, :, frame])
    for frame in (0, 3):
        assert difference(some[:, :, frame], all_frames[:, :, frame]) < 1e-5


def test_guided_video_runs_whole(video, text, clean_clip):
    plain, guided = (video(guidance, steps=3, denoise=1.0) for guidance in (None, text(clean_clip)))
    assert guided.isfinite().all()
    assert (guided - plain).square().mean(dim=(1, 3, 4)).sqrt().min() > 1e-3


def test_frames_that_the_video_does_not_have_are_refused(run, video, text, clean_clip):
    far = run("SDGGuidanceFrames", guidance=text(clean_clip), frames="0-7")
    with pytest.raises(ValueError, match=r"this video has 5 latent frames, 0\.\.4"):
        video(far)
    with pytest.raises(ValueError, match="whole numbers and ranges"):
        run("SDGGuidanceFrames", guidance=text(clean_clip), frames="first")


def test_guidance_frames_leave_pictures_alone(run, sample, text, latent_adm, clean_clip):
    guidance = text(clean_clip)
    framed = run("SDGGuidanceFrames", guidance=guidance, frames="3")
    assert torch.equal(sample(latent_adm("v"), framed), sample(latent_adm("v"), guidance))


# Two encoders


@pytest.fixture(scope="module")
def pair(run, linear_noisy_clip, clean_clip):
    """pair(crossover) -> a noisy and a clean encoder in one."""
    return lambda crossover: run(
        "SDGEncoderCrossfade", noisy=linear_noisy_clip, clean=clean_clip, crossover=float(crossover)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_crossfade_is_the_noisy_one_above_and_the_clean_one_below(
    sample, text, latent_adm, pair, linear_noisy_clip, clean_clip, prediction
):
    model = latent_adm(prediction)
    early, low = {"end_percent": 0.8}, {"denoise": 0.25}  # noise well above t = 0, and well below t = 999
    latent = {"latent_image": {"samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))}}
    assert torch.equal(sample(model, text(pair(0), **early)), sample(model, text(linear_noisy_clip, **early)))
    noisy, clean, both = (
        sample(model, text(e), **latent, **low) for e in (linear_noisy_clip, clean_clip, pair(999))
    )  # fmt: skip
    assert torch.equal(both, clean)
    assert not torch.equal(both, noisy)


def test_a_crossfade_in_the_middle_is_neither(sample, text, latent_adm, pair, linear_noisy_clip, clean_clip):
    pictures = [sample(latent_adm("eps"), text(e)) for e in (pair(300), linear_noisy_clip, clean_clip)]
    assert pictures[0].isfinite().all()
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def test_each_encoder_of_a_crossfade_has_its_own_view(pack, text, latent_adm, pair, autoencoder):
    guidance = text(pair(-1))
    sights = pack.views.see(latent_adm("eps"), guidance, pack.views.ViewChoice("auto", autoencoder))
    assert [sights.view_of(term.encoder).name for term in guidance.terms] == ["linear:made up", "decoded"]


def test_a_crossfade_the_wrong_way_round_is_refused(run, pair, linear_noisy_clip, clean_clip):
    with pytest.raises(ValueError, match="read denoised and noisy; wanted a noisy CLIP in the first"):
        run("SDGEncoderCrossfade", noisy=clean_clip, clean=linear_noisy_clip, crossover=-1.0)
    with pytest.raises(ValueError, match="read noisy and noisy"):
        run("SDGEncoderCrossfade", noisy=linear_noisy_clip, clean=linear_noisy_clip, crossover=-1.0)
    with pytest.raises(ValueError, match="input noisy is a crossfade of two encoders already"):
        run("SDGEncoderCrossfade", noisy=pair(-1), clean=clean_clip, crossover=-1.0)


# Memory and cancelling


@pytest.mark.parametrize("route", ROUTES)
def test_out_of_memory_takes_the_gradient_in_parts(
    pack, sample, exact_latent_adm, exact_routes, assert_equal_runs, monkeypatch, caplog, route
):
    model, routes, gradient, sizes = exact_latent_adm, exact_routes, pack.gradient.score_gradient, []
    whole = sample(model, **routes[route], batch=4)

    def short_of_memory(encoder, terms, weights, targets, x, sight):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("Tried to allocate too much.")
        return gradient(encoder, terms, weights, targets, x, sight)

    monkeypatch.setattr(pack.gradient, "score_gradient", short_of_memory)
    with caplog.at_level(logging.WARNING):
        parts = sample(model, **routes[route], batch=4)
    assert sizes == [4, *[2, 2] * 4]
    assert [record.message for record in caplog.records if "Out of memory" in record.message] == [
        "Out of memory in the guidance gradient of 4 pictures; it is taken in parts now."
    ]
    assert_equal_runs(parts, whole)


@pytest.mark.skipif(sys.platform != "linux", reason="Reads /proc.")
def test_ten_runs_leave_no_memory_behind(
    sample, text, latent_adm, sd15, prompts, pair, clean_clip, autoencoder, taesd_file, caplog
):
    """After the tenth run at most 1 % more than after the second, through a VAE and through TAESD."""

    def resident() -> int:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for _ in range(10):
        sample(latent_adm("eps"), text(pair(300)), vae=autoencoder)
        sample(sd15, text(clean_clip), view="decoded", steps=2, batch=1, **prompts)
        sizes.append(resident())
    print(f"Resident after run 2: {sizes[1] / 2**20:.1f} MB, after run 10: {sizes[9] / 2**20:.1f} MB.")
    assert sizes[9] <= 1.01 * sizes[1]
    assert not [r.message for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("route", ROUTES)
def test_cancelling_ends_the_run_within_a_step_and_leaves_nothing(
    comfy, pack, run, latent_adm, routes, monkeypatch, route
):
    model = run("SDGApplyGuidance", model=latent_adm("v"), **routes[route])
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    before = custom(comfy, model, sigmas, noise)
    states, steps, times = [], [], []
    original = pack.seam.open_run

    def spy(*args):
        state = original(*args)
        states.append((weakref.ref(state), weakref.ref(state.chunks)))
        return state

    def cancel(step, *_):
        steps.append(step)
        if step == 2:
            times.append(time.perf_counter())
            comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(pack.seam, "open_run", spy)
    try:
        custom(comfy, model, sigmas, noise, callback=cancel)
    except comfy.model_management.InterruptProcessingException:
        times.append(time.perf_counter())
    assert steps == [0, 1, 2]
    assert len(times) == 2
    print(f"{route}: cancelled in {1000 * (times[1] - times[0]):.1f} ms.")
    gc.collect()
    assert [ref() for pair in states for ref in pair] == [None, None]
    assert torch.equal(custom(comfy, model, sigmas, noise), before)
