"""The published noisy CLIPs: their layout, what they compute by a second implementation, and their way into our files.

Layout and formulas are written down here once more. Most tests use a small model of the same layout, in place of
RN50x16; one compares RN50x16 itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from sdg_core import files
from sdg_core.commands import main
from sdg_core.encoders import (
    CleanCLIP,
    NoisyCLIP,
    build_clip,
    load_noisy_clip,
    published,
    save_noisy_clip,
    with_text,
)

T = (0.0, 333.5, 999.0)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Layout:
    """Sizes of a published file: RN50x16's, unless told otherwise."""

    width: int = 96
    blocks: tuple[int, ...] = (6, 8, 18, 8)
    embed: int = 768
    size: int = 256

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file."""
        w, top = self.width, 32 * self.width
        shapes = {}
        for place, cin, cout in ((0, 3, w // 2), (3, w // 2, w // 2), (6, w // 2, w)):
            shapes |= {f"visual_frozen.{place}.weight": (cout, cin, 3, 3)} | norm(f"visual_frozen.{place + 1}", cout)
        channels, modulated = w, 2 * w
        for stage, (name, count) in enumerate(zip(STAGES, self.blocks, strict=True)):
            inner = w * 2**stage
            for block in range(count):
                shapes |= bottleneck(f"{name}.{block}", channels, inner, shortcut=block == 0)
                channels, modulated = 4 * inner, modulated + 6 * inner
        shapes["attn_pool.positional_embedding"] = ((self.size // 32) ** 2 + 1, top)
        for part, out in (("k_proj", top), ("q_proj", top), ("v_proj", top), ("c_proj", self.embed)):
            shapes |= linear(f"attn_pool.{part}", top, out)
        shapes |= linear("time_embed.0", 128, 512) | linear("time_embed.2", 512, 512)
        return shapes | linear("emb_layers.1", 512, 2 * modulated)


STAGES = ("visual_frozen.10", "visual_frozen.11", "visual_frozen.12", "layer4")
RN50X16 = Layout()
SMALL = Layout(width=8, blocks=(1, 2, 1, 1), embed=16, size=64)
SMALL_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    numbers = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in numbers} | {f"{name}.num_batches_tracked": ()}


def linear(name: str, cin: int, cout: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (cout, cin), f"{name}.bias": (cout,)}


def bottleneck(name: str, channels: int, inner: int, shortcut: bool) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.conv1.weight": (inner, channels, 1, 1)} | norm(f"{name}.bn1", inner)
    shapes |= {f"{name}.conv2.weight": (inner, inner, 3, 3)} | norm(f"{name}.bn2", inner)
    shapes |= {f"{name}.conv3.weight": (4 * inner, inner, 1, 1)} | norm(f"{name}.bn3", 4 * inner)
    if shortcut:
        shapes |= {f"{name}.downsample.0.weight": (4 * inner, channels, 1, 1)} | norm(f"{name}.downsample.1", 4 * inner)
    return shapes


def random_state(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers with which activations stay of order 1.

    The weights of one fan-in are windows into one row of numbers, and those of ``emb_layers`` overlap: so a file of
    RN50x16 takes 100 MB and not 1 GB, and is made fast.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = layout.shapes()
    pools: dict[int, Tensor] = {}
    for shape in shapes.values():
        fan_in, size = math.prod(shape[1:]), math.prod(shape) + 999
        if len(shape) > 1 and shape[0] < 50_000 and len(pools.get(fan_in, ())) < size:
            pools[fan_in] = torch.randn(size, generator=generator) * fan_in**-0.5
    return {name: random_tensor(name, shape, pools, generator) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], pools: Mapping[int, Tensor], generator) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if name == "emb_layers.1.weight":
        row = torch.randn(shape[0] * 5 + shape[1], generator=generator) * 0.03
        return row.as_strided(shape, (5, 1))
    if len(shape) > 1:
        pool = pools[math.prod(shape[1:])]
        start = int(torch.randint(len(pool) - math.prod(shape), (), generator=generator))
        return pool[start : start + math.prod(shape)].view(shape)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        least = 0.2 if "bn3.weight" in name else 0.7
        return least + 0.6 * torch.rand(shape, generator=generator)
    return 0.2 * torch.randn(shape, generator=generator)


def second_implementation(state: Mapping[str, Tensor], image: Tensor, t: Tensor) -> list[Tensor]:
    """Stem, layer1..layer4 and the pooled embedding of noisy pictures (B, 3, S, S) in -1..1 at t (B,), in float64."""
    state = {name: value.double() for name, value in state.items()}
    image = image.double()
    angles = t.double()[:, None] * 10_000 ** (-torch.arange(64).double() / 64)
    hidden = torch.cat([angles.cos(), angles.sin()], 1)
    for name in ("time_embed.0", "time_embed.2", "emb_layers.1"):
        hidden = F.linear(hidden if name == "time_embed.0" else hidden.relu(), *pair(state, name))
    numbers, used = hidden, 0

    def normalise(x: Tensor, name: str) -> Tensor:
        values = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, training=False, eps=1e-5)

    def modulate(x: Tensor) -> Tensor:
        nonlocal used
        scale, shift = numbers[:, used : used + 2 * x.shape[1], None, None].chunk(2, 1)
        used += 2 * x.shape[1]
        return x * (1 + scale) + shift

    def block(x: Tensor, name: str, stride: int) -> Tensor:
        y = modulate(normalise(F.conv2d(x, state[f"{name}.conv1.weight"]), f"{name}.bn1")).relu()
        y = modulate(normalise(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")).relu()
        y = modulate(normalise(F.conv2d(F.avg_pool2d(y, stride), state[f"{name}.conv3.weight"]), f"{name}.bn3"))
        if f"{name}.downsample.0.weight" in state:
            x = F.conv2d(F.avg_pool2d(x, stride), state[f"{name}.downsample.0.weight"])
            x = normalise(x, f"{name}.downsample.1")
        return (x + y).relu()

    mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    x = ((image + 1) / 2 - mean) / std
    for place, stride in ((0, 2), (3, 1), (6, 1)):
        x = F.conv2d(x, state[f"visual_frozen.{place}.weight"], stride=stride, padding=1)
        x = modulate(normalise(x, f"visual_frozen.{place + 1}")).relu()
    features = [F.avg_pool2d(x, 2)]
    for stage, name in enumerate(STAGES):
        x = features[-1]
        for i in range(sum(f"{name}.{i}.conv1.weight" in state for i in range(99))):
            x = block(x, f"{name}.{i}", 2 if stage > 0 and i == 0 else 1)
        features.append(x)
    assert used == numbers.shape[1]
    return [*features, attention_pool(state, x)]


def attention_pool(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D): the mean attends to itself and to all places, with heads of 64 channels."""
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + state["attn_pool.positional_embedding"]
    q, k, v = (
        F.linear(part, *pair(state, f"attn_pool.{name}_proj")).unflatten(2, (-1, 64)).transpose(1, 2)
        for name, part in (("q", tokens[:, :1]), ("k", tokens), ("v", tokens))
    )
    mixed = ((q * 64**-0.5) @ k.transpose(2, 3)).softmax(-1) @ v
    return F.linear(mixed.transpose(1, 2).flatten(1), *pair(state, "attn_pool.c_proj"))


