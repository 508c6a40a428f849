"""The systems that the paper compares with, through the host: classifier guidance, and ILVR."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
FACTOR = 4


@pytest.fixture(scope="module")
def sample(run):
    """sample(model, guidance, **changes) -> pictures (2, 3, 16, 16) of the Guided KSampler."""

    def go(model, guidance=None, latent=(2, 3, 16, 16), **changes):
        inputs = {
            "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
            "latent_image": {"samples": torch.zeros(latent)},
        }  # fmt: skip
        return run("SDGGuidedKSampler", model=model, guidance=guidance, **(inputs | changes))["samples"]

    return go


@pytest.fixture(scope="module")
def classifier(run):
    return run("SDGLoadClassifier", classifier_name="random.safetensors")


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 20, 24, 3, generator=torch.Generator().manual_seed(0))


def pull(run, classifier, name="blue background", scale=100.0, **interval):
    return run("SDGClassifierGuidance", classifier=classifier, class_name=name, scale=scale, **(WHOLE | interval))


def log_p(classifier, picture, number):
    with torch.inference_mode():
        return classifier.model(picture, torch.zeros(1), 1).embed.log_softmax(1)[:, number]


def wrong(run, message, node_id, **inputs):
    with pytest.raises(ValueError, match=message):
        run(node_id, **inputs)


# Classifier guidance


def test_the_classifier_raises_its_own_verdict_and_a_name_is_a_number(run, sample, adm, classifier):
    plain, guided = sample(adm), sample(adm, pull(run, classifier))
    before, after = (log_p(classifier, picture, 1) for picture in (plain, guided))
    assert bool((after > before).all())
    assert torch.equal(guided, sample(adm, pull(run, classifier, "1")))
    assert not torch.equal(guided, sample(adm, pull(run, classifier, "glasses")))
    assert torch.equal(plain, sample(adm, pull(run, classifier, scale=0.0)))


def test_in_the_host_it_is_what_the_core_computes(pack, comfy, run, exact, exact_adm, sample):
    """denoised + sigma^2 grad_x log p(y | x / sqrt(1 + sigma^2), t), by autograd and Euler's steps written out."""
    classifier = exact(run("SDGLoadClassifier", classifier_name="random.safetensors"))
    net, table = classifier.model, classifier.model.table
    found = sample(exact_adm, pull(run, classifier, scale=3.0), cap=0.0)
    with torch.inference_mode():
        sampling = exact_adm.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 4).double()
        noise = comfy.sample.prepare_noise(torch.zeros(2, 3, 16, 16), 7).double()
    with torch.inference_mode(False), pack.gradient.gradient_scope(net, exact_adm.model.diffusion_model):
        x = noise.clone() * (1 + sigmas[0].clone() ** 2) ** 0.5
        for s, s_next in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
            with torch.no_grad():
                t = sampling.timestep(torch.tensor([s])).expand(2)
                out = exact_adm.model.diffusion_model(x / (1 + s**2) ** 0.5, t)
                denoised = (x / (1 + s**2) - out * s / (1 + s**2) ** 0.5).clamp(-1, 1)
            u = (x / (1 + s**2) ** 0.5).requires_grad_(True)
            logits = net(u, table.timestep(torch.tensor([s]).double()), 1).embed
            (grad,) = torch.autograd.grad(logits.log_softmax(1)[:, 1].sum(), u)
            denoised = denoised + 3.0 * s**2 / (1 + s**2) ** 0.5 * grad
            x = (x + (x - denoised) / s * (s_next - s)).detach()
    assert float((found - x).abs().max() / x.abs().max()) < 1e-4


def test_it_adds_up_with_text_in_combine_guidance(run, sample, adm, classifier, noisy_clip):
    text = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE)
    one = pull(run, classifier)
    both = run("SDGCombineGuidance", guidance_1=text, weight_1=1.0, guidance_2=one, weight_2=0.5)
    pictures = [sample(adm, guidance) for guidance in (text, one, both)]
    assert float((pictures[2] - pictures[0]).abs().mean()) > 1e-4
    assert float((pictures[2] - pictures[1]).abs().mean()) > 1e-4
    alone = run("SDGCombineGuidance", guidance_1=text, weight_1=0.0, guidance_2=one, weight_2=1.0)
    assert torch.equal(sample(adm, alone), pictures[1])


