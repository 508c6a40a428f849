"""Half precision: models in bf16, fp16 and fp8, latents and files in fp16, sigma up to 157.

Every family of architectures.py, small, computing in the precision itself (on a CPU the host would compute in float32).
`make precision` prints the table; precision.py says what its columns are.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAMILIES = ["SD15", "SDXL", "SD3", "Flux", "WAN21_T2V"]
PRECISIONS = ["fp32", "bf16", "fp16", "fp8"]
TIMES_DENOISED = 4.0
"""The clean encoder's shift is at most this many times as far from float32's as denoised is. Measured: up to 2.5."""
TIMES_PICTURE = 2.0
"""The guided picture is at most this many times as far from float32's as the unguided one. Measured: up to 1.3."""


@pytest.fixture(scope="module")
def measures(comfy, pack):
    """precision.py and what it imports, which lie beside this file."""
    pack.ksampler = comfy.nodes.KSampler
    sys.path.insert(0, str(Path(__file__).parent))
    yield importlib.import_module("precision")
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, comfy, pack, measures) -> Iterator[object]:
    yield measures.Family(pack, request.param)
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="module")
def row(family) -> Callable[[str], object]:
    return functools.cache(family.row)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_guided_is_finite_and_scale_zero_leaves_the_bits(row, precision):
    assert row(precision).finite
    assert row(precision).zero


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_the_guided_picture_stays_as_near_to_float32s_as_the_unguided_one(row, precision):
    measured = row(precision)
    assert 0 < measured.model < 0.1
    assert measured.noisy == 0  # it reads x_t, not denoised
    assert measured.times <= TIMES_DENOISED
    assert max(measured.run_noisy, measured.run_clean) <= TIMES_PICTURE


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("encoder", ["noisy", "clean"])
def test_the_shift_is_float32s_own_whatever_the_model_computes_in(pack, family, precision, encoder):
    """The same bits as outside of the host, from the denoised that the model gave."""
    guidance, model = family.guidance[encoder], family.model(precision)
    sights = pack.views.see(model, guidance, pack.views.ViewChoice())
    for step in family.steps(precision, encoder):
        run = pack.seam.open_run(model, guidance.terms, pack.method.Strength(cap=None), sights)
        with Dtypes() as seen:
            shift = pack.method.guidance_shift(step.denoised.float(), step.x_t.float(), step.sigma.float(), run)
        assert torch.equal(shift, step.shift)
        assert seen.dtypes <= {torch.float32, torch.float64}


class Dtypes(TorchDispatchMode):
    """Floating dtypes of every tensor that is computed, and the operations that gave numbers that are not finite, of
    finite ones. (A NaN that is written down says that a number is not known.)"""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.broken: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        computed = given and not func.__name__.startswith("empty") and all(x.isfinite().all() for x in given)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.dtypes.add(tensor.dtype)
                if computed and not tensor.isfinite().all():
                    self.broken.append(func.__name__)
        return out


# Latents and files in fp16


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_latents_in_fp16_are_sampled_as_they_are_without_guidance(family, precision):
    """Guided, they are as near to the run of float32 latents as unguided, within ``TIMES_PICTURE``.

    With CFG, for without it ComfyUI 0.8 divides such latents by 1e-37, which fp16 does not hold, guided or not.
    """
    encoders, dtypes = (None, "noisy", "clean"), (torch.float16, torch.float32)
    halves, exact = ([family.picture(precision, e, dtype, 2.0) for e in encoders] for dtype in dtypes)
    assert torch.equal(family.picture(precision, "off", torch.float16, 2.0), halves[0])
    assert all(picture.isfinite().all() for picture in halves)
    plain, *guided = (rms_apart(a, b) for a, b in zip(halves, exact, strict=True))
    assert max(guided) <= TIMES_PICTURE * plain


def rms_apart(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).square().mean() / b.float().square().mean()).sqrt().item()


@pytest.fixture(scope="module")
def text(run):
    def make(encoder, **changes):
        inputs = {"text": "a red hat", "scale": 200.0, "start_percent": 0.0, "end_percent": 1.0} | changes
        return run("SDGTextGuidance", noisy_clip=encoder, **inputs)

    return make


def test_an_encoder_file_in_fp16_guides_in_float32(pack, run, models_folder, noisy_clip, adm, text):
    """As one in float32 that holds the same numbers."""
    half = models_folder / "noisy_clip/random.safetensors"
    state = load_file(half)
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
    exact = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    with safe_open(str(half), framework="pt") as file:
        save_file(exact, half.with_stem("random_float32"), file.metadata())
    other = run("SDGLoadNoisyCLIP", noisy_clip_name="random_float32.safetensors")
    for encoder in (noisy_clip.model, other.model):
        assert {v.dtype for v in encoder.state_dict().values() if v.is_floating_point()} == {torch.float32}
    pictures = [draw(run, adm, text(encoder)) for encoder in (noisy_clip, other)]
    assert torch.equal(*pictures)


def draw(run, model, guidance=None, samples=None, **changes) -> Tensor:
    """A short run of a pixel model by the Guided KSampler."""
    inputs = {
        "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "strength": "relative", "cap": 0.1,
    }  # fmt: skip
    latent = {"samples": torch.zeros(2, 3, 16, 16) if samples is None else samples}
    return run("SDGGuidedKSampler", model=model, guidance=guidance, latent_image=latent, **(inputs | changes))[
        "samples"
    ]


