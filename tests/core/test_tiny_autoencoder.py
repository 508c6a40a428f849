"""Tiny autoencoders against the published layout written out by itself, and encoders rebuilt from a file's keys."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sdg_core.files import save
from sdg_core.method import gradient_scope
from sdg_core.models import (
    TinyAutoencoder,
    encoder_from_state,
    latent_encoder,
    load_tiny_autoencoder,
    load_tiny_encoder,
    tiny_decoder,
    tiny_encoder,
)

TAESD = {"width": 64, "blocks": (3, 3, 3, 1), "latent_channels": 4}
"""Bohan 2023: taesd_decoder.safetensors."""
LAYOUTS = [
    {"width": 8, "blocks": (3, 3, 3, 1), "latent_channels": 4},
    {"width": 8, "blocks": (3, 3, 3, 1), "latent_channels": 16},
    {"width": 12, "blocks": (1, 2), "latent_channels": 5},
    {"width": 8, "blocks": (2, 0, 1), "latent_channels": 4},
]


def random_state(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep signals at about their size; biases too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(v.shape, generator=generator) * (0.3 if v.ndim == 1 else v[0].numel() ** -0.5)
        for k, v in module.state_dict().items()
    }


def decoded_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """TAESD's decoder by its file alone, layer for layer in the order of the numbers in its keys.

    A clamp is 0, a convolution 1, its ReLU 2; then blocks (with ``conv.0``), and convolutions without a bias, each
    after an upsampling that has no weights; the last one has a bias and gives the picture.
    """
    x = torch.tanh(x / 3) * 3
    numbers = sorted({int(key.split(".")[0]) for key in state})
    assert numbers[0] == 1
    for n in numbers:
        if f"{n}.conv.0.weight" in state:
            h = x
            for i in (0, 2, 4):
                h = F.conv2d(h, state[f"{n}.conv.{i}.weight"], state[f"{n}.conv.{i}.bias"], padding=1)
                h = F.relu(h) if i < 4 else h
            x = F.relu(h + x)
        else:
            if f"{n}.bias" not in state:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = F.conv2d(x, state[f"{n}.weight"], state.get(f"{n}.bias"), padding=1)
            x = F.relu(x) if n == 1 else x
    return x


def filled(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with random weights, and these."""
    module.load_state_dict(state := random_state(module))
    return module, state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_decoder_is_taesds_written_out(layout, draw):
    decoder, state = filled(tiny_decoder(**layout))
    x = draw(2, layout["latent_channels"], 3, 5) * 3
    scale = 2 ** (len(layout["blocks"]) - 1)
    got, wanted = decoder(x), decoded_by_hand(state, x)
    assert got.shape == (2, 3, 3 * scale, 5 * scale)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_taesds_own_layout_has_the_keys_of_its_file():
    """Blocks at 3-5, 8-10, 13-15 and 18, upsampled convolutions at 7, 12 and 17."""
    blocks, upsampled = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), (7, 12, 17)
    shapes: dict[str, tuple[int, ...]] = {"1.weight": (64, 4, 3, 3), "1.bias": (64,)}
    for n in blocks:
        for i in (0, 2, 4):
            shapes |= {f"{n}.conv.{i}.weight": (64, 64, 3, 3), f"{n}.conv.{i}.bias": (64,)}
    shapes |= {f"{n}.weight": (64, 64, 3, 3) for n in upsampled}
    shapes |= {"19.weight": (3, 64, 3, 3), "19.bias": (3,)}
    assert {k: tuple(v.shape) for k, v in tiny_decoder(**TAESD).state_dict().items()} == shapes


def test_latents_are_softly_bounded_to_three(draw):
    decoder, _ = filled(tiny_decoder(**LAYOUTS[0]))
    far, further = (decoder(torch.full((1, 4, 2, 2), value)) for value in (60.0, 600.0))
    torch.testing.assert_close(far, further)


