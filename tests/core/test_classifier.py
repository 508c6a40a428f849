"""Noisy classifiers: the published layouts, what they compute by a second implementation, their gradient, their files.

Layout and formulas are written down here once more, from the published description.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.files import save
from sdg_core.method import (
    ClassGuidance,
    Convention,
    GuidanceRun,
    Several,
    Term,
    TimestepTable,
    guide,
)
from sdg_core.models import ADMConfig, ADMUNet, Classifier, ClassifierConfig, load_classifier

HEAD = 64
PUBLISHED = {  # side: (widths over 128, residual blocks to a level)
    64: ((1, 2, 3, 4), 4),
    128: ((1, 1, 2, 3, 4), 2),
    256: ((1, 1, 2, 2, 4, 4), 2),
    512: ((0.5, 1, 1, 2, 2, 4, 4), 2),
}
ATTENDED = (32, 16, 8)  # sides of maps
TINY = ClassifierConfig(
    ADMConfig(
        image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=32
    ),
    classes=3,
    class_names=("glasses", "blue background", "pink hair"),
)


def published_shapes(side: int, width: int = 128, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published file; with another width or number of classes, of a smaller one like it."""
    mults, depth = PUBLISHED[side]
    embed = 4 * width
    shapes = affine("time_embed.0", embed, width) | affine("time_embed.2", embed, embed)
    channels, number = int(mults[0] * width), 1
    shapes |= affine("input_blocks.0.0", channels, 3, 3, 3)
    for level, mult in enumerate(mults):
        for _ in range(depth):
            out = int(mult * width)
            shapes |= residual(f"input_blocks.{number}.0", channels, out, embed)
            if side // 2**level in ATTENDED:
                shapes |= attention(f"input_blocks.{number}.1", out)
            channels, number = out, number + 1
        if level < len(mults) - 1:
            shapes |= residual(f"input_blocks.{number}.0", channels, channels, embed)
            number += 1
    for part in (0, 2):
        shapes |= residual(f"middle_block.{part}", channels, channels, embed)
    shapes |= attention("middle_block.1", channels) | affine("out.0", channels)
    shapes["out.2.positional_embedding"] = (channels, (side // 2 ** (len(mults) - 1)) ** 2 + 1)
    return shapes | affine("out.2.qkv_proj", 3 * channels, channels, 1) | affine("out.2.c_proj", classes, channels, 1)


def affine(name: str, out: int, *rest: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}


def residual(name: str, channels: int, out: int, embed: int) -> dict[str, tuple[int, ...]]:
    shapes = affine(f"{name}.in_layers.0", channels) | affine(f"{name}.in_layers.2", out, channels, 3, 3)
    shapes |= affine(f"{name}.emb_layers.1", 2 * out, embed)
    shapes |= affine(f"{name}.out_layers.0", out) | affine(f"{name}.out_layers.3", out, out, 3, 3)
    return shapes | (affine(f"{name}.skip_connection", out, channels, 1, 1) if out != channels else {})


def attention(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    shapes = affine(f"{name}.norm", channels) | affine(f"{name}.qkv", 3 * channels, channels, 1)
    return shapes | affine(f"{name}.proj_out", channels, channels, 1)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random numbers with which activations stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) > 1 and "positional" not in name:
            values *= math.prod(shape[1:]) ** -0.5
        elif name.endswith(".weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.2
        state[name] = values
    return state


def second_implementation(state: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Logits (B, classes), in the precision of the weights: a walk over the names."""
    width = state["time_embed.0.weight"].shape[1]
    angles = t[:, None] * 10_000 ** (-torch.arange(width // 2, dtype=t.dtype) / (width // 2))
    hidden = F.linear(torch.cat([angles.cos(), angles.sin()], 1), *pair(state, "time_embed.0"))
    embed = F.linear(F.silu(hidden), *pair(state, "time_embed.2"))

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, *pair(state, name), eps=1e-5)

    def block(name: str, h: Tensor, halved: bool) -> Tensor:
        y = F.silu(norm(f"{name}.in_layers.0", h))
        if halved:
            y, h = F.avg_pool2d(y, 2), F.avg_pool2d(h, 2)
        y = F.conv2d(y, *pair(state, f"{name}.in_layers.2"), padding=1)
        scale, shift = F.linear(F.silu(embed), *pair(state, f"{name}.emb_layers.1"))[..., None, None].chunk(2, 1)
        y = F.silu(norm(f"{name}.out_layers.0", y) * (1 + scale) + shift)
        if f"{name}.skip_connection.weight" in state:
            h = F.conv2d(h, *pair(state, f"{name}.skip_connection"))
        return h + F.conv2d(y, *pair(state, f"{name}.out_layers.3"), padding=1)

    def attend(name: str, h: Tensor) -> Tensor:
        B, C, H, W = h.shape
        numbers = F.conv1d(norm(f"{name}.norm", h.flatten(2)), *pair(state, f"{name}.qkv"))
        heads = []
        for q, k, v in (head.split(HEAD, 1) for head in numbers.split(3 * HEAD, 1)):  # heads first, then q, k, v
            weights = (q.transpose(1, 2) @ k / math.sqrt(HEAD)).softmax(2)
            heads.append(v @ weights.transpose(1, 2))
        return h + F.conv1d(torch.cat(heads, 1), *pair(state, f"{name}.proj_out")).view(B, C, H, W)

    h = F.conv2d(x, *pair(state, "input_blocks.0.0"), padding=1)
    depth = PUBLISHED[x.shape[-1]][1]
    for i in range(1, sum(f"input_blocks.{i}.0.in_layers.0.weight" in state for i in range(1, 99)) + 1):
        h = block(f"input_blocks.{i}.0", h, halved=i % (depth + 1) == 0)
        if f"input_blocks.{i}.1.qkv.weight" in state:
            h = attend(f"input_blocks.{i}.1", h)
    h = block("middle_block.2", attend("middle_block.1", block("middle_block.0", h, False)), False)
    return pool(state, F.silu(norm("out.0", h)))


def pool(state: dict[str, Tensor], h: Tensor) -> Tensor:
    """All places and their mean attend to each other, q, k, v first and then heads; the mean's row is kept."""
    tokens = h.flatten(2)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], 2) + state["out.2.positional_embedding"]
    q, k, v = F.conv1d(tokens, *pair(state, "out.2.qkv_proj")).chunk(3, 1)
    heads = []
    for one in zip(*(part.split(HEAD, 1) for part in (q, k, v)), strict=True):
        weights = torch.einsum("bct,bcs->bts", one[0] * HEAD**-0.25, one[1] * HEAD**-0.25).softmax(2)
        heads.append(torch.einsum("bts,bcs->bct", weights, one[2]))
    return F.conv1d(torch.cat(heads, 1), *pair(state, "out.2.c_proj"))[:, :, 0]


def pair(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def tiny(seed: int = 0, config: ClassifierConfig = TINY) -> Classifier:
    """In float64, with the layers that start at zero filled too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = Classifier(config).double()
        for parameter in classifier.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return classifier.requires_grad_(False).eval()


def log_p(classifier: Classifier, x: Tensor, t: Tensor, number: int) -> Tensor:
    embed = classifier(x, t, 1).embed
    assert embed is not None
    return embed.log_softmax(1)[:, number]


@pytest.mark.parametrize("side", PUBLISHED)
def test_a_published_layout_is_read_off_its_names_and_shapes(side):
    state = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(side).items()}
    config = ClassifierConfig.from_state_dict(state)
    mults, depth = PUBLISHED[side]
    levels = tuple(level for level in range(len(mults)) if side // 2**level in ATTENDED)
    body = ADMConfig(
        image_size=side, model_channels=128, channel_mult=mults, num_res_blocks=depth, attention_levels=levels,
        beta_schedule="cosine" if side == 64 else "linear",
    )  # fmt: skip
    assert config == ClassifierConfig(body, classes=1000)
    with torch.device("meta"):
        ours = Classifier(config).state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == published_shapes(side)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logits_equal_a_second_implementation(side, dtype, tolerance, draw):
    """The whole 64 px layout at half its width, the 128 px one too; in the pictures' own size."""
    state = {name: value.to(dtype) for name, value in random_state(published_shapes(side, 64, 10)).items()}
    classifier = Classifier(ClassifierConfig.from_state_dict(state)).to(dtype).eval()
    classifier.load_state_dict(state)
    x, t = draw(2, 3, side, side).to(dtype), torch.tensor([3.0, 871.0], dtype=dtype)
    with torch.no_grad():
        wanted, found = second_implementation(state, x, t), classifier(x, t, 1).embed
    assert 0.1 < float(wanted.std()) < 100
    assert float((found - wanted).abs().max()) < tolerance * float(wanted.abs().max())


def test_the_gradient_of_log_p_is_its_finite_difference(draw):
    classifier, t = tiny(), torch.tensor([321.0], dtype=torch.float64)
    x, direction = (draw(1, 3, 16, 16, seed=seed).double() for seed in (0, 1))
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(log_p(classifier, x, t, 1).sum(), x)
    h = 1e-5
    up, down = (float(log_p(classifier, x.detach() + sign * h * direction, t, 1)) for sign in (1, -1))
    assert float((grad * direction).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-8)


def test_guidance_shifts_by_the_gradient_in_the_classifiers_own_scaling(draw):
    """denoised' = denoised + s (1 - abar) / sqrt(abar) grad_u log p(y | u, t), u = x / sqrt(1 + sigma^2)."""
    classifier, sigma = tiny(), torch.tensor([0.7, 0.7], dtype=torch.float64)
    x, denoised = (draw(2, 3, 16, 16, seed=seed).double() for seed in (0, 1))
    terms = (Term(ClassGuidance(2), classifier, 3.0, several=Several("nearest")),)  # it has no references: no matter
    run = GuidanceRun(terms, Convention.VE, lambda percent: math.inf if percent <= 0 else 0.0)
    found = guide(denoised, x, sigma, run) - denoised
    u = (x / math.sqrt(1 + 0.49)).requires_grad_(True)
    t = TimestepTable.from_name("linear").timestep(sigma[:1])
    (grad,) = torch.autograd.grad(log_p(classifier, u, t, 2).sum(), u)
    wanted = 3.0 * 0.49 / math.sqrt(1 + 0.49) * grad
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert float(run.trace[0].scores[0, 0]) == pytest.approx(float(log_p(classifier, u, t, 2)[0].detach()))


def test_samples_do_not_mix(draw):
    classifier, x, t = tiny(), draw(3, 3, 16, 16).double(), torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64)
    singles = torch.cat([classifier(x[i : i + 1], t[i : i + 1], 1).embed for i in range(3)])
    torch.testing.assert_close(classifier(x, t, 1).embed, singles, rtol=1e-9, atol=1e-9)
    shared = classifier(x, t[:1], 1).embed
    torch.testing.assert_close(shared, classifier(x, t[:1].expand(3), 1).embed, rtol=1e-9, atol=1e-9)


def test_larger_pictures_are_averaged_down_and_their_noise_counts_as_smaller(draw):
    classifier, t = tiny(), torch.tensor([100.0], dtype=torch.float64)
    x = draw(1, 3, 32, 32).double()
    assert torch.equal(classifier(x, t, 1).embed, classifier(F.avg_pool2d(x, 2), t, 1).embed)
    assert classifier.noise_gain(32, 32) == 0.5
    assert classifier.noise_gain(16, 8) == 1.0


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({}, 3),
        ({"resblock_updown": False}, 3),
        ({"scale_shift_norm": False, "channel_mult": (1, 2, 2), "attention_levels": (2,)}, 5),
        ({"num_res_blocks": 3, "attention_levels": (0, 1)}, 2),
    ],
)
def test_config_is_recovered_from_a_state_dict(changes, classes):
    config = ClassifierConfig(replace(TINY.body, head_channels=64, image_size=32, **changes), classes)
    with torch.device("meta"):
        state = Classifier(config).state_dict()
    assert ClassifierConfig.from_state_dict(state) == config


