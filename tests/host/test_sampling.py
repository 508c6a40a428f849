"""Guided sampling through the host, compared with the core and with the host's own sampler."""

from __future__ import annotations

import pytest
import torch

BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def sample(run):
    """sample(model, guidance, **changes) -> pictures (B, 3, H, W) of the Guided KSampler."""

    def go(model, guidance=None, size=16, batch=2, **changes):
        inputs = {
            "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
            "latent_image": {"samples": torch.zeros(batch, 3, size, size)},
        }  # fmt: skip
        return run("SDGGuidedKSampler", model=model, guidance=guidance, **(inputs | changes))["samples"]

    return go


@pytest.fixture(scope="module")
def text(run, noisy_clip):
    return run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE)


@pytest.fixture(scope="module")
def four_kinds(run, noisy_clip):
    """One guidance of each kind, all with the same reference."""
    return all_kinds(run, noisy_clip)


@pytest.fixture
def exact_kinds(run, exact_noisy_clip):
    """The same in float64."""
    return all_kinds(run, exact_noisy_clip)


def all_kinds(run, noisy_clip) -> list:
    image = torch.rand(1, 20, 24, 3, generator=torch.Generator().manual_seed(0))
    common = {"noisy_clip": noisy_clip, "image": image, **WHOLE}
    return [
        run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE),
        run("SDGContentGuidance", scale=200.0, **common),
        run("SDGStructureGuidance", scale=300.0, layers="3,4", **common),
        run("SDGStyleGuidance", scale=300.0, layers="4,5", centred=True, **common),
    ]


def combined(run, guidances, weights=(1.0, 1.0, 1.0, 1.0)):
    inputs = {}
    for i, (guidance, weight) in enumerate(zip(guidances, weights, strict=False), 1):
        inputs |= {f"guidance_{i}": guidance, f"weight_{i}": weight}
    return run("SDGCombineGuidance", **inputs)


def ksampler(comfy, model, size, steps, cfg, sampler, scheduler, batch=1):
    with torch.inference_mode():
        latent = {"samples": torch.zeros(batch, 3, size, size)}
        return comfy.nodes.common_ksampler(model, 7, steps, cfg, sampler, scheduler, BLANK, BLANK, latent)[0]["samples"]


