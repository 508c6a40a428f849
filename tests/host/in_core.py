"""Example graphs computed by the core alone: what a host should give for them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdg_core import avatars as worlds
from sdg_core import method as guidance
from sdg_core import models
from sdg_core.pictures import draw_table

CONTROLS = {
    "SDGGuidanceSchedule": lambda term, values: replace(term, curves=(curve_of(values),), every=values["every"]),
    "SDGGuidanceSpeed": lambda term, values: guidance.PACES[values["speed"]].of(term),
    "SDGGuidanceAugment": lambda term, values: replace(
        term, augment=guidance.Augment(values["crops"], values["least"])
    ),
    "SDGGuidanceAway": lambda term, values: replace(
        term, scale=-abs(term.scale), goal=guidance.Goal(values["until"], adapted=False)
    ),
}


def curve_of(values: dict) -> guidance.Curve:
    points = tuple(tuple(map(float, pair.split(":"))) for pair in values["points"].split(","))
    return guidance.Curve(points, values["curve"])


PASSED_ON = ("samples", "image", "images", "latent")
"""Inputs of the nodes that give on what they get."""


class Core:
    """The bundled worlds of a folder, by the names that loaders give, and the latents' encoder."""

    def __init__(self, avatars: Path) -> None:
        self.avatars = avatars
        self.encode, _ = worlds.bundled_latent_encoder(avatars)
        self.world = functools.cache(self._world)

    def _world(self, name: str, route: str) -> worlds.World:
        found = re.fullmatch(r"avatars latent (\w+) \(bundled\)", name)
        return worlds.open_world(worlds.WorldName(self.avatars, *((found[1], route) if found else ())))


