"""Writes the example workflows for published models: SD 1.5, SDXL, SD 3.5 and Flux.

`python tests/host/make_model_workflows.py`

Files, addresses and settings are those of ComfyUI's own templates, so the frontend offers to download what is missing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from make_workflows import SIZES, SOCKETS, STRUCTURE_LAYERS, Graph

from sdg_core.avatars import RELATIVE_CAP, RELATIVE_INTERVAL
from sdg_core.method import DEFAULT_SCALE, StyleGuidance

DOWNLOAD = "download by tag"
GUIDED = (
    [("model", "MODEL"), ("latent_image", "LATENT"), ("guidance", "SDG_GUIDANCE"), ("positive", "CONDITIONING"),
     ("negative", "CONDITIONING"), ("vae", "VAE")],
    [("LATENT", "LATENT")],
)  # fmt: skip
CORE: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "CheckpointLoaderSimple": ([], [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE")]),
    "UNETLoader": ([], [("MODEL", "MODEL")]),
    "DualCLIPLoader": ([], [("CLIP", "CLIP")]),
    "SDGLoadCLIP": ([], [("NOISY_CLIP", "NOISY_CLIP")]),
    "CLIPTextEncode": ([("clip", "CLIP")], [("CONDITIONING", "CONDITIONING")]),
    "FluxGuidance": ([("conditioning", "CONDITIONING")], [("CONDITIONING", "CONDITIONING")]),
    "ConditioningZeroOut": ([("conditioning", "CONDITIONING")], [("CONDITIONING", "CONDITIONING")]),
    "EmptyLatentImage": ([], [("LATENT", "LATENT")]),
    "EmptySD3LatentImage": ([], [("LATENT", "LATENT")]),
    "LoadImage": ([], [("IMAGE", "IMAGE"), ("MASK", "MASK")]),
    "SDGApplyGuidance": ([("model", "MODEL"), ("guidance", "SDG_GUIDANCE"), ("vae", "VAE")], [("MODEL", "MODEL")]),
    "SDGGuidedKSampler": GUIDED,
    "KSampler": (
        [("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent_image", "LATENT")],
        [("LATENT", "LATENT")],
    ),
    "CLIPLoader": ([], [("CLIP", "CLIP")]),
    "ModelSamplingSD3": ([("model", "MODEL")], [("MODEL", "MODEL")]),
    "EmptyHunyuanLatentVideo": ([], [("LATENT", "LATENT")]),
    "SDGGuidanceFrames": ([("guidance", "SDG_GUIDANCE")], [("GUIDANCE", "SDG_GUIDANCE")]),
    "SaveAnimatedWEBP": ([("images", "IMAGE")], []),
    "MarkdownNote": ([], []),
}
CORE_SIZES = {
    "CheckpointLoaderSimple": (380, 126), "UNETLoader": (380, 86), "DualCLIPLoader": (380, 142),
    "VAELoader": (380, 86), "SDGLoadCLIP": (380, 150), "CLIPTextEncode": (380, 160), "FluxGuidance": (380, 62),
    "ConditioningZeroOut": (380, 34), "LoadImage": (380, 330), "SDGTextGuidance": (380, 210),
    "SDGContentGuidance": (380, 180), "SDGStructureGuidance": (380, 200), "SDGStyleGuidance": (380, 230),
    "SDGCombineGuidance": (380, 230), "SDGApplyGuidance": (320, 340), "KSampler": (320, 270),
    "SDGGuidedKSampler": (320, 580), "EmptyLatentImage": (320, 118), "EmptySD3LatentImage": (320, 118),
    "VAEDecode": (320, 60), "SaveImage": (700, 830), "CLIPLoader": (380, 110), "ModelSamplingSD3": (320, 60),
    "EmptyHunyuanLatentVideo": (320, 140), "SDGGuidanceFrames": (380, 90), "SaveAnimatedWEBP": (700, 830),
}  # fmt: skip
"""Heights that both renderers of the frontend keep; its newer one (Nodes 2.0) draws taller widgets."""

VIT_STYLE_LAYERS = "2"
"""A quarter into a ViT. Its Gram matrices carry style there (FreeDoM, Yu et al. 2023, uses block 3 of ViT-B-16)."""


@dataclass(frozen=True)
class File:
    """A published file: the loader's ``properties.models``, from which the frontend offers the download."""

    name: str
    url: str
    directory: str

    @classmethod
    def at(cls, url: str, directory: str) -> File:
        return cls(url.split("/")[-1].split("?")[0], url, directory)

    def line(self) -> str:
        return f"- [{self.name}]({self.url}) in models/{self.directory}"