def difference(a, b):
    """Largest difference, as a part of the largest value: random encoders pull pictures out of -1..1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def test_guidance_changes_the_picture(sample, adm, four_kinds):
    plain = sample(adm)
    for guidance in four_kinds:
        assert (sample(adm, guidance) - plain).abs().mean() > 1e-4


def test_without_guidance_or_scale_every_sampler_and_scheduler_gives_the_hosts_bits(
    comfy, run, sample, adm, noisy_clip
):
    off = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=0.0, **WHOLE)
    on = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=9.0, **WHOLE)
    silent = [None, off, combined(run, [on, off], [0.0, 1.0])]
    differing = []
    for i, sampler in enumerate(comfy.samplers.KSampler.SAMPLERS):
        for j, scheduler in enumerate(comfy.samplers.KSampler.SCHEDULERS):
            wanted = ksampler(comfy, adm, 8, 3, 2.0, sampler, scheduler)
            settings = {"size": 8, "batch": 1, "steps": 3, "cfg": 2.0, "sampler_name": sampler, "scheduler": scheduler}
            if not torch.equal(sample(adm, silent[(i + j) % 3], **settings), wanted):
                differing.append((sampler, scheduler))
    assert not differing


def test_guided_every_sampler_gives_another_and_finite_picture(comfy, sample, adm, text):
    broken = []
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        settings = {"size": 8, "batch": 1, "steps": 4, "sampler_name": sampler}
        guided, plain = sample(adm, text, **settings), sample(adm, **settings)
        if not guided.isfinite().all() or torch.equal(guided, plain):
            broken.append(sampler)
    assert not broken


@pytest.mark.parametrize("sampler", ["euler", "euler_cfg_pp"])
def test_outside_its_interval_guidance_leaves_the_hosts_bits(comfy, run, sample, adm, noisy_clip, sampler):
    """Img2img of the first tenth of the noise range: guidance for the first half of the run never acts."""
    part = {"start_percent": 0.0, "end_percent": 0.3}
    early = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **part)
    settings = {"sampler_name": sampler, "cfg": 2.0, "denoise": 0.1}
    assert torch.equal(sample(adm, early, **settings), sample(adm, **settings))


def test_batch_equals_singles_with_the_same_noise(sample, exact_adm, exact_kinds, run, assert_equal_runs):
    """batch_index makes the host give each picture the noise that it has in the batch."""
    adm, guidance = exact_adm, combined(run, exact_kinds)
    zeros = torch.zeros(4, 3, 16, 16)
    batch = sample(adm, guidance, latent_image={"samples": zeros, "batch_index": [0, 1, 2, 3]})
    for i in range(4):
        single = sample(adm, guidance, latent_image={"samples": zeros[:1], "batch_index": [i]})
        assert_equal_runs(single[0], batch[i])


def test_same_seed_gives_the_same_bits(sample, adm, four_kinds, run):
    guidance = combined(run, four_kinds)
    first = sample(adm, guidance)
    assert torch.equal(sample(adm, guidance), first)
    assert not torch.equal(sample(adm, guidance, seed=8), first)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "ddpm"])
def test_a_seed_past_which_a_sampler_cannot_count_is_refused_in_words(sample, adm, sampler):
    last = 2**64 - 1
    assert torch.isfinite(sample(adm, seed=last, batch=1)).all()
    with pytest.raises(ValueError, match=rf"Got the seed {last}; {sampler} counts on from it.*Choose a smaller seed"):
        sample(adm, seed=last, batch=1, sampler_name=sampler)
    assert torch.isfinite(sample(adm, seed=last - 1, batch=1, sampler_name=sampler)).all()


def test_order_of_combined_guidances_does_not_matter(sample, exact_adm, exact_kinds, run, assert_equal_runs):
    forward, backward = combined(run, exact_kinds), combined(run, exact_kinds[::-1])
    assert_equal_runs(sample(exact_adm, forward), sample(exact_adm, backward))


def test_weight_multiplies_scale_and_chains(sample, exact_adm, exact_noisy_clip, exact_kinds, run, assert_equal_runs):
    half = run("SDGTextGuidance", noisy_clip=exact_noisy_clip, text="a red hat", scale=75.0, **WHOLE)
    whole = combined(run, [combined(run, [half], [4.0])], [0.5])
    assert_equal_runs(sample(exact_adm, whole), sample(exact_adm, exact_kinds[0]))


def test_apply_guidance_equals_guided_ksampler(comfy, run, sample, adm, text):
    model = run("SDGApplyGuidance", model=adm, guidance=text, strength="absolute", cap=1.0)
    assert torch.equal(ksampler(comfy, model, 16, 4, 1.0, "euler", "normal", batch=2), sample(adm, text))


def test_guidance_leaves_the_model_that_came_in_alone(sample, adm, text):
    before = sample(adm)
    sample(adm, text)
    assert torch.equal(sample(adm), before)


def test_without_conditioning_it_equals_blank_conditioning(sample, exact_adm, exact_kinds, assert_equal_runs):
    bare = sample(exact_adm, exact_kinds[0], positive=None, negative=None, cfg=8.0)
    assert_equal_runs(bare, sample(exact_adm, exact_kinds[0]))


def test_diffusion_model_never_sees_autograd(sample, adm, four_kinds, run):
    seen = []

    def look(module, inputs, output):
        seen.append((torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), output.grad_fn is not None))

    hook = adm.model.diffusion_model.register_forward_hook(look)
    try:
        sample(adm, combined(run, four_kinds), cfg=2.0)
    finally:
        hook.remove()
    assert set(seen) == {(False, False)}


def test_weights_moved_in_inference_mode_still_guide(run, sample, adm, text):
    """What the host's loading does on a GPU: every parameter becomes an inference tensor."""
    plain = sample(adm, text)
    clip = run("SDGLoadNoisyCLIP", noisy_clip_name="random.safetensors")
    with torch.inference_mode():
        clip.model.to(torch.float64).to(torch.float32)
    assert any(p.is_inference() for p in clip.model.parameters())
    moved = run("SDGTextGuidance", noisy_clip=clip, text="a red hat", scale=150.0, **WHOLE)
    assert torch.equal(sample(adm, moved), plain)


def test_state_of_a_run_is_dropped_also_when_interrupted(comfy, pack, sample, adm, text, monkeypatch):
    opened = []
    original = pack.seam.open_run

    def spy(*args):
        opened.append(original(*args))
        return opened[-1]

    monkeypatch.setattr(pack.seam, "open_run", spy)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(adm, text)
    sample(adm, text)
    assert [len(run.trace) for run in opened] == [0, 4]


def test_relative_strength_ignores_the_scale(run, sample, exact_adm, exact_noisy_clip, assert_equal_runs):
    def picture(scale):
        guidance = run("SDGTextGuidance", noisy_clip=exact_noisy_clip, text="a red hat", scale=scale, **WHOLE)
        return sample(exact_adm, guidance, strength="relative", cap=0.3)

    assert_equal_runs(picture(10.0), picture(1000.0))
    assert (picture(10.0) - sample(exact_adm)).abs().max() > 1e-2


def test_masked_part_of_a_latent_stays(sample, adm, text):
    latent = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    out = sample(adm, text, latent_image={"samples": latent, "noise_mask": mask})
    assert (out[..., :8] - latent[..., :8]).abs().max() < 1e-5
    assert (out[..., 8:] - latent[..., 8:]).abs().mean() > 1e-2


