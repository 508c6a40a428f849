"""Reduced forms of the measurements that `sdg evaluate` prints in full, on the bundled models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from sdg_core import commands
from sdg_core.avatars import BUNDLED, LATENT, Pull, World, WorldName, load_world, open_world, sample, seeded_noise
from sdg_core.avatars.demo import GAP, SEEDS, TILE, demo_rows, draw_grid, draw_strip, strip_rows
from sdg_core.avatars.jobs import hits, judge_accuracy
from sdg_core.avatars.metrics import grain, layout_correlation
from sdg_core.avatars.world import LATENT_MODELS, ROUTES
from sdg_core.method import DEFAULT_SCALE, Goal, Strength, guide
from sdg_core.models import euler, guided

STEPS = 25


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def latents():
    """The 128 px world."""
    return open_world(WorldName(model="v", route="noisy linear"))


def test_all_bundled_files_stay_within_their_budget():
    sizes = {path: path.stat().st_size for path in BUNDLED.rglob("*") if path.suffix in (".safetensors", ".png")}
    assert sum(sizes.values()) <= 60e6
    assert sum(size for path, size in sizes.items() if path.parent == LATENT) <= 40e6  # the registry's package


@pytest.mark.parametrize(
    ("prompt", "wish"),
    [
        ("someone with a green backdrop", {"background": "green"}),
        ("someone with spectacles", {"glasses": True}),
    ],
)
def test_text_guidance_of_latents_draws_what_the_prompt_names(latents, prompt, wish):
    wanted = {name: latents.judge.attributes[name].index(value) for name, value in wish.items()}
    noise = seeded_noise(range(16), 32, 4)
    guided, plain = (sample(latents, pulls, noise, steps=20) for pulls in ([Pull("text", prompt)], []))
    assert guided.shape == (16, 3, 128, 128)
    assert hits(latents, guided, [wanted] * 16).mean() >= 0.8
    assert hits(latents, plain, [wanted] * 16).mean() <= 0.5
    assert grain(plain).mean() < 0.02


def test_judge_is_right_on_held_out_renders(world):
    accuracy = judge_accuracy(world)
    assert min(accuracy[name] for name in ("style", "background", "hair", "glasses", "hat")) >= 0.9


@pytest.mark.parametrize(
    ("prompt", "wish"),
    [("a person with blue background", {"background": "blue"}), ("pixel art", {"style": "pixel"})],
)
def test_text_guidance_draws_what_the_prompt_names(world, prompt, wish):
    wanted = {name: world.judge.attributes[name].index(value) for name, value in wish.items()}
    noise = seeded_noise(range(16), 32)
    guided = sample(world, [Pull("text", prompt)], noise, steps=STEPS)
    plain = sample(world, [], noise, steps=STEPS)
    assert hits(world, guided, [wanted] * 16).mean() >= 0.8
    assert hits(world, plain, [wanted] * 16).mean() <= 0.4


def test_structure_guidance_follows_the_layout_of_its_reference(world):
    reference = world.renders[0]
    noise = seeded_noise(range(8), 32)
    guided = sample(world, [Pull("structure", reference)], noise, steps=STEPS)
    plain = sample(world, [], noise, steps=STEPS)
    close, far = (layout_correlation(x, reference[None].expand(8, -1, -1, -1)).mean() for x in (guided, plain))
    assert close >= max(0.7, far + 0.3)


@pytest.mark.parametrize("kind", list(DEFAULT_SCALE))
def test_a_hundred_times_the_default_scale_stays_finite(world, kind):
    target = "a person with glasses" if kind == "text" else world.renders[0]
    noise = seeded_noise(range(2), 32)
    guided = sample(world, [Pull(kind, target, 100 * DEFAULT_SCALE[kind])], noise, steps=10)
    assert bool(torch.isfinite(guided).all())


@pytest.mark.parametrize("kind", ["text", "content", "structure", "style"])
def test_a_target_is_met_where_the_guidance_can(world, kind):
    """Nine tenths of the way from unguided to as far as a target takes it, by the noisy CLIP, at the default cap."""
    target = "a person with glasses and blue background" if kind == "text" else world.renders[0]
    term = replace(world.term(Pull(kind, target)), start=0.0, end=1.0)
    noise, sigmas = seeded_noise(range(2), 32), world.denoiser.sigmas(60)

    def finished(term):
        run, seen = (world.open_run((t,), Strength()) for t in (term, replace(term, goal=None, scale=1.0)))
        *_, last = euler(guided(world.denoiser, run), world.denoiser.initial(noise, sigmas), sigmas)
        guide(last.x, last.x, sigmas[-2].expand(2), seen)
        return seen.trace[0].scores[0] + 1 - term.guidance.best

    free, unlimited = finished(replace(term, scale=1e-9)), finished(replace(term, goal=Goal(1.0)))
    wanted = float(free.mean() + 0.9 * (unlimited.min() - free.mean()))
    got = finished(replace(term, goal=Goal(wanted)))
    print(f"{kind}: unguided {free.tolist()}, unlimited {unlimited.tolist()}, target {wanted:.3f}, got {got.tolist()}")
    torch.testing.assert_close(got, torch.full((2,), wanted), rtol=0, atol=0.02)


def test_the_same_seed_gives_the_same_picture(world):
    pulls, noise = [Pull("text", "a person with glasses"), Pull("style", world.renders[1])], seeded_noise(range(4), 32)
    assert torch.equal(sample(world, pulls, noise, steps=10), sample(world, pulls, noise, steps=10))


def exactly(name: WorldName) -> World:
    """A bundled world in float64."""
    world = open_world(name)
    decoder = () if world.decoded is None else world.decoded.modules
    for module in (world.denoiser.unet, world.encoder, *decoder):
        module.double()
    return world


def run_apart(world: World, kinds: Sequence[str], steps: int) -> tuple[float, float]:
    """How far a batch's run is from its pictures' own, and from its own after a change of its noise by one ulp."""
    channels, size, _ = world.denoiser.shape
    pulls = [
        Pull(kind, "a person with glasses" if kind == "text" else world.renders[2 + i]) for i, kind in enumerate(kinds)
    ]
    noise = seeded_noise(range(2), size, channels).double()
    changed = torch.nextafter(noise, torch.zeros_like(noise))
    batch, other, *singles = (
        sample(world, pulls, x, steps=steps, sampler="euler") for x in (noise, changed, *noise[:, None])
    )
    return float((batch - torch.cat(singles)).abs().max()), float((batch - other).abs().max())


@pytest.fixture(scope="module")
def exact_world() -> World:
    return exactly(WorldName())


@pytest.mark.parametrize("kind", list(DEFAULT_SCALE))
def test_a_guided_run_of_a_batch_is_that_of_its_single_pictures(exact_world, kind):
    """Fifty steps at the default scale, in float64.

    Guidance amplifies rounding, by pictures' content and style the most, and rounding is each CPU's own: where a change
    of the noise by one ulp grows beyond 1e-9, the bar is a hundred times what it grows to.
    """
    apart, ulp = run_apart(exact_world, [kind], 50)
    print(f"{kind}: {apart:.1e} apart; one ulp of the noise makes {ulp:.1e}")
    assert apart < max(1e-9, 100 * ulp)


def test_four_guidances_at_once_amplify_rounding_and_nothing_else(exact_world):
    """At full scale they overshoot at every step, so that one rounding grows: to what a change by one ulp grows."""
    apart, ulp = run_apart(exact_world, list(DEFAULT_SCALE), 50)
    print(f"all: {apart:.1e} apart; one ulp of the noise makes {ulp:.1e}")
    assert apart < max(1e-9, 100 * ulp)


LATENTS = [WorldName(model=model, route=route) for model, route in zip(LATENT_MODELS, ROUTES, strict=True)]


@pytest.mark.parametrize("name", LATENTS, ids=lambda name: f"{name.model} {name.route}")
def test_a_guided_run_of_latents_is_that_of_its_single_pictures(name):
    """Twenty steps of every model, each through another view, text and structure, in float64."""
    apart, ulp = run_apart(exactly(name), ["text", "structure"], 20)
    print(f"{name.model} {name.route}: {apart:.1e} apart; one ulp of the noise makes {ulp:.1e}")
    assert apart < max(1e-9, 100 * ulp)


def test_the_order_of_guidances_does_not_matter_in_a_whole_run(exact_world):
    pulls = [Pull("text", "a person with glasses"), Pull("content", exact_world.renders[2])]
    noise = seeded_noise([0], 32).double()
    one, other, changed = (
        sample(exact_world, some, x, steps=50, sampler="euler")
        for some, x in ((pulls, noise), (pulls[::-1], noise), (pulls, torch.nextafter(noise, torch.zeros_like(noise))))
    )
    apart, ulp = (float((one - two).abs().max()) for two in (other, changed))
    assert apart < max(1e-9, 100 * ulp)


def test_demo_row_shows_every_guidance_its_references_and_labels_that_fit(latents):
    rows = strip_rows(latents)
    assert {pull.kind for pull in rows[-1].pulls} == set(DEFAULT_SCALE)
    strip = draw_strip(rows, [torch.zeros(1, 3, 128, 128) for _ in rows])
    side = 2 * TILE
    assert strip.width == len(rows) * (side + GAP) - GAP
    for x, row in enumerate(rows):
        picture = strip.crop((x * (side + GAP), 0, x * (side + GAP) + side, side))
        assert (len(picture.getcolors(side * side)) > 1) == any(isinstance(p.target, torch.Tensor) for p in row.pulls)
        gap = strip.crop((x * (side + GAP) + side, 0, x * (side + GAP) + side + GAP, strip.height))
        assert x == len(rows) - 1 or gap.getcolors() == [(GAP * strip.height, (255, 255, 255))]


def test_demo_grid_has_a_row_for_every_guidance_and_room_for_every_label(latents):
    rows = demo_rows(latents)
    kinds = {pull.kind for row in rows for pull in row.pulls}
    assert kinds == set(DEFAULT_SCALE)
    assert not rows[0].pulls
    grid = draw_grid(rows, [torch.zeros(len(SEEDS), 3, 128, 128)] * len(rows))
    labels = torch.tensor(list(grid.crop((0, 0, 250, grid.height)).convert("L").tobytes()))
    edge = torch.tensor(list(grid.crop((246, 40, 250, grid.height)).convert("L").tobytes()))
    assert labels.min() < 128  # text is drawn
    assert edge.min() == 255  # and none runs into the pictures


def test_evaluate_prints_one_json_object_with_rows(capsys):
    assert commands.main(["evaluate", "--suite", "structure", "--samples", "4", "--steps", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(set(row) == {"name", "n", "value", "unguided", "bar", "cost_ms"} for row in rows)
    assert [row["name"] for row in rows] == ["structure", "structure/nearest render"]
    assert rows[0]["n"] >= 4


def test_a_missing_picture_is_named_in_the_error(capsys, tmp_path):
    assert commands.main(["sample", "--style", str(tmp_path / "none.png")]) == 2
    assert "none.png" in capsys.readouterr().err
