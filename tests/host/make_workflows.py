"""Writes example_workflows/*.json in the format of ComfyUI's frontend, with the default scales.

`python tests/host/make_workflows.py`
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sdg_core.avatars import CLEAN_INTERVAL, CLEAN_SCALE, NOISY_INTERVAL, NOISY_SCALE  # noqa: E402
from sdg_core.avatars.editing import DENOISE, DIRECTION, HAIR, KEEP, LONGER, REGIONS  # noqa: E402
from sdg_core.avatars.world import NEGATIVE, NOISY_CURVE, NOISY_SEVERAL, OTHERS  # noqa: E402
from sdg_core.method import DEFAULT_INTERVAL, DEFAULT_SCALE, StructureGuidance, StyleGuidance  # noqa: E402

STRUCTURE_LAYERS, STYLE_LAYERS = (",".join(map(str, kind.layers)) for kind in (StructureGuidance, StyleGuidance))
BUNDLED = "avatars (bundled)"
SEVERAL = round(NOISY_SCALE["text"] * NOISY_SEVERAL, 6)
"""Scale of each of several texts."""
SHARED = 275.0
"""Scale of a text beside another guidance, or of one with several wishes."""
CLASS_SETTINGS = [OTHERS["class"][0], *OTHERS["class"][1]]
ILVR_FACTOR, ILVR_PROMPT = 8, "a person with glasses"
SOCKETS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "SDGLoadADM": ([], [("MODEL", "MODEL"), ("blank", "CONDITIONING")]),
    "SDGLoadNoisyCLIP": ([], [("NOISY_CLIP", "NOISY_CLIP")]),
    "SDGEmptyPixelLatent": ([("vae", "VAE")], [("LATENT", "LATENT")]),
    "SDGTextGuidance": ([("noisy_clip", "NOISY_CLIP")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGContentGuidance": (
        [("noisy_clip", "NOISY_CLIP"), ("image", "IMAGE"), ("negative", "IMAGE")], [("GUIDANCE", "SDG_GUIDANCE")],
    ),
    "SDGStructureGuidance": ([("noisy_clip", "NOISY_CLIP"), ("image", "IMAGE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGStyleGuidance": ([("noisy_clip", "NOISY_CLIP"), ("image", "IMAGE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGCombineGuidance": ([(f"guidance_{i}", "SDG_GUIDANCE") for i in (1, 2, 3, 4)], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceSchedule": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceSpeed": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceMask": (
        [("guidance", "SDG_GUIDANCE"), ("mask", "MASK"), ("reference_mask", "MASK")], [("GUIDANCE", "SDG_GUIDANCE")],
    ),
    "SDGGuidanceTarget": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceAway": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceReferences": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceAugment": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceBudget": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGDirectionGuidance": ([("noisy_clip", "NOISY_CLIP"), ("image", "IMAGE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGGuidanceReport": (
        [("latent", "LATENT")], [("LATENT", "LATENT"), ("plot", "IMAGE"), ("text", "STRING"), ("json", "STRING")],
    ),
    "SDGGuidanceXY": (
        [(f"guidance_{i}", "SDG_GUIDANCE") for i in (1, 2, 3, 4)],
        [("GUIDANCE", "SDG_GUIDANCE"), ("SWEEP", "SDG_SWEEP")],
    ),
    "SDGXYGrid": ([("images", "IMAGE"), ("sweep", "SDG_SWEEP")], [("IMAGE", "IMAGE")]),
    "SDGSavePreset": ([("guidance", "SDG_GUIDANCE")], []),
    "SDGLoadPreset": ([("noisy_clip", "NOISY_CLIP"), ("classifier", "SDG_CLASSIFIER")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SDGEncoderCrossfade": ([("noisy", "NOISY_CLIP"), ("clean", "NOISY_CLIP")], [("NOISY_CLIP", "NOISY_CLIP")]),
    "SDGPaperSampler": ([("guidance", "SDG_GUIDANCE")], [("SAMPLER", "SAMPLER")]),
    "BasicScheduler": ([("model", "MODEL")], [("SIGMAS", "SIGMAS")]),
    "SamplerCustom": (
        [
            ("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("sampler", "SAMPLER"),
            ("sigmas", "SIGMAS"), ("latent_image", "LATENT"),
        ],
        [("output", "LATENT"), ("denoised_output", "LATENT")],
    ),
    "SDGLoadClassifier": ([], [("CLASSIFIER", "SDG_CLASSIFIER")]),
    "SDGClassifierGuidance": ([("classifier", "SDG_CLASSIFIER")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SolidMask": ([], [("MASK", "MASK")]),
    "MaskComposite": ([("destination", "MASK"), ("source", "MASK")], [("MASK", "MASK")]),
    "ImageBatch": ([("image1", "IMAGE"), ("image2", "IMAGE")], [("IMAGE", "IMAGE")]),
    "RepeatLatentBatch": ([("samples", "LATENT")], [("LATENT", "LATENT")]),
    "SDGILVRReference": ([("model", "MODEL"), ("image", "IMAGE"), ("vae", "VAE")], [("MODEL", "MODEL")]),
    "SDGGuidedKSampler": (
        [
            ("model", "MODEL"), ("latent_image", "LATENT"), ("guidance", "SDG_GUIDANCE"),
            ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("vae", "VAE"),
        ],
        [("LATENT", "LATENT")],
    ),
    "SDGLoadCLIP": ([], [("NOISY_CLIP", "NOISY_CLIP")]),
    "SDGFinetuneNoisyCLIP": (
        [("clip", "NOISY_CLIP"), ("images", "IMAGE"), ("model", "MODEL"), ("vae", "VAE")],
        [("NOISY_CLIP", "NOISY_CLIP"), ("IMAGE", "IMAGE")],
    ),
    "SDGSaveNoisyCLIP": ([("noisy_clip", "NOISY_CLIP")], []),
    "SDGLoadAutoencoder": ([], [("VAE", "VAE")]),
    "EmptyImage": ([], [("IMAGE", "IMAGE")]),
    "VAEEncode": ([("pixels", "IMAGE"), ("vae", "VAE")], [("LATENT", "LATENT")]),
    "VAELoader": ([], [("VAE", "VAE")]),
    "VAEDecode": ([("samples", "LATENT"), ("vae", "VAE")], [("IMAGE", "IMAGE")]),
    "ImageScale": ([("image", "IMAGE")], [("IMAGE", "IMAGE")]),
    "PreviewImage": ([("images", "IMAGE")], []),
    "SaveImage": ([("images", "IMAGE")], []),
    "Note": ([], []),
}  # fmt: skip
SIZES = {
    "SDGTextGuidance": (340, 260), "SDGContentGuidance": (340, 150), "SDGStructureGuidance": (340, 180),
    "SDGGuidanceSchedule": (340, 160), "SDGGuidanceSpeed": (340, 100),
    "SDGGuidanceMask": (340, 130), "SDGGuidanceTarget": (340, 100),
    "SDGGuidanceAway": (340, 100), "SDGGuidanceReferences": (340, 130), "SDGGuidanceAugment": (340, 160),
    "SDGGuidanceReport": (320, 560), "SDGSavePreset": (300, 120), "SDGLoadPreset": (300, 120),
    "SDGEncoderCrossfade": (340, 100), "SDGPaperSampler": (320, 60), "BasicScheduler": (320, 130),
    "SamplerCustom": (320, 250),
    "SDGGuidanceBudget": (340, 100), "SDGDirectionGuidance": (340, 300), "SDGClassifierGuidance": (340, 180),
    "SDGStyleGuidance": (340, 210), "SDGCombineGuidance": (340, 220), "SDGGuidedKSampler": (320, 580),
    "SDGApplyGuidance": (320, 340), "SDGLoadNoisyCLIP": (340, 210), "SDGLoadADM": (340, 106),
    "VAEDecode": (300, 60), "ImageScale": (300, 140), "PreviewImage": (300, 300), "SaveImage": (560, 640),
    "Note": (340, 190), "SDGFinetuneNoisyCLIP": (360, 620), "SDGSaveNoisyCLIP": (300, 200),
    "SDGILVRReference": (340, 180), "SDGGuidanceXY": (340, 180), "SDGXYGrid": (300, 60),
}  # fmt: skip
NOTES = ("Note", "MarkdownNote")
COLOURS = {
    "SDGLoad SDGEncoder SDGEmpty": ("#2a363b", "#3f5159"),
    "SDGText SDGContent SDGStructure SDGStyle SDGDirection SDGClassifier": ("#232", "#353"),
    "SDGGuidanceReport SDGXYGrid SDGGuided SDGApply SDGPaper SDGILVR SDGFinetune SDGSaveNoisy": ("#323", "#535"),
    "SDGGuidance SDGCombine SDGSavePreset": ("#223", "#335"),
    "Note MarkdownNote": ("#432", "#653"),
}
"""Title and body of nodes, by how their kinds begin, the first that fits: as web/js/look.js colours new nodes."""
TITLE, GAP, HEADER = 30, 40, 80
"""Heights: a node's title, above its place; what is free below a node; from a group's top to its first node."""
OF_THE_HOST = ("VAE Decode", "VAE Encode", "Save Image", "KSampler", "SamplerCustom")


SIDE = 128
"""Pixels of the bundled latent models' pictures."""
MODEL, CLIP = "avatars latent v (bundled)", "avatars latent (bundled)"
SAMPLING = ["fixed", 30, 1.0, "euler_ancestral", "normal", 1.0, "absolute", 1.0, "auto"]
STEADY = [*SAMPLING[:3], "euler", *SAMPLING[4:]]
"""Widgets of Guided KSampler after the seed; of one that adds no noise."""


