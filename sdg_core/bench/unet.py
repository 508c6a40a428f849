"""A guided step of a UNet of SD1.5's size at 512 px beside an unguided one, and beside other ways to guide.

The UNet and the decoder of its VAE are ComfyUI's own classes, with random weights: COMFYUI_PATH names the folder. All
steps are with classifier-free guidance. On a GPU the model computes in bf16, on a CPU in float32.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..encoders import CleanCLIP
from ..method import Convention, GuidanceRun, LinearView, Term, TimestepTable, expand, guide, unit
from ..method.guidance import TextGuidance
from .peers import METHODS, Peer
from .rows import MB, Row, Task, by_turns, peak_memory
from .steps import noisy_clip, text

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "num_head_channels": -1, "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1, "context_dim": 768, "use_linear_in_transformer": False, "legacy": False,
}  # fmt: skip
"""The options of the host's UNetModel for SD1.5."""

VAE = {
    "ch": 128, "out_ch": 3, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "in_channels": 3,
    "resolution": 256, "z_channels": 4,
}  # fmt: skip
"""The options of the host's Decoder for the VAE of SD1.5."""

TOKENS, CFG, SIGMA = 77, 7.0, 2.0


def find_host() -> Path:
    """ComfyUI's folder. Raises FileNotFoundError, saying what to do, where there is none."""
    place = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
    if not (place / "comfy/ldm").is_dir():
        raise FileNotFoundError(
            f"There is no ComfyUI in {place}; its UNet is what is measured. Install ComfyUI (`pip install comfy-cli`, "
            "`comfy install`), set COMFYUI_PATH to its folder, or leave the suite unet out."
        )
    return place


def host_module(name: str) -> object:
    """A module of ComfyUI, in this process, which it then takes for one without a card where there is none."""
    place = str(find_host())
    if place not in sys.path:
        sys.path.insert(0, place)
        arguments = importlib.import_module("comfy.cli_args").args
        arguments.cpu = not torch.cuda.is_available()
    return importlib.import_module(name)


@dataclass(frozen=True)
class Bed:
    """SD1.5's UNet and decoder with random weights, and one latent (batch, 4, side / 8, side / 8) at sigma 2."""

    unet: nn.Module
    decoder: nn.Module
    context: Tensor
    x: Tensor
    ratio: TimestepTable

    @classmethod
    def of(cls, batch: int = 1, side: int = 512) -> Bed:
        cuda = torch.cuda.is_available()
        device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
        ops = host_module("comfy.ops").disable_weight_init  # type: ignore[attr-defined]
        openai = host_module("comfy.ldm.modules.diffusionmodules.openaimodel")
        model = host_module("comfy.ldm.modules.diffusionmodules.model")
        unet = openai.UNetModel(**SD15, dtype=dtype, device=device, operations=ops)  # type: ignore[attr-defined]
        decoder = model.Decoder(**VAE).to(device, dtype)  # type: ignore[attr-defined]
        generator = torch.Generator(device).manual_seed(0)
        for module in (unet, decoder):
            for parameter in module.eval().requires_grad_(False).parameters():
                size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * size)
        context = torch.randn(2, TOKENS, 768, generator=generator, device=device).to(dtype)
        x = torch.randn(batch, 4, side // 8, side // 8, generator=generator, device=device) * SIGMA
        return cls(unet, decoder, context, x, TimestepTable.from_name("scaled_linear"))

    @property
    def sigma(self) -> Tensor:
        return torch.full((len(self.x),), SIGMA)

    def denoise(self, x: Tensor, sigma: Tensor, *, guided: bool = True) -> Tensor:
        """The model's estimate, with classifier-free guidance or of the prompt alone."""
        times = 2 if guided else 1
        s, t = expand(sigma, x), self.ratio.timestep(sigma).to(x.device)
        dtype = self.context.dtype
        seen = (x / (1 + s.square()).sqrt()).repeat(times, 1, 1, 1).to(dtype)
        context = self.context[:times].repeat_interleave(len(x), dim=0)
        eps: Tensor = self.unet(seen, t.repeat(times), context=context).to(x.dtype)
        if guided:
            eps, free = eps.chunk(2)
            eps = free + CFG * (eps - free)
        return x - s * eps

    def decode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about -1..1, through the whole VAE."""
        picture: Tensor = self.decoder((x / 0.18215).to(self.context.dtype)).to(x.dtype)
        return picture.clamp(-1, 1)


def ours(bed: Bed, run: GuidanceRun) -> Task:
    """One guided step of this package, and, without any term in the run, an unguided one."""

    @torch.no_grad()
    def step() -> None:
        denoised = bed.denoise(bed.x, bed.sigma)
        guide(denoised, bed.x, bed.sigma, run)

    return step


def peer(bed: Bed, clip: CleanCLIP, method: str, wanted: TextGuidance) -> Task:
    """One guided step of another method. The diffusers pipeline asks the model a second time, of the prompt alone."""
    second = method == "through_unet"

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return bed.denoise(x, sigma, guided=not second)

    guided = Peer(method, denoise, bed.decode, clip, wanted, 1.0)  # type: ignore[arg-type]

    def step() -> None:
        with torch.no_grad():
            if second:
                bed.denoise(bed.x, bed.sigma)
            guided(bed.x, bed.sigma)

    return step


def unet_rows(rounds: int, batch: int = 1, side: int = 512, progress: Callable[[str], object] = print) -> list[Row]:
    """`step_ratio`, `speedup_over_<method>`, `extra_memory_mb` and the times behind them."""
    bed, encoder = Bed.of(batch, side), noisy_clip()
    factors = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)) / 2
    view = LinearView("sd15", factors, torch.zeros(3))
    wanted = text(encoder)

    def run(*terms: Term) -> GuidanceRun:
        return GuidanceRun(terms, Convention.VE, lambda p: 15 * (1 - p), view_of=lambda encoder: view, variance=1.0)

    plain, guided = ours(bed, run()), ours(bed, run(Term(wanted, encoder, 100.0)))
    progress("a step of SD1.5's size, unguided and guided")
    took = by_turns({"plain": plain, "guided": guided}, rounds)
    spent = {}
    for name, task in (("plain", plain), ("guided", guided)):
        with peak_memory() as peak:
            task()
        spent[name] = peak.taken
    clip = clean_of(encoder)
    others = {}
    for method in METHODS:
        progress(f"a step guided by {method}")
        task = peer(bed, clip, method, TextGuidance(unit(wanted.embed).to(bed.x.device)))
        others[method] = by_turns({"ours": guided, method: task}, max(1, rounds // 2))
    name = "" if batch == 1 else f"_batch_{batch}"
    return [
        Row(f"unguided_step_s{name}", took["plain"], "s", rounds),
        Row(f"step_ratio{name}", took["guided"] / took["plain"], "x", rounds),
        Row(f"extra_memory_mb{name}", (spent["guided"] - spent["plain"]) / MB, "MB", 1),
        *(Row(f"speedup_over_{m}{name}", t[m] / t["ours"], "x", max(1, rounds // 2)) for m, t in others.items()),
    ]


def clean_of(encoder: nn.Module) -> CleanCLIP:
    """A clean CLIP that shares a noisy one's image tower."""
    clip = nn.Module()
    clip.visual = encoder.tower.visual  # type: ignore[union-attr]
    return CleanCLIP(clip, encoder.image_size, has_text=False).requires_grad_(False)  # type: ignore[arg-type]
