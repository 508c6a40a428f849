"""open_clip's models opened up: equal to open_clip's own pass, stopping early, and refusing files that do not fit.

Four tiny architectures are registered with open_clip for these tests: a ResNet, a ViT, and through timm one with
SigLIP's attention pooling (not named after it, or open_clip would download SigLIP's tokenizer) and a ConvNeXt. Their
weights are random; nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdg_core.encoders import CleanCLIP, from_clean, load_noisy_clip, save_noisy_clip
from sdg_core.encoders.clip import CLIP_MEAN, CLIP_STD
from sdg_core.encoders.open_clip_models import architectures, check_architecture, download, load_file

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TIMM = {"timm_model_pretrained": False, "image_size": 160}
SIZES = {"tiny-resnet": 64, "tiny-vit": 32, "tiny-mapped": 160, "tiny-convnext": 160}
CONFIGS = {
    "tiny-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-vit": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": TEXT,
        "quick_gelu": True,
    },
    "tiny-mapped": {
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TIMM, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "tiny-convnext": {
        "embed_dim": 16,
        "vision_cfg": {**TIMM, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
}
MAPS = {
    "tiny-resnet": [(8, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)],
    "tiny-vit": [(32, 4, 4)] * 5,
    "tiny-mapped": [(96, 10, 10)] * 5,
    "tiny-convnext": [(24, 40, 40), (32, 20, 20), (48, 10, 10), (64, 5, 5)],
}
DEEPEST = {
    "tiny-resnet": "layer4",
    "tiny-vit": "transformer.resblocks.3",
    "tiny-mapped": "trunk.blocks.8",
    "tiny-convnext": "trunk.stages.3",
}
"""What only the last map needs, and the embedding."""


@pytest.fixture(scope="module", autouse=True)
def tiny_architectures(tmp_path_factory) -> Iterator[None]:
    """Registered with open_clip while this file's tests run."""
    folder = tmp_path_factory.mktemp("model_configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    factory = open_clip.factory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
        patch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
        open_clip.add_model_config(folder)
        yield


@functools.cache
def state_of(name: str) -> dict[str, Tensor]:
    """Random weights of an architecture, its norms away from the neutral."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(name)
        for key, value in clip.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.add_(0.2 * torch.rand_like(value) if "var" in key else 0.2 * torch.randn_like(value))
    return clip.state_dict()


@pytest.fixture(params=list(CONFIGS))
def name(request) -> str:
    return request.param


@pytest.fixture
def weights(tmp_path):
    """Writes an architecture's random weights: ``weights(name, suffix)``, its path."""

    def write(name: str, suffix: str = ".safetensors") -> Path:
        path = tmp_path / f"weights{suffix}"
        if suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in state_of(name).items()}, str(path))
        else:
            torch.save(state_of(name), path)
        return path

    return write


def plain(name: str) -> nn.Module:
    """open_clip's own model with the same weights."""
    clip = open_clip.create_model(name).eval().requires_grad_(False)
    clip.load_state_dict(state_of(name))
    return clip