def test_files_of_other_kinds_are_refused():
    with torch.device("meta"):
        unet, classifier = ADMUNet(TINY.body).state_dict(), Classifier(TINY).state_dict()
    with pytest.raises(ValueError, match="Use Load ADM"):
        ClassifierConfig.from_state_dict(unet)
    with pytest.raises(ValueError, match=r"Not a guided-diffusion classifier.*Wanted"):
        ClassifierConfig.from_state_dict({"visual.conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not end in attention pooling"):
        ClassifierConfig.from_state_dict({k: v for k, v in classifier.items() if not k.startswith("out.2")})
    plain = Classifier(replace(TINY, body=replace(TINY.body, channel_mult=(1, 1, 1, 1), attention_levels=())))
    with pytest.raises(ValueError, match="could be 3 different sets of levels"):
        ClassifierConfig.from_state_dict(plain.state_dict())


def test_a_published_pt_loads_and_knows_imagenets_names(tmp_path):
    state = {name: value.float() for name, value in random_state(published_shapes(64, 64)).items()}
    torch.save(state, tmp_path / "64x64_classifier.pt")
    classifier = load_classifier(tmp_path / "64x64_classifier.pt")
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    assert classifier.number_of("golden retriever") == classifier.number_of("207") == 207
    assert classifier.number_of("tench") == 0
    with pytest.raises(ValueError, match="golden retriever"):
        classifier.number_of("golden retreiver")


def test_safetensors_keeps_weights_config_and_names(tmp_path, draw):
    config = replace(TINY, body=replace(TINY.body, patch=2, image_size=32, beta_schedule="cosine"))
    classifier = tiny(config=config).float()
    save(tmp_path / "c.safetensors", "classifier", asdict(config), classifier.state_dict(), half=False)
    loaded = load_classifier(tmp_path / "c.safetensors")
    x, t = draw(1, 3, 32, 32).float(), torch.tensor([40.0])
    assert loaded.config == config
    assert torch.equal(loaded(x, t, 1).embed, classifier(x, t, 1).embed)


def test_a_class_goes_by_name_or_number():
    classifier = tiny()
    assert [classifier.number_of(name) for name in ("Blue Background ", "2", "glasses")] == [1, 2, 0]
    with pytest.raises(ValueError, match=r'no class "blue".*0\.\.2.*blue background'):
        classifier.number_of("blue")
    with pytest.raises(ValueError, match=r"0\.\.2, or a name such as glasses, blue background, pink hair"):
        classifier.number_of("3")
    with pytest.raises(ValueError, match="gives them no names"):
        tiny(config=replace(TINY, class_names=())).number_of("cat")
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        replace(TINY, class_names=("a", "b"))


def test_a_name_that_no_log_can_write_is_escaped():
    with pytest.raises(ValueError, match="There is no class") as error:
        tiny().number_of("half \ud800")
    assert b"half \\ud800" in str(error.value).encode("utf-8")
