"""Presets: what is read is what was written, bit for bit, and everything else is refused by the name of its field."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdg_core.method import (
    Augment,
    Blend,
    ClassGuidance,
    ContentGuidance,
    Convention,
    Curve,
    DirectionGuidance,
    Fade,
    Goal,
    GuidanceRun,
    Region,
    Several,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    combine,
    guide,
)
from sdg_core.presets import preset_text, read_preset
from sdg_core.presets.preset import Controls


def embed(texts: list[str]) -> torch.Tensor:
    """A direction for every text."""
    rows = [torch.randn(5, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return F.normalize(torch.stack(rows), dim=1)


def eight_bit(*shape: int, seed: int) -> torch.Tensor:
    """Pictures as a file gives them."""
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return bits.float() / 255 * 2 - 1


@pytest.fixture
def encoder(tiny_encoder):
    return tiny_encoder()


@pytest.fixture
def clean(tiny_encoder):
    made = tiny_encoder(seed=1)
    made.reads = "denoised"
    return made


@pytest.fixture
def terms(encoder, draw):
    """Every kind, and every control, for one encoder."""
    text = TextGuidance(embed(["a hat", "Hüte ☂"]), True, ("a hat", "Hüte ☂"))
    change = embed(["a", "b"])
    plain = TextGuidance(embed(["a hat"]), False, ("a hat",), embed(["a"]), ("a",))
    seen, rough = eight_bit(2, 3, 9, 7, seed=0), draw(2, 3, 6, 5, seed=1).clamp(-1, 1)
    mask, soft = torch.zeros(1, 1, 8, 8), torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    mask[..., 3:] = 1
    curve = Curve(((0.0, 1.0), (0.3, 0.1 + 0.2)), "ease in")
    blend = Blend(0.5, True)
    parts = (
        Term(text, encoder, 200.0, 0.2, 0.6, curves=(curve, Curve())),
        Term(ContentGuidance(rough, True, seen), encoder, -1e-3, several=Several("nearest", (1.0, 0.25))),
        Term(StructureGuidance(seen, (1, 2)), encoder, 30.0, region=Region(mask, soft, 0.1), every=2, lead=0.3),
        Term(StyleGuidance(seen, (2,), True), encoder, 1 / 3, goal=Goal(0.7), budget=25.5, frames=(0, -1)),
        Term(DirectionGuidance(seen[:1], change[1:] - change[:1], ("a", "b")), encoder, 20.0, goal=Goal(0.1, False)),
    )
    first = combine([(parts[:2], 1.5), (parts[2:4], -0.1)], blend)
    return (*first, *combine([(parts[4:], 2.0)], Blend(1.0)), Term(plain, encoder, 7.0))


def made(text: str, *encoders) -> tuple[Term, ...]:
    """The terms of a preset for an encoder, or for a pair."""
    pair = [(e, None) for e in encoders] if len(encoders) == 1 else list(zip(encoders, FADES, strict=True))
    return tuple(term for recipe in read_preset(text) for term in recipe.terms(pair, lambda i: embed))


FADES = (Fade(2.0, True), Fade(2.0, False))


def test_every_field_of_a_term_is_kept():
    kept = {field.name for field in fields(Controls)} | {"guidance", "encoder", "fade"}
    assert kept == {field.name for field in fields(Term)}


def same(a: object, b: object) -> bool:
    """Equal to the last bit: tensors too, and floats by their bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__") and not isinstance(a, torch.nn.Module):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return a is b if isinstance(a, torch.nn.Module) else a == b


def test_what_is_read_is_what_was_written(terms, encoder):
    read = made(preset_text(terms), encoder)
    assert len(read) == len(terms)
    for a, b in zip(terms, read, strict=True):
        assert same(a, b)
    assert [[a.blend is b.blend for b in read] for a in read] == [[a.blend is b.blend for b in terms] for a in terms]


def test_what_was_read_is_written_as_it_was(terms, encoder):
    text = preset_text(terms)
    assert preset_text(made(text, encoder)) == text