def normalised(picture: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Pictures in -1..1 as open_clip's own preprocessing gives them, colour by colour."""
    return torch.stack([((picture[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], dim=1)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_the_embedding_is_open_clips_own(name, weights, draw):
    model, picture = load_file(name, weights(name)), draw(2, 3, SIZES[name], SIZES[name])
    features = model(picture, torch.zeros(1), model.full_depth)
    assert_close(features.embed, plain(name).encode_image(normalised(picture)))
    assert [tuple(m.shape[1:]) for m in features.maps] == MAPS[name]


def test_text_embeddings_are_open_clips_own(name, weights):
    prompts = ["a red fox", "snow"]
    wanted = plain(name).encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)
    assert_close(load_file(name, weights(name)).encode_text(prompts), wanted)


def test_stopping_early_gives_the_first_maps(name, weights, draw):
    model, picture = load_file(name, weights(name)), draw(2, 3, SIZES[name], SIZES[name])
    full = model(picture, torch.zeros(1), model.full_depth)
    assert model.full_depth == len(MAPS[name]) + 1
    for depth in range(1, model.full_depth):
        part = model(picture, torch.zeros(1), depth)
        assert part.embed is None
        assert len(part.maps) == depth
        assert all(torch.equal(a, b) for a, b in zip(part.maps, full.maps, strict=False))


def test_layers_deeper_than_asked_for_are_not_run(name, weights, draw):
    model, picture = load_file(name, weights(name)), draw(1, 3, SIZES[name], SIZES[name])
    depth = model.full_depth - 2
    wanted = model(picture, torch.zeros(1), depth).maps

    def fail(*_) -> None:
        raise AssertionError("A layer was run that no map asked for.")

    model.tower.visual.get_submodule(DEEPEST[name]).register_forward_pre_hook(fail)
    got = model(picture, torch.zeros(1), depth).maps
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(AssertionError):
        model(picture, torch.zeros(1), depth + 1)


def test_samples_do_not_mix(name, weights, draw):
    model, picture = load_file(name, weights(name)), draw(3, 3, SIZES[name], SIZES[name])
    batch = model(picture, torch.zeros(1), model.full_depth)
    single = model(picture[1:2], torch.zeros(1), model.full_depth)
    for a, b in zip((*batch.maps, batch.embed), (*single.maps, single.embed), strict=True):
        assert_close(a[1:2], b)


def test_gradients_are_open_clips_own(name, weights, draw):
    model, picture = load_file(name, weights(name)), draw(1, 3, SIZES[name], SIZES[name])
    grads = []
    encoders = (
        lambda x: model(x, torch.zeros(1), model.full_depth).embed,
        lambda x: plain(name).encode_image(normalised(x)),
    )
    for encode in encoders:
        x = picture.clone().requires_grad_(True)
        grads += torch.autograd.grad(encode(x).square().sum(), x)
    assert float(grads[1].abs().max()) > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))


def test_models_come_frozen_and_in_eval_mode(name, weights):
    model = load_file(name, weights(name))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.reads, model.view, model.image_size) == ("denoised", "any", SIZES[name])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_files_of_every_kind_hold_the_same_model(suffix, weights):
    clip = plain("tiny-resnet")
    model = load_file("tiny-resnet", weights("tiny-resnet", suffix))
    for key, value in model.tower.visual.state_dict().items():
        assert torch.equal(value, clip.visual.state_dict()[key])


def test_a_half_precision_file_is_read_as_float32(tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in state_of("tiny-vit").items()}
    torch.save({"state_dict": half}, tmp_path / "half.pt")
    model = load_file("tiny-vit", tmp_path / "half.pt")
    for key, value in model.tower.visual.state_dict().items():
        assert torch.equal(value, half[f"visual.{key}"].float())


@pytest.mark.parametrize(
    ("architecture", "tag", "stand_in", "mean", "std"),
    [
        ("ViT-B-16-SigLIP", "webli", "tiny-mapped", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("ViT-B-32", "openai", "tiny-vit", CLIP_MEAN, CLIP_STD),
        ("convnext_base", "laion400m_s13b_b51k", "tiny-convnext", CLIP_MEAN, CLIP_STD),
    ],
)
def test_the_architecture_says_how_pictures_are_normalised(
    architecture, tag, stand_in, mean, std, tmp_path, monkeypatch, draw
):
    """open_clip's record of the published weights decides; a tiny model stands in for those weights here."""
    asked, clip = [], plain(stand_in)
    wanted = clip.encode_image(normalised(picture := draw(1, 3, SIZES[stand_in], SIZES[stand_in]), mean, std))
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kw: asked.append((args, kw)) or clip)
    model = download(architecture, tag, tmp_path)
    quick = tag == "openai"  # whose weights were trained with that activation
    asked_for = {"pretrained": tag, "cache_dir": str(tmp_path), "force_quick_gelu": quick}
    assert asked == [((architecture,), asked_for)]
    assert model.build["quick_gelu"] == quick
    assert_close(model(picture, torch.zeros(1), model.full_depth).embed, wanted)
    if architecture == "ViT-B-16-SigLIP":
        torch.testing.assert_close(model.prepare(picture), picture, rtol=0, atol=1e-5)


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host\nand so on")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(ValueError, match=r"openai of RN50 could not be downloaded or read: no route to host\. Check"):
        download("RN50", "openai", tmp_path)


