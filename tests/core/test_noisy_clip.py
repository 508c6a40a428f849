"""NoisyCLIP over small open_clip towers: what conditioning on t may and may not change, and its files."""

from __future__ import annotations

import copy
import functools

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sdg_core.encoders import (
    NoisyCLIP,
    NoisyCLIPConfig,
    TimeConditioning,
    build_clip,
    load_noisy_clip,
    resize,
    save_noisy_clip,
)
from sdg_core.encoders import clip as clips
from sdg_core.encoders.clip import CLIP_MEAN, CLIP_STD
from sdg_core.encoders.conditioning import Modulate
from sdg_core.encoders.towers import open_tower
from sdg_core.files import save
from sdg_core.method import (
    PIXEL_VIEW,
    ContentGuidance,
    Features,
    Sight,
    StructureGuidance,
    Target,
    Term,
    score_gradient,
    timestep_embedding,
)

pytestmark = pytest.mark.usefixtures("float64")

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CONFIGS = {
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "vit": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": TEXT,
    },
}
MAP_SHAPES = {
    "resnet": [(8, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)],
    "vit": [(32, 4, 4)] * 5,
}
DEEPER = {
    "resnet": ["bn1", "layer1", "layer2", "layer3", "layer4", "attnpool"],
    "vit": ["conv1", *(f"transformer.resblocks.{i}" for i in range(4)), "ln_post"],
}
"""The first module of every stage, and of the pooling after them."""

T = [0.0, 412.25, 999.0]