def test_a_run_is_the_same_to_the_last_bit(terms, encoder, draw):
    x_0, eps = draw(2, 3, 8, 8).clamp(-1, 1), draw(2, 3, 8, 8, seed=1)
    used = tuple(replace(term, frames=None, budget=None) for term in terms)
    results = []
    for each in (used, made(preset_text(used), encoder)):
        run = GuidanceRun(each, Convention.VE, lambda p: math.inf if p <= 0 else 10 * (1 - p))
        steps = [guide(0.9 * x_0, x_0 + s * eps, torch.full((2,), s), run) for s in (7.0, 6.0, 5.0, 2.0)]
        results.append(torch.stack(steps))
    assert torch.equal(*results)
    assert not torch.equal(results[0][0], 0.9 * x_0)


def test_a_pair_is_one_guidance_and_crops_are_its_clean_encoders(encoder, clean):
    text, image = TextGuidance(embed(["a"]), False, ("a",)), ContentGuidance(eight_bit(1, 3, 4, 4, seed=0))
    crops = Augment(3, 0.5)
    terms = tuple(
        Term(guidance, each, 2.0, fade=fade, augment=crops if each is clean else None)
        for guidance in (text, text, image)
        for each, fade in zip((encoder, clean), FADES, strict=True)
    )
    said = preset_text(terms)
    assert len(json.loads(said)["guidances"]) == 3
    assert all(map(same, terms, made(said, encoder, clean)))
    assert [term.augment for term in made(said, clean)] == [crops] * 3
    with pytest.raises(ValueError, match="for clean encoders"):
        made(said, encoder)


def test_a_class_is_kept(encoder):
    term = Term(ClassGuidance(207), encoder, 10.0)
    assert same((term,), made(preset_text((term,)), encoder))


@pytest.mark.parametrize("kind", ["png", "float32"])
def test_pictures_are_png_where_that_is_exact(encoder, draw, kind):
    image = eight_bit(1, 3, 5, 6, seed=0) if kind == "png" else draw(1, 3, 5, 6).clamp(-1, 1)
    said = json.loads(preset_text((Term(ContentGuidance(image), encoder, 1.0),)))
    assert kind in said["guidances"][0]["images"][0]


def test_texts_that_are_not_known_are_refused(encoder):
    with pytest.raises(ValueError, match="words are not known"):
        preset_text((Term(TextGuidance(embed(["a"])), encoder, 1.0),))


def test_numbers_that_no_file_may_hold_are_not_written(encoder):
    with pytest.raises(ValueError, match=r"guidances\[0\].scale.*number from"):
        preset_text((Term(ClassGuidance(1), encoder, 1e12),))


# Malformed files


BAD = [
    None, True, False, "", "x", -1, 0, 1, 3, 0.5, -0.5, 2.5, 1e300, -1e300, 10**400, [], {}, [1], [[]], [None],
    {"a": 1}, "\u0000", "../../x", "__import__('os')", [0.5, 0.5], [[0, 1], [0, 1]], "A" * 200_000,
]  # fmt: skip


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where every field and every item of a list stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in items:
        yield (*path, name)
        yield from places(part, (*path, name))


def at(value, path: tuple):
    for name in path:
        value = value[name]
    return value


def named(path: tuple) -> str:
    words = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in path)
    return words.lstrip(".")


def attempt(text: str, encoder) -> tuple[tuple[Term, ...] | None, str]:
    """The terms, or None and the refusal."""
    try:
        return made(text, encoder), ""
    except ValueError as error:
        return None, str(error)


def normal(said: dict) -> list:
    """The guidances with their blends themselves, and with whom they share them: numbers may be others."""
    numbers = [part["blend"] for part in said["guidances"]]
    blends = [None if n is None else (said["blends"][n], numbers.index(n)) for n in numbers]
    return [{**part, "blend": blend} for part, blend in zip(said["guidances"], blends, strict=True)]


def tells(error: str, path: tuple) -> bool:
    """Whether an error names a field, or what holds it, by its place; or the field as what another doesn't fit. Layers
    are the encoder's affair, and it says which it has."""
    near = [named(path[:end]) for end in range(len(path), min(len(path), 3) - 1, -1)]
    return any(f"field {place}" in error for place in near) or f"{path[-1]}" in error or "1..2" in error


