"""Videos (B, C, T, H, W): every latent frame is guided as a picture of its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import (
    ContentGuidance,
    Convention,
    GuidanceRun,
    LinearView,
    Region,
    Strength,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    guidance_shift,
    guide,
)

pytestmark = pytest.mark.usefixtures("float64")

B, FRAMES = 2, 5
VIEW = LinearView("toy", torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.3], [-0.5, 0.2, 0.1]]), torch.zeros(3))
SIGMA = torch.full((B,), 0.6)


def percent_to_sigma(percent: float) -> float:
    return math.inf if percent <= 0 else 0.0


def make_run(*terms: Term, strength: Strength | None = None) -> GuidanceRun:
    return GuidanceRun(terms, Convention.FLOW, percent_to_sigma, strength or Strength(), lambda encoder: VIEW, 1.0)


def folded(video: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W), frame by frame."""
    return torch.stack([video[b, :, f] for b in range(len(video)) for f in range(video.shape[2])])


def frame(video: Tensor, f: int) -> Tensor:
    return video[:, :, f]


@pytest.fixture(params=["noisy", "denoised"])
def encoder(request, tiny_encoder):
    encoder = tiny_encoder()
    encoder.reads = request.param
    return encoder


@pytest.fixture
def video(draw):
    """denoised and x_t (2, 3, 5, 6, 6)."""
    x_0 = draw(B, 3, FRAMES, 6, 6)
    return 0.9 * x_0, 0.4 * x_0 + 0.6 * draw(B, 3, FRAMES, 6, 6, seed=1)


@pytest.fixture
def images(draw):
    return draw(FRAMES, 3, 6, 6, seed=2).clamp(-1, 1)


@pytest.mark.parametrize("strength", [Strength(cap=None), Strength(cap=0.05), Strength("relative", 0.3)])
def test_a_video_equals_its_frames_folded_into_the_batch(strength, encoder, video, images, draw):
    terms = (
        Term(TextGuidance(F.normalize(draw(1, 5, seed=3), dim=-1)), encoder, 5.0),
        Term(StructureGuidance(images[:1], (1, 2)), encoder, 5.0),
        Term(StyleGuidance(images[:1], (2,)), encoder, 5.0),
    )
    denoised, x_t = video
    got = guide(denoised, x_t, SIGMA, make_run(*terms, strength=strength))
    assert got.shape == x_t.shape
    pictures = guide(
        folded(denoised), folded(x_t), SIGMA.repeat_interleave(FRAMES), make_run(*terms, strength=strength)
    )
    torch.testing.assert_close(folded(got), pictures, rtol=1e-9, atol=1e-9)
    assert not torch.equal(got, denoised)


def test_videos_of_a_batch_keep_their_own_noise_level(encoder, video, images):
    denoised, x_t = video
    run = make_run(Term(ContentGuidance(images[:1]), encoder, 50.0))
    got = guide(denoised, x_t, torch.tensor([0.3, 0.8]), run)
    for b, s in enumerate((0.3, 0.8)):
        alone = guide(denoised[b : b + 1], x_t[b : b + 1], torch.tensor([s]), make_run(*run.terms))
        torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("chosen", "wanted"), [((0,), {0}), ((-1,), {4}), ((1, 3), {1, 3}), ((-5, 2, -3, 0), {0, 2}), ((4, -1), {4})]
)
def test_chosen_frames_change_and_no_others(chosen, wanted, encoder, video, images):
    """The chosen frames move as they do where all frames are guided; the others stay, bit for bit."""
    denoised, x_t = video
    guidance = ContentGuidance(images[:1])
    everywhere = guide(denoised, x_t, SIGMA, make_run(Term(guidance, encoder, 50.0)))
    got = guide(denoised, x_t, SIGMA, make_run(Term(guidance, encoder, 50.0, frames=chosen)))
    for f in range(FRAMES):
        if f in wanted:
            assert not torch.equal(frame(got, f), frame(denoised, f))
            torch.testing.assert_close(frame(got, f), frame(everywhere, f), rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(frame(got, f), frame(denoised, f))


@pytest.mark.parametrize("strength", [Strength(cap=None), Strength("relative", 0.3)])
def test_frames_that_are_not_chosen_cost_no_pass(strength, tiny_encoder, video, images):
    """Two terms on different frames: each frame is shifted by its own, and a frame without any is left out."""
    encoder, (denoised, x_t) = tiny_encoder(), video
    read = []
    encoder.register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0])))
    first = Term(ContentGuidance(images[:1]), encoder, 50.0, frames=(0,))
    second = Term(StructureGuidance(images[1:2], (2,)), encoder, 5.0, frames=(0, 3))
    run = make_run(first, second, strength=strength)
    got = guide(denoised, x_t, SIGMA, run)
    assert read == [1, 1, 2 * B]  # two references, then frames 0 and 3 of both videos
    for f, terms in [(0, (first, second)), (3, (second,))]:
        everywhere = [Term(term.guidance, encoder, term.scale) for term in terms]
        sample = (frame(denoised, f), frame(x_t, f), SIGMA)
        alone = guide(*sample, make_run(*everywhere, strength=strength))
        torch.testing.assert_close(frame(got, f), alone, rtol=1e-9, atol=1e-9)
    assert [torch.equal(frame(got, f), frame(denoised, f)) for f in (1, 2, 4)] == [True] * 3


