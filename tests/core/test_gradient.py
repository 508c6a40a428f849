"""The gradient of guidance against finite differences, and its manners towards autograd and inference mode."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import (
    PIXEL_VIEW,
    ContentGuidance,
    DecodedView,
    Features,
    Sight,
    StructureGuidance,
    StyleGuidance,
    Target,
    Term,
    TextGuidance,
    as_normal,
    gradient_scope,
)
from sdg_core.method import score_gradient as gradient_of_sight

pytestmark = pytest.mark.usefixtures("float64")

IMAGE = torch.zeros(1, 3, 8, 8)
T = torch.tensor([300.0])


def score_gradient(encoder, terms, weights, targets, u, t):
    """The gradient of a pixel picture u at t."""
    sight = Sight(PIXEL_VIEW, torch.ones(len(u)), t)
    return gradient_of_sight(encoder, terms, weights, list(map(Target, targets)), u, sight)


def text_structure_style(encoder, embed: Tensor) -> tuple[Term, ...]:
    guidances = (
        TextGuidance(F.normalize(embed, dim=-1)),
        StructureGuidance(IMAGE, layers=(1, 2)),
        StyleGuidance(IMAGE, layers=(2,), centred=True),
    )
    return tuple(Term(guidance, encoder, 1.0) for guidance in guidances)


def targets_of(terms: tuple[Term, ...], reference: Features) -> list[Features]:
    return [term.guidance.target(lambda image, depth: reference) for term in terms]


def score_in_float64(encoder, u: Tensor, t: Tensor, reference: Features, embed: Tensor, weights: Tensor) -> Tensor:
    """F of ``text_structure_style`` per sample, (B,), written out. ``encoder`` in float64; weights (3, B)."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).sum(1) / b.square().sum()

    def covariance(m: Tensor) -> Tensor:
        flat = m.flatten(2) - m.mean(dim=(2, 3))[..., None]
        return flat @ flat.mT / flat.shape[2]

    seen = encoder(u, t.double(), 3)
    wanted = [m.double() for m in reference.maps]
    text = F.cosine_similarity(seen.embed, embed.double())
    structure = -(distance(seen.maps[0], wanted[0]) + distance(seen.maps[1], wanted[1])) / 2
    style = -distance(covariance(seen.maps[1]), covariance(wanted[1]))
    return (weights.double() * torch.stack([text, structure, style])).sum(dim=0)


@pytest.mark.parametrize("t", [T, torch.tensor([300.0, 700.0])])
def test_gradient_equals_finite_differences(t, tiny_encoder, draw):
    encoder, u, embed = tiny_encoder(), draw(2, 3, 6, 6), draw(1, 5, seed=3)
    weights = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1.0, 4.0]])
    with torch.no_grad():
        reference = encoder(draw(1, 3, 6, 6, seed=1), T, 3)
        terms = text_structure_style(encoder, embed)
        grad, scores = score_gradient(encoder, terms, weights, targets_of(terms, reference), u, t)
        precise, h = copy.deepcopy(encoder).double(), 1e-5
        for b in range(2):
            bumps = h * torch.eye(108, dtype=torch.float64).view(108, 3, 6, 6)
            args = (t[-1:] if b else t[:1], reference, embed, weights[:, b : b + 1])
            up, down = (score_in_float64(precise, u[b].double() + sign * bumps, *args) for sign in (1, -1))
            wanted = ((up - down) / (2 * h)).view(3, 6, 6)
            torch.testing.assert_close(grad[b].double(), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
            total = score_in_float64(precise, u[b : b + 1].double(), *args)
            torch.testing.assert_close((weights[:, b] * scores[:, b]).sum()[None].double(), total, rtol=1e-9, atol=1e-9)


def test_all_terms_share_one_forward_pass(tiny_encoder, draw):
    encoder = tiny_encoder()
    terms = text_structure_style(encoder, draw(1, 5))
    with torch.no_grad():
        targets = targets_of(terms, encoder(draw(1, 3, 8, 8), T, 3))
    before = encoder.calls
    score_gradient(encoder, terms, torch.ones(3, 2), targets, draw(2, 3, 8, 8), T)
    assert encoder.calls == before + 1


def test_the_encoder_stops_at_the_deepest_layer_asked_for(tiny_encoder, draw):
    encoder = tiny_encoder()
    term = Term(StructureGuidance(IMAGE, layers=(1,)), encoder, 1.0)
    with torch.no_grad():
        target = encoder(draw(1, 3, 8, 8), T, 1)
        for parameter in (*encoder.second.parameters(), *encoder.head.parameters()):
            parameter.fill_(torch.nan)
    grad, scores = score_gradient(encoder, [term], torch.ones(1, 1), [target], draw(1, 3, 8, 8, seed=1), T)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(scores).all()


def test_samples_do_not_mix(tiny_encoder, draw):
    encoder, u, embed, weights = tiny_encoder(), draw(3, 3, 8, 8), draw(1, 5, seed=3), draw(3, 3, seed=4)
    terms = text_structure_style(encoder, embed)
    with torch.no_grad():
        targets = targets_of(terms, encoder(draw(1, 3, 8, 8, seed=1), T, 3))
    batch, _ = score_gradient(encoder, terms, weights, targets, u, T)
    for i in range(3):
        single, _ = score_gradient(encoder, terms, weights[:, i : i + 1], targets, u[i : i + 1], T)
        torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-9, atol=1e-9)


