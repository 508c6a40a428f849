"""The view decoded through the host's own tiny decoders: every latent format of the host, against its own previews.

Files of random weights, in the host's own layouts, lie in models/vae_approx for that. Real files are compared where the
host's own folder has them.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import math
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HOST = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
HALF = {"taehv"}
"""Decoders that the host tells from others of the same layout by their dtype."""
OF_VIDEO_WITH_SOUND = {"MiniMaxH3AV": 24}
"""Channels of the pictures, where a format counts those of the sound."""


def formats_of_the_host() -> dict[str, str | None]:
    """Every latent format, and its decoder's name."""
    if not (HOST / "main.py").is_file():
        return {"no host": "none"}
    sys.path.insert(0, str(HOST))
    try:
        module = importlib.import_module("comfy.latent_formats")
    finally:
        sys.path.remove(str(HOST))
    classes = {k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, module.LatentFormat)}
    return {name: made().taesd_decoder_name for name, made in classes.items()}


FORMATS = formats_of_the_host()
SEEN = [name for name, decoder in FORMATS.items() if decoder is not None]
UNSEEN = [name for name, decoder in FORMATS.items() if decoder is None]
every_format = pytest.mark.parametrize("name", SEEN)


@pytest.fixture
def approx(comfy, tmp_path, monkeypatch) -> Path:
    """models/vae_approx, empty."""
    folder = tmp_path / "vae_approx"
    folder.mkdir()
    monkeypatch.setitem(
        comfy.folder_paths.folder_names_and_paths, "vae_approx", ([str(folder)], {".safetensors", ".pth"})
    )
    return folder


@pytest.fixture
def latent(comfy) -> Callable:
    """latent("SD15") -> the host's latent format of that name."""
    return lambda name: getattr(importlib.import_module("comfy.latent_formats"), name)()


@pytest.fixture
def write(comfy, approx, latent) -> Callable:
    """write("SD15", file) -> the path of a file of random weights in the layout of that format's decoder."""

    def go(name: str, file: str | None = None, change: Callable = lambda state: state) -> Path:
        decoder = latent(name).taesd_decoder_name
        path = approx / f"{file or decoder}.safetensors"
        state = random_decoder(name, latent(name)).state_dict()
        save_file(change({k: v.half() if decoder in HALF else v for k, v in state.items()}), path)
        return path

    return go


@pytest.fixture
def see(comfy, pack, latent_adm, clean_clip, latent) -> Callable:
    """see("SD15") -> how a clean CLIP sees such latents, decoded; the model itself is another's."""

    def go(name: str, **choice):
        model = latent_adm("flow").clone()
        model.add_object_patch("latent_format", latent(name))
        return SimpleNamespace(
            model=model,
            **vars(pack.views.choose_view(model, clean_clip.model, pack.views.ViewChoice("decoded", **choice))),
        )

    return go


@pytest.fixture
def preview(comfy, latent, monkeypatch) -> Callable:
    """preview("SD15") -> the host's own previewer of such latents."""
    import comfy.cli_args
    import latent_preview

    def go(name: str):
        monkeypatch.setattr(comfy.cli_args.args, "preview_method", latent_preview.LatentPreviewMethod.TAESD)
        return latent_preview.get_previewer(torch.device("cpu"), latent(name))

    return go


def random_decoder(name: str, latent) -> nn.Module:
    """The host's own class with weights and biases that keep the size of what passes through."""
    from comfy.taesd.taehv import TAEHV
    from comfy.taesd.taesd import TAESD

    channels = channels_of(name, latent)
    model = TAESD(latent_channels=channels).taesd_decoder if not is_video(latent) else TAEHV(latent_channels=channels)
    generator = torch.Generator().manual_seed(0)
    for key, p in model.requires_grad_(False).named_parameters():
        values = torch.randn(p.shape, generator=generator)
        p.copy_(values * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1 * values + float(is_norm(model, key)))
    return model


def is_norm(model: nn.Module, key: str) -> bool:
    return key.endswith(".weight") and isinstance(model.get_submodule(key.rpartition(".")[0]), nn.GroupNorm)


