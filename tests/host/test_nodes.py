"""What the nodes say: their schemas, their help, and their errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
IDS = {
    "SDGLoadNoisyCLIP", "SDGLoadADM", "SDGEmptyPixelLatent", "SDGTextGuidance", "SDGContentGuidance",
    "SDGStructureGuidance", "SDGStyleGuidance", "SDGCombineGuidance", "SDGGuidedKSampler", "SDGApplyGuidance",
    "SDGPaperSampler", "SDGLoadCLIP", "SDGEncoderCrossfade", "SDGLoadAutoencoder", "SDGGuidanceFrames",
    "SDGFinetuneNoisyCLIP", "SDGSaveNoisyCLIP", "SDGGuidanceSchedule", "SDGGuidanceSpeed",
    "SDGGuidanceMask",
    "SDGGuidanceTarget", "SDGGuidanceAway", "SDGDirectionGuidance", "SDGGuidanceReferences",
    "SDGGuidanceAugment", "SDGGuidanceBudget",
    "SDGLoadClassifier", "SDGClassifierGuidance",
    "SDGILVRReference",
    "SDGGuidanceReport",
    "SDGGuidanceXY", "SDGXYGrid",
    "SDGSavePreset", "SDGLoadPreset",
}  # fmt: skip


def test_node_ids_are_the_ones_workflows_use(pack):
    assert set(pack.nodes) == IDS


@pytest.mark.parametrize("node_id", sorted(IDS))
def test_every_node_explains_itself(pack, node_id):
    schema = pack.nodes[node_id].GET_SCHEMA()
    assert schema.description
    assert schema.display_name.endswith("(SDG)")
    assert schema.category in ("SDG/loaders", "SDG/guidance", "SDG/sampling", "SDG/training")
    assert (ROOT / f"web/docs/{node_id}.md").read_text().startswith("# ")
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip, part.id
    assert not [part.tooltip for part in (*schema.inputs, *schema.outputs) if len(part.tooltip.split()) > 25]


def test_guided_ksampler_has_ksamplers_inputs_with_their_defaults(comfy, pack):
    host = comfy.nodes.KSampler.INPUT_TYPES()["required"]
    ours = {part.id: part for part in pack.nodes["SDGGuidedKSampler"].GET_SCHEMA().inputs}
    for name, (kind, *options) in host.items():
        assert name in ours
        if options and "default" in options[0] and kind in ("INT", "FLOAT"):
            mine = ours[name].as_dict()
            assert {k: mine[k] for k in ("default", "min", "max")} == {
                k: options[0][k] for k in ("default", "min", "max")
            }


def wrong(run, message, node_id, **inputs):
    with pytest.raises(ValueError, match=message):
        run(node_id, **inputs)


def test_wrong_guidance_inputs_are_explained(run, noisy_clip):
    image = torch.rand(1, 16, 16, 3)
    text = {"noisy_clip": noisy_clip, "scale": 1.0, **WHOLE}
    wrong(run, "empty text", "SDGTextGuidance", **text, text="  \n")
    wrong(run, "start below end", "SDGTextGuidance", **text | {"start_percent": 0.5, "end_percent": 0.5}, text="a")
    wrong(run, "alpha channel", "SDGContentGuidance", **text, image=torch.rand(1, 16, 16, 4))
    wrong(run, r"batch, height, width, 3", "SDGContentGuidance", **text, image=torch.rand(16, 16, 3))
    wrong(run, r"batch, height, width, 3", "SDGContentGuidance", **text, image=torch.rand(1, 3, 16, 16))
    wrong(run, "separated by commas", "SDGStructureGuidance", **text, image=image, layers="deep")
    wrong(run, "separated by commas", "SDGStructureGuidance", **text, image=image, layers=" , ")
    wrong(run, r"one or more of 1..5", "SDGStyleGuidance", **text, image=image, layers="4,6", centred=True)
    wrong(run, "at least one", "SDGCombineGuidance")


def test_images_become_references_once(pack):
    image = torch.tensor([0.0, 0.5, 1.0]).expand(1, 4, 5, 3)
    out = pack.inputs.to_references(image)
    assert out.shape == (1, 3, 4, 5)
    assert out[0, :, 0, 0].tolist() == [-1, 0, 1]


def test_wrong_files_are_explained(run, models_folder, tmp_path_factory):
    (models_folder / "adm/noise.safetensors").write_bytes(b"not a file")
    (models_folder / "adm/clip.safetensors").write_bytes((models_folder / "noisy_clip/random.safetensors").read_bytes())
    torch.save({"a": torch.zeros(1)}, models_folder / "adm/other.pt")
    wrong(run, "no file gone", "SDGLoadADM", adm_name="gone.safetensors")
    wrong(run, "not a readable safetensors", "SDGLoadADM", adm_name="noise.safetensors")
    wrong(run, "noisy CLIP; wanted", "SDGLoadADM", adm_name="clip.safetensors")
    wrong(run, "Not a guided-diffusion checkpoint", "SDGLoadADM", adm_name="other.pt")


def test_missing_bundled_weights_are_explained(run, pack, monkeypatch, tmp_path):
    monkeypatch.setattr(pack.files, "BUNDLED", tmp_path)
    name = pack.host.BUNDLED_NAME
    wrong(run, r"bundled model avatars \(bundled\) is missing.* with its repository only", "SDGLoadADM", adm_name=name)
    wrong(run, "install this node pack again", "SDGLoadCLIP", clip_name=name, architecture="RN50", pretrained="")
    wrong(run, "install this node pack again", "SDGLoadADM", adm_name="avatars latent eps (bundled)")
    wrong(run, "autoencoder.safetensors .* Install this node pack again", "SDGLoadAutoencoder")


def test_loaders_notice_a_changed_file(pack, models_folder):
    import os

    node, path = pack.nodes["SDGLoadADM"], models_folder / "adm/random.safetensors"
    before = node.fingerprint_inputs(adm_name="random.safetensors")
    assert node.fingerprint_inputs(adm_name="random.safetensors") == before
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert node.fingerprint_inputs(adm_name="random.safetensors") != before


def sampled(run, model, guidance, latent, **changes):
    inputs = {
        "seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
    }  # fmt: skip
    return run(
        "SDGGuidedKSampler", model=model, guidance=guidance, latent_image={"samples": latent}, **(inputs | changes)
    )


@pytest.fixture(scope="module")
def text(run, noisy_clip):
    return run("SDGTextGuidance", noisy_clip=noisy_clip, text="a", scale=9.0, **WHOLE)


def test_every_line_of_a_text_is_a_text_by_itself(run, adm, noisy_clip):
    texts = {"noisy_clip": noisy_clip, "scale": 9.0, "negative": "a", **WHOLE}
    lines = run("SDGTextGuidance", text=" a red hat\n\n  on a table ", **texts)
    parts = [run("SDGTextGuidance", text=text, **texts) for text in ("a red hat", "on a table")]
    both = run("SDGCombineGuidance", guidance_1=parts[0], guidance_2=parts[1])
    latent = torch.zeros(1, 3, 16, 16)
    first, second, one = (sampled(run, adm, g, latent)["samples"] for g in (lines, both, parts[0]))
    assert [term.guidance.texts for term in lines.terms] == [("a red hat",), ("on a table",)]
    assert torch.equal(first, second)
    assert not torch.equal(first, one)
    wrong(run, "Got a text of 33 lines; wanted 32 at most", "SDGTextGuidance", text="a\n" * 33, **texts)


def test_loaders_give_encoders_in_bf16_that_guide(pack, run, adm):
    """By how much their gradient turns is the core's to say: a model of random weights magnifies any difference."""
    loaders = {
        "SDGLoadNoisyCLIP": {"noisy_clip_name": "random.safetensors"},
        "SDGLoadCLIP": {"clip_name": pack.host.BUNDLED_NAME, "architecture": "RN50", "pretrained": ""},
    }
    for node, inputs in loaders.items():
        pictures = {}
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            encoder = run(node, precision=precision, **inputs)
            assert {p.dtype for p in encoder.model.tower.parameters()} == {dtype}
            pictures[precision], moved = guided(run, adm, "SDGTextGuidance", noisy_clip=encoder, text="a red hat")
            assert moved > 0.01
        assert bool(pictures["bf16"].isfinite().all())
        assert not torch.equal(pictures["bf16"], pictures["fp32"])
        wrong(run, "Got the precision 'fp8'; wanted one of: fp32, bf16", node, precision="fp8", **inputs)