def test_nothing_of_the_callers_is_changed(tiny_encoder, draw):
    encoder, u = tiny_encoder(), draw(1, 3, 8, 8)
    embed = F.normalize(draw(1, 5), dim=-1)
    terms, targets = [Term(TextGuidance(embed), encoder, 1.0)], [Features((), embed)]
    grad, scores = score_gradient(encoder, terms, torch.ones(1, 1), targets, u, T)
    assert torch.equal(u, draw(1, 3, 8, 8))
    assert not any(tensor.requires_grad for tensor in (u, grad, scores))
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_inference_tensors_give_the_same_gradient(tiny_encoder, draw):
    def gradient() -> tuple[Tensor, Tensor]:
        encoder, embed = tiny_encoder().requires_grad_(False), F.normalize(draw(1, 5, seed=3), dim=-1)
        reference = encoder(draw(1, 3, 8, 8, seed=1), T.clone(), 3)
        terms = (*text_structure_style(encoder, embed), Term(ContentGuidance(IMAGE), encoder, 1.0))
        u, weights = draw(2, 3, 8, 8) + 0, torch.ones(4, 2)
        return score_gradient(encoder, terms, weights, targets_of(terms, reference), u, T.clone())

    wanted = gradient()
    with torch.inference_mode():
        assert tiny_encoder().head.weight.is_inference()
        got = gradient()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fails", [False, True])
def test_scope_puts_inference_tensors_back(fails, tiny_encoder):
    with torch.inference_mode():
        encoder = tiny_encoder().requires_grad_(False)
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    with pytest.raises(RuntimeError, match="inside") if fails else nullcontext():  # noqa: SIM117
        with gradient_scope(encoder):
            inside = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
            assert not any(v.is_inference() for v in inside.values())
            assert all(v.data_ptr() == tensors[k].data_ptr() for k, v in inside.items())
            if fails:
                raise RuntimeError("inside")
    after = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    assert after.keys() == tensors.keys()
    assert all(v is tensors[k] for k, v in after.items())


def test_scope_opens_autograd_and_closes_it():
    with torch.inference_mode():
        with gradient_scope():
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        with gradient_scope():
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_as_normal_shares_storage_of_any_layout():
    with torch.inference_mode():
        tensor = torch.arange(24.0).view(4, 6)[1:, ::2].t()
    normal = as_normal(tensor)
    assert not normal.is_inference()
    assert normal.data_ptr() == tensor.data_ptr()
    assert torch.equal(normal, tensor)
    assert as_normal(normal) is normal


def decoded_gradient(encoder, decoder: torch.nn.Module, weight: float, x: Tensor) -> Tensor:
    """The gradient of a text score through a decoder, which computes in its own precision."""
    view = DecodedView(lambda latent: decoder(latent.to(decoder.weight.dtype)), 2, (decoder,))
    sight = Sight(view, torch.ones(len(x)), T)
    guidance = TextGuidance(F.normalize(torch.ones(1, 5), dim=-1))
    target = Target(guidance.target(lambda image, depth: Features(())))
    return gradient_of_sight(
        encoder, [Term(guidance, encoder, 1.0)], torch.full((1, len(x)), weight), [target], x, sight
    )[0]


def test_a_decoder_in_float32_hands_the_gradient_on_to_the_bit(tiny_encoder, draw):
    encoder, x = tiny_encoder(), draw(3, 4, 3, 3) * torch.tensor([1e-3, 1.0, 100.0]).view(3, 1, 1, 1)
    decoder = torch.nn.ConvTranspose2d(4, 3, 2, stride=2).requires_grad_(False)
    got = decoded_gradient(encoder, decoder, 7.0, x)
    x = x.clone().requires_grad_(True)
    embed = encoder(decoder(x), T, encoder.full_depth).embed
    score = F.normalize(embed, dim=-1) @ F.normalize(torch.ones(1, 5), dim=-1).T
    (wanted,) = torch.autograd.grad(7.0 * score.sum(), x)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("weight", [1e-8, 1.0, 1e8])
def test_a_decoder_in_fp16_keeps_gradients_of_any_size(weight, tiny_encoder, draw):
    """fp16 holds 6e-8 to 65504."""
    encoder, x = tiny_encoder(), draw(2, 4, 3, 3)
    decoder = torch.nn.ConvTranspose2d(4, 3, 2, stride=2).requires_grad_(False)
    exact, half = (
        decoded_gradient(encoder, copy.deepcopy(decoder).to(d), weight, x) for d in (torch.float32, torch.float16)
    )
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.01 * exact.norm()


def test_a_decoded_picture_without_gradient_gives_none(tiny_encoder, draw):
    decoder = torch.nn.ConvTranspose2d(4, 3, 2, stride=2).requires_grad_(False).half()
    assert not decoded_gradient(tiny_encoder(), decoder, 0.0, draw(2, 4, 3, 3)).any()