def pair(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def features(encoder: NoisyCLIP, image: Tensor, t: list[float]) -> list[Tensor]:
    """In float64."""
    out = encoder.double()(image, torch.tensor(t, dtype=torch.float64), encoder.full_depth)
    return [*out.maps, out.embed]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def assert_of_order_one(values: list[Tensor]) -> None:
    for value in values:
        assert 0.1 < float(value.square().mean().sqrt()) < 10


def assert_all_differ(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert float((a - b).abs().mean()) > 0.01 * float(a.abs().mean())


def row(values: list[Tensor], index: int) -> list[Tensor]:
    return [value[index : index + 1] for value in values]


# RN50x16 itself


def test_the_layout_has_the_published_sizes():
    shapes = RN50X16.shapes()
    assert shapes["emb_layers.1.weight"] == (182_400, 512)
    assert shapes["attn_pool.positional_embedding"] == (65, 3072)
    assert sum("bn" in name and name.endswith("running_var") for name in shapes) == 3 * (6 + 8 + 18 + 8)


def test_a_published_rn50x16_computes_what_its_authors_wrote(tmp_path, draw):
    """Two pictures at all three t, each timestep once as the batch's own and once of one picture."""
    state, image = random_state(RN50X16), draw(2, 3, 256, 256) * 0.5
    torch.save(state, tmp_path / "published.pt")
    encoder = load_noisy_clip(tmp_path / "published.pt")
    with torch.no_grad():
        mixed = second_implementation(state, image, torch.tensor([0.0, 333.5]))
        late = second_implementation(state, image, torch.tensor([999.0, 999.0]))
        assert_of_order_one(mixed)
        assert mixed[-1].shape == (2, 768)
        assert_close(features(encoder, image, [0.0, 333.5]), mixed)
        assert_close(features(encoder, image, [999.0]), late)
        assert_close(features(encoder, image[:1], [0.0]), row(mixed, 0))
        assert_close(features(encoder, image[1:], [333.5]), row(mixed, 1))
        for index in (0, 1):
            assert_all_differ(row(mixed, index), row(late, index))


# The same layout, small


@pytest.fixture(scope="module", autouse=True)
def small_architectures(tmp_path_factory) -> Iterator[None]:
    """open_clip knows "small", "small-gelu", "small-wide" and "small-vit" while this file's tests run."""
    folder, factory = tmp_path_factory.mktemp("model_configs"), open_clip.factory
    vit = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16}
    others = {"gelu": {"quick_gelu": False}, "wide": {"embed_dim": 24}, "vit": {"vision_cfg": vit}}
    for name, change in {"small": {}, **{f"small-{name}": change for name, change in others.items()}}.items():
        (folder / f"{name}.json").write_text(json.dumps({**SMALL_CLIP, **change}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
        patch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
        open_clip.add_model_config(folder)
        yield


@pytest.fixture
def small(monkeypatch) -> dict[str, Tensor]:
    """A small published state dict, and the loader expects its sizes."""
    vision = {**SMALL_CLIP["vision_cfg"], "image_size": SMALL.size}
    clip = {**SMALL_CLIP, "vision_cfg": vision, "architecture": "small"}
    expected = replace(published.config(), clip=clip, noise_size=SMALL.size)
    monkeypatch.setattr(published, "config", lambda: expected)
    return random_state(SMALL)


@pytest.fixture
def file(small, tmp_path) -> Path:
    torch.save(small, tmp_path / "published.pt")
    return tmp_path / "published.pt"


def make_clip(architecture: str = "small") -> CleanCLIP:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = {**open_clip.get_model_config(architecture), "architecture": architecture}
        return CleanCLIP(build_clip(config), 32, build=config).requires_grad_(False).eval()


@pytest.mark.parametrize("t", T)
def test_features_are_those_of_a_second_implementation(t, small, file, draw):
    image = draw(2, 3, SMALL.size, SMALL.size)
    wanted = second_implementation(small, image, torch.tensor([t, t]))
    assert_of_order_one(wanted)
    assert_close(features(load_noisy_clip(file), image, [t]), wanted)


def test_every_picture_has_its_own_t(small, file, draw):
    image, t = draw(3, 3, SMALL.size, SMALL.size), list(T)
    assert_close(features(load_noisy_clip(file), image, t), second_implementation(small, image, torch.tensor(t)))


def test_folding_the_conditioning_into_the_norms_changes_nothing(file, draw):
    encoder, image = load_noisy_clip(file), draw(2, 3, SMALL.size, SMALL.size)
    for t in T:
        assert_close(features(encoder, image, [t]), features(encoder, image, [t, t]))


def test_all_features_depend_on_t(file, draw):
    encoder, image = load_noisy_clip(file), draw(2, 3, SMALL.size, SMALL.size)
    early, middle, late = (features(encoder, image, [t]) for t in T)
    assert_all_differ(early, middle)
    assert_all_differ(middle, late)


def test_it_comes_frozen_without_text_and_says_how_to_get_one(file):
    encoder = load_noisy_clip(file)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match=r"no text tower.*Load CLIP to text_from"):
        encoder.encode_text(["a cat"])


def test_half_precision_weights_are_read_as_float32(small, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in small.items()}, tmp_path / "half.pth")
    encoder = load_noisy_clip(tmp_path / "half.pth")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


# Files that are something else


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


WRONG = {
    "missing": (
        lambda s: without(s, "layer4.0.bn1.running_var", "emb_layers.1.bias"),
        r"not a whole published .*Missing: layer4\.0\.bn1\.running_var, emb_layers\.1\.bias\.",
    ),
    "many": (lambda s: {k: v for k, v in s.items() if "bn" not in k}, r"Missing: visual_frozen\.10.* and \d+ more\."),
    "extra": (lambda s: {**s, "text.ln.bias": torch.zeros(2)}, r"Unknown: text\.ln\.bias\."),
    "shape": (
        lambda s: {**s, "attn_pool.positional_embedding": torch.zeros(50, 256)},
        r"Wrong shape: attn_pool\.positional_embedding \(50, 256\) instead of \(5, 256\)\.",
    ),
    "foreign": (lambda s: {"a.weight": torch.zeros(1)}, r"Not a published noisy CLIP.*a\.weight; wanted visual_frozen"),
    "empty": (lambda s: {}, r"Not a published noisy CLIP"),
    "nested": (lambda s: {"state_dict": s}, r"wrong\.pt does not hold a plain state dict"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_state_dicts_are_refused_by_name_and_nothing_is_overwritten(case, small, tmp_path, capsys):
    change, message = WRONG[case]
    torch.save(change(small), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=message):
        load_noisy_clip(tmp_path / "wrong.pt")
    assert_refused_by_convert(tmp_path / "wrong.pt", capsys)


def test_a_pickle_with_code_is_refused_and_not_run(small, tmp_path, capsys):
    trace = tmp_path / "trace"
    torch.save({**small, "bomb": Bomb(trace)}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt was not loaded.*could run code"):
        load_noisy_clip(tmp_path / "bomb.pt")
    assert_refused_by_convert(tmp_path / "bomb.pt", capsys)
    assert not trace.exists()


def test_a_truncated_file_is_refused(file, capsys):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"published\.pt was not loaded: it is damaged"):
        load_noisy_clip(file)
    assert_refused_by_convert(file, capsys)


def assert_refused_by_convert(source: Path, capsys) -> None:
    out = source.with_name("precious.safetensors")
    out.write_bytes(b"precious")
    before = sorted(path.name for path in source.parent.iterdir())
    assert main(["convert", str(source), "--out", str(out), "--force"]) == 2
    assert capsys.readouterr().err.startswith("sdg: ")
    assert out.read_bytes() == b"precious"
    assert sorted(path.name for path in source.parent.iterdir()) == before


# Conversion


def test_a_converted_encoder_is_the_same(file, tmp_path, draw):
    out, image = tmp_path / "ours.safetensors", draw(2, 3, SMALL.size, SMALL.size)
    assert main(["convert", str(file), "--out", str(out)]) == 0
    before, after = load_noisy_clip(file), load_noisy_clip(out)
    assert after.config == before.config
    assert not after.has_text
    for one, other in zip(features(after, image, [333.5]), features(before, image, [333.5]), strict=True):
        assert torch.equal(one, other)
    with safe_open(str(out), "pt") as tensors:
        assert not [name for name in tensors.keys() if name.startswith("text.")]  # noqa: SIM118


def test_half_precision_is_close_and_half_as_large(file, tmp_path, draw):
    image, sizes = draw(2, 3, SMALL.size, SMALL.size), []
    for options in ([], ["--half"]):
        assert main(["convert", str(file), "--out", str(tmp_path / "o.safetensors"), "--force", *options]) == 0
        sizes.append((tmp_path / "o.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    assert_close(features(load_noisy_clip(tmp_path / "o.safetensors"), image, [333.5]),
                 features(load_noisy_clip(file), image, [333.5]), 0.01)  # fmt: skip


def test_numbers_beyond_half_precision_are_kept(small, tmp_path):
    small["visual_frozen.1.running_var"][0] = 1e6
    torch.save(small, tmp_path / "published.pt")
    save_noisy_clip(tmp_path / "half.safetensors", load_noisy_clip(tmp_path / "published.pt"), half=True)
    loaded = load_noisy_clip(tmp_path / "half.safetensors")
    assert torch.equal(loaded.tower.visual.bn1.running_var, small["visual_frozen.1.running_var"])


def test_an_existing_file_is_kept_unless_forced(file, tmp_path, capsys):
    out = tmp_path / "ours.safetensors"
    out.write_bytes(b"precious")
    assert main(["convert", str(file), "--out", str(out)]) == 2
    assert "overwrite it with --force" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert main(["convert", str(file), "--out", str(out), "--force"]) == 0
    assert load_noisy_clip(out).full_depth == 6


def test_other_endings_and_missing_folders_are_explained(file, tmp_path, capsys):
    assert main(["convert", str(file), "--out", str(tmp_path / "ours.pt")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    assert main(["convert", str(file), "--out", str(tmp_path / "none/ours.safetensors")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file, tmp_path, monkeypatch):
    def breaks_off(tensors: dict, path: str, metadata: dict) -> None:
        Path(path).write_bytes(b"the beginning")
        raise OSError("No space left on device")

    encoder, out = load_noisy_clip(file), tmp_path / "ours.safetensors"
    out.write_bytes(b"precious")
    monkeypatch.setattr(files, "save_file", breaks_off)
    for path in (out, tmp_path / "new.safetensors"):
        with pytest.raises(ValueError, match=rf"{path.name} was not written: No space left.*disk has room"):
            save_noisy_clip(path, encoder)
    assert out.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.safetensors", "published.pt"]


# A text tower from elsewhere


def test_a_lent_text_tower_speaks_as_it_did_and_nobody_loses_anything(file, draw):
    encoder, clip, image = load_noisy_clip(file), make_clip(), draw(2, 3, SMALL.size, SMALL.size)
    weights = {name: value.clone() for name, value in clip.state_dict().items()}
    lent = with_text(encoder, clip)
    assert lent.has_text
    assert not lent.training
    assert torch.equal(lent.encode_text(["a cat"]), clip.encode_text(["a cat"]))
    for one, other in zip(features(lent, image, [333.5]), features(encoder, image, [333.5]), strict=True):
        assert torch.equal(one, other)
    nn.init.zeros_(lent.text.token_embedding.weight)
    assert all(torch.equal(value, weights[name]) for name, value in clip.state_dict().items())
    assert encoder.text is None
    assert not encoder.has_text


def test_a_lent_text_tower_is_saved_with_the_encoder(file, tmp_path, draw):
    lent, image = with_text(load_noisy_clip(file), make_clip()), draw(1, 3, SMALL.size, SMALL.size)
    save_noisy_clip(tmp_path / "both.safetensors", lent, half=False)
    loaded = load_noisy_clip(tmp_path / "both.safetensors")
    assert loaded.config == lent.config
    assert torch.equal(loaded.encode_text(["a cat"]), lent.encode_text(["a cat"]))
    assert_close(features(loaded, image, [0.0]), features(lent, image, [0.0]), 0)
    assert_same_text(with_text(loaded, lent), lent)


def assert_same_text(one: CleanCLIP, other: CleanCLIP) -> None:
    assert torch.equal(one.encode_text(["a red dog"]), other.encode_text(["a red dog"]))


def test_convert_adds_a_text_tower_from_a_file(file, tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        clip = build_clip(SMALL_CLIP).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    out = tmp_path / "both.safetensors"
    arguments = ["convert", str(file), "--out", str(out), "--text-from"]
    assert main([*arguments, str(tmp_path / "clip.pt")]) == 0
    tokens = open_clip.SimpleTokenizer(context_length=77)(["a cat"])
    assert torch.equal(load_noisy_clip(out).encode_text(["a cat"]), clip.encode_text(tokens, normalize=True))
    assert main([*arguments, "nobody", "--force"]) == 2
    assert 'no weights "nobody" for small' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("small-wide", "gives 24 numbers and the noisy CLIP 16.*architecture: small"),
        ("small-vit", "belongs to small-vit, whose image tower differs.*Wanted: small"),
        ("small-gelu", r"whose activation \(quick_gelu\) differs"),
    ],
)
def test_text_towers_of_other_clips_are_refused(architecture, message, file):
    with pytest.raises(ValueError, match=message):
        with_text(load_noisy_clip(file), make_clip(architecture))


def test_a_clip_without_a_text_tower_has_none_to_lend(file):
    encoder = load_noisy_clip(file)
    with pytest.raises(ValueError, match="without a text tower to lend"):
        with_text(encoder, encoder)