def settings(kind: str, *layers: str) -> list:
    """Widget values of a guidance node as measured on the latent models: scale, layers if any, start and end."""
    return [NOISY_SCALE[kind], *layers, *NOISY_INTERVAL[kind]]


def _inside(at: list[int], bounding: list[int]) -> bool:
    x, y, width, height = bounding
    return x <= at[0] < x + width and y <= at[1] < y + height


@dataclass
class Graph:
    """A workflow under construction. ``add`` takes what each socket is fed by: the node id that ``add`` gave."""

    sockets = SOCKETS
    sizes = SIZES

    nodes: list[dict] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)

    def add(self, kind: str, title: str, at: tuple[int, int], widgets: list, **sources: int) -> int:
        number = len(self.nodes) + 1
        inputs, outputs = self.sockets[kind]
        node = {
            "id": number, "type": kind, "pos": list(at), "size": list(self.sizes.get(kind, (300, 106))), "flags": {},
            "order": number - 1, "mode": 0, "title": title,
            "inputs": [{"name": name, "type": type_, "link": None} for name, type_ in inputs],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in outputs],
            "properties": {"Node name for S&R": kind} if kind not in NOTES else {}, "widgets_values": widgets,
        }  # fmt: skip
        fitting = [pair for begins, pair in COLOURS.items() if kind.startswith(tuple(begins.split()))]
        node |= dict(zip(("color", "bgcolor"), fitting[0], strict=True)) if fitting else {}
        if title.endswith("(SDG)") or title in OF_THE_HOST:
            del node["title"]  # the node's own: the frontend shows it in the user's language
        self.nodes.append(node)
        for slot, (name, type_) in enumerate(inputs):
            if name in sources:
                self._link(sources[name], number, slot, type_)
        return number

    def _link(self, source: int, target: int, slot: int, type_: str) -> None:
        """From the source's first output of that type."""
        number, outputs = len(self.links) + 1, self.nodes[source - 1]["outputs"]
        output = [out["type"] for out in outputs].index(type_)
        self.links.append([number, source, output, target, slot, type_])
        outputs[output]["links"].append(number)
        self.nodes[target - 1]["inputs"][slot]["link"] = number

    def group(self, title: str, x: int, y: int, width: int, height: int) -> None:
        bounding = [x, y, width, height]
        self.groups.append({"id": len(self.groups) + 1, "title": title, "bounding": bounding, "color": "#3f789e",
                            "font_size": 24, "flags": {}})  # fmt: skip

    def make_room(self) -> None:
        """Moves down what is too near to a node above it, with all that is as low; groups stay around their nodes."""
        members = [[n for n in self.nodes if _inside(n["pos"], g["bounding"])] for g in self.groups]
        by_height = sorted(self.nodes, key=lambda node: node["pos"][1])
        for i, upper in enumerate(by_height):
            for lower in by_height[i + 1 :]:
                (x, y), (width, height), (left, top) = upper["pos"], upper["size"], lower["pos"]
                if top > y and left < x + width and x < left + lower["size"][0]:
                    self._insert(max(y + 1, top - HEADER), y + height + TITLE + GAP - top)
        for group, inside in zip(self.groups, members, strict=True):
            bottom = group["bounding"][1] + group["bounding"][3]
            missing = max((n["pos"][1] + n["size"][1] for n in inside), default=bottom) + GAP - bottom
            self._insert(bottom, missing)
            group["bounding"][3] += max(0, missing)

    def _insert(self, y: int, height: int) -> None:
        """Free height at y, where it is above 0."""
        if height <= 0:
            return
        for node in self.nodes:
            node["pos"][1] += height if node["pos"][1] >= y else 0
        for group in self.groups:
            top, whole = group["bounding"][1], group["bounding"][3]
            group["bounding"][1] += height if top >= y else 0
            group["bounding"][3] += height if top < y < top + whole else 0

    def save(self, name: str) -> None:
        self.make_room()
        workflow = {
            "revision": 0,  # without an id: the frontend gives each copy that it opens one of its own
            "last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes,
            "links": self.links, "groups": self.groups, "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip
        path = ROOT / f"example_workflows/{name}.json"
        path.write_text(json.dumps(workflow, indent=1) + "\n")


@dataclass
class Models:
    """The loaders that every example has, in a column on the left."""

    adm: int
    clip: int
    vae: int


def models(graph: Graph, note: str) -> Models:
    graph.group("Models", -20, -80, 380, 720)
    graph.add("Note", "About", (0, 430), [note])
    return Models(
        graph.add("SDGLoadADM", "Load ADM (SDG)", (0, 0), [MODEL]),
        graph.add("SDGLoadNoisyCLIP", "Load Noisy CLIP (SDG)", (0, 140), [CLIP]),
        graph.add("SDGLoadAutoencoder", "Load Autoencoder (SDG)", (0, 280), []),
    )


def sampler(
    graph: Graph, models: Models, at: tuple[int, int], guidance: int, batch: int, seed: int, widgets: list = SAMPLING
) -> int:
    """Empty latent, Guided KSampler and VAE Decode; gives the decoded picture."""
    x, y = at
    empty = [SIDE, SIDE, batch]
    latent = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (x, y + 420), empty, vae=models.vae)
    return sampled(graph, models, at, guidance, latent, [seed, *widgets])