# What the host's options choose


OPTIONS = {
    "bf16_unet": "bfloat16", "fp16_unet": "float16", "fp8_e4m3fn_unet": "float8_e4m3fn", "fp8_e5m2_unet": "float8_e5m2",
    "fp64_unet": "float64",
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_adm_is_guided_in_the_dtype_of_the_hosts_option(comfy, run, noisy_clip, adm, text, monkeypatch, option):
    import comfy.cli_args

    monkeypatch.setattr(comfy.cli_args.args, option, True)
    model = run("SDGLoadADM", adm_name="random.safetensors")
    wanted = getattr(torch, OPTIONS[option])
    assert model.model.get_dtype() == wanted
    plain = draw(run, model)
    assert plain.isfinite().all()
    assert torch.equal(draw(run, model, text(noisy_clip, scale=0.0)), plain)
    guided = draw(run, model, text(noisy_clip))
    assert guided.isfinite().all()
    assert rms_apart(guided, plain) > 1e-3
    assert rms_apart(plain, draw(run, adm)) < 0.1


# Overflow


def pull(run, kind: str, encoder) -> object:
    """A guidance of each kind, at ten times and more of its default scale."""
    whole = {"scale": 1e4, "start_percent": 0.0, "end_percent": 1.0}
    if kind == "text":
        return run("SDGTextGuidance", noisy_clip=encoder, text="a red hat", **whole)
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(5))
    more = {"content": {}, "structure": {"layers": "3"}, "style": {"layers": "3", "centred": False}}[kind]
    return run(f"SDG{kind.capitalize()}Guidance", noisy_clip=encoder, image=image, **whole, **more)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["text", "content", "structure", "style"])
@pytest.mark.parametrize("encoder", ["noisy_clip", "clean_clip"])
def test_nothing_overflows_at_the_largest_noise(pack, run, request, adm, encoder, kind, dtype):
    """x_t, denoised and sigma in half precision at sigma 157.4: as in float32, rounded once."""
    guidance = pull(run, kind, request.getfixturevalue(encoder))
    generator = torch.Generator().manual_seed(6)
    denoised = torch.randn(2, 3, 16, 16, generator=generator).clamp(-1, 1).to(dtype)
    x_t = (denoised + 157.4 * torch.randn(2, 3, 16, 16, generator=generator)).to(dtype)
    sigma = torch.full((2,), 157.4, dtype=dtype)
    sights = pack.views.see(adm, guidance, pack.views.ViewChoice())

    def guided(*tensors: Tensor) -> Tensor:
        run = pack.seam.open_run(adm, guidance.terms, pack.method.Strength(cap=None), sights)
        return pack.method.guide(*tensors, run)

    with torch.inference_mode(), Dtypes() as seen:
        half = guided(denoised, x_t, sigma)
    assert not seen.broken
    exact = guided(denoised.float(), x_t.float(), sigma.float())
    assert half.dtype == dtype
    assert not torch.equal(half, denoised)
    assert torch.equal(half, exact.to(dtype))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_vae_in_fp16_keeps_small_and_large_gradients(
    comfy, pack, measures, clean_vit, sd15, text, monkeypatch, scale
):
    """Its shift is as near to that of a VAE in float32 as fp16 itself, whatever the scale."""
    import comfy.cli_args

    shifts = []
    for option in ("fp32_vae", "fp16_vae"):
        with monkeypatch.context() as patch:
            patch.setattr(comfy.cli_args.args, option, True)
            vae = kl_vae(comfy, measures)
        guidance = text(clean_vit, scale=scale)
        sights = pack.views.see(sd15, guidance, pack.views.ViewChoice("decoded", vae))
        state = pack.seam.open_run(sd15, guidance.terms, pack.method.Strength(cap=None), sights)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            shifts.append(pack.method.guidance_shift(0.9 * x, x.clone(), torch.tensor([2.0]), state))
    assert shifts[0].any()
    assert rms_apart(shifts[1], shifts[0]) < 0.01


def kl_vae(comfy, measures):
    """A VAE object of the host around its own AutoencoderKL, small, with random weights."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    kl = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.inference_mode():
        model = AutoencoderKL(ddconfig=kl, embed_dim=4)
        measures.small_models.draw(model)
        return comfy.sd.VAE(sd=model.state_dict(), config={"params": {"ddconfig": kl, "embed_dim": 4}})


@pytest.fixture(scope="module")
def clean_vit(pack, measures):
    return measures.vit(pack)


@pytest.fixture(scope="module")
def sd15(measures):
    return measures.small_models.build(measures.small_models.small("SD15"), torch.float32)


# Tables: `make precision`


def measure_precision(family, row, measures):
    if family.name == FAMILIES[0]:
        print("\n" + measures.HEAD)
    for precision in PRECISIONS:
        print(measures.line(row(precision)))


def measure_precision_with_an_encoder_of_kinks(family, measures):
    if family.name == FAMILIES[0]:
        print("\n" + measures.KINKED_HEAD)
    for precision in PRECISIONS[1:]:
        print(measures.line(family.kinked_row(precision)))
