"""Scores against the method's formulas written out in float64, and how guidances combine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sdg_core.method import (
    PIXEL_VIEW,
    ContentGuidance,
    Features,
    Sight,
    StructureGuidance,
    StyleGuidance,
    Target,
    Term,
    TextGuidance,
    combine,
    fit,
    gram,
    score_gradient,
)

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(4, 8, 8), (6, 4, 4), (5, 2, 3)]
IMAGE, OTHERS = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 8, 8)


def random_features(batch: int, seed: int, size: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(size * (torch.randn(batch, *shape, generator=generator) + 0.5) for shape in SHAPES)
    return Features(maps, size * torch.randn(batch, 7, generator=generator))


def naive_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def naive_gram(m: np.ndarray, centred: bool) -> np.ndarray:
    C, H, W = m.shape
    g = np.zeros((C, C))
    mean = m.mean(axis=(1, 2)) if centred else np.zeros(C)
    for i in range(C):
        for j in range(C):
            g[i, j] = ((m[i] - mean[i]) * (m[j] - mean[j])).sum() / (H * W)
    return g


def naive_relative(seen: np.ndarray, wanted: np.ndarray) -> float:
    return float(((seen - wanted) ** 2).sum() / (wanted**2).sum())


def naive(guidance, features: Features, reference: Features) -> Tensor:
    """Score of every sample against every reference, averaged over references: (B,), float64."""
    maps, wanted = ([m.double().numpy() for m in f.maps] for f in (features, reference))
    rows = []
    for b in range(len(maps[0])):
        row = []
        for r in range(len(wanted[0])):
            if isinstance(guidance, ContentGuidance):
                row.append(naive_cosine(features.embed[b].double().numpy(), reference.embed[r].double().numpy()))
                continue
            pairs = [(maps[j - 1][b], wanted[j - 1][r]) for j in guidance.layers]
            if isinstance(guidance, StyleGuidance):
                pairs = [tuple(naive_gram(m, guidance.centred) for m in pair) for pair in pairs]
            row.append(-np.mean([naive_relative(*pair) for pair in pairs]))
        rows.append(np.mean(row))
    return torch.tensor(np.array(rows))


GUIDANCES = {
    "content": ContentGuidance(IMAGE),
    "structure": StructureGuidance(IMAGE, layers=(2,)),
    "structure_deep": StructureGuidance(IMAGE, layers=(3, 1)),
    "style": StyleGuidance(IMAGE, layers=(1, 2, 3), centred=True),
    "style_plain": StyleGuidance(IMAGE, layers=(2,), centred=False),
}


@pytest.fixture(params=GUIDANCES)
def guidance(request):
    return GUIDANCES[request.param]


def score(guidance, features: Features, reference: Features) -> Tensor:
    return guidance.score(features, guidance.target(lambda image, depth: reference))


@pytest.mark.parametrize("references", [1, 3])
def test_score_equals_the_formula(guidance, references):
    features, reference = random_features(4, seed=0), random_features(references, seed=1)
    got = score(guidance, features, reference)
    assert got.shape == (4,)
    torch.testing.assert_close(got.double(), naive(guidance, features, reference), rtol=1e-9, atol=1e-9)


def test_text_score_is_the_mean_cosine_over_prompts():
    features = random_features(3, seed=0)
    prompts = torch.nn.functional.normalize(random_features(2, seed=1).embed, dim=-1)
    guidance = TextGuidance(prompts)
    wanted = [np.mean([naive_cosine(e.double().numpy(), p.double().numpy()) for p in prompts]) for e in features.embed]
    torch.testing.assert_close(score(guidance, features, features).double(), torch.tensor(np.array(wanted)))


@pytest.mark.parametrize("spherical", [False, True])
def test_negative_pictures_are_half_their_mean_cosine_less(spherical):
    """Whatever they are to the reference, and for each of several references alike."""
    features, reference, others = (random_features(n, seed=s) for n, s in ((3, 0), (2, 1), (4, 2)))
    seen = {id(IMAGE): reference, id(OTHERS): others}
    guidance = ContentGuidance(IMAGE, spherical, OTHERS)
    target = guidance.target(lambda image, depth: seen[id(image)])
    plain = score(ContentGuidance(IMAGE, spherical), features, reference)
    less = [np.mean([naive_cosine(e.numpy(), o.numpy()) for o in others.embed]) for e in features.embed]
    wanted = plain - torch.tensor(np.array(less)) / 2
    torch.testing.assert_close(guidance.score(features, target), wanted, rtol=1e-9, atol=1e-9)
    for r in range(2):
        one = guidance.score(features, target.take(slice(r, r + 1)))
        alone = ContentGuidance(IMAGE, spherical).score(features, Features((), target.embed[r : r + 1]))
        torch.testing.assert_close(one, alone - torch.tensor(np.array(less)) / 2, rtol=1e-9, atol=1e-9)


def test_scores_are_per_sample(guidance):
    features, reference = random_features(4, seed=0), random_features(2, seed=1)
    singles = [
        score(guidance, Features(tuple(m[i : i + 1] for m in features.maps), features.embed[i : i + 1]), reference)
        for i in range(4)
    ]
    torch.testing.assert_close(score(guidance, features, reference), torch.cat(singles))


def test_several_references_average(guidance):
    features, reference = random_features(2, seed=0), random_features(3, seed=1)
    each = [
        score(guidance, features, Features(tuple(m[r : r + 1] for m in reference.maps), reference.embed[r : r + 1]))
        for r in range(3)
    ]
    torch.testing.assert_close(score(guidance, features, reference), torch.stack(each).mean(dim=0))


def test_scores_are_best_at_the_reference_itself(guidance):
    reference = random_features(1, seed=1)
    best = 1.0 if isinstance(guidance, ContentGuidance) else 0.0
    torch.testing.assert_close(score(guidance, reference, reference), torch.tensor([best]), rtol=0, atol=1e-9)
    assert float(score(guidance, random_features(1, seed=0), reference)) < best - 0.1


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_scores_are_dimensionless(guidance, size):
    wanted = score(guidance, random_features(3, seed=0), random_features(2, seed=1))
    got = score(guidance, random_features(3, seed=0, size=size), random_features(2, seed=1, size=size))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_scores_are_float32_for_half_features(guidance):
    half = [
        Features(tuple(m.half() for m in f.maps), f.embed.half())
        for f in (random_features(2, seed=0), random_features(1, seed=1))
    ]
    exact = [Features(tuple(m.float() for m in f.maps), f.embed.float()) for f in half]
    got = score(guidance, *half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, score(guidance, *exact), rtol=1e-9, atol=1e-9)


def test_a_reference_without_features_gives_finite_scores():
    reference = Features(tuple(torch.zeros(1, *shape) for shape in SHAPES), torch.zeros(1, 7))
    for guidance in GUIDANCES.values():
        assert torch.isfinite(score(guidance, reference, reference)).all()


def test_centred_gram_ignores_each_channels_mean(draw):
    m, offset = draw(2, 4, 5, 6), 3 * draw(2, 4, 1, 1, seed=1)
    torch.testing.assert_close(gram(m + offset), gram(m), rtol=1e-9, atol=1e-9)
    assert float((gram(m + offset, centred=False) - gram(m, centred=False)).abs().max()) > 1


def test_centred_gram_is_the_covariance_of_channels(draw):
    m = draw(2, 4, 5, 6)
    for sample, got in zip(m, gram(m), strict=True):
        torch.testing.assert_close(got, torch.cov(sample.flatten(1), correction=0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("centred", [True, False])
def test_a_gram_matrix_has_the_gradient_of_torchs_own(layout, centred, draw):
    """Of a function that does not treat both halves of G alike; and in the map's own memory format."""
    m = draw(2, 3, 4, 5).double().contiguous(memory_format=layout).requires_grad_()
    weights = draw(2, 3, 3, seed=1).double()
    flat = m.flatten(2) - (m.flatten(2).mean(dim=2, keepdim=True) if centred else 0)
    plain = flat @ flat.transpose(1, 2) / 20
    found, wanted = (torch.autograd.grad((weights * g).sum(), m)[0] for g in (gram(m, centred), plain))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.stride() == m.stride()