@pytest.mark.parametrize("architecture", ["RN51", "ViT-B32", "tiny-vot"])
def test_unknown_architectures_name_the_nearest(architecture, tmp_path):
    nearest = {"RN51": "RN50", "ViT-B32": "ViT-B-32", "tiny-vot": "tiny-vit"}[architecture]
    for load in (
        lambda: check_architecture(architecture),
        lambda: load_file(architecture, tmp_path / "weights.pt"),
        lambda: download(architecture, "openai", tmp_path),
    ):
        with pytest.raises(ValueError, match=f'knows no architecture "{architecture}"') as error:
            load()
        assert nearest in str(error.value).split("Nearest: ")[1].rstrip(".").split(", ")


def test_all_of_open_clips_architectures_are_offered():
    names = architectures()
    assert names == sorted(names)
    assert set(names) == set(open_clip.list_models()) - set(CONFIGS)  # those that come with open_clip
    for name in ("RN50", "ViT-B-32", "tiny-vit"):
        check_architecture(name)


def test_unknown_tags_name_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r'no weights "laion99" for RN50\. Its tags: openai, yfcc15m, cc12m\. Choose'):
        download("RN50", "laion99", tmp_path)
    with pytest.raises(ValueError, match="Its tags: none: choose a file of weights instead"):
        download("tiny-vit", "openai", tmp_path)


class RunsCode:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_with_code_is_refused_and_not_run(dump, tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "it_ran"
    dump({**state_of("tiny-vit"), "more": RunsCode(trace)}, path)
    with pytest.raises(ValueError, match=r"evil\.pt was not loaded as tiny-vit: "):
        load_file("tiny-vit", path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists()  # the file was a danger indeed


def foreign_files(tmp_path: Path) -> dict[str, Path]:
    """Files that hold no weights of ``tiny-vit``, by what is wrong with them."""
    torch.save(state_of("tiny-resnet"), tmp_path / "other.pt")
    wider = {k: torch.cat([v, v]) if k == "visual.proj" else v for k, v in state_of("tiny-vit").items()}
    torch.save(wider, tmp_path / "wider.pt")
    torch.save({k: v for k, v in state_of("tiny-vit").items() if k != "visual.conv1.weight"}, tmp_path / "part.pt")
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "foreign.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello, I am not a model")
    (tmp_path / "text.pt").write_text("hello, I am not a model")
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    return {path.stem + path.suffix: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "file",
    ["other.pt", "wider.pt", "part.pt", "foreign.safetensors", "text.safetensors", "text.pt", "empty.bin", "list.pt"],
)
def test_files_that_do_not_fit_are_refused_by_name(file, tmp_path):
    path = foreign_files(tmp_path)[file]
    with pytest.raises(ValueError, match=r"was not loaded as tiny-vit: .*Choose the architecture") as error:
        load_file("tiny-vit", path)
    assert str(error.value).startswith(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.pt was not loaded as tiny-vit"):
        load_file("tiny-vit", tmp_path / "gone.pt")


def test_without_a_text_tower_text_is_refused():
    model = CleanCLIP(plain("tiny-vit"), 32, has_text=False)
    with pytest.raises(ValueError, match="has no text tower, so it cannot guide by text"):
        model.encode_text(["a red fox"])
    assert not any(key.startswith("text.") for key in model.state_dict())


def test_every_kind_of_tower_can_become_a_noisy_clip(name, tmp_path, draw):
    """It starts as the clean CLIP; folding its conditioning is the same as applying it; a file brings it back."""
    save_file(state_of(name), tmp_path / "clean.safetensors")
    clean, side = load_file(name, tmp_path / "clean.safetensors"), SIZES[name]
    model, image = from_clean(clean).requires_grad_(False), draw(2, 3, side, side)
    wanted = clean(image, torch.zeros(1), clean.full_depth).embed
    assert_close(model(image, torch.tensor([10.0, 900.0]), model.full_depth).embed, wanted)
    torch.nn.init.normal_(model.conditioning.emb_layers[1].weight, std=0.05)
    folded = model(image, torch.tensor([700.0]), model.full_depth).embed
    torch.testing.assert_close(
        model(image, torch.tensor([700.0, 700.0]), model.full_depth).embed, folded, rtol=1e-4, atol=1e-4
    )
    assert (folded - wanted).abs().max() > 1e-3
    save_noisy_clip(tmp_path / "noisy.safetensors", model, half=False)
    again = load_noisy_clip(tmp_path / "noisy.safetensors")
    assert_close(again(image, torch.tensor([700.0]), model.full_depth).embed, folded)
    assert again.config.clip["architecture"] == name