def sampled(
    graph: Graph, models: Models, at: tuple[int, int], guidance: int, latent: int, widgets: list, **more: int
) -> int:
    """Guided KSampler and VAE Decode."""
    x, y = at
    samples = graph.add(
        "SDGGuidedKSampler", "Guided KSampler (SDG)", at, widgets,
        model=models.adm, latent_image=latent, guidance=guidance, **more,
    )  # fmt: skip
    return graph.add("VAEDecode", "VAE Decode", (x + 360, y), [], samples=samples, vae=models.vae)


def shown(graph: Graph, image: int, at: tuple[int, int], name: str = "") -> None:
    """The picture, saved under a name or only shown."""
    if name:
        graph.add("SaveImage", "Save Image", at, [f"SDG/{name}"], images=image)
    else:
        graph.add("PreviewImage", "Reference", at, [], images=image)


def text(
    graph: Graph,
    models: Models,
    at: tuple[int, int],
    prompt: str,
    scale: float | None = None,
    interval: tuple[float, float] = NOISY_INTERVAL["text"],
    negative: str = NEGATIVE,
) -> int:
    """By default at the scale that one wish has, or each of several, one a line."""
    usual = SEVERAL if "\n" in prompt else NOISY_SCALE["text"]
    widgets = [prompt, usual if scale is None else scale, *interval, negative]
    return graph.add("SDGTextGuidance", "Text Guidance (SDG)", at, widgets, noisy_clip=models.clip)