@pytest.fixture
def other_model(comfy, adm):
    """The ADM passed off as a model with another latent format or another kind of sampling."""

    def build(kind=None, **latent):
        model = adm.clone()
        latent = type("Latent", (type(adm.model.latent_format),), latent)()
        model.add_object_patch("latent_format", latent)
        if kind:
            sampling = type(
                "Sampling", (comfy.model_sampling.ModelSamplingDiscreteFlow, getattr(comfy.model_sampling, kind)), {}
            )
            model.add_object_patch("model_sampling", sampling())
        return model

    return build


def test_models_that_cannot_be_guided_are_refused(run, adm, other_model, text):
    latent = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="without noise"):
        sampled(run, other_model(kind="IMG_TO_IMG"), text, latent)
    with pytest.raises(ValueError, match="sound or solid shapes"):
        sampled(run, other_model(latent_dimensions=1), text, latent)
    wrong(run, "cap is 0", "SDGApplyGuidance", model=adm, guidance=text, strength="relative", cap=0.0)


def test_sizes_and_shapes_that_do_not_fit_are_refused(run, adm, text):
    with pytest.raises(ValueError, match="multiples of 4"):
        sampled(run, adm, None, torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
        sampled(run, adm, None, torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
        sampled(run, adm, None, torch.ones(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"shape \(1, 3, 256\).* audio alone"):
        sampled(run, adm, text, torch.zeros(1, 3, 256))


@pytest.fixture
def published_name(pack, models_folder, monkeypatch):
    """The name of a published checkpoint in models/noisy_clip: its layout, but a small model instead of RN50x16."""
    published, path = pack.published, models_folder / "noisy_clip/published.pt"
    encoder = pack.encoders.load_noisy_clip(models_folder / "noisy_clip/random.safetensors")
    monkeypatch.setattr(published, "config", lambda: encoder.config)
    state = {name: value for name, value in encoder.state_dict().items() if not name.startswith("text.")}
    torch.save({published.published_name(name): value for name, value in state.items()}, path)
    yield path.name
    path.unlink()


def guided(run, adm, node_id, **inputs):
    """The picture that a guidance gives, and how far it moved it."""
    guidance = run(node_id, scale=1.0, **inputs, **WHOLE)
    latent = torch.zeros(1, 3, 16, 16)
    picture, plain = (sampled(run, adm, terms, latent, strength="relative")["samples"] for terms in (guidance, None))
    return picture, float((picture - plain).abs().mean())


def test_a_published_checkpoint_guides_by_image_as_the_same_weights_of_ours_do(
    pack, run, adm, noisy_clip, published_name
):
    assert published_name in pack.host.model_names("noisy_clip")
    encoder, image = run("SDGLoadNoisyCLIP", noisy_clip_name=published_name), torch.rand(1, 16, 16, 3)
    picture, moved = guided(run, adm, "SDGContentGuidance", noisy_clip=encoder, image=image)
    assert moved > 0.01
    assert torch.equal(picture, guided(run, adm, "SDGContentGuidance", noisy_clip=noisy_clip, image=image)[0])


def test_a_published_checkpoint_says_where_text_comes_from(run, published_name):
    encoder = run("SDGLoadNoisyCLIP", noisy_clip_name=published_name)
    wrong(run, "Load CLIP to text_from", "SDGTextGuidance", noisy_clip=encoder, text="a", scale=1.0, **WHOLE)


def test_text_comes_from_another_loader_that_keeps_its_own(pack, run, adm, published_name):
    core, config = pack.encoders, pack.published.config().clip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip = core.CleanCLIP(core.build_clip(config), 32, build=config).requires_grad_(False).eval()
    lender, said = pack.memory.patch_module(clip), clip.encode_text(["a"])
    encoders = [run("SDGLoadNoisyCLIP", noisy_clip_name=published_name, text_from=lender) for _ in range(2)]
    assert guided(run, adm, "SDGTextGuidance", noisy_clip=encoders[0], text="a")[1] > 0.01
    for encoder in (lender, *encoders):
        assert torch.equal(encoder.model.encode_text(["a"]), said)
    assert clip.text is lender.model.text
    assert encoders[0].model.text is not clip.text
    pair = run("SDGEncoderCrossfade", noisy=encoders[0], clean=lender, crossover=-1.0)
    wrong(run, "text_from is a crossfade", "SDGLoadNoisyCLIP", noisy_clip_name=published_name, text_from=pair)


def test_a_clip_of_another_width_lends_no_text_tower(run, clean_clip, published_name):
    wrong(run, r"noisy CLIP 32, so", "SDGLoadNoisyCLIP", noisy_clip_name=published_name, text_from=clean_clip)


def test_conditional_models_want_their_prompts(comfy, pack, adm):
    class Conditional:
        model = object()

    with pytest.raises(ValueError, match="negative is not connected"):
        pack.host.conditioning(Conditional(), BLANK, None, 4.0)
    assert pack.host.conditioning(adm, None, None, 4.0).cfg == 1.0


def test_paper_sampler_refuses_flow_models(comfy, run, other_model):
    sampler = run("SDGPaperSampler", guidance=None)
    latent = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="flow model"), torch.inference_mode():
        comfy.sample.sample_custom(
            other_model(kind="CONST"), latent, 1.0, sampler, torch.tensor([0.9, 0.5, 0.0]), BLANK, BLANK, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip


def test_pixel_latent_decodes_to_itself(comfy, run):
    """The host's pixel_space VAE is all that is needed to see a pixel latent."""
    vae = comfy.nodes.VAELoader().load_vae("pixel_space")[0]
    latent = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.inference_mode():
        image = vae.decode(latent)
    assert image.shape == (2, 16, 24, 3)
    assert torch.allclose(image.movedim(-1, 1) * 2 - 1, latent, atol=1e-5)


def test_empty_pixel_latent_has_one_cell_for_each_pixel(run):
    latent = run("SDGEmptyPixelLatent", width=48, height=32, batch_size=3)
    assert latent["samples"].shape == (3, 3, 32, 48)


def test_empty_latent_has_the_cells_of_its_vae(run, vae_of):
    """What Load Autoencoder gives, and the host's own kind with a tuple of ratios."""
    for ratio in (4, (8, 8)):
        latent = run("SDGEmptyPixelLatent", width=48, height=32, batch_size=2, vae=vae_of(5, ratio))
        cells = ratio if isinstance(ratio, int) else ratio[-1]
        assert latent["samples"].shape == (2, 5, 32 // cells, 48 // cells)
        assert latent["downscale_ratio_spacial"] == cells


@pytest.fixture
def vae_of(comfy):
    """A VAE of the host with channels and a ratio."""

    def make(channels, ratio):
        vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
        vae.latent_channels, vae.downscale_ratio = channels, ratio
        return vae

    return make


def test_core_is_free_of_the_host():
    banned = ("comfy", "folder_paths", "nodes")
    for path in (ROOT / "sdg_core").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            assert not (words[:1] in (["import"], ["from"]) and words[1].split(".")[0] in banned), (path.name, line)


def test_examples_are_json():
    for path in (ROOT / "example_workflows").glob("*.json"):
        assert json.loads(path.read_text())["nodes"]


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_nodes_of_an_example_lie_in_a_group_and_off_each_other(path):
    workflow, title = json.loads(path.read_text()), 30
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    boxes = [(x, y - title, x + w, y + h) for x, y, w, h in boxes]
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in workflow["groups"])]
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    assert not [pair for pair in itertools.combinations(groups, 2) if overlap(*pair)]
    for left, top, right, bottom in boxes:
        assert [a for a in groups if a[0] <= left and a[1] <= top and right <= a[2] and bottom <= a[3]]


def overlap(a: tuple, b: tuple) -> bool:
    """Boxes (left, top, right, bottom) that share more than an edge."""
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])