@pytest.mark.parametrize("chosen", [(5,), (-6,), (0, 7), ()])
def test_frames_that_the_video_lacks_are_refused(chosen, encoder, video, images):
    run = make_run(Term(ContentGuidance(images[:1]), encoder, 5.0, frames=chosen))
    with pytest.raises(ValueError, match=r"this video has 5 latent frames, 0\.\.4, or -5\.\.-1"):
        guide(*video, SIGMA, run)


def test_frames_do_not_matter_to_pictures(encoder, video, images):
    denoised, x_t = (frame(v, 0) for v in video)
    chosen, all_frames = (
        guide(denoised, x_t, SIGMA, make_run(Term(ContentGuidance(images[:1]), encoder, 5.0, frames=frames)))
        for frames in ((3,), None)
    )
    assert torch.equal(chosen, all_frames)


@pytest.mark.parametrize("kind", [ContentGuidance, lambda image: StructureGuidance(image, (1, 2))])
def test_with_as_many_references_as_frames_each_frame_follows_its_own(kind, encoder, video, images):
    denoised, x_t = video
    got = guide(denoised, x_t, SIGMA, make_run(Term(kind(images), encoder, 5.0)))
    for f in range(FRAMES):
        run = make_run(Term(kind(images[f : f + 1]), encoder, 5.0))
        alone = guide(frame(denoised, f), frame(x_t, f), SIGMA, run)
        torch.testing.assert_close(frame(got, f), alone, rtol=1e-9, atol=1e-9)


def test_references_of_chosen_frames_are_those_of_their_place_in_the_video(encoder, video, images):
    denoised, x_t = video
    everywhere = guide(denoised, x_t, SIGMA, make_run(Term(ContentGuidance(images), encoder, 50.0)))
    got = guide(denoised, x_t, SIGMA, make_run(Term(ContentGuidance(images), encoder, 50.0, frames=(1, -1))))
    for f in (1, 4):
        torch.testing.assert_close(frame(got, f), frame(everywhere, f), rtol=1e-9, atol=1e-9)


def test_fewer_references_are_spread_from_the_first_frame_to_the_last(encoder, video, images):
    """Two references on five frames: the middle one still follows the first."""
    denoised, x_t = video
    got = guide(denoised, x_t, SIGMA, make_run(Term(ContentGuidance(images[:2]), encoder, 50.0)))
    for f, r in [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]:
        run = make_run(Term(ContentGuidance(images[r : r + 1]), encoder, 50.0))
        alone = guide(frame(denoised, f), frame(x_t, f), SIGMA, run)
        torch.testing.assert_close(frame(got, f), alone, rtol=1e-9, atol=1e-9)


def test_fewer_masks_are_spread_from_the_first_frame_to_the_last(encoder, video, images):
    """Two masks on five frames, as references are spread."""
    denoised, x_t = video
    masks = torch.zeros(2, 1, 6, 6)
    masks[0, ..., :3, :], masks[1, ..., 3:, :] = 1, 1
    term = Term(ContentGuidance(images[:1]), encoder, 50.0, region=Region(masks))
    got = guide(denoised, x_t, SIGMA, make_run(term)) - denoised
    for f, mask in enumerate([0, 0, 0, 1, 1]):
        moved = frame(got, f).abs().sum(dim=1)
        assert bool((moved[:, masks[mask, 0] == 0] == 0).all())
        assert bool((moved[:, masks[mask, 0] == 1] > 0).all())


def test_one_reference_serves_all_frames_and_several_are_averaged_for_pictures(encoder, video, images):
    denoised, x_t = video
    got = guide(denoised, x_t, SIGMA, make_run(Term(ContentGuidance(images[:1]), encoder, 50.0)))
    same = guide(denoised, x_t, SIGMA, make_run(Term(ContentGuidance(images[:1].repeat(5, 1, 1, 1)), encoder, 50.0)))
    torch.testing.assert_close(got, same, rtol=1e-9, atol=1e-9)
    picture = [frame(v, 0) for v in video]
    free = Strength(cap=None)
    run = make_run(Term(ContentGuidance(images[:2]), encoder, 5.0), strength=free)
    together = guidance_shift(*picture, SIGMA, run)
    alone = [
        guidance_shift(*picture, SIGMA, make_run(Term(ContentGuidance(image[None]), encoder, 5.0), strength=free))
        for image in images[:2]
    ]
    torch.testing.assert_close(together, sum(alone) / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 36), (2, 108)])
def test_latents_that_are_no_pictures_are_refused(shape, encoder, images, draw):
    run = make_run(Term(ContentGuidance(images[:1]), encoder, 5.0))
    with pytest.raises(ValueError, match=r"pictures \(batch, channels, height, width\) and videos") as error:
        guide(draw(*shape), draw(*shape, seed=1), SIGMA, run)
    assert str(shape) in str(error.value)