def is_video(latent) -> bool:
    return latent.latent_dimensions == 3


def channels_of(name: str, latent) -> int:
    return OF_VIDEO_WITH_SOUND.get(name, latent.latent_channels)


def some_latents(name: str, latent, count: int = 2, height: int = 4, width: int = 6) -> Tensor:
    return torch.randn(count, channels_of(name, latent), height, width, generator=torch.Generator().manual_seed(1))


def as_the_host_draws(previewer, latent, x: Tensor) -> tuple[Tensor, Tensor]:
    """The host's decoder of a preview on one latent x (1, C, h, w), and the preview itself: both (3, H, W) in 0..1.

    Video latents as they reach the host's VAE Decode: its previews leave out ``process_out``.
    """
    with torch.inference_mode():
        if is_video(latent):
            z = latent.process_out(x[:, :, None])
            decoded = previewer.taesd.decode(z)[0, 0].movedim(-1, 0)
        else:
            z = x
            decoded = (previewer.taesd.decode(z)[0] + 1) / 2
        drawn = numpy.asarray(previewer.decode_latent_to_preview(z))
    return decoded.clone(), torch.tensor(drawn).movedim(-1, 0) / 255


def check_it_is_the_hosts_preview(seen: Tensor, decoded: Tensor, drawn: Tensor) -> None:
    seen = (seen + 1) / 2
    assert seen.shape == decoded.shape == drawn.shape
    assert seen.std() > 0.02
    assert (seen.clamp(0, 1) - decoded.clamp(0, 1)).abs().max() < 1e-5
    assert (seen.clamp(0, 1) - drawn).abs().max() < 1 / 255 + 1e-5


# Every format of the host


@every_format
def test_the_view_is_the_hosts_own_preview(latent, write, see, preview, name):
    write(name)
    x = some_latents(name, latent(name))
    view = see(name).view
    with torch.inference_mode():
        seen = view.picture(x, torch.ones(2))
    assert seen.shape[-2:] == view.size(4, 6)
    previewer = preview(name)
    for i in range(2):
        check_it_is_the_hosts_preview(seen[i], *as_the_host_draws(previewer, latent(name), x[i : i + 1]))


@every_format
def test_the_gradient_of_a_score_is_finite_and_reaches_every_sample(pack, run, clean_clip, latent, write, see, name):
    write(name)
    grad = score_gradient(pack, run, clean_clip, see(name).view, some_latents(name, latent(name)))
    assert grad.isfinite().all()
    assert (grad.flatten(1).norm(dim=1) > 0).all()


def score_gradient(pack, run, clip, view, x: Tensor) -> Tensor:
    """Of a text's score, in the host's inference mode."""
    guidance = run("SDGTextGuidance", noisy_clip=clip, text="a red hat", scale=1.0, start_percent=0.0, end_percent=1.0)
    ones, (term,) = torch.ones(len(x)), guidance.terms
    sight = pack.method.Sight(view, ones, torch.zeros(1))
    target = pack.method.Target(term.guidance.target(None))
    with torch.inference_mode():
        return pack.method.score_gradient(term.encoder, [term], ones[None], [target], x.clone(), sight)[0]


@every_format
def test_the_gradient_is_the_finite_difference(latent, write, see, name):
    """In float64, through every layer that works in place or remembers the frame before."""
    write(name)
    with torch.inference_mode():
        (decoder,) = see(name).view.modules
    check_finite_differences(decoder.double(), some_latents(name, latent(name), 1).double())


def check_finite_differences(decode: Callable[[Tensor], Tensor], x: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(decode(x).shape, generator=generator, dtype=x.dtype)
    inside = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad((decode(inside) * weights).sum(), inside)
    assert grad.norm() > 0
    step = 1e-8  # few of the thousands of ReLUs turn within it
    for direction in (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(3)):
        ahead, behind = ((decode(x + sign * step * direction) * weights).sum() for sign in (1, -1))
        slope = float((grad * direction).sum())
        assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-4 * float(grad.norm()))


