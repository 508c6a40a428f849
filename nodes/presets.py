"""Nodes that keep a guidance as a file, and make it again for any encoder."""

from __future__ import annotations

from collections.abc import Callable

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..sdg_core.method import ClassGuidance, Fade, Term
from ..sdg_core.presets import Recipe, preset_text, read_preset
from . import host
from .classifier import ClassifierSocket
from .guidance import GuidanceSocket, guidance_output
from .loaders import NoisyCLIPSocket

FOLDER = "sdg_presets"


class SDGSavePreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGSavePreset",
            display_name="Save Preset (SDG)",
            category="SDG/guidance",
            description="Writes a guidance, with its texts, pictures and controls, to models/sdg_presets. Use it to "
            "share a look, or to have it in other workflows.",
            inputs=[
                GuidanceSocket.Input(
                    "guidance", tooltip="Any guidance, also a combined one. Its encoder is not kept, its pictures are."
                ),
                io.String.Input(
                    "name",
                    default="my_guidance",
                    tooltip="File name without ending. A number is added where it is taken.",
                ),
            ],
            outputs=[],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, name: str) -> io.NodeOutput:
        text = preset_text(host.to_guidance(guidance).terms)
        path = host.free_path(FOLDER, name, ".json")
        path.write_text(text, encoding="utf-8")
        host.NodeText(cls.hidden).say(f"Saved {path.name}")
        return io.NodeOutput(ui={"text": [path.name]})


class SDGLoadPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadPreset",
            display_name="Load Preset (SDG)",
            category="SDG/guidance",
            description="A guidance that Save Preset wrote, through the encoder that you connect. Use it for a look "
            "that is ready.",
            inputs=[
                io.Combo.Input(
                    "preset_name",
                    options=host.model_names(FOLDER),
                    tooltip="A file of models/sdg_presets. New ones are listed after a refresh.",
                ),
                NoisyCLIPSocket.Input(
                    "noisy_clip",
                    optional=True,
                    tooltip="The encoder that all its guidances look through, also a crossfade. Classifier guidance "
                    "needs none.",
                ),
                ClassifierSocket.Input(
                    "classifier",
                    optional=True,
                    tooltip="For presets that hold a classifier guidance: its classifier, from Load Classifier.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def fingerprint_inputs(cls, preset_name: str, **others: object) -> str:
        return host.fingerprint(FOLDER, preset_name)

    @classmethod
    def execute(
        cls, preset_name: str, noisy_clip: host.NoisyCLIPValue | None = None, classifier: ModelPatcher | None = None
    ) -> io.NodeOutput:
        recipes = read_preset(host.read_text(host.model_path(FOLDER, preset_name)))
        clips = () if noisy_clip is None else host.encoder_parts(noisy_clip)
        classifiers = () if classifier is None else ((host.to_classifier(classifier), None),)
        terms: list[Term] = []
        patchers: dict[int, ModelPatcher] = {}
        for recipe in recipes:
            parts = classifiers if recipe.kind == "class" else clips
            terms += terms_of(recipe, parts)
            patchers |= {id(patcher): patcher for patcher, _ in parts}
        return io.NodeOutput(host.HostGuidance(tuple(terms), tuple(patchers.values())))


def terms_of(recipe: Recipe, parts: tuple[tuple[ModelPatcher, Fade | None], ...]) -> tuple[Term, ...]:
    """The terms of one guidance of a preset. Raises ValueError where nothing is connected for it to look through."""
    if not parts:
        name, maker = ("classifier", "Classifier") if recipe.kind == "class" else ("noisy_clip", "Noisy CLIP")
        raise ValueError(
            f"This preset holds a {recipe.kind} guidance, and the input {name} is empty. Connect Load {maker} (SDG)."
        )

    def speak(i: int) -> Callable[[list[str]], Tensor]:
        return lambda texts: host.load_encoder(parts[i][0]).encode_text(texts)

    terms = recipe.terms([(patcher.model, fade) for patcher, fade in parts], speak)
    for term in terms:
        if isinstance(term.guidance, ClassGuidance):
            parts[0][0].model.number_of(str(term.guidance.number))  # raises for classes that it doesn't have
    return terms