def test_two_applied_guidances_add_up(run, sample, exact_adm, exact_noisy_clip, assert_equal_runs):
    """One after the other is the same as both at once, as long as nothing is capped. Each rounds once."""
    half, whole = (
        run("SDGTextGuidance", noisy_clip=exact_noisy_clip, text="a red hat", scale=scale, **WHOLE)
        for scale in (5.0, 10.0)
    )
    model = run("SDGApplyGuidance", model=exact_adm, guidance=half, strength="absolute", cap=0.0)
    assert_equal_runs(sample(model, half, cap=0.0), sample(exact_adm, whole, cap=0.0), rounded=10)


def test_gradient_memory_is_reserved(pack, adm, noisy_clip):
    asked = []
    sights = pack.views.see(adm, pack.host.HostGuidance((), (noisy_clip,)), pack.views.ViewChoice())
    reserve = pack.seam._memory_reserver(sights)
    reserve(lambda model, shape, conds: asked.append(shape), adm, torch.Size([4, 3, 16, 16]), {})
    needed = 4 * pack.memory.activation_bytes(noisy_clip.model)
    ((batch, *rest),) = asked
    assert rest == [3, 16, 16]
    assert adm.memory_required([2 * (batch - 4), *rest]) >= needed > 0


# The host against the core


@pytest.fixture(scope="module")
def core(pack, models_folder):
    """The core's own denoiser, and runs with the same text guidance, from the same files."""
    denoiser = pack.models.ADMDenoiser(pack.models.load_adm(models_folder / "adm/random.safetensors"))
    clip = pack.encoders.load_noisy_clip(models_folder / "noisy_clip/random.safetensors")
    term = pack.method.Term(pack.method.TextGuidance(clip.encode_text(["a red hat"])), clip, 150.0)

    def open_run(cap):
        convention, strength = pack.method.Convention.VE, pack.method.Strength(cap=cap)
        to_sigma = pack.models.percent_to_sigma(denoiser.table)
        return pack.method.GuidanceRun((term,), convention, to_sigma, strength)

    return denoiser, open_run


def start(pack, denoiser, steps, seed=7):
    """The core's first x and sigmas, with the host's noise for this seed."""
    sigmas = pack.models.normal_sigmas(denoiser.table, steps)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return pack.models.initial(noise, sigmas[0]), sigmas


@pytest.mark.parametrize("guided", [False, True])
def test_host_euler_gives_the_cores_picture(pack, sample, adm, text, core, guided):
    denoiser, open_run = core
    x, sigmas = start(pack, denoiser, 10)
    denoise = pack.models.guided(denoiser, open_run(1.0)) if guided else denoiser
    *_, last = pack.models.euler(denoise, x, sigmas)
    assert (sample(adm, text if guided else None, steps=10) - last.x).abs().max() < 1e-3


@pytest.mark.parametrize("guided", [False, True])
def test_paper_sampler_gives_the_cores_picture(comfy, pack, run, adm, text, core, guided):
    denoiser, open_run = core
    x, sigmas = start(pack, denoiser, 10)
    generator = torch.Generator().manual_seed(7 + 1)
    *_, last = pack.models.paper(denoiser.predict, x, sigmas, generator, open_run(None) if guided else None)
    sampler = run("SDGPaperSampler", guidance=text if guided else None)
    assert (custom(comfy, adm, sampler, sigmas) - last.x).abs().max() < 1e-3


def test_paper_sampler_takes_the_same_variance_under_cfg(comfy, pack, run, adm, core):
    sampler = run("SDGPaperSampler", guidance=None)
    _, sigmas = start(pack, core[0], 5)
    assert (custom(comfy, adm, sampler, sigmas, cfg=3.0) - custom(comfy, adm, sampler, sigmas)).abs().max() < 1e-3


def custom(comfy, model, sampler, sigmas, cfg=1.0):
    """What SamplerCustom does with a SAMPLER."""
    latent = torch.zeros(2, 3, 16, 16)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 7)
        return comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas.clone(), BLANK, BLANK, latent, disable_pbar=True, seed=7
        )


def test_a_picture_much_larger_than_the_model_learned_is_warned_of_once(run, latent_adm, caplog):
    net = latent_adm("eps").model.diffusion_model
    net.sizes_warned.clear()
    size = net.config.image_size
    for side in (size, 2 * size, 3 * size, 3 * size, 4 * size):
        net(torch.zeros(1, net.config.channels, side, side), torch.zeros(1))
    said = [record.getMessage() for record in caplog.records if "learned pictures" in record.message]
    downscale = net.config.latent_format.downscale
    assert len(said) == 2
    assert f"at {3 * size * downscale} x {3 * size * downscale} it draws" in said[0]
    assert f"Set Empty Pixel Latent to {size * downscale} x {size * downscale}." in said[0]