def test_the_memory_of_its_gradient_is_asked_for(pack, classifier):
    assert pack.memory.activation_bytes(classifier.model) > 1e5


def test_what_a_classifier_cannot_do_is_explained(run, sample, latent_adm, classifier, noisy_clip):
    with pytest.raises(ValueError, match='classifier was made for "pixels"'):
        sample(latent_adm("eps"), pull(run, classifier), latent=(1, 4, 16, 16))
    wrong(run, "wanted an SDG_CLASSIFIER", "SDGClassifierGuidance", classifier=noisy_clip, class_name="1", scale=1.0,
          **WHOLE)  # fmt: skip
    wrong(run, r"no class \"hat\".*0\.\.2.*glasses", "SDGClassifierGuidance", classifier=classifier, class_name="hat",
          scale=1.0, **WHOLE)  # fmt: skip
    wrong(run, "wanted a NOISY_CLIP", "SDGTextGuidance", noisy_clip=classifier, text="a", scale=1.0, **WHOLE)
    wrong(run, "no file gone", "SDGLoadClassifier", classifier_name="gone.safetensors")


def test_a_diffusion_model_is_no_classifier(run, models_folder):
    (models_folder / "classifier/adm.safetensors").write_bytes((models_folder / "adm/random.safetensors").read_bytes())
    wrong(run, "ADM diffusion model; wanted a noisy classifier", "SDGLoadClassifier", classifier_name="adm.safetensors")


# ILVR


def held(run, model, image, factor=FACTOR, vae=None, **interval):
    return run("SDGILVRReference", model=model, image=image, down_factor=factor, vae=vae, **(WHOLE | interval))


def low(picture):
    return F.avg_pool2d(picture, FACTOR)


def apart(picture, wanted):
    return float((low(picture) - low(wanted)).abs().max())


@pytest.fixture(scope="module")
def wanted(pack, image):
    """The reference as the sampled pictures see it."""
    return pack.method.fit(pack.inputs.to_references(image), 16, 16)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "heun", "euler_cfg_pp"])
def test_finished_pictures_have_the_references_low_frequencies(run, sample, adm, image, wanted, sampler):
    plain, picture = (sample(model, sampler_name=sampler) for model in (adm, held(run, adm, image)))
    assert apart(picture, wanted) < 1e-4
    assert apart(plain, wanted) > 0.05


def test_guidance_moves_the_rest_in_either_order(run, sample, adm, image, wanted, noisy_clip):
    text = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE)
    first = sample(held(run, adm, image), text)
    applied = run("SDGApplyGuidance", model=adm, guidance=text, strength="absolute", cap=1.0)
    last = sample(held(run, applied, image))
    assert apart(first, wanted) < 1e-4
    assert torch.equal(first, last)
    assert float((first - sample(held(run, adm, image))).abs().mean()) > 1e-4


def test_outside_its_range_steps_are_the_models_own(run, comfy, adm, image):
    """The first two of four steps are free: until there the run is the plain one, bit for bit."""
    seen = {}

    def watch(name, model):
        def callback(step, denoised, x, total):
            seen.setdefault(name, []).append((x.clone(), denoised.clone()))

        latent = torch.zeros(1, 3, 16, 16)
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(latent, 7)
            comfy.sample.sample(model, noise, 4, 1.0, "euler", "normal", BLANK, BLANK, latent, seed=7,
                                callback=callback, disable_pbar=True)  # fmt: skip

    watch("plain", adm)
    watch("late", held(run, adm, image, start_percent=0.5))
    watch("early", held(run, adm, image, end_percent=0.5))
    same = {name: [torch.equal(a[1], b[1]) for a, b in zip(seen["plain"], seen[name], strict=True)] for name in seen}
    assert same["late"][:2] == [True, True]
    assert not same["late"][3]
    assert not same["early"][0]


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_latents_are_held_through_the_vae(run, sample, latent_adm, autoencoder, image, prediction):
    model = latent_adm(prediction)
    shape = (1, 4, 16, 16)
    picture = sample(held(run, model, image, vae=autoencoder), latent=shape, scheduler="simple")
    with torch.inference_mode():
        resized = F.interpolate(image.movedim(-1, 1), (32, 38), mode="bicubic", antialias=True).clamp(0, 1)
        wanted = autoencoder.encode(resized[..., 3:35].movedim(1, -1))
    assert apart(picture, wanted) < 1e-3 * float(wanted.abs().max())
    assert apart(sample(model, latent=shape, scheduler="simple"), wanted) > 0.05 * float(wanted.abs().max())


