"""What makes latents visible: the host's own tiny decoders, found as its previews find them, and connected VAEs.

Every latent frame is decoded by itself, as the host previews a video by its first frame: a latent frame is one picture
of the clip, and its gradient never reaches its neighbours. In a whole clip a frame also depends on those before it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.taesd.taehv import TAEHV
from comfy.taesd.taesd import TAESD
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ...sdg_core.method import DecodedView, as_normal, gradient_scope, precise
from .memory import patch_module

UNREADABLE = (
    ValueError, RuntimeError, LookupError, AttributeError, TypeError, OSError, EOFError, pickle.PickleError,
    SafetensorError,
)  # fmt: skip
"""What the host raises for files that are damaged or of another layout."""


def format_name(latent) -> str:
    return getattr(latent, "sdg_name", None) or type(latent).__name__


def has_factors(latent) -> bool:
    """Whether the host knows a linear picture of these latents."""
    return getattr(latent, "latent_rgb_factors", None) is not None


def downscale_of(latent) -> int:
    """Picture pixels to a latent pixel; ComfyUI before 0.11 does not say, and has 8 everywhere."""
    return getattr(latent, "spacial_downscale_ratio", 8)


# The host's tiny decoders


class PictureDecoder(nn.Module):
    """TAESD: model latents (B, C, h, w) to pictures (B, 3, H, W) in -1..1."""

    def __init__(self, model: TAESD) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.decode(x)


class FrameDecoder(nn.Module):
    """TAEHV and its kin: model latents of single frames (B, C, h, w) to pictures (B, 3, H, W) in -1..1.

    Latents pass ``latent.process_out`` first, as on the way to the host's VAE Decode. The host's previews leave that
    out, so they are paler (HunyuanVideo) or tinted (Wan): the picture here is the one that VAE Decode gives.
    """

    def __init__(self, model: nn.Module, latent, from_0_to_1: bool) -> None:
        super().__init__()
        self.model, self.latent, self.from_0_to_1 = model, latent, from_0_to_1

    def forward(self, x: Tensor) -> Tensor:
        with _attached(self.model):
            picture = self.model.decode(self.latent.process_out(x[:, :, None]))[:, :, 0]
        picture = picture.to(x.device)  # TAEHV hands pictures out on the CPU
        return picture * 2 - 1 if self.from_0_to_1 else picture


def through_tiny_decoder(latent) -> tuple[DecodedView, comfy.model_patcher.ModelPatcher]:
    """The view through a latent format's tiny decoder in models/vae_approx, and the patcher that loads it.

    Raises ValueError where the host knows none, where its file is missing, and where the file is another's or damaged.
    """
    path = _find_file(latent)
    video = latent.taesd_decoder_name in latent_preview.VIDEO_TAES
    with torch.inference_mode(False):
        try:
            decoder = _frame_decoder(latent, path) if video else _picture_decoder(latent, path)
            plain_layers(decoder).requires_grad_(False).eval()
            upscale = _measure(decoder, picture_channels(latent))
        except UNREADABLE as error:
            raise ValueError(
                f"{path.name} in models/vae_approx is damaged, or no decoder of this model's latents "
                f"({format_name(latent)}) that this ComfyUI can read. Download it again, update ComfyUI if the file is "
                "newer, or connect a VAE."
            ) from error
    return DecodedView(decoder, upscale, (decoder,)), patch_module(decoder)


def _find_file(latent) -> Path:
    """The file that the host's previews take."""
    name, linear = latent.taesd_decoder_name, ", or choose the view linear" if has_factors(latent) else ""
    if name is None:
        raise ValueError(
            f"This ComfyUI knows no tiny decoder for this model's latents ({format_name(latent)}). "
            f"Connect a VAE{linear}."
        )
    files = [f for f in folder_paths.get_filename_list("vae_approx") if f.startswith(name)]
    if not files:
        raise ValueError(
            f"The view decoded needs {name}.safetensors (or .pth) in models/vae_approx; it is not there. "
            f"Put it there, or connect a VAE{linear}."
        )
    return Path(folder_paths.get_full_path_or_raise("vae_approx", files[0]))


def _picture_decoder(latent, path: Path) -> PictureDecoder:
    model = TAESD(None, str(path), latent_channels=latent.latent_channels)
    del model.taesd_encoder
    return PictureDecoder(model)


def _frame_decoder(latent, path: Path) -> FrameDecoder:
    """The host tells a video decoder's kind by its keys and its dtype, in its VAE. Raises ValueError for others."""
    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    vae = comfy.sd.VAE(state, device=torch.device("cpu"), dtype=torch.float32)
    model = vae.first_stage_model
    if model is None or vae.latent_channels != picture_channels(latent):
        raise ValueError("The host reads another model, or none, off this file.")
    missing = [k for k in model.state_dict() if k not in state and not k.startswith("encoder.")]
    if missing:  # the host only warns, and goes on with what was in memory
        raise ValueError(f"The file lacks {', '.join(missing)}.")
    model.encoder = None
    return FrameDecoder(model, detached_format(latent), _from_0_to_1(vae))