@dataclass(frozen=True)
class Graph:
    """One prompt of the host's API: {node id: {"class_type", "inputs"}}."""

    core: Core
    prompt: dict

    def output(self, number: str):
        """What a node gives: pictures (B, 3, H, W) in -1..1, latents, or terms."""
        kind, values = self.prompt[number]["class_type"], self.prompt[number]["inputs"]
        if kind in CONTROLS:
            return tuple(CONTROLS[kind](term, values) for term in self._input(values, "guidance"))
        if kind in self._ways:
            return self._ways[kind](values)
        return self._terms(kind, values)

    @property
    def _ways(self) -> dict[str, Callable]:
        pass_on = dict.fromkeys(("VAEDecode", "ImageScale", "SaveImage", "SDGGuidanceReport"), self._pass_on)
        return {
            "SDGXYGrid": self._table,
            "SDGGuidedKSampler": self._sample,
            "SDGCombineGuidance": self._combine,
            "SDGGuidanceMask": self._masked,
            "RepeatLatentBatch": lambda values: self._input(values, "samples").repeat(values["amount"], 1, 1, 1),
            "VAEEncode": lambda values: self.core.encode(self._input(values, "pixels")),
            **pass_on,
        }

    def _input(self, values: dict, name: str):
        """What comes in at a socket."""
        return self.output(values[name][0])

    def _pass_on(self, values: dict):
        return self._input(values, next(name for name in PASSED_ON if name in values))

    @property
    def _here(self) -> worlds.World:
        """The world of the graph's model and encoder."""
        nodes = self.prompt.values()
        (name,) = {node["inputs"]["adm_name"] for node in nodes if node["class_type"] == "SDGLoadADM"}
        clean = "SDGLoadCLIP" in {node["class_type"] for node in nodes}
        return self.core.world(name, "clean decoded" if clean else "noisy linear")

    def _terms(self, kind: str, values: dict) -> tuple[guidance.Term, ...]:
        """A guidance node's; of a text one for each line."""
        lines = values.get("text", "").splitlines()
        if len(lines) > 1:
            return tuple(part for line in lines for part in self._terms(kind, values | {"text": line}))
        clip = self._here.classifier if kind == "SDGClassifierGuidance" else self._here.encoder
        image = self._input(values, "image") if "image" in values else None
        layers = tuple(int(n) for n in values.get("layers", "1").split(","))
        made = {
            "SDGTextGuidance": lambda: guidance.TextGuidance(
                clip.encode_text(lines),
                texts=tuple(lines),
                negative=clip.encode_text([values["negative"]]) if values.get("negative") else None,
            ),
            "SDGContentGuidance": lambda: guidance.ContentGuidance(
                image, negative=self._input(values, "negative") if "negative" in values else None
            ),
            "SDGStructureGuidance": lambda: guidance.StructureGuidance(image, layers),
            "SDGStyleGuidance": lambda: guidance.StyleGuidance(image, layers, values.get("centred", True)),
            "SDGClassifierGuidance": lambda: guidance.ClassGuidance(clip.number_of(values["class_name"])),
            "SDGDirectionGuidance": lambda: guidance.DirectionGuidance(
                image, clip.encode_text([values["to_text"]]) - clip.encode_text([values["from_text"]])
            ),
        }[kind]()
        return (guidance.Term(made, clip, values["scale"], values["start_percent"], values["end_percent"]),)

    def _combine(self, values: dict) -> tuple[guidance.Term, ...]:
        used = [i for i in (1, 2, 3, 4) if f"guidance_{i}" in values]
        parts = [(self._input(values, f"guidance_{i}"), values[f"weight_{i}"]) for i in used]
        blend = guidance.Blend(values.get("balance", 0.0), values.get("conflicts") == "project")
        return guidance.combine(parts, blend if blend.balance or blend.project else None)

    def _masked(self, values: dict) -> tuple[guidance.Term, ...]:
        region = guidance.Region(self._mask(values["mask"][0]))
        return tuple(replace(term, region=region) for term in self._input(values, "guidance"))

    def _mask(self, number: str) -> Tensor:
        """(1, 1, H, W) of the regions example: one mask pasted into another."""
        values = self.prompt[number]["inputs"]
        whole, part = (self.prompt[values[name][0]]["inputs"] for name in ("destination", "source"))
        result = torch.full((1, 1, whole["height"], whole["width"]), whole["value"])
        x, y = values["x"], values["y"]
        result[..., y : y + part["height"], x : x + part["width"]] += part["value"]
        return result

    def _sample(self, values: dict) -> Tensor:
        here = self._here
        denoiser, start = here.denoiser, self.prompt[values["latent_image"][0]]
        terms = self._input(values, "guidance") if "guidance" in values else ()
        run = here.open_run(terms, guidance.Strength(cap=values["cap"]))
        sigmas = denoiser.sigmas(int(values["steps"] / values["denoise"]))[-(values["steps"] + 1) :]
        denoise = self._held(models.guided(denoiser, run), self.prompt[values["model"][0]])
        if start["class_type"] == "RepeatLatentBatch":
            latents = self._input(values, "latent_image")
            noise = worlds.batch_noise(values["seed"], *latents.shape[:3:2], latents.shape[1])
            x = denoiser.noised(latents, noise, sigmas)
        else:
            size = start["inputs"]
            side = size["width"] * denoiser.shape[1] // here.renders.shape[-1]
            noise = worlds.batch_noise(values["seed"], size["batch_size"], side, denoiser.shape[0])
            x = denoiser.initial(noise, sigmas)
        if values["sampler_name"] == "euler":
            *_, last = models.euler(denoise, x, sigmas)
        else:
            *_, last = models.euler_ancestral(denoise, x, sigmas, torch.Generator().manual_seed(values["seed"] + 1))
        picture = (here.decode(last.x) + 1) / 2
        return picture.clamp(0, 1) * 2 - 1  # a picture of the host is 0..1: this rounds as it does

    def _held(self, denoise: Callable, node: dict) -> Callable:
        if node["class_type"] != "SDGILVRReference":
            return denoise
        values, to_sigma = node["inputs"], self._here.denoiser.percent_to_sigma()
        reference = self.core.encode(self._input(values, "image"))
        low = guidance.LowFrequencies(reference, values["down_factor"], values["start_percent"], values["end_percent"])
        return lambda x, sigma: low.hold(denoise(x, sigma), sigma, to_sigma)

    def _table(self, values: dict) -> Tensor:
        """(1, 3, H, W): what a list of runs gives, run by run: each with one guidance at one factor for the sweep."""
        plan = values["sweep"][0]
        rows = [self.prompt[plan]["inputs"][f"guidance_{i}"][0] for i in (1, 2, 3)]
        factors = [float(factor) for factor in self.prompt[plan]["inputs"]["factors"].split(",")]
        cells = []
        for row, factor in itertools.product(rows, factors):
            one = {"class_type": "SDGCombineGuidance", "inputs": {"guidance_1": [row, 0], "weight_1": factor}}
            cells.append(replace(self, prompt=self.prompt | {plan: one})._input(values, "images"))
        names = [f"{n}. {guidance.name_of(self.output(row)[0])}" for n, row in enumerate(rows, 1)]
        cells = torch.cat(cells).unflatten(0, (len(rows), len(factors)))
        drawn = np.asarray(draw_table(cells, names, [f"x {factor:g}" for factor in factors])) / 127.5 - 1
        return torch.from_numpy(drawn).movedim(-1, 0)[None]