def test_a_reference_for_each_picture_of_a_batch(run, sample, adm, pack):
    images = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(3))
    assert apart(sample(held(run, adm, images)), pack.inputs.to_references(images)) < 1e-4
    three = held(run, adm, torch.rand(3, 16, 16, 3))
    with pytest.raises(ValueError, match="3 references for a batch of 2"):
        sample(three)


def test_impossible_references_are_explained(run, adm, latent_adm, image):
    wrong(run, "no VAE is connected", "SDGILVRReference", model=latent_adm("eps"), image=image, down_factor=4, **WHOLE)
    wrong(run, "wanted 1 or more", "SDGILVRReference", model=adm, image=image, down_factor=0, **WHOLE)
    wrong(run, "start below end", "SDGILVRReference", model=adm, image=image, down_factor=4, start_percent=0.6,
          end_percent=0.6)  # fmt: skip
    wrong(run, "wanted a MODEL", "SDGILVRReference", model=image, image=image, down_factor=4, **WHOLE)
    wrong(run, "alpha channel", "SDGILVRReference", model=adm, image=torch.rand(1, 8, 8, 4), down_factor=4, **WHOLE)


# GLIDE's noised CLIP


def test_glides_two_halves_guide_by_text_and_one_says_what_is_missing(run, sample, adm, models_folder):
    """A small one of the published layout, written by the names of a NoisyCLIP with token conditioning."""
    folder = models_folder / "noisy_clip"
    generator = torch.Generator().manual_seed(0)
    for name, shapes in (("clip_image_enc.pt", glide_shapes(True)), ("clip_text_enc.pt", glide_shapes(False))):
        state = {k: torch.randn(v, generator=generator) * (0.1 if len(v) > 1 else 1.0) for k, v in shapes.items()}
        torch.save(state, folder / name)
    encoder = run("SDGLoadNoisyCLIP", noisy_clip_name="clip_image_enc.pt")
    text = run("SDGTextGuidance", noisy_clip=encoder, text="a red hat", scale=1.0, **WHOLE)
    moved = sample(adm, text, strength="relative") - sample(adm)
    assert float(moved.abs().mean()) > 0.01
    (folder / "clip_text_enc.pt").unlink()
    alone = run("SDGLoadNoisyCLIP", noisy_clip_name="clip_image_enc.pt")
    wrong(run, "text half beside", "SDGTextGuidance", noisy_clip=alone, text="a", scale=1.0, **WHOLE)
    (folder / "clip_image_enc.pt").unlink()


def glide_shapes(image: bool) -> dict[str, tuple[int, ...]]:
    """One block of 64 channels."""
    w = 64
    shapes = {"blocks.input.w_voc": (49408, w), "blocks.input.w_pos": (77, w)}
    if image:
        shapes = {"blocks.input.w_t": (1000, w), "blocks.input.w_pos": (17, w), "blocks.input.patch_proj": (w, 3, 4, 4)}
        shapes |= {"blocks.input.ln.g": (w,), "blocks.input.ln.b": (w,)}
    for name in ("blocks.block_0.f_attn.ln", "blocks.block_0.f_mlp.ln", "blocks.output.ln"):
        shapes |= {f"{name}.g": (w,), f"{name}.b": (w,)}
    shapes |= {f"blocks.block_0.f_attn.f_{part}.w": (w, w) for part in "qkvc"}
    shapes |= {f"blocks.block_0.f_attn.f_{part}.b": (w,) for part in "qvc"}
    shapes |= {"blocks.block_0.f_mlp.f_1.w": (4 * w, w), "blocks.block_0.f_mlp.f_1.b": (4 * w,)}
    shapes |= {"blocks.block_0.f_mlp.f_2.w": (w, 4 * w), "blocks.block_0.f_mlp.f_2.b": (w,)}
    return shapes | {"blocks.output.f.w": (32, w)}