def test_gram_ignores_where_things_are(draw):
    m = draw(1, 4, 5, 6)
    shuffled = m.flatten(2)[..., torch.randperm(30, generator=torch.Generator().manual_seed(0))].view_as(m)
    torch.testing.assert_close(gram(shuffled), gram(m))


def test_depth_is_the_deepest_layer_read(tiny_encoder):
    encoder = tiny_encoder()
    assert StructureGuidance(IMAGE, layers=(2, 1)).depth(encoder) == 2
    assert StyleGuidance(IMAGE, layers=(1,)).depth(encoder) == 1
    assert ContentGuidance(IMAGE).depth(encoder) == encoder.full_depth
    assert TextGuidance(torch.zeros(1, 5)).depth(encoder) == encoder.full_depth


@pytest.mark.parametrize("layers", [(), (0,), (3,), (1, 7)])
@pytest.mark.parametrize("kind", [StructureGuidance, StyleGuidance])
def test_layers_that_the_encoder_lacks_are_refused(kind, layers, tiny_encoder):
    with pytest.raises(ValueError, match=r"Got the layers \[.*wanted one or more of 1\.\.2"):
        kind(IMAGE, layers=layers).depth(tiny_encoder())


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_intervals_that_are_none_are_refused(start, end, tiny_encoder):
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        Term(ContentGuidance(IMAGE), tiny_encoder(), 1.0, start, end)