def reference(graph: Graph, models: Models, y: int, prompt: str, seed: int, title: str) -> int:
    """A row that samples one picture by text, to serve as a reference."""
    graph.group(title, 380, y - 80, 1180, 720)
    guidance = text(graph, models, (400, y), prompt, SHARED)  # of two wishes
    image = sampler(graph, models, (800, y), guidance, 1, seed)
    shown(graph, image, (1160, y + 120))
    return image


def result(
    graph: Graph,
    models: Models,
    y: int,
    guidance: int,
    seed: int,
    name: str,
    title: str,
    widgets: list = SAMPLING,
    left: int = 380,
    x: int = 800,
) -> None:
    """Four pictures under a guidance, in a group from ``left`` on, their sampler at x."""
    graph.group(title, left, y - 80, x + 1320 - left, 840)
    image = sampler(graph, models, (x, y), guidance, 4, seed, widgets)
    shown(graph, image, (x + 700, y), name)


def text_example() -> None:
    graph = Graph()
    m = models(graph, "A prompt for a model that has none: Text Guidance pulls every step towards the text, "
                      "each line a wish by itself.\n\n"
                      "Change first: the text, to other hair and background colours, a beard, a hat, or a style such "
                      "as pixel art, sketch or toon. Then the scale: 0 gives what the model draws alone.")  # fmt: skip
    guidance = text(graph, m, (400, 0), "a person with glasses\na person with blue background")
    result(graph, m, 0, guidance, 7, "text", "Sample under a text")
    graph.save("text")


def content_example() -> None:
    graph = Graph()
    m = models(graph, "Variations of a picture. The first row samples a reference; Load Image can take its place.\n\n"
                      "Content Guidance follows what it shows, not its pixels. The second row is what the model draws "
                      "anyway: away from that, the reference's own counts more. Guidance Schedule holds back while "
                      "there is mostly noise, and pulls hard from then on.\n\nChange first: the seed of the last "
                      "Guided KSampler, for other variations; then the points, for example 0:1.")  # fmt: skip
    image = reference(graph, m, 0, "a person with red hair, yellow background", 3, "1. A reference")
    graph.group("2. What the model draws anyway", 380, 720, 1180, 720)
    empty = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (400, 800), [SIDE, SIDE, 8], vae=m.vae)
    drawn = graph.add(
        "SDGGuidedKSampler", "Unguided: no guidance connected", (800, 800), [100, *SAMPLING],
        model=m.adm, latent_image=empty,
    )  # fmt: skip
    others = graph.add("VAEDecode", "VAE Decode", (1160, 800), [], samples=drawn, vae=m.vae)
    guidance = graph.add(
        "SDGContentGuidance", "Content Guidance (SDG)", (0, 1600), [*settings("content")],
        noisy_clip=m.clip, image=image, negative=others,
    )  # fmt: skip
    held = NOISY_CURVE["content"]
    points = ", ".join(f"{p:g}:{v:g}" for p, v in held.points)
    guidance = graph.add(
        "SDGGuidanceSchedule", "Guidance Schedule (SDG)", (400, 1600), [held.ease, points, 1], guidance=guidance
    )
    graph.group("3. What to follow", -20, 1520, 380, 260)
    result(graph, m, 1600, guidance, 0, "content", "4. Sample variations of it")
    graph.save("content")


def style_and_structure_example() -> None:
    graph = Graph()
    m = models(graph, "The layout of one picture in the style of another. Both references are sampled here; "
                      "put Load Image in their place to use your own.\n\nChange first: weight_1 for the layout, "
                      "weight_2 for the style, each between 0.1 and 1.")  # fmt: skip
    layout = reference(graph, m, 0, "flat cartoon with long hair and orange background", 3, "1. A reference for layout")
    look = reference(graph, m, 800, "blob with yellow background", 5, "2. A reference for style")
    structure = graph.add(
        "SDGStructureGuidance", "Structure Guidance (SDG)", (400, 1600),
        [*settings("structure", STRUCTURE_LAYERS)], noisy_clip=m.clip, image=layout,
    )  # fmt: skip
    style = graph.add(
        "SDGStyleGuidance", "Style Guidance (SDG)", (400, 1830),
        [*settings("style", STYLE_LAYERS), StyleGuidance.centred], noisy_clip=m.clip, image=look,
    )  # fmt: skip
    both = graph.add(
        "SDGCombineGuidance", "Combine Guidance (SDG)", (400, 2090), [0.5, 0.25, 1.0, 1.0],
        guidance_1=structure, guidance_2=style,
    )  # fmt: skip
    result(graph, m, 1600, both, 0, "style_and_structure", "3. Layout of the first, style of the second")
    graph.save("style_and_structure")