HUB = "https://huggingface.co"
SD15 = File.at(
    f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors?download=true",
    "checkpoints",
)
SDXL = File.at(
    f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors?download=true",
    "checkpoints",
)
SD35 = File.at(
    f"{HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/sd3.5_large_fp8_scaled.safetensors?download=true",
    "checkpoints",
)
FLUX = File.at(f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors", "diffusion_models")
CLIP_L = File.at(f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors", "text_encoders")
T5 = File.at(f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors", "text_encoders")
FLUX_VAE = File.at(f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors", "vae")
WAN_FILES = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN = File.at(f"{WAN_FILES}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors?download=true", "diffusion_models")
UMT5 = File.at(f"{WAN_FILES}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors?download=true", "text_encoders")
WAN_VAE = File.at(f"{WAN_FILES}/vae/wan_2.1_vae.safetensors?download=true", "vae")


@dataclass(frozen=True)
class CLIP:
    """A CLIP of open_clip, by architecture and tag."""

    architecture: str
    tag: str

    def line(self) -> str:
        return (
            f"- CLIP {self.architecture} by LAION ({self.tag}): *Load CLIP (SDG)* fetches it into models/open_clip "
            "at the first run"
        )


VIT_B_32 = CLIP("ViT-B-32", "laion2b_s34b_b79k")
VIT_B_16 = CLIP("ViT-B-16", "laion2b_s34b_b88k")  # a grid of 14 x 14 where ViT-B-32 has 7 x 7: finer maps


@dataclass
class ModelGraph(Graph):
    """A workflow around published models: three columns of groups, Models, then Prompt over Guidance, then Sample.

    ``bottom``: where Models and Guidance end.
    """

    sockets = SOCKETS | CORE
    sizes = SIZES | CORE_SIZES

    bottom: int = 980

    def load(self, kind: str, title: str, at: tuple[int, int], widgets: list, *files: File) -> int:
        number = self.add(kind, title, at, widgets)
        self.nodes[number - 1]["properties"]["models"] = [asdict(file) for file in files]
        return number

    def note(self, title: str, at: tuple[int, int], size: tuple[int, int], text: str) -> None:
        number = self.add("MarkdownNote", title, at, [text])
        self.nodes[number - 1]["size"] = list(size)


@dataclass(frozen=True)
class Models:
    """The nodes that give MODEL, CLIP and VAE, and the encoder of guidance."""

    model: int
    clip: int
    vae: int
    encoder: int


@dataclass(frozen=True)
class Prompts:
    """The nodes that give positive and negative."""

    positive: int
    negative: int


@dataclass(frozen=True)
class Run:
    """Widgets of a sampler, and the latent to start from."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str
    latent: str
    side: int

    def widgets(self) -> list:
        return [0, "fixed", self.steps, self.cfg, self.sampler, self.scheduler, 1.0]


STRENGTH = ["relative", RELATIVE_CAP]
"""strength and cap of the nodes that apply guidance: relative to a model's own step, also where nobody measured it."""


def settings(kind: str, *layers: str) -> list:
    """Widget values of a guidance node: its scale, layers if it has them, and the interval of relative strength."""
    return [DEFAULT_SCALE[kind], *layers, *RELATIVE_INTERVAL[kind]]


# Models


def encoder(graph: ModelGraph, clip: CLIP, y: int) -> int:
    return graph.add("SDGLoadCLIP", "Load CLIP (SDG)", (0, y), [DOWNLOAD, clip.architecture, clip.tag])


def checkpoint(graph: ModelGraph, name: str, file: File, clip: CLIP, about: str) -> Models:
    """The Models group around a checkpoint that holds MODEL, CLIP and VAE."""
    graph.group("Models", -20, -80, 420, graph.bottom + 80)
    number = graph.load("CheckpointLoaderSimple", f"Load Checkpoint: {name}", (0, 0), [file.name], file)
    found = Models(number, number, number, encoder(graph, clip, 200))
    graph.note("About", (0, 410), (380, 250), about + "\n\n## Models\n\n" + "\n".join([file.line(), clip.line()]))
    return found


def flux_dev(graph: ModelGraph, clip: CLIP, about: str) -> Models:
    """The Models group around Flux.1 dev, which comes in parts."""
    graph.group("Models", -20, -80, 420, graph.bottom + 80)
    model = graph.load("UNETLoader", "Load Diffusion Model: Flux.1 dev", (0, 0), [FLUX.name, "default"], FLUX)
    words = [CLIP_L.name, T5.name, "flux", "default"]
    text = graph.load("DualCLIPLoader", "Load its text encoders", (0, 160), words, CLIP_L, T5)
    vae = graph.load("VAELoader", "Load its VAE", (0, 370), [FLUX_VAE.name], FLUX_VAE)
    found = Models(model, text, vae, encoder(graph, clip, 530))
    lines = [file.line() for file in (FLUX, CLIP_L, T5, FLUX_VAE)] + [clip.line()]
    graph.note("About", (0, 740), (380, 300), about + "\n\n## Models\n\n" + "\n".join(lines))
    return found


def wan(graph: ModelGraph, clip: CLIP, about: str) -> Models:
    """The Models group around Wan 2.1, a video model, which comes in parts."""
    graph.group("Models", -20, -80, 420, graph.bottom + 80)
    net = graph.load("UNETLoader", "Load Diffusion Model: Wan 2.1", (0, 0), [WAN.name, "default"], WAN)
    text = graph.load("CLIPLoader", "Load its text encoder", (0, 160), [UMT5.name, "wan", "default"], UMT5)
    vae = graph.load("VAELoader", "Load its VAE", (0, 340), [WAN_VAE.name], WAN_VAE)
    shifted = graph.add("ModelSamplingSD3", "Shift", (0, 720), [8.0], model=net)
    found = Models(shifted, text, vae, encoder(graph, clip, 500))
    lines = [file.line() for file in (WAN, UMT5, WAN_VAE)] + [clip.line()]
    graph.note("About", (0, 850), (380, 330), about + "\n\n## Models\n\n" + "\n".join(lines))
    return found


# Prompt


def prompts(graph: ModelGraph, models: Models, positive: str, negative: str) -> Prompts:
    graph.group("Prompt", 420, -80, 820, 280)
    return Prompts(
        graph.add("CLIPTextEncode", "Positive prompt", (440, 0), [positive], clip=models.clip),
        graph.add("CLIPTextEncode", "Negative prompt", (840, 0), [negative], clip=models.clip),
    )


def flux_prompts(graph: ModelGraph, models: Models, positive: str) -> Prompts:
    """Flux.1 dev takes its own guidance as a number, and no negative prompt."""
    graph.group("Prompt", 420, -80, 820, 280)
    text = graph.add("CLIPTextEncode", "Positive prompt", (440, 0), [positive], clip=models.clip)
    return Prompts(
        graph.add("FluxGuidance", "Flux Guidance", (840, 0), [3.5], conditioning=text),
        graph.add("ConditioningZeroOut", "No negative prompt", (840, 120), [], conditioning=text),
    )


# Guidance


def reference(graph: ModelGraph, advice: str) -> int:
    """The Guidance group with its reference picture; guidance nodes go into its right half, from y = 300."""
    graph.group("Guidance", 420, 220, 820, graph.bottom - 220)
    image = graph.add("LoadImage", "Load Image: reference", (440, 300), ["example.png", "image"])
    graph.note("How strong?", (440, 690), (380, 270), HOW_STRONG + "\n\n" + advice)
    return image


HOW_STRONG = (
    "**strength** is *relative*: every step shifts by **cap** times the model's own step, the same part on "
    "every model. Keep the seed, change the cap.\n\n"
    "- Too little, of a style above all: 0.5.\n"
    "- Colours burn, detail tears: 0.1, or let the guidance end at 0.6.\n"
    "- The **scale** only shares the shift out between guidances; its sign says towards or away.\n\n"
    "The cap was measured on the small latent models of this pack (eps, v, flow), not on this one."
)
LINEAR = (
    "**view** is *auto*: CLIP looks at the latent's own colours, which costs little. Connect the VAE to **vae**, and "
    "it looks at the decoded picture: sharper, slower, more memory."
)
DECODED = (
    "**view** is *decoded*: CLIP looks at what the VAE decodes. That is the sharpest, and takes the most time and "
    "memory. Disconnect **vae** to use the TAESD in models/vae_approx, or choose *linear*, which costs little."
)


# Sample


def latent(graph: ModelGraph, run: Run) -> int:
    graph.group("Sample", 1260, -80, 1100, 930)
    return graph.add(run.latent, "Empty latent", (1280, 0), [run.side, run.side, 1])


def apply_and_sample(graph: ModelGraph, models: Models, prompts: Prompts, guidance: int, run: Run) -> int:
    """Apply Guidance in front of the host's KSampler; gives the samples."""
    start = latent(graph, run)
    guided = graph.add(
        "SDGApplyGuidance", "Apply Guidance (SDG)", (1280, 170), [*STRENGTH, "auto"],
        model=models.model, guidance=guidance,
    )  # fmt: skip
    return graph.add(
        "KSampler", "KSampler", (1280, 420), run.widgets(),
        model=guided, positive=prompts.positive, negative=prompts.negative, latent_image=start,
    )  # fmt: skip


def sample_guided(
    graph: ModelGraph, models: Models, prompts: Prompts, guidance: int, run: Run, view: str = "auto"
) -> int:
    """Guided KSampler, with the VAE connected for the view "decoded"; gives the samples."""
    start = latent(graph, run)
    vae = {"vae": models.vae} if view == "decoded" else {}
    return graph.add(
        "SDGGuidedKSampler", "Guided KSampler (SDG)", (1280, 170), [*run.widgets(), *STRENGTH, view],
        model=models.model, latent_image=start, guidance=guidance, positive=prompts.positive,
        negative=prompts.negative, **vae,
    )  # fmt: skip


def saved(graph: ModelGraph, models: Models, samples: int, name: str) -> None:
    image = graph.add("VAEDecode", "VAE Decode", (1280, 750), [], samples=samples, vae=models.vae)
    graph.add("SaveImage", "Save Image", (1640, 0), [f"SDG/{name}"], images=image)
    graph.save(name)


# The examples


def sd15_text_and_style() -> None:
    graph = ModelGraph(bottom=1130)
    m = checkpoint(
        graph, "SD 1.5", SD15, VIT_B_16,
        "A text and a picture's style at once, on top of Stable Diffusion 1.5's own prompt.\n\n"
        "*Combine Guidance* adds the two up.\n\nChange first: the text and the picture in *Load Image*; then the two "
        "weights, which say what pulls more.",
    )  # fmt: skip
    words = prompts(graph, m, "a cottage by a lake, mountains behind, evening light", "text, watermark, blurry")
    image = reference(graph, DECODED)
    text = graph.add(
        "SDGTextGuidance", "Text Guidance (SDG)", (840, 300), ["a snowy winter landscape", *settings("text")],
        noisy_clip=m.encoder,
    )  # fmt: skip
    style = graph.add(
        "SDGStyleGuidance", "Style Guidance (SDG)", (840, 580),
        [*settings("style", VIT_STYLE_LAYERS), StyleGuidance.centred], noisy_clip=m.encoder, image=image,
    )  # fmt: skip
    both = graph.add(
        "SDGCombineGuidance", "Combine Guidance (SDG)", (840, 880), [1.0, 1.0, 1.0, 1.0],
        guidance_1=text, guidance_2=style,
    )  # fmt: skip
    run = Run(30, 7.0, "euler", "normal", "EmptyLatentImage", 512)
    saved(graph, m, sample_guided(graph, m, words, both, run, "decoded"), "sd15_text_and_style")


def sdxl_style() -> None:
    graph = ModelGraph()
    m = checkpoint(
        graph, "SDXL", SDXL, VIT_B_16,
        "The style of a picture, on whatever SDXL's own prompt says.\n\n"
        "Strokes, texture and palette come along; what the picture shows does not.\n\nChange first: the picture in "
        "*Load Image*; then cap of *Apply Guidance*.",
    )  # fmt: skip
    words = prompts(graph, m, "a fox in an autumn forest, morning mist", "text, watermark")
    style = graph.add(
        "SDGStyleGuidance", "Style Guidance (SDG)", (840, 300),
        [*settings("style", VIT_STYLE_LAYERS), StyleGuidance.centred],
        noisy_clip=m.encoder, image=reference(graph, LINEAR),
    )  # fmt: skip
    run = Run(30, 7.0, "euler", "normal", "EmptyLatentImage", 1024)
    saved(graph, m, apply_and_sample(graph, m, words, style, run), "sdxl_style")


def sd3_content() -> None:
    graph = ModelGraph()
    m = checkpoint(
        graph, "SD 3.5 Large", SD35, VIT_B_32,
        "Variations on a picture with Stable Diffusion 3.5 Large.\n\n"
        "*Content Guidance* follows what the picture shows; pose and layout stay free, so every seed gives another "
        "one. The prompt may stay general.\n\nChange first: the picture in *Load Image*; then the seed.",
    )  # fmt: skip
    words = prompts(graph, m, "a detailed illustration", "")
    content = graph.add(
        "SDGContentGuidance", "Content Guidance (SDG)", (840, 300), [*settings("content")],
        noisy_clip=m.encoder, image=reference(graph, LINEAR),
    )  # fmt: skip
    run = Run(28, 4.0, "euler", "sgm_uniform", "EmptySD3LatentImage", 1024)
    saved(graph, m, sample_guided(graph, m, words, content, run), "sd3_content")


def flux_structure() -> None:
    graph = ModelGraph(bottom=1060)
    m = flux_dev(
        graph, VIT_B_16,
        "The layout of a picture, drawn anew by Flux.1 dev from its own prompt: things stay in their places.\n\n"
        "Change first: the picture in *Load Image* and the prompt; then cap of *Apply Guidance*.",
    )  # fmt: skip
    words = flux_prompts(graph, m, "a marble statue in a museum hall, soft daylight")
    structure = graph.add(
        "SDGStructureGuidance", "Structure Guidance (SDG)", (840, 300), [*settings("structure", STRUCTURE_LAYERS)],
        noisy_clip=m.encoder, image=reference(graph, LINEAR),
    )  # fmt: skip
    run = Run(20, 1.0, "euler", "simple", "EmptySD3LatentImage", 1024)
    saved(graph, m, apply_and_sample(graph, m, words, structure, run), "flux_structure")


def wan_frames() -> None:
    graph = ModelGraph(bottom=1200)
    m = wan(
        graph, VIT_B_32,
        "Another text for the beginning of a video than for its end, with Wan 2.1.\n\n*Guidance Frames* lets a "
        "guidance act on some frames only. They are latent frames: 33 frames of video are 9, counted from 0.\n\n"
        "Change first: the two texts; then their frames.",
    )  # fmt: skip
    words = prompts(graph, m, "a fox walking through a forest, camera follows", "static, blurry, watermark")
    graph.group("Guidance", 420, 220, 820, graph.bottom - 220)
    parts = []
    for x, season, frames in ((440, "green summer forest", "0-3"), (840, "forest in deep snow", "5-8")):
        text = graph.add(
            "SDGTextGuidance", "Text Guidance (SDG)", (x, 300), [f"a {season}", *settings("text")], noisy_clip=m.encoder
        )
        parts.append(graph.add("SDGGuidanceFrames", "Guidance Frames (SDG)", (x, 560), [frames], guidance=text))
    both = graph.add(
        "SDGCombineGuidance", "Combine Guidance (SDG)", (840, 700), [1.0, 1.0, 1.0, 1.0],
        guidance_1=parts[0], guidance_2=parts[1],
    )  # fmt: skip
    graph.note("How strong?", (440, 700), (380, 360), HOW_STRONG + "\n\n" + LINEAR)
    graph.group("Sample", 1260, -80, 1100, 930)
    empty = graph.add("EmptyHunyuanLatentVideo", "Empty video latent", (1280, 0), [832, 480, 33, 1])
    run = Run(30, 6.0, "uni_pc", "simple", "EmptyHunyuanLatentVideo", 832)
    samples = graph.add(
        "SDGGuidedKSampler", "Guided KSampler (SDG)", (1280, 190), [*run.widgets(), *STRENGTH, "auto"],
        model=m.model, latent_image=empty, guidance=both, positive=words.positive, negative=words.negative,
    )  # fmt: skip
    images = graph.add("VAEDecode", "VAE Decode", (1280, 640), [], samples=samples, vae=m.vae)
    widgets = ["SDG/wan_frames", 16.0, False, 90, "default"]
    graph.add("SaveAnimatedWEBP", "Save the video", (1640, 0), widgets, images=images)
    graph.save("wan_frames")


EXAMPLES = [wan_frames, sd15_text_and_style, sdxl_style, sd3_content, flux_structure]

if __name__ == "__main__":
    for example in EXAMPLES:
        example()
