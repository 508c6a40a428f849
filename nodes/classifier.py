"""Nodes of classifier guidance, ADM's own: a classifier of noisy pictures, and one of its classes to pull towards."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..sdg_core.method import ClassGuidance, Term
from ..sdg_core.models import load_classifier
from . import defaults, host
from .guidance import guidance_output, interval_inputs, scale_input
from .inputs import check_finite, shown

ClassifierSocket = io.Custom("SDG_CLASSIFIER")


class SDGLoadClassifier(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadClassifier",
            display_name="Load Classifier (SDG)",
            category="SDG/loaders",
            description="Loads a classifier of noisy pictures (guided-diffusion's), for Classifier Guidance.",
            inputs=[
                io.Combo.Input(
                    "classifier_name",
                    options=host.model_names("classifier"),
                    tooltip="A file of models/classifier: saved by this pack, or published, such as "
                    "256x256_classifier.pt; or the bundled one, for the bundled latent models.",
                )
            ],
            outputs=[ClassifierSocket.Output("CLASSIFIER", tooltip="Connect to Classifier Guidance.")],
        )

    @classmethod
    def fingerprint_inputs(cls, classifier_name: str) -> str:
        return host.fingerprint("classifier", classifier_name)

    @classmethod
    def execute(cls, classifier_name: str) -> io.NodeOutput:
        path = host.model_path("classifier", classifier_name)
        with torch.inference_mode(False):
            return io.NodeOutput(host.patch_module(load_classifier(path)))


class SDGClassifierGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGClassifierGuidance",
            display_name="Classifier Guidance (SDG)",
            category="SDG/guidance",
            description="Pulls towards one class of a classifier, as ADM's own guidance does. Use it to compare with "
            "text guidance, or beside it.",
            inputs=[
                ClassifierSocket.Input("classifier", tooltip="The classifier to look through, from Load Classifier."),
                io.String.Input(
                    "class_name",
                    default="0",
                    tooltip="A class by number, from 0, or by name: green background, for the bundled one. "
                    "Published ones know ImageNet's numbers: 207 is golden retriever.",
                ),
                scale_input(
                    defaults.CLASS_SCALE,
                    "How strongly to follow the class. Higher follows closer and varies less; 0 is off, "
                    "negative pushes away. Usual: 1 to 20.",
                ),
                *interval_inputs(0.0, 1.0),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(
        cls, classifier: ModelPatcher, class_name: str, scale: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        check_finite(scale=scale)
        patcher = host.to_classifier(classifier)
        if not isinstance(class_name, str):
            raise ValueError(f"Got the class {shown(class_name)}; wanted words. Write a name or a number.")
        guidance = ClassGuidance(patcher.model.number_of(class_name))
        term = Term(guidance, patcher.model, scale, start_percent, end_percent)
        return io.NodeOutput(host.HostGuidance((term,), (patcher,)))
