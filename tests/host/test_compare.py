"""An XY plot: every guidance at every factor, in order, and one picture of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def rows(run, noisy_clip):
    """Two guidances: a text, and a text with a picture."""
    text = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE)
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    content = run("SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=300.0, **WHOLE)
    return text, run("SDGCombineGuidance", guidance_1=text, guidance_2=content)


@pytest.fixture(scope="module")
def plan(pack, rows):
    """plan(factors) -> the list of guidances and the sweep."""
    return lambda factors: pack.nodes["SDGGuidanceXY"].execute(factors, rows[0], None, rows[1]).args


@pytest.fixture(scope="module")
def grid(pack):
    """grid(images, sweep) -> IMAGE; both as the host gives a node that takes lists."""
    return lambda images, *sweep: pack.nodes["SDGXYGrid"].execute(images=images, sweep=[*sweep]).args[0]


def test_a_sweep_goes_through_rows_then_factors(plan):
    swept, sweep = plan("0, 0.5, -2")
    scales = [[term.scale for term in guidance.terms] for guidance in swept]
    assert scales == [[0.0], [75.0], [-300.0], [0.0, 0.0], [75.0, 150.0], [-300.0, -600.0]]
    assert sweep.rows == ('text "a red hat"', 'text "a red hat" + content')
    assert sweep.factors == (0.0, 0.5, -2.0)
    assert all(guidance.patchers for guidance in swept)


def test_the_host_gives_a_list_to_what_follows_and_the_grid_takes_one(pack):
    xy, table = (pack.nodes[name] for name in ("SDGGuidanceXY", "SDGXYGrid"))
    assert xy.GET_SCHEMA().outputs[0].is_output_list
    assert not xy.GET_SCHEMA().outputs[1].is_output_list
    assert table.GET_SCHEMA().is_input_list


def test_a_text_in_other_letters_is_left_out_of_the_name(pack, run, noisy_clip):
    text = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a 红 hat", scale=1.0, **WHOLE)
    assert pack.nodes["SDGGuidanceXY"].execute("1", text).args[1].rows == ("text",)


def test_every_picture_stands_in_its_cell(plan, grid):
    """Pictures of one gray each, two a batch: two grids, in which the grays stand in order."""
    _, sweep = plan("0, 1, 2")
    grays = [torch.stack([torch.full((40, 30, 3), (10 * i + b) / 255) for b in (0, 100)]) for i in range(1, 7)]
    both = (grid(grays, sweep) * 255).round().numpy().astype(int)
    assert both.shape[0] == 2
    for number, shift in enumerate((0, 100)):
        left, top = {}, {}
        for i in range(1, 7):
            where = np.argwhere((both[number] == 10 * i + shift).all(axis=-1))
            assert len(where) >= 40 * 30
            top[i], left[i] = np.median(where, axis=0) // 10
        assert top[1] == top[2] == top[3] < top[4] == top[5] == top[6]
        assert left[1] == left[4] < left[2] == left[5] < left[3] == left[6]


@pytest.mark.parametrize("factors", ["", " , ", "one", "1e999", "nan", ", ".join(["1"] * 13)])
def test_factors_that_are_none_are_refused(plan, factors):
    with pytest.raises(ValueError, match=r"Got the factors .*wanted 1 to 12 finite numbers"):
        plan(factors)


def test_what_is_missing_is_said(pack, plan, grid):
    with pytest.raises(ValueError, match="Connect at least one guidance"):
        pack.nodes["SDGGuidanceXY"].execute("1")
    with pytest.raises(ValueError, match="guidance_2 got 'me'; wanted an SDG_GUIDANCE"):
        pack.nodes["SDGGuidanceXY"].execute("1", None, "me")
    _, sweep = plan("0, 1")
    picture = torch.rand(1, 16, 16, 3)
    with pytest.raises(ValueError, match=r"Got 3 runs .*wanted 4 of one shape, for 2 guidances at 2 factors"):
        grid([picture] * 3, sweep)
    with pytest.raises(ValueError, match=r"shapes .*wanted 4 of one shape"):
        grid([picture] * 3 + [torch.rand(1, 8, 8, 3)], sweep)
    with pytest.raises(ValueError, match="sweep got 3; wanted an SDG_SWEEP"):
        grid([picture] * 4, 3)
