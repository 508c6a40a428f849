"""The systems that the paper compares with, through the host: classifier guidance."""

from __future__ import annotations

import pytest
import torch

BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


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
    with pytest.raises(ValueError, match="classifier reads the noisy pictures of pixel models"):
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