def test_fit_leaves_a_picture_of_the_right_size(draw):
    image = draw(2, 3, 8, 8)
    assert fit(image, 8, 8) is image


@pytest.mark.parametrize(
    ("source", "target"), [((8, 16), (8, 8)), ((16, 8), (8, 8)), ((8, 8), (4, 8)), ((9, 12), (9, 6))]
)
def test_fit_cuts_the_middle_out(source, target, draw):
    image = draw(2, 3, *source).clamp(-1, 1)
    top, left = ((s - t) // 2 for s, t in zip(source, target, strict=True))
    wanted = image[..., top : top + target[0], left : left + target[1]]
    torch.testing.assert_close(fit(image, *target), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("source", "target"), [((64, 96), (16, 16)), ((7, 5), (32, 48)), ((33, 100), (20, 31))])
def test_fit_scales_without_distortion(source, target):
    """A picture whose colour is its position: after fitting, the colour's slope is the same both ways."""
    rows, columns = (torch.arange(n).float() - (n - 1) / 2 for n in source)
    image = torch.stack([rows[:, None].expand(source), columns.expand(source), torch.zeros(source)])[None] / 200
    got = fit(image, *target)
    assert got.shape == (1, 3, *target)
    zoom = max(t / s for t, s in zip(target, source, strict=True))
    inside = got[..., target[0] // 4 : -(target[0] // 4), target[1] // 4 : -(target[1] // 4)]
    assert float(inside[0, 0].diff(dim=0).mean()) * 200 == pytest.approx(1 / zoom, rel=0.05)
    assert float(inside[0, 1].diff(dim=1).mean()) * 200 == pytest.approx(1 / zoom, rel=0.05)
    assert float(inside[0, 0].diff(dim=1).abs().max()) < 1e-6


def test_fit_stays_in_range(draw):
    assert float(fit(draw(1, 3, 9, 9).sign(), 20, 20).abs().max()) <= 1


def test_combine_is_the_weighted_sum(tiny_encoder, draw):
    first, second = tiny_encoder(0), tiny_encoder(1)
    a = Term(TextGuidance(draw(1, 5)), first, 100.0, 0.1, 0.9)
    b = Term(ContentGuidance(IMAGE), second, 50.0)
    inner = combine([((a,), 2.0), ((b,), -1.0)])
    outer = combine([(inner, 0.5), ((a,), 3.0)])
    assert [(t.guidance, t.encoder, t.scale, t.start, t.end) for t in outer] == [
        (a.guidance, first, 100.0, 0.1, 0.9),
        (b.guidance, second, -25.0, 0.0, 1.0),
        (a.guidance, first, 300.0, 0.1, 0.9),
    ]


def test_the_gradient_of_a_sum_is_the_weighted_sum_in_any_order(tiny_encoder, draw):
    encoder, u, t = tiny_encoder(), draw(2, 3, 8, 8), torch.tensor([300.0])
    with torch.no_grad():
        reference = encoder(draw(1, 3, 8, 8, seed=1), t, 3)
    guidances = [ContentGuidance(IMAGE), StructureGuidance(IMAGE, layers=(1,)), StyleGuidance(IMAGE, layers=(2,))]
    terms = [Term(g, encoder, 1.0) for g in guidances]
    targets = [g.target(lambda image, depth: reference) for g in guidances]
    weights = torch.tensor([[2.0, 0.5], [-3.0, 1.0], [0.0, 4.0]])

    def gradient(order: list[int]) -> Tensor:
        return score_gradient(
            encoder, [terms[k] for k in order], weights[order], [Target(targets[k]) for k in order], u,
            Sight(PIXEL_VIEW, torch.ones(len(u)), t),
        )[0]  # fmt: skip

    singles = sum(gradient([k]) for k in range(3))
    torch.testing.assert_close(gradient([0, 1, 2]), singles, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient([2, 0, 1]), gradient([0, 1, 2]), rtol=1e-9, atol=1e-9)
