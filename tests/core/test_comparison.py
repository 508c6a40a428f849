"""The comparison with other systems, edits and compositions, in small, and what their columns mean."""

from __future__ import annotations

import json

import pytest
import torch

from sdg_core import commands
from sdg_core.avatars import Settings, WorldName, open_world
from sdg_core.avatars.comparison import FACTORS, METHODS, PAIRS, accuracy, found_reference, found_wish, pairs
from sdg_core.avatars.editing import COMPOSITIONS
from sdg_core.avatars.jobs import class_name
from sdg_core.avatars.world import Change, Pull, sample, seeded_noise

COLUMNS = ["accuracy", "frechet", "diversity", "retrieval", "seconds"]


@pytest.fixture(scope="module")
def world():
    return open_world(WorldName(model="v", route="noisy linear"))


@pytest.fixture(scope="module")
def chosen(world):
    return pairs(world, Settings())


def evaluated(capsys, suite: str, samples: int) -> list[dict]:
    command = ["evaluate", "--suite", suite, "--samples", str(samples), "--steps", "2", "--processes", "1", "--json"]
    assert commands.main(command) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_references_are_found_as_themselves_and_show_what_they_are_said_to(world, chosen):
    references = torch.stack([pair.reference for pair in chosen])
    assert len({tuple(pair.shows[name] for name in ("background", "hair")) for pair in chosen}) == PAIRS
    assert found_reference(world, chosen, references) == 1
    assert found_reference(world, chosen, references.roll(1, 0)) == 0
    assert accuracy(world, [pair.shows for pair in chosen], references) > 0.9
    assert accuracy(world, [pair.shows for pair in chosen], references.roll(1, 0)) < 0.5


def test_renders_that_show_a_wish_are_found_by_it(world, chosen):
    names, asked = list(world.judge.attributes), [pair.wish for pair in chosen]
    shown = []
    for wish in asked:
        ((name, value),) = wish.items()
        shown.append(world.renders[int(torch.nonzero(world.labels[:, names.index(name)] == value)[0])])
    assert accuracy(world, asked, torch.stack(shown)) > 0.9
    assert found_wish(world, asked, torch.stack(shown)) > 0.4 > 1 / PAIRS  # a render shows other wishes too


def test_every_wish_is_a_class_of_the_classifier(world):
    for name, values in world.judge.attributes.items():
        for value in values:
            assert 0 <= world.classifier.number_of(class_name(name, value)) < world.classifier.config.classes


def test_the_table_has_every_column_of_every_method(capsys):
    rows = evaluated(capsys, "table", 2 * PAIRS)
    assert [row["name"] for row in rows] == [f"{method.name}/{name}" for method in METHODS for name in COLUMNS]
    assert {f"ilvr {factor}" for factor in FACTORS[1:]} < {method.name for method in METHODS}
    by_name = {row["name"]: row for row in rows}
    assert by_name["unguided/diversity"]["value"] == 1
    assert by_name["unguided/frechet"]["value"] == by_name["text/frechet"]["unguided"]
    assert all(by_name[f"{method.name}/seconds"]["value"] > 0 for method in METHODS)


def test_edits_and_compositions_are_measured(capsys):
    rows = evaluated(capsys, "edit", 3)
    assert [(row["name"], row["n"]) for row in rows] == [("edit/reached", 3), ("edit/kept", 3)]
    rows = evaluated(capsys, "composition", 2)
    assert [row["name"] for row in rows] == [f"composition/{name}" for name in COMPOSITIONS]


def test_controls_are_measured(capsys):
    rows = {row["name"]: row for row in evaluated(capsys, "controls", 8)}
    assert {name.split("/")[1] for name in rows} == {"every second", "balanced", "fast", "away", "mask"}
    assert rows["controls/mask/outside"]["value"] < 1


def test_a_classifier_pulls_towards_its_class(world):
    noise, green = seeded_noise(range(4), 32, 4), world.judge.attributes["background"].index("green")
    pictures = sample(world, [Pull("class", "green background")], noise, steps=10)
    assert (world.judge.verdict(pictures)["background"] == green).float().mean() > 0.7


def test_an_edit_at_no_denoise_to_speak_of_leaves_the_picture(world):
    from sdg_core.avatars import bundled_latent_encoder

    encode, _ = bundled_latent_encoder()
    render = world.renders[:1]
    change = Change(render[0], "a person with black hair", "a person with pink hair")
    noise = seeded_noise([0], 32, 4)
    near, far = (
        sample(world, [Pull("direction", change)], noise, steps=5, picture=encode(render), denoise=part)
        for part in (0.05, 1.0)
    )
    assert (near - render).square().mean() < 0.1 * (far - render).square().mean()