def text_and_image_example() -> None:
    graph = Graph()
    m = models(graph, "A picture's content, changed by a text: Combine Guidance adds the two up.\n\nChange first: "
                      "weight_1, to stay closer to the picture; weight_2, to follow the text. Guidance Report says "
                      "what each did. Save Preset keeps both, Load Preset brings them back (Ctrl-M: on).")  # fmt: skip
    image = reference(graph, m, 0, "a person with red hair, yellow background", 3, "1. A reference")
    content = graph.add(
        "SDGContentGuidance", "Content Guidance (SDG)", (400, 800), [*settings("content")],
        noisy_clip=m.clip, image=image,
    )  # fmt: skip
    words = text(graph, m, (400, 1000), "a person with blue hair", SHARED)
    both = graph.add(
        "SDGCombineGuidance", "Combine Guidance (SDG)", (400, 1280), [0.5, 1.0, 1.0, 1.0],
        guidance_1=content, guidance_2=words,
    )  # fmt: skip
    graph.add("SDGSavePreset", "Save Preset (SDG)", (0, 800), ["blue_hair"], guidance=both)
    graph.nodes[-1]["mode"] = 2  # muted
    graph.group("Keep it", -20, 720, 380, 420)
    graph.group("2. Its content, with the hair of the text", 380, 720, 1740, 840)
    empty = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (800, 1220), [SIDE, SIDE, 4], vae=m.vae)
    samples = graph.add(
        "SDGGuidedKSampler", "Guided KSampler (SDG)", (800, 800), [0, *SAMPLING, True],
        model=m.adm, latent_image=empty, guidance=both,
    )  # fmt: skip
    told = graph.add("SDGGuidanceReport", "Guidance Report (SDG)", (1160, 910), [], latent=samples)
    decoded = graph.add("VAEDecode", "VAE Decode", (1160, 800), [], samples=told, vae=m.vae)
    shown(graph, decoded, (1500, 800), "text_and_image")
    graph.add("SDGLoadPreset", "Load Preset (SDG)", (0, 980), ["blue_hair.json"], noisy_clip=m.clip)
    graph.nodes[-1]["mode"] = 2  # muted
    graph.save("text_and_image")


def ilvr_example() -> None:
    graph = Graph()
    m = models(graph, "A picture's colours and coarse layout, with detail from a text: ILVR Reference holds the low "
                      "frequencies, Text Guidance moves the rest.\n\nChange first: down_factor; higher leaves more to "
                      "model and text. So does a lower end_percent.")  # fmt: skip
    image = reference(graph, m, 0, "a person with red hair, yellow background", 3, "1. A reference")
    held = graph.add(
        "SDGILVRReference", "ILVR Reference (SDG)", (400, 800), [ILVR_FACTOR, 0.0, 1.0],
        model=m.adm, image=image, vae=m.vae,
    )  # fmt: skip
    words = text(graph, m, (400, 1060), ILVR_PROMPT, SHARED)
    result(graph, replace(m, adm=held), 800, words, 0, "ilvr", "2. Its low frequencies, with what the text adds")
    graph.save("ilvr")


def classifier_example() -> None:
    graph = Graph()
    m = models(graph, "ADM's own guidance, by a classifier of noisy pictures: it pulls towards one of the classes that "
                      "it was trained on.\n\nChange first: class_name. The bundled one knows single attributes: blue "
                      "background, pink hair, glasses, no hat, pixel art. Text Guidance takes any words.")  # fmt: skip
    classifier = graph.add("SDGLoadClassifier", "Load Classifier (SDG)", (400, 0), [CLIP])
    guidance = graph.add(
        "SDGClassifierGuidance", "Classifier Guidance (SDG)", (400, 160), ["green background", *CLASS_SETTINGS],
        classifier=classifier,
    )  # fmt: skip
    result(graph, m, 0, guidance, 0, "classifier", "Sample under a class")
    graph.save("classifier")