def test_every_field_is_checked(terms, encoder):
    """Whatever stands in a field: it is kept as it is, or refused by the field's name."""
    said = json.loads(preset_text(terms))
    tried = refused = 0
    for path in places(said):
        for bad in BAD:
            changed = copy.deepcopy(said)
            at(changed, path[:-1])[path[-1]] = bad
            tried += 1
            kept, told = attempt(json.dumps(changed), encoder)
            refused += kept is None
            if kept is None:
                assert tells(told, path), (path, bad, told)
            else:
                assert normal(json.loads(preset_text(kept))) == normal(changed), (path, bad)
    print(f"{tried} changes, {refused} refused")
    assert refused > 0.8 * tried


def test_every_field_must_be_there_and_no_other(terms):
    said = json.loads(preset_text(terms))
    for path in places(said):
        if isinstance(path[-1], int):
            continue
        less, more = copy.deepcopy(said), copy.deepcopy(said)
        del at(less, path[:-1])[path[-1]]
        with pytest.raises(ValueError, match="preset"):
            read_preset(json.dumps(less))
        at(more, path[:-1])["unknown"] = 1
        with pytest.raises(ValueError, match="unknown of this guidance preset is not known"):
            read_preset(json.dumps(more))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_everywhere(terms, word):
    said = json.loads(preset_text(terms))
    for path in places(said):
        if isinstance(at(said, path), int | float) and not isinstance(at(said, path), bool):
            changed = copy.deepcopy(said)
            at(changed, path[:-1])[path[-1]] = "HERE"
            with pytest.raises(ValueError, match=r"finite|wanted"):
                read_preset(json.dumps(changed).replace('"HERE"', word))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "nested too deeply|no JSON"),
        ("[]", "wanted an object"),
        ("null", "wanted an object"),
        ('{"format": "SDG guidance preset", "format": "x"}', "format twice"),
        ('{"format": "other"}', "format"),
        ('{"format": "SDG guidance preset", "version": 2, "blends": [], "guidances": []}', "version .* is 2; wanted 1"),
        (
            '{"format": "SDG guidance preset", "version": 1, "blends": [], "guidances": []}',
            "guidances of this .* list of 0",
        ),
        ('{"a": ' + "9" * 5000 + "}", "preset"),
    ],
)
def test_what_is_no_preset_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_preset(text)


def png(mode: str, size: tuple[int, int]) -> str:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "picture",
    [
        {"png": png("L", (4, 4))},
        {"png": png("RGBA", (4, 4))},
        {"png": png("RGB", (20_000, 1))},
        {"png": png("RGB", (40, 40))[:60]},
        {"png": base64.b64encode(b"GIF89a").decode()},
        {"png": "%%%"},
        {"png": png("RGB", (4, 4)), "height": 4},
        {"float32": base64.b64encode(np.zeros(47, "<f4").tobytes()).decode(), "height": 4, "width": 4},
        {"float32": base64.b64encode(np.full(48, np.nan, "<f4").tobytes()).decode(), "height": 4, "width": 4},
        {"float32": base64.b64encode(np.full(48, 1.5, "<f4").tobytes()).decode(), "height": 4, "width": 4},
        {"float32": "", "height": 16384, "width": 16384},
        {},
    ],
    ids=lambda picture: "-".join(picture) or "nothing",
)
def test_pictures_that_are_none_are_refused(encoder, picture):
    said = json.loads(preset_text((Term(ContentGuidance(eight_bit(1, 3, 4, 4, seed=0)), encoder, 1.0),)))
    said["guidances"][0]["images"][0] = picture
    with pytest.raises(ValueError, match=r"field guidances\[0\].images\[0\]"):
        read_preset(json.dumps(said))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(blends=anything, guidances=anything, more=st.dictionaries(st.text(), anything, max_size=2))
def test_nothing_but_a_refusal_comes_of_made_up_files(blends, guidances, more):
    said = {"format": "SDG guidance preset", "version": 1, "blends": blends, "guidances": guidances, **more}
    with pytest.raises(ValueError, match="preset"):
        read_preset(json.dumps(said))