def make_clip(kind: str, seed: int = 0) -> nn.Module:
    """A CLIP with random weights, and running statistics that are not the neutral ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = build_clip(CONFIGS[kind])
        for module in clip.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(std=0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
    return clip.requires_grad_(False).eval()


def make_noisy(kind: str, conditioned: bool = True, has_text: bool = True, **settings) -> NoisyCLIP:
    """A NoisyCLIP; ``conditioned`` fills the layer that starts at zero, so that t matters."""
    settings.setdefault("hidden", 24)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = NoisyCLIP(NoisyCLIPConfig(CONFIGS[kind], **settings), make_clip(kind), has_text)
        if conditioned:
            nn.init.normal_(model.conditioning.emb_layers[1].weight, std=0.3)
            nn.init.normal_(model.conditioning.emb_layers[1].bias, std=0.1)
    return model.requires_grad_(False).eval()


def assert_same(a, b, tolerance: float) -> None:
    for one, other in zip((*a.maps, a.embed), (*b.maps, b.embed), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.fixture(params=["resnet", "vit"])
def kind(request) -> str:
    return request.param


def test_an_untrained_noisy_clip_is_the_clean_clip_at_every_t(kind, draw):
    model, size = make_noisy(kind, conditioned=False), CONFIGS[kind]["vision_cfg"]["image_size"]
    x = draw(3, 3, size, size)
    pixels = (x + 1) / 2
    normalised = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    wanted = make_clip(kind).encode_image(normalised)
    for t in ([0.0], [999.0], T):
        embed = model(x, torch.tensor(t), model.full_depth).embed
        torch.testing.assert_close(embed, wanted, rtol=1e-9, atol=1e-9)


def test_t_matters_after_training(kind, draw):
    model, x = make_noisy(kind), draw(1, 3, 32, 32)
    early, late = (model(x, torch.tensor([t]), model.full_depth) for t in (0.0, 999.0))
    for a, b in zip((*early.maps[1:], early.embed), (*late.maps[1:], late.embed), strict=True):
        assert float((a - b).abs().mean()) > 0.01 * float(a.abs().mean())


def test_depth_says_which_maps_are_computed(kind, draw):
    model, x = make_noisy(kind), draw(2, 3, 32, 32)
    full = model(x, torch.tensor([300.0]), model.full_depth)
    assert [tuple(m.shape[1:]) for m in full.maps] == MAP_SHAPES[kind]
    assert full.embed.shape == (2, 16)
    for depth in range(1, model.full_depth):
        part = model(x, torch.tensor([300.0]), depth)
        assert part.embed is None
        assert len(part.maps) == depth
        for a, b in zip(part.maps, full.maps, strict=False):
            assert torch.equal(a, b)


def test_vit_maps_have_the_pictures_layout(draw):
    """Before the first block tokens do not mix: a change in one 8 x 8 patch shows at its place and nowhere else."""
    model, x, t = make_noisy("vit"), draw(1, 3, 32, 32), torch.tensor([300.0])
    changed = x.clone()
    changed[:, :, 8:16, 24:32] += 1
    (before,), (after,) = (model(picture, t, 1).maps for picture in (x, changed))
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[1, 3] = True
    assert torch.equal((before - after).abs().amax(dim=(0, 1)) > 1e-4, wanted)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("t", [[300.0], [300.0, 600.0]])
def test_layers_deeper_than_asked_for_are_not_touched(kind, depth, t, draw):
    model, x, t = make_noisy(kind), draw(2, 3, 32, 32), torch.tensor(t)
    wanted = model(x, t, depth).maps
    for name in DEEPER[kind][depth:]:
        for parameter in model.tower.visual.get_submodule(name).parameters():
            parameter.fill_(torch.nan)
    for a, b in zip(model(x, t, depth).maps, wanted, strict=True):
        assert torch.equal(a, b)
    assert not torch.isfinite(model(x, t, model.full_depth).embed).any()


def test_a_shared_t_equals_the_same_t_per_sample(kind, draw):
    model, x = make_noisy(kind), draw(3, 3, 32, 32)
    for t in T:
        shared = model(x, torch.tensor([t]), model.full_depth)
        assert_same(model(x, torch.full((3,), t), model.full_depth), shared, 1e-9)


def test_samples_do_not_mix(kind, draw):
    model, x, t = make_noisy(kind), draw(3, 3, 32, 32), torch.tensor(T)
    batch = model(x, t, model.full_depth)
    for i in range(3):
        single = model(x[i : i + 1], t[i : i + 1], model.full_depth)
        assert_same(type(batch)(tuple(m[i : i + 1] for m in batch.maps), batch.embed[i : i + 1]), single, 1e-9)


def test_no_hook_or_folded_weight_stays_behind(kind, draw):
    model, x = make_noisy(kind), draw(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = model(x, torch.tensor([0.0]), model.full_depth)
    model(x, torch.tensor([0.0, 900.0]), model.full_depth)
    assert_same(model(x, torch.tensor([0.0]), model.full_depth), first, 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_modulation_is_a_scale_and_a_shift_after_each_norm(draw):
    """The stem of the ResNet written out, with scale and shift taken from the conditioning's numbers in order."""
    model, x, t = make_noisy("resnet"), draw(2, 3, 64, 64), torch.tensor([100.0, 800.0])
    c, v = model.conditioning, model.tower.visual
    numbers = c.emb_layers(c.time_embed(timestep_embedding(t, 128)))
    h, at = model.prepare(x), 0
    for i in (1, 2, 3):
        conv, norm = getattr(v, f"conv{i}"), getattr(v, f"bn{i}")
        width = norm.num_features
        scale, shift = (numbers[:, at + k * width : at + (k + 1) * width, None, None] for k in (0, 1))
        at += 2 * width
        h = F.relu(norm(conv(h)) * (1 + scale) + shift)
    torch.testing.assert_close(model(x, t, 1).maps[0], F.avg_pool2d(h, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("steep", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("by_sample", [True, False])
def test_modulation_has_the_gradients_of_torchs_own(layout, steep, by_sample, draw):
    """In float64, whatever formats the map and the gradient that comes back have; and with only the map asking."""
    y, pull = (draw(3, 4, 5, 6, seed=k).double().contiguous(memory_format=f) for k, f in ((1, layout), (2, steep)))
    gain, shift = (draw(3, 4, 1, 1, seed=k).double().requires_grad_(by_sample) for k in (3, 4))
    asked = (y.requires_grad_(), gain, shift) if by_sample else (y.requires_grad_(),)
    ours, theirs = Modulate.apply(y, gain, shift), y * gain + shift
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(out, asked, pull) for out in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found[0].stride() == y.stride()


def test_modulation_of_half_precision_sums_in_the_conditionings_own(draw):
    y = (100 * draw(2, 3, 16, 16)).bfloat16().requires_grad_()
    gain, shift = (draw(2, 3, 1, 1, seed=k).requires_grad_() for k in (1, 2))
    out = Modulate.apply(y, gain, shift)
    slope, by_gain, by_shift = torch.autograd.grad(out.to(gain).sum(), (y, gain, shift))
    assert out.dtype == slope.dtype == torch.bfloat16
    torch.testing.assert_close(by_gain, y.detach().to(gain).sum((2, 3), keepdim=True))
    torch.testing.assert_close(by_shift, torch.full_like(shift, 256.0))


@pytest.mark.parametrize("t", [[250.0], [250.0, 750.0]])
def test_gradients_in_inference_mode_equal_those_outside(kind, t, draw):
    image, x = draw(1, 3, 32, 32).clamp(-1, 1), draw(2, 3, 32, 32, seed=1)
    t, weights = torch.tensor(t), torch.ones(2, 2)

    def gradient() -> Tensor:
        model = make_noisy(kind)
        features = model(image, torch.tensor([250.0]), model.full_depth)
        targets = [Features((), features.embed), Features((features.maps[3],))]  # structure reads layer 4
        terms = [Term(guidance, model, 1.0) for guidance in (ContentGuidance(image), StructureGuidance(image, (4,)))]
        return score_gradient(
            model, terms, weights, list(map(Target, targets)), x.clone(), Sight(PIXEL_VIEW, torch.ones(len(x)), t)
        )[0]

    wanted = gradient()
    with torch.inference_mode():
        got = gradient()
    assert float(wanted.abs().max()) > 0
    torch.testing.assert_close(got, wanted)


def test_published_conditioning_layout():
    """RN50x16: 123 norms; 3 in the stem, 3 in each of 6 + 8 + 18 + 8 bottlenecks; 182,400 numbers."""
    config = open_clip.get_model_config("RN50x16")
    with torch.device("meta"):
        model = NoisyCLIP(NoisyCLIPConfig(config), build_clip(config))
    names = [name for name, _ in model.tower.norms()]
    assert len(names) == 123
    assert names[:4] == ["visual.bn1", "visual.bn2", "visual.bn3", "visual.layer1.0.bn1"]
    assert names[3 + 3 * 6] == "visual.layer2.0.bn1"
    assert names[-1] == "visual.layer4.7.bn3"
    state = model.conditioning.state_dict()
    assert {name: tuple(v.shape) for name, v in state.items()} == {
        "time_embed.0.weight": (512, 128),
        "time_embed.0.bias": (512,),
        "time_embed.2.weight": (512, 512),
        "time_embed.2.bias": (512,),
        "emb_layers.1.weight": (182_400, 512),
        "emb_layers.1.bias": (182_400,),
    }


def test_conditioning_starts_as_identity_and_gives_scale_before_shift():
    conditioning = TimeConditioning([2, 3], hidden=8)
    for scale, shift in conditioning(torch.tensor([5.0])):
        assert not scale.any()
        assert not shift.any()
    conditioning.emb_layers[1].bias.data.copy_(torch.arange(10.0))
    (scale_1, shift_1), (scale_2, shift_2) = conditioning(torch.tensor([5.0]))
    assert [v[0].tolist() for v in (scale_1, shift_1, scale_2, shift_2)] == [[0, 1], [2, 3], [4, 5, 6], [7, 8, 9]]


def test_prepare_maps_minus_one_to_one_onto_clips_own_input():
    model = make_noisy("vit")
    black, white = model.prepare(-torch.ones(1, 3, 32, 32)), model.prepare(torch.ones(1, 3, 32, 32))
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    torch.testing.assert_close(black[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(white[0, :, 31, 31], (1 - mean) / std)


def test_resize_averages_down_and_leaves_what_fits(draw):
    x = draw(1, 3, 8, 8)
    assert resize(x, 8) is x
    torch.testing.assert_close(resize(x, 4), x.reshape(1, 3, 4, 2, 4, 2).mean(dim=(3, 5)))
    assert resize(x, 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (128, 64), (96, 32), (16, 16), (48, 40)])
@pytest.mark.parametrize("noise_size", [0, 16])
def test_noise_gain_is_the_factor_on_white_noise(height, width, noise_size, draw):
    model = make_noisy("vit", noise_size=noise_size)
    seen = resize(draw(400, 3, height, width), noise_size or 32)
    gain = model.noise_gain(height, width)
    if height < (noise_size or 32):  # enlarged: the noise is as it was in training, only spread over more pixels
        assert gain == 1
    else:
        assert float(seen.std()) == pytest.approx(gain, rel=0.01)


def test_text_embeddings_are_open_clips_own_and_normalised():
    prompts, clip = ["a red circle", "two squares"], make_clip("vit")
    embed = make_noisy("vit").encode_text(prompts)
    tokens = open_clip.SimpleTokenizer(context_length=77)(prompts)
    torch.testing.assert_close(embed, F.normalize(clip.encode_text(tokens), dim=-1))
    torch.testing.assert_close(embed.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("named", [False, True])
def test_the_list_of_words_is_read_once(named, monkeypatch):
    built, tokenizer = [], open_clip.SimpleTokenizer
    monkeypatch.setattr(open_clip, "SimpleTokenizer", lambda **wanted: built.append(1) or tokenizer(**wanted))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: built.append(1) or tokenizer())
    monkeypatch.setattr(clips, "_standard_tokenizer", functools.cache(clips._standard_tokenizer.__wrapped__))
    monkeypatch.setattr(clips, "_tokenizer", functools.cache(clips._tokenizer.__wrapped__))
    for prompt in ("a red circle", "two squares"):
        model = make_noisy("vit")
        model.tokenizer = clips.tokenizer_of("RN50") if named else None
        model.encode_text([prompt])
    assert built == [1]


def test_without_a_text_tower_text_is_refused_and_images_work(draw):
    model = make_noisy("vit", has_text=False)
    with pytest.raises(ValueError, match=r"no text tower.*content, structure or style"):
        model.encode_text(["a red circle"])
    wanted = make_noisy("vit")(draw(1, 3, 32, 32), torch.tensor([3.0]), 6).embed
    assert torch.equal(model(draw(1, 3, 32, 32), torch.tensor([3.0]), 6).embed, wanted)


def test_unknown_towers_are_refused():
    with pytest.raises(ValueError, match=r"kind Linear.*ModifiedResNet, VisionTransformer or TimmModel"):
        open_tower(nn.Linear(1, 1))


def rounded(model: NoisyCLIP) -> NoisyCLIP:
    """The model with weights that fp16 holds exactly."""
    for tensor in model.state_dict().values():
        if tensor.dtype == torch.float32:
            tensor.copy_(tensor.half())
    return model


@pytest.mark.parametrize("has_text", [True, False])
def test_a_saved_model_comes_back_equal(kind, has_text, tmp_path, draw):
    model = rounded(make_noisy(kind, has_text=has_text, noise_size=16, beta_schedule="cosine", notes={"by": "me"}))
    save_noisy_clip(tmp_path / "model.safetensors", model)
    loaded = load_noisy_clip(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert loaded.has_text == has_text
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x, t = draw(2, 3, 32, 32), torch.tensor([10.0, 800.0])
    assert_same(loaded(x, t, 6), model(x, t, 6), 0)
    if has_text:
        assert torch.equal(loaded.encode_text(["a cat"]), model.encode_text(["a cat"]))


def test_a_small_token_table_comes_back_as_a_standard_one(tmp_path):
    known = open_clip.SimpleTokenizer(context_length=77)(["a red circle"])[0].unique()
    model = rounded(make_noisy("vit"))
    small = copy.deepcopy(model)
    rows = torch.cat([model.text.token_embedding.weight[1234][None], model.text.token_embedding.weight[known]])
    small.text.token_embedding = nn.Embedding.from_pretrained(rows)
    save_noisy_clip(tmp_path / "full.safetensors", model)
    save_noisy_clip(tmp_path / "small.safetensors", small, token_ids=known)
    loaded = load_noisy_clip(tmp_path / "small.safetensors")
    table = loaded.text.token_embedding.weight
    assert table.shape == (49408, 16)
    assert torch.equal(table[known], model.text.token_embedding.weight[known])
    unknown = torch.ones(49408, dtype=torch.bool).index_fill(0, known, False)
    assert torch.equal(table[unknown], rows[:1].expand(int(unknown.sum()), -1))
    assert torch.equal(loaded.encode_text(["a red circle"]), model.encode_text(["a red circle"]))
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "full")]
    assert sizes[0] < sizes[1] - 49000 * 16 * 2


def test_a_file_of_another_kind_is_refused(tmp_path):
    save(tmp_path / "other.safetensors", "adm", {}, {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other\.safetensors holds an? ADM diffusion model; wanted a noisy CLIP"):
        load_noisy_clip(tmp_path / "other.safetensors")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"w": torch.zeros(1)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(ValueError, match=r"foreign\.safetensors is a safetensors file of another program"):
        load_noisy_clip(tmp_path / "foreign.safetensors")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        load_noisy_clip(tmp_path / "cut.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors.*noisy CLIP"):
        load_noisy_clip(tmp_path / "none.safetensors")