@every_format
def test_no_layer_is_the_hosts_to_move_in_the_middle_of_a_gradient(pack, write, see, name):
    """Its dynamic memory moves the weights of layers that can cast them."""
    write(name)
    with torch.inference_mode():
        seen = see(name)
    (decoder,) = seen.view.modules
    assert seen.patcher.model is decoder
    assert not [layer for layer in decoder.modules() if hasattr(layer, "comfy_cast_weights")]
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    assert not [p for p in decoder.parameters() if p.is_inference() or p.requires_grad]


@every_format
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears")
def test_the_memory_of_a_gradient_is_known(pack, latent, write, see, name):
    """Against what torch's profiler saw at its peak.

    Kernels of CPUs without AVX2 first unfold what a convolution reads, k x k times as much, and drop it again.
    """
    write(name)
    (decoder,) = see(name).view.modules
    x = some_latents(name, latent(name), 1, 8, 12).requires_grad_(True)
    unfolded, plain = [0], torch.backends.cpu.get_cpu_capability() == "DEFAULT"

    def unfold(layer, inputs):
        unfolded.append(inputs[0].nbytes * math.prod(layer.kernel_size))

    for layer in decoder.modules():
        if plain and isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(unfold)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(decoder(x).sum(), x)
    steps = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in steps if event.name() == "[memory]"))
    assert peak - max(unfolded) < pack.memory.decoder_bytes(decoder, x.shape, 8) < 1.5 * peak


@every_format
def test_a_view_that_is_dropped_leaves_no_weights_behind(write, see, name):
    """Models are attached again and again; measuring memory must not keep a graph."""
    write(name)
    with torch.inference_mode():
        weights = [weakref.ref(p) for p in see(name).view.modules[0].parameters()]
    gc.collect()
    assert not [ref for ref in weights if ref() is not None]


@pytest.mark.parametrize("name", UNSEEN)
def test_formats_without_a_decoder_say_what_to_do(approx, latent, see, name):
    linear = ", or choose the view linear" if latent(name).latent_rgb_factors is not None else ""
    with pytest.raises(ValueError, match=rf"knows no tiny decoder.*\({name}\)\. Connect a VAE{linear}\.$"):
        see(name)


# Video


def test_every_frame_of_a_video_is_guided_as_a_picture(pack, run, clean_clip, latent, write, see):
    """Alone it gets the same shift."""
    write("HunyuanVideo")
    guidance = run(
        "SDGTextGuidance", noisy_clip=clean_clip, text="a red hat", scale=1e4, start_percent=0.0, end_percent=1.0
    )
    model, sigma = see("HunyuanVideo").model, torch.tensor([0.5])
    sights = pack.views.see(model, guidance, pack.views.ViewChoice("decoded"))
    clip = some_latents("HunyuanVideo", latent("HunyuanVideo"), 3, 4, 4).movedim(0, 1)[None]

    def shift(x: Tensor) -> Tensor:
        state = pack.seam.open_run(model, guidance.terms, pack.method.Strength(), sights)
        with torch.inference_mode():
            return pack.method.guidance_shift(x, 1.1 * x, sigma, state)

    whole = shift(clip)
    assert whole.shape == clip.shape
    assert (whole.square().mean(dim=(0, 1, 3, 4)) > 0).all()
    frames = torch.cat([shift(clip[:, :, i : i + 1]) for i in range(3)], dim=2)
    assert (whole - frames).abs().max() < 1e-3 * whole.abs().max()


def test_a_connected_video_decoder_passes_whole_gradients_and_stays_as_it_was(comfy, pack, latent, write, see):
    """TAEHV as a VAE: frame by frame it detaches what one frame hands to the next."""
    path = write("Wan21")
    with torch.inference_mode():
        vae = comfy.sd.VAE(comfy.utils.load_torch_file(str(path)), dtype=torch.float64)
        connected, tiny = see("Wan21", vae=vae).view, see("Wan21").view
    tiny.modules[0].double()
    weights = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    pictures, grads = [], []
    for view in (connected, tiny):
        with torch.inference_mode(), pack.method.gradient_scope(*view.modules):
            x = some_latents("Wan21", latent("Wan21"), 1).double().requires_grad_(True)
            pictures.append(view.picture(x, torch.ones(1)))
            grads += torch.autograd.grad((pictures[-1] * weights).sum(), x)
    assert (pictures[0] - pictures[1]).abs().max() < 1e-5
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()
    assert vae.first_stage_model.parallel is False