def picture_channels(latent) -> int:
    """Channels of a format's pictures. One for video with sound counts the most of both, and makes nested latents."""
    fix = getattr(latent, "fix_empty_latent", None)
    if fix is None:
        return latent.latent_channels
    shape = (1, latent.latent_channels) + (1,) * latent.latent_dimensions
    empty = fix(torch.zeros(shape))
    return (empty.tensors[0] if empty.is_nested else empty).shape[1]


def plain_layers(module: nn.Module) -> nn.Module:
    """``module``, its host layers turned into the torch layers that they extend. Weights of the host's layers may be
    moved away between forward and backward by its dynamic memory management, plain ones stay."""
    for layer in module.modules():
        if type(layer).__module__ == "comfy.ops":
            layer.__class__ = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn."))
    return module


def _measure(decoder: nn.Module, channels: int) -> int:
    """Picture pixels to a latent pixel, found by decoding a small latent. Notes in ``decoder.bytes_per_position`` what
    the gradient takes for each latent pixel: what autograd keeps, and half as much for the layers at work."""
    kept, side = {}, 2

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor = tensor.detach()  # or a graph would hold itself
        return tensor

    with gradient_scope(decoder), saved_tensors_hooks(keep, lambda tensor: tensor):
        picture = decoder(torch.zeros(1, channels, side, side, requires_grad=True))
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    decoder.bytes_per_position = 3 * total // (2 * side**2)
    return picture.shape[-1] // side


# VAEs


def through_vae(latent, vae) -> tuple[DecodedView, comfy.model_patcher.ModelPatcher]:
    """Through a VAE object's own model: its decode() is not made for gradients (it writes in place, and tiles).

    Raises ValueError for a VAE of other latents.
    """
    if vae.latent_channels not in (latent.latent_channels, picture_channels(latent)):
        raise ValueError(
            f"The connected VAE decodes latents of {vae.latent_channels} channels, and this model's "
            f"({format_name(latent)}) have {latent.latent_channels}. Connect this model's own VAE, or leave vae empty."
        )
    module, patcher = vae.first_stage_model, vae.patcher
    from_0_to_1, latent = _from_0_to_1(vae), detached_format(latent)

    def decode(x: Tensor) -> Tensor:
        three = vae.latent_dim == 3
        z = latent.process_out(x[:, :, None] if three and x.ndim == 4 else x)
        z = z[:, :, 0] if z.ndim == 5 and not three else z
        out = precise(_call_decode(module, z.to(vae.vae_dtype), patcher)).to(x.device)
        out = out[:, :, 0] if out.ndim == 5 else out
        return out * 2 - 1 if from_0_to_1 else out

    ratio = vae.upscale_ratio[-1] if isinstance(vae.upscale_ratio, tuple) else vae.upscale_ratio
    scale = ratio if isinstance(ratio, int) else downscale_of(latent)
    return DecodedView(decode, scale, (module,)), patcher


def _call_decode(module: nn.Module, z: Tensor, patcher: comfy.model_patcher.ModelPatcher) -> Tensor:
    """``module.decode(z)``. Under the host's dynamic memory weights may be evicted between forward and backward, so
    copies are used that stay: more memory, for as long as the gradient takes."""
    with _attached(module):
        if not getattr(patcher, "is_dynamic", lambda: False)():
            return module.decode(z)
        weights = {name: as_normal(p).to(z.device, copy=True) for name, p in module.named_parameters()}
        return functional_call(_Decode(module), {f"module.{name}": w for name, w in weights.items()}, (z,))


class _Decode(nn.Module):
    """A module whose call is another's decode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module.decode(z)


# Of both


def _from_0_to_1(vae) -> bool:
    """Whether a VAE's model gives pictures in 0..1, as TAEHV does, and not in -1..1."""
    return float(vae.process_output(torch.zeros(1))) == 0


def detached_format(latent):
    """A latent format whose tensors autograd can save."""
    latent = copy.copy(latent)
    with torch.inference_mode(False):
        for name, value in vars(latent).items():
            if isinstance(value, Tensor):
                setattr(latent, name, as_normal(value).clone())
    return latent


@contextmanager
def _attached(module: nn.Module) -> Iterator[None]:
    """Decoding through which whole gradients pass, without a progress bar.

    A TAEHV that goes frame by frame detaches what one frame hands to the next, and a single latent frame is several
    of its frames. In parallel it computes the same, attached.
    """
    if not isinstance(module, TAEHV):
        yield
        return
    before = module.parallel, module.show_progress_bar
    module.parallel, module.show_progress_bar = True, False
    try:
        yield
    finally:
        module.parallel, module.show_progress_bar = before