def regions_example() -> None:
    graph = Graph()
    m = models(graph, "Two texts, each with its own part of the picture: Guidance Mask bounds what a text reads and "
                      "changes. Each has the other's colour as its negative text; the sampler adds no noise, under "
                      "which the model makes both sides alike again.\n\nChange first: the two texts; then the masks. "
                      "Here they are the two sides of where hair is; draw others with ComfyUI's mask "
                      "editor.")  # fmt: skip
    graph.group("1. Masks", -820, 720, 760, 560)
    black = graph.add("SolidMask", "Solid Mask: nothing", (-800, 800), [0.0, SIDE, SIDE])
    part = graph.add("SolidMask", "Solid Mask: a part", (-800, 960), [1.0, SIDE // 2, round(SIDE * HAIR)])
    sides = [
        graph.add("MaskComposite", name, (-460, y), [x, 0, "add"], destination=black, source=part)
        for name, x, y in (("Left", 0, 800), ("Right", SIDE // 2, 1000))
    ]
    masked = []
    graph.group("2. Texts, each in its mask", -20, 720, 760, 700)
    colours = [f"a person with {colour} hair" for colour in ("blue", "green")]
    for y, words, other, mask in zip((800, 1120), colours, colours[::-1], sides, strict=True):
        guidance = text(graph, m, (0, y), words, REGIONS, LONGER, other)
        masked.append(
            graph.add("SDGGuidanceMask", "Guidance Mask (SDG)", (380, y), [0.0], guidance=guidance, mask=mask)
        )
    both = graph.add(
        "SDGCombineGuidance", "Combine Guidance (SDG)", (780, 800), [1.0, 1.0, 1.0, 1.0],
        guidance_1=masked[0], guidance_2=masked[1],
    )  # fmt: skip
    result(graph, m, 800, both, 4, "regions", "3. Blue hair left, green hair right", STEADY, 760, 1160)
    graph.save("regions")


def edit_example() -> None:
    graph = Graph()
    m = models(graph, "Edits a picture as one text changes into another. Direction Guidance follows the change of "
                      "texts, Structure Guidance keeps the rest, a denoise below 1 starts from the picture.\n\nChange "
                      "first: the two texts; then denoise, higher for more change. Load Image can take the place of "
                      "the first row.")  # fmt: skip
    image = reference(graph, m, 0, "flat cartoon with black hair, yellow background", 3, "1. Before")
    change = graph.add(
        "SDGDirectionGuidance", "Direction Guidance (SDG)", (0, 800),
        ["a person with black hair", "a person with pink hair", DIRECTION, *OTHERS["direction"][1]],
        noisy_clip=m.clip, image=image,
    )  # fmt: skip
    keep = graph.add(
        "SDGStructureGuidance", "Structure Guidance (SDG)", (0, 1160),
        [KEEP, STRUCTURE_LAYERS, *NOISY_INTERVAL["structure"]], noisy_clip=m.clip, image=image,
    )  # fmt: skip
    both = graph.add(
        "SDGCombineGuidance", "Combine Guidance (SDG)", (400, 800), [1.0, 1.0, 1.0, 1.0],
        guidance_1=change, guidance_2=keep,
    )  # fmt: skip
    graph.group("2. The change", -20, 720, 380, 660)
    graph.group("3. After", 380, 720, 2060, 840)
    latent = graph.add("VAEEncode", "VAE Encode", (400, 1120), [], pixels=image, vae=m.vae)
    four = graph.add("RepeatLatentBatch", "Repeat: four of it", (740, 1120), [4], samples=latent)
    widgets = [0, *SAMPLING]
    widgets[6] = DENOISE
    shown(graph, sampled(graph, m, (1120, 800), both, four, widgets), (1820, 800), "edit")
    graph.save("edit")


def references_example() -> None:
    graph = Graph()
    m = models(graph, "Several references for one guidance: Guidance References lets every picture follow the one that "
                      "it fits best. Guidance Target stops at a similarity instead of pulling on, Guidance Budget "
                      "bounds what guidance costs.\n\nChange first: choice, to mean, in turn or one each; then the "
                      "similarity.")  # fmt: skip
    first = reference(graph, m, 0, "flat cartoon with red hair and yellow background", 3, "1. A reference")
    second = reference(graph, m, 800, "toon with green hair and blue background", 5, "2. Another one")
    pair = graph.add("ImageBatch", "Both references", (0, 1600), [], image1=first, image2=second)
    content = graph.add(
        "SDGContentGuidance", "Content Guidance (SDG)", (0, 1760), [*settings("content")],
        noisy_clip=m.clip, image=pair,
    )  # fmt: skip
    several = graph.add(
        "SDGGuidanceReferences", "Guidance References (SDG)", (400, 1600), ["nearest", ""], guidance=content
    )
    target = graph.add("SDGGuidanceTarget", "Guidance Target (SDG)", (780, 1600), [0.6], guidance=several)
    budget = graph.add("SDGGuidanceBudget", "Guidance Budget (SDG)", (1160, 1600), [50.0], guidance=target)
    graph.group("3. Both at once", -20, 1520, 380, 440)
    longer = [*SAMPLING[:1], 50, *SAMPLING[2:]]
    result(graph, m, 1600, budget, 71, "references", "4. Each follows the one it fits best", longer, x=1540)
    graph.save("references")


def clean_clip_example() -> None:
    graph = Graph()
    graph.group("Models", -20, -80, 380, 820)
    note = (
        "Guidance with a CLIP that never saw noise, as you have one for every model: it reads the model's estimate, "
        "decoded. Guidance Augment shows it random crops, so that it is harder to please by patterns nobody sees.\n\n"
        "Change first: crops, fewer to save time, more for a steadier pull; then the scale. A noisy CLIP, made with "
        "Fine-tune Noisy CLIP, does better and costs less."
    )
    graph.add("Note", "About", (0, 530), [note])
    adm = graph.add("SDGLoadADM", "Load ADM (SDG)", (0, 0), [MODEL])
    clip = graph.add("SDGLoadCLIP", "Load CLIP (SDG)", (0, 140), [BUNDLED, "RN50", ""])
    vae = graph.add("SDGLoadAutoencoder", "Load Autoencoder (SDG)", (0, 340), [])
    words = graph.add(
        "SDGTextGuidance", "Text Guidance (SDG)", (400, 0),
        ["a person with green background", CLEAN_SCALE["text"], *CLEAN_INTERVAL["text"]], noisy_clip=clip,
    )  # fmt: skip
    crops = graph.add("SDGGuidanceAugment", "Guidance Augment (SDG)", (400, 270), [4, 0.7, False], guidance=words)
    graph.group("Sample under a text", 380, -80, 1740, 840)
    m = Models(adm, clip, vae)
    latent = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (800, 420), [SIDE, SIDE, 4], vae=vae)
    widgets = [0, *SAMPLING]
    widgets[-1] = "decoded"
    shown(graph, sampled(graph, m, (800, 0), crops, latent, widgets, vae=vae), (1500, 0), "clean_clip")
    graph.save("clean_clip")


def crossfade_example() -> None:
    graph = Graph()
    m = models(graph, "Two encoders in one: the noisy CLIP sets the layout while there is much noise, the clean CLIP "
                      "looks at the decoded picture at the end.\n\nChange first: crossover, the timestep where they "
                      "change over, half and half. 100 leaves little to the clean CLIP, 400 much; -1 asks the "
                      "noisy CLIP's own file.")  # fmt: skip
    clean = graph.add("SDGLoadCLIP", "Load CLIP (SDG)", (400, 0), [BUNDLED, "RN50", ""])
    pair = graph.add("SDGEncoderCrossfade", "Encoder Crossfade (SDG)", (400, 200), [200.0], noisy=m.clip, clean=clean)
    words = text(graph, replace(m, clip=pair), (400, 350), "a person with pink hair and glasses", SHARED)
    graph.group("Sample through both", 380, -80, 1740, 840)
    latent = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (800, 420), [SIDE, SIDE, 4], vae=m.vae)
    image = sampled(graph, m, (800, 0), words, latent, [0, *SAMPLING], vae=m.vae)
    shown(graph, image, (1500, 0), "encoder_crossfade")
    graph.save("encoder_crossfade")


def paper_example() -> None:
    graph = Graph()
    graph.group("Models", -20, -80, 380, 720)
    note = (
        "The paper's own sampler: ancestral steps whose variance the model has learned, the mean shifted by variance "
        "times gradient. No cap, no relative strength.\n\nChange first: the scale of Text Guidance, the paper's 100 to "
        "300; then the steps. Published ADMs of 256 pixels, in models/adm, take 100 steps and more."
    )
    graph.add("Note", "About", (0, 430), [note])
    adm = graph.add("SDGLoadADM", "Load ADM (SDG)", (0, 0), [BUNDLED])
    clip = graph.add("SDGLoadNoisyCLIP", "Load Noisy CLIP (SDG)", (0, 140), [BUNDLED])
    vae = graph.add("VAELoader", "Load VAE: pixel_space", (0, 280), ["pixel_space"])
    graph.group("Sample as the paper does", 380, -80, 1740, 840)
    guidance = graph.add(
        "SDGTextGuidance", "Text Guidance (SDG)", (400, 0),
        ["a person with glasses and blue background", DEFAULT_SCALE["text"], *DEFAULT_INTERVAL["text"]],
        noisy_clip=clip,
    )  # fmt: skip
    method = graph.add("SDGPaperSampler", "Paper Sampler (SDG)", (800, 0), [], guidance=guidance)
    sigmas = graph.add("BasicScheduler", "Steps", (800, 100), ["normal", 100, 1.0], model=adm)
    latent = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (800, 580), [32, 32, 4])
    samples = graph.add(
        "SamplerCustom", "SamplerCustom", (800, 280), [True, 0, "fixed", 1.0],
        model=adm, positive=adm, negative=adm, sampler=method, sigmas=sigmas, latent_image=latent,
    )  # fmt: skip
    image = graph.add("VAEDecode", "VAE Decode", (1160, 0), [], samples=samples, vae=vae)
    widgets = ["nearest-exact", 256, 256, "disabled"]
    large = graph.add("ImageScale", "Enlarge", (1160, 100), widgets, image=image)
    shown(graph, large, (1500, 0), "paper")
    graph.save("paper")


def pixels_example() -> None:
    graph = Graph()
    graph.group("Models", -20, -80, 380, 720)
    note = (
        "The paper's own path: a model that draws pixels, 32 x 32 of them, with a noisy CLIP that reads pixels.\n\n"
        "Change first: the text, then the scale. Pictures are decoded by Load VAE, pixel_space. Published ADMs of 256 "
        "pixels, in models/adm, go the same way."
    )
    graph.add("Note", "About", (0, 430), [note])
    adm = graph.add("SDGLoadADM", "Load ADM (SDG)", (0, 0), [BUNDLED])
    clip = graph.add("SDGLoadNoisyCLIP", "Load Noisy CLIP (SDG)", (0, 140), [BUNDLED])
    vae = graph.add("VAELoader", "Load VAE: pixel_space", (0, 280), ["pixel_space"])
    graph.group("Sample under a text", 380, -80, 1740, 840)
    guidance = graph.add(
        "SDGTextGuidance", "Text Guidance (SDG)", (400, 0),
        ["a person with glasses and blue background", DEFAULT_SCALE["text"], *DEFAULT_INTERVAL["text"]],
        noisy_clip=clip,
    )  # fmt: skip
    latent = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (800, 420), [32, 32, 4])
    widgets = [0, "fixed", 50, 1.0, "euler", "normal", 1.0, "absolute", 1.0]
    samples = graph.add(
        "SDGGuidedKSampler", "Guided KSampler (SDG)", (800, 0), widgets,
        model=adm, latent_image=latent, guidance=guidance,
    )  # fmt: skip
    image = graph.add("VAEDecode", "VAE Decode", (1160, 0), [], samples=samples, vae=vae)
    widgets = ["nearest-exact", 256, 256, "disabled"]
    large = graph.add("ImageScale", "Enlarge", (1160, 100), widgets, image=image)
    shown(graph, large, (1500, 0), "pixels")
    graph.save("pixels")


