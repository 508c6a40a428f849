"""How the bundled world turns wishes into guidance: scales, intervals and curves by kind and by company."""

from __future__ import annotations

import pytest
import torch

from sdg_core.avatars import NOISY_INTERVAL, NOISY_SCALE, Pull, World, WorldName, open_world
from sdg_core.avatars.jobs import BANK, rarity
from sdg_core.avatars.metrics import gram_distance, gram_distances, nearest
from sdg_core.avatars.world import NOISY_CURVE, NOISY_SEVERAL, NOISY_SMALL


@pytest.fixture(scope="module")
def noisy() -> World:
    return open_world(WorldName(model="v", route="noisy linear"))


@pytest.fixture(scope="module")
def clean() -> World:
    return open_world(WorldName(model="v", route="clean linear"))


def test_a_text_has_the_strength_of_its_company_and_of_what_it_is_about(noisy, clean):
    def way(world: World, *about: object) -> tuple[float, float, float]:
        term = world.term(world.text("a person with a happy face", *about))
        return term.scale, term.start, term.end

    scale, interval = NOISY_SMALL["expression"]
    assert way(noisy) == (NOISY_SCALE["text"], *NOISY_INTERVAL["text"])
    assert way(noisy, "hat", 3) == (NOISY_SEVERAL * NOISY_SCALE["text"], *NOISY_INTERVAL["text"])
    assert way(noisy, "expression") == (scale, *interval)
    assert way(clean, "expression") == way(clean) == way(clean, "hat", 3)  # never measured


def test_a_kind_has_its_curve_unless_the_scale_is_ones_own(noisy, clean):
    reference = noisy.renders[0]
    assert noisy.term(Pull("content", reference)).curves == (NOISY_CURVE["content"],)
    assert noisy.term(Pull("content", reference, 100.0)).curves == ()
    assert noisy.term(Pull("content", reference, 100.0, curve=NOISY_CURVE["content"])).curves != ()
    assert noisy.term(Pull("structure", reference)).curves == clean.term(Pull("content", reference)).curves == ()


def test_gram_distances_of_all_pairs_are_those_of_each(noisy):
    judge, some, others = noisy.judge, noisy.renders[:3], noisy.renders[3:5]
    with torch.no_grad():
        every = gram_distances(judge.double(), some.double(), others.double())
        each = [gram_distance(judge, some.double(), other[None].double().expand_as(some)) for other in others]
    judge.float()
    torch.testing.assert_close(every, torch.stack(each, dim=1), rtol=1e-9, atol=0)


def test_rare_renders_are_farther_from_their_nearest_by_the_plain_count(noisy):
    """Of one attribute, against a loop over renders; unknown in a world with few renders."""
    features, labels = noisy.held_out.features, noisy.held_out.labels
    column, near = list(noisy.judge.attributes).index("hair"), nearest(features[BANK:], features[:BANK])
    values = range(len(noisy.judge.attributes["hair"]))
    shown = [[float(d) for d, label in zip(near, labels[BANK:, column], strict=True) if label == v] for v in values]
    wanted = sum(sum(d) / len(d) for d in shown) / len(shown) / float(near.mean())
    assert rarity(noisy, "hair") == pytest.approx(wanted, rel=1e-4)
    assert rarity(open_world(WorldName()), "hair") is None