# Files that do not fit


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def words(path: Path) -> None:
    path.write_bytes(b"not found" * 100)


def pickled(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path.with_suffix(".pth"))
    path.unlink()


def torn_pickle(path: Path) -> None:
    pickled(path)
    torn(path.with_suffix(".pth"))


def foreign(path: Path) -> None:
    save_file({"model.weight": torch.zeros(2, 2)}, path)


@pytest.mark.parametrize("damage", [torn, empty, words, pickled, torn_pickle, foreign])
@pytest.mark.parametrize("name", ["SD15", "Wan21"])
def test_damaged_files_are_refused_by_name(write, see, name, damage):
    path = write(name)
    damage(path)
    with pytest.raises(ValueError, match=rf"{path.stem}.* is damaged, or no decoder of .*\({name}\).*connect a VAE"):
        see(name)


@pytest.mark.parametrize(("name", "other"), [("SD15", "SD3"), ("SD3", "SD15"), ("HunyuanVideo", "HunyuanVideo15")])
def test_decoders_of_other_latents_are_refused(latent, write, see, name, other):
    write(other, file=latent(name).taesd_decoder_name)
    with pytest.raises(ValueError, match=rf"no decoder of this model's latents \({name}\)"):
        see(name)


@pytest.mark.parametrize(
    ("name", "lost"), [("SD15", "19."), ("SD15", "4.conv"), ("Wan21", "decoder.5."), ("Wan21", "decoder.1.")]
)
def test_files_that_lack_a_layer_are_refused(write, see, name, lost):
    """The host's VAE takes them, with a warning in the log."""
    write(name, change=lambda state: {k: v for k, v in state.items() if not k.startswith(lost)})
    with pytest.raises(ValueError, match="is damaged, or no decoder"):
        see(name)


def test_a_video_decoder_without_its_encoder_will_do(latent, write, see):
    write("Wan22", change=lambda state: {k: v for k, v in state.items() if k.startswith("decoder.")})
    with torch.inference_mode():
        picture = see("Wan22").view.picture(some_latents("Wan22", latent("Wan22"), 1), torch.ones(1))
    assert picture.isfinite().all()


@pytest.mark.parametrize("name", ["SDXL", "Wan21"])
def test_a_missing_file_is_named_with_its_folder(approx, latent, see, name):
    decoder = latent(name).taesd_decoder_name
    with pytest.raises(
        ValueError, match=rf"needs {decoder}\.safetensors \(or \.pth\) in models/vae_approx; .*linear\.$"
    ):
        see(name)


# Real files


@every_format
def test_a_real_file_gives_the_hosts_own_preview(comfy, pack, run, clean_clip, latent, see, preview, monkeypatch, name):
    folder, decoder = HOST / "models/vae_approx", latent(name).taesd_decoder_name
    if not [p for p in folder.glob(f"{decoder}*") if p.suffix in (".safetensors", ".pth")]:
        pytest.skip(f"No {decoder} in {folder}.")
    monkeypatch.setitem(
        comfy.folder_paths.folder_names_and_paths, "vae_approx", ([str(folder)], {".safetensors", ".pth"})
    )
    view, x = see(name).view, some_latents(name, latent(name), 1, 16, 16)
    with torch.inference_mode():
        seen = view.picture(x, torch.ones(1))
    check_it_is_the_hosts_preview(seen[0], *as_the_host_draws(preview(name), latent(name), x))
    grad = score_gradient(pack, run, clean_clip, view, x)
    assert grad.isfinite().all()
    assert grad.norm() > 0