def finetune_example() -> None:
    graph = Graph()
    graph.group("Models", -20, -80, 380, 960)
    adm = graph.add("SDGLoadADM", "Load ADM (SDG)", (0, 0), [MODEL])
    clip = graph.add("SDGLoadCLIP", "Load CLIP (SDG)", (0, 140), [BUNDLED, "RN50", ""])
    vae = graph.add("SDGLoadAutoencoder", "Load Autoencoder (SDG)", (0, 340), [])
    note = (
        "Teaches a clean CLIP to read noise, on pictures that the diffusion model draws itself, and guides with the "
        "result.\n\nThis is a trial of a minute or two. Change first: folder, to a few thousand pictures of yours, and "
        "steps, to 1,000 or more. Save Noisy CLIP keeps the result; it is switched off here (Ctrl-M switches it on)."
    )
    graph.add("Note", "About", (0, 500), [note])
    graph.group("1. Pictures to learn from", 380, -80, 740, 760)
    empty = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (400, 420), [SIDE, SIDE, 64], vae=vae)
    widgets = [7, "fixed", 10, 1.0, "dpmpp_2m", "karras", 1.0, "absolute", 1.0]
    drawn = graph.add(
        "SDGGuidedKSampler", "Unguided: no guidance connected", (400, 0), widgets, model=adm, latent_image=empty
    )
    images = graph.add("VAEDecode", "VAE Decode", (760, 0), [], samples=drawn, vae=vae)
    graph.group("2. Fine-tune", 1140, -80, 740, 960)
    tuned = graph.add(
        "SDGFinetuneNoisyCLIP", "Fine-tune Noisy CLIP (SDG)", (1160, 0),
        [100, 32, 64, 0.0006, "all", "angle", 0, 0, ""], clip=clip, images=images, model=adm, vae=vae,
    )  # fmt: skip
    graph.add("PreviewImage", "Found again under noise", (1560, 0), [], images=tuned)
    graph.add(
        "SDGSaveNoisyCLIP", "Save Noisy CLIP (SDG)", (1560, 360), ["avatars_trial", "", "", True], noisy_clip=tuned
    )
    graph.nodes[-1]["mode"] = 2  # muted
    graph.group("3. Guide with it", 1900, -80, 1740, 840)
    guidance = graph.add(
        "SDGTextGuidance", "Text Guidance (SDG)", (1920, 0),
        ["a person with blue background", SHARED, *NOISY_INTERVAL["text"], NEGATIVE], noisy_clip=tuned,
    )  # fmt: skip
    four = graph.add("SDGEmptyPixelLatent", "Empty Pixel Latent (SDG)", (2320, 420), [SIDE, SIDE, 4], vae=vae)
    samples = graph.add(
        "SDGGuidedKSampler", "Guided KSampler (SDG)", (2320, 0), [0, *SAMPLING],
        model=adm, latent_image=four, guidance=guidance,
    )  # fmt: skip
    image = graph.add("VAEDecode", "VAE Decode", (2680, 0), [], samples=samples, vae=vae)
    shown(graph, image, (3020, 0), "finetune")
    graph.save("finetune")