def test_gradients_pass_as_through_the_layers_by_hand(draw):
    """Also inside a host's inference mode, where the weights are inference tensors."""
    state, x = random_state(tiny_decoder(**LAYOUTS[2])), draw(1, 5, 3, 3)
    by_hand = x.clone().requires_grad_(True)
    (wanted,) = torch.autograd.grad(decoded_by_hand(state, by_hand).square().sum(), by_hand)
    with torch.inference_mode():
        decoder = filled(tiny_decoder(**LAYOUTS[2]))[0].requires_grad_(False)
        with gradient_scope(decoder):
            inside = x.clone().requires_grad_(True)
            (got,) = torch.autograd.grad(decoder(inside).square().sum(), inside)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_encoder_is_taesds_written_out(draw):
    state = random_state(encoder := tiny_encoder(8, (1, 2, 1), 4))
    encoder.load_state_dict(state)
    x = picture = draw(1, 3, 16, 12)
    for n in sorted({int(key.split(".")[0]) for key in state}):
        if f"{n}.conv.0.weight" in state:
            h = x
            for i in (0, 2, 4):
                h = F.conv2d(h, state[f"{n}.conv.{i}.weight"], state[f"{n}.conv.{i}.bias"], padding=1)
                h = F.relu(h) if i < 4 else h
            x = F.relu(h + x)
        else:
            stride = 1 if f"{n}.bias" in state else 2
            x = F.conv2d(x, state[f"{n}.weight"], state.get(f"{n}.bias"), stride=stride, padding=1)
    assert x.shape == (1, 4, 4, 3)
    torch.testing.assert_close(encoder(picture), x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


def test_an_autoencoder_survives_its_file(tmp_path, draw):
    model, path = TinyAutoencoder(8, (1, 1, 1), (1, 1, 1), 4), tmp_path / "autoencoder.safetensors"
    model.load_state_dict(random_state(model))
    config = {"width": 8, "encoder_blocks": [1, 1, 1], "decoder_blocks": [1, 1, 1], "channels": 4}
    save(path, "autoencoder", config, model.state_dict(), half=False)
    again = load_tiny_autoencoder(path)
    assert (again.downscale, again.latent_channels, again.width) == (4, 4, 8)
    picture = draw(1, 3, 16, 16)
    latent = again.encoder(picture)
    assert latent.shape == (1, 4, 4, 4)
    assert torch.equal(latent, model.encoder(picture))
    assert torch.equal(again.decoder(latent), model.decoder(latent))
    assert torch.equal(encoder_from_state(model.state_dict())(picture), latent)
    assert not any(p.requires_grad for p in again.parameters())


def test_widths_by_size_and_a_patch_survive_the_file(tmp_path, draw):
    """Pictures folded first: their layers see a quarter of the pixels, latents are as small as the blocks say."""
    options = {"width": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1], "channels": 4}
    options |= {"patch": 2, "decoder_width": [8, 4]}
    model, path = TinyAutoencoder(**options), tmp_path / "autoencoder.safetensors"
    model.load_state_dict(random_state(model))
    save(path, "autoencoder", options, model.state_dict(), half=False)
    again, picture = load_tiny_autoencoder(path), draw(1, 3, 16, 24)
    encode, downscale = latent_encoder(again.encoder)
    latent = model.encoder(picture)
    assert (again.downscale, downscale, again.width, again.latent_channels) == (4, 4, 8, 4)
    assert latent.shape == (1, 4, 4, 6)
    assert again.decoder(latent).shape == picture.shape
    torch.testing.assert_close(encode(picture * 2 - 1), latent)
    assert torch.equal(again.decoder(latent), model.decoder(latent))
    folded = F.pixel_unshuffle(picture, 2)
    torch.testing.assert_close(model.encoder[1:](folded), latent)
    torch.testing.assert_close(F.pixel_shuffle(model.decoder[:-1](latent), 2), model.decoder(latent))


def test_every_size_wants_its_width():
    with pytest.raises(ValueError, match="2 sizes of blocks and 3 widths"):
        tiny_encoder((4, 8, 8), (1, 1), 4)


def wrong_files() -> dict[str, dict[str, Tensor]]:
    good = random_state(tiny_encoder(8, (1, 3, 3, 3), 4))
    video = {k: v[:, :, None].repeat(1, 1, 3, 1, 1) if v.ndim == 4 else v for k, v in good.items()}
    return {
        "empty": {},
        "foreign": {"model.weight": torch.zeros(2, 2)},
        "decoder": random_state(tiny_decoder(**LAYOUTS[0])),
        "video": video,
        "vector": {**good, "0.weight": torch.zeros(8)},
        "short": {k: v for k, v in good.items() if not k.startswith("4.")},
        "torn": {k: v for k, v in good.items() if k != "9.conv.2.weight"},
        "uneven": {**good, "6.weight": torch.zeros(8, 9, 3, 3)},
        "more": {**good, "13.extra.weight": torch.zeros(8)},
        "pooled": {**good, "11.pool.0.weight": torch.zeros(32, 8, 1, 1)},  # Flux.2's kind
        "big vae": {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3), "encoder.conv_in.bias": torch.zeros(8)},
    }


@pytest.mark.parametrize("file", list(wrong_files()))
def test_files_that_hold_no_tiny_encoder_are_refused(file):
    with pytest.raises(ValueError, match=re.compile(r"Not a tiny encoder(: it does not start| that this pack)")):
        encoder_from_state(wrong_files()[file])


def test_half_precision_files_become_float32(draw):
    module, state = filled(tiny_encoder(8, (1, 2, 1), 4))
    encoder, picture = encoder_from_state({k: v.half() for k, v in state.items()}), draw(1, 3, 16, 16)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(encoder(picture), module(picture), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prefix", ["", "taesd_encoder.", "encoder."])
def test_a_taesd_encoder_gives_model_latents(prefix, tmp_path, draw):
    """Read off its file, with any usual prefix; pictures in -1..1 become its own 0..1."""
    module, picture = tiny_encoder(8, (1, 3, 3, 3), 4), draw(1, 3, 32, 48)
    state = random_state(module)
    module.load_state_dict(state)
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "taesd_encoder.safetensors")
    encode, downscale = latent_encoder(load_tiny_encoder(tmp_path / "taesd_encoder.safetensors"))
    assert downscale == 8
    assert encode(picture).shape == (1, 4, 4, 6)
    assert torch.equal(encode(picture), module((picture + 1) / 2))


def test_files_that_are_no_encoder_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"Not a tiny encoder.*taesd_encoder\.safetensors"):
        load_tiny_encoder(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_tiny_encoder(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_tiny_encoder(tmp_path / "gone.safetensors")