def controls_example() -> None:
    graph = Graph()
    note = (
        "Controls take a guidance and give it back with one thing changed.\n\nSchedule: the layout of the reference "
        "counts early, and less and less. Away: no glasses, and no push once there are none. Combine with conflicts on "
        "project: neither undoes the other.\n\nChange first: points of Guidance Schedule, for example 0:1, 0.3:0, "
        "which leaves more to the model."
    )
    m = models(graph, note)
    image = reference(graph, m, 0, "a person with glasses and blue background", 3, "1. A reference")
    structure = graph.add(
        "SDGStructureGuidance", "Structure Guidance (SDG)", (-800, 800), [*settings("structure", STRUCTURE_LAYERS)],
        noisy_clip=m.clip, image=image,
    )  # fmt: skip
    early = graph.add(
        "SDGGuidanceSchedule", "Guidance Schedule (SDG)", (-400, 800), ["ease out", "0:1, 0.7:0", 1], guidance=structure
    )
    words = text(graph, m, (-800, 1060), "a person with glasses", SHARED)
    away = graph.add("SDGGuidanceAway", "Guidance Away (SDG)", (-400, 1060), [0.0], guidance=words)
    both = graph.add(
        "SDGCombineGuidance", "Combine Guidance (SDG)", (400, 800), [1.0, 1.0, 1.0, 1.0, "project", 0.0],
        guidance_1=early, guidance_2=away,
    )  # fmt: skip
    quick = graph.add("SDGGuidanceSpeed", "Guidance Speed (SDG)", (400, 1100), ["balanced"], guidance=both)
    graph.group("2. Guidances and their controls", -820, 720, 1180, 640)
    result(graph, m, 800, quick, 0, "controls", "3. Its layout, without the glasses")
    graph.save("controls")


def xy_example() -> None:
    graph = Graph()
    m = models(graph, "An XY plot: each guidance at each scale, from one seed. Guidance XY gives them one after the "
                      "other, so that one sampler draws all; XY Grid puts them into one picture.\n\nChange first: the "
                      "factors, finer around the best one; then the seed.")  # fmt: skip
    image = reference(graph, m, 0, "a person with red hair, yellow background", 3, "1. A reference")
    words = text(graph, m, (-800, 800), "a person with pink hair")
    content = graph.add(
        "SDGContentGuidance", "Content Guidance (SDG)", (-800, 1080), [*settings("content")],
        noisy_clip=m.clip, image=image,
    )  # fmt: skip
    structure = graph.add(
        "SDGStructureGuidance", "Structure Guidance (SDG)", (-800, 1260), [*settings("structure", STRUCTURE_LAYERS)],
        noisy_clip=m.clip, image=image,
    )  # fmt: skip
    graph.group("2. What to compare", -820, 720, 780, 760)
    plan = graph.add(
        "SDGGuidanceXY", "Guidance XY (SDG)", (-400, 800), ["0, 0.2, 0.5, 1, 2"],
        guidance_1=words, guidance_2=content, guidance_3=structure,
    )  # fmt: skip
    graph.group("3. Every guidance at every factor", 380, 720, 1740, 840)
    image = sampler(graph, m, (800, 800), plan, 1, 0)
    grid = graph.add("SDGXYGrid", "XY Grid (SDG)", (1160, 920), [], images=image, sweep=plan)
    shown(graph, grid, (1500, 800), "xy")
    graph.save("xy")


EXAMPLES = [
    controls_example,
    classifier_example,
    regions_example,
    edit_example,
    references_example,
    clean_clip_example,
    crossfade_example,
    paper_example,
    ilvr_example,
    finetune_example,
    pixels_example,
    text_example,
    content_example,
    style_and_structure_example,
    text_and_image_example,
    xy_example,
]

if __name__ == "__main__":
    for example in EXAMPLES:
        example()
