"""GLIDE's noised CLIP: its published layout, what it computes by a second implementation, and its way into our files.

Layout and formulas are written down here once more, from the published description. Most tests use fewer and narrower
layers of the same layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.encoders import NoisyCLIP, build_clip, glide, load_noisy_clip, save_noisy_clip
from sdg_core.method import TimestepTable, embedding

HEAD = 64
PROMPTS = ["a painting of a corgi", "x " * 200]
MEANS, STDS = (122.77093945, 116.74601272, 104.09373519), (68.50053285, 66.63215831, 70.32316309)


@dataclass(frozen=True)
class Layout:
    """Sizes of the two published files, unless told otherwise."""

    size: int = 64
    patch: int = 4
    width: int = 768
    blocks: int = 12
    text_width: int = 512
    text_blocks: int = 12
    vocabulary: int = 65536
    embed: int = 512

    def image(self) -> dict[str, tuple[int, ...]]:
        places = (self.size // self.patch) ** 2
        shapes = {"blocks.input.w_t": (1000, self.width), "blocks.input.w_pos": (places + 1, self.width)}
        shapes["blocks.input.patch_proj"] = (self.width, 3, self.patch, self.patch)
        shapes |= norm("blocks.input.ln", self.width)
        return shapes | self.rest(self.width, self.blocks)

    def text(self) -> dict[str, tuple[int, ...]]:
        shapes = {"blocks.input.w_voc": (self.vocabulary, self.text_width), "blocks.input.w_pos": (77, self.text_width)}
        return shapes | self.rest(self.text_width, self.text_blocks)

    def rest(self, width: int, blocks: int) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for i in range(blocks):
            name = f"blocks.block_{i}"
            shapes |= norm(f"{name}.f_attn.ln", width) | norm(f"{name}.f_mlp.ln", width)
            for part in "qvc":
                shapes |= {f"{name}.f_attn.f_{part}.w": (width, width), f"{name}.f_attn.f_{part}.b": (width,)}
            shapes[f"{name}.f_attn.f_k.w"] = (width, width)
            shapes |= {f"{name}.f_mlp.f_1.w": (4 * width, width), f"{name}.f_mlp.f_1.b": (4 * width,)}
            shapes |= {f"{name}.f_mlp.f_2.w": (width, 4 * width), f"{name}.f_mlp.f_2.b": (width,)}
        return shapes | norm("blocks.output.ln", width) | {"blocks.output.f.w": (self.embed, width)}


SMALL = Layout(size=16, width=128, blocks=2, text_width=128, text_blocks=2, vocabulary=49500, embed=24)


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.g": (width,), f"{name}.b": (width,)}


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random numbers with which activations stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith(".w") or name.endswith("patch_proj"):
            values *= math.prod(shape[1:]) ** -0.5
        state[name] = 1 + 0.2 * values if name.endswith(".g") else values if values.ndim > 1 else 0.2 * values
    return state


def second_implementation(state: dict[str, Tensor], tokens: Tensor, causal: bool, row: Tensor) -> Tensor:
    """Blocks, last norm and projection of tokens (B, L, C), read off at ``row`` (B,): (B, D), in float64."""

    def normalised(name: str, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        return apart / (apart.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.g"] + state[f"{name}.b"]

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.w"].T + state.get(f"{name}.b", torch.zeros(()))

    x, L = tokens, tokens.shape[1]
    for i in range(sum(f"blocks.block_{i}.f_attn.ln.g" in state for i in range(99))):
        name = f"blocks.block_{i}"
        y, heads = normalised(f"{name}.f_attn.ln", x), []
        q, k, v = (affine(f"{name}.f_attn.f_{part}", y) for part in "qkv")
        for start in range(0, x.shape[-1], HEAD):
            mine = slice(start, start + HEAD)
            weights = q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(HEAD)
            if causal:
                weights = weights.masked_fill(torch.ones(L, L).tril() == 0, -1e10)
            heads.append(weights.softmax(-1) @ v[..., mine])
        x = x + affine(f"{name}.f_attn.f_c", torch.cat(heads, -1))
        y = affine(f"{name}.f_mlp.f_1", normalised(f"{name}.f_mlp.ln", x))
        x = x + affine(f"{name}.f_mlp.f_2", y * (1 + torch.erf(y / math.sqrt(2))) / 2)
    last = normalised("blocks.output.ln", x[torch.arange(len(x)), row])
    return last @ state["blocks.output.f.w"].T


def second_image(state: dict[str, Tensor], image: Tensor, t: list[int]) -> Tensor:
    """Embeddings (B, D) of x_t (B, 3, S, S) in -1..1, in float64."""
    state = {name: value.double() for name, value in state.items()}
    means, stds = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEANS, STDS))
    patches = F.conv2d(((image.double() + 1) * 127.5 - means) / stds, state["blocks.input.patch_proj"], stride=4)
    tokens = torch.cat([state["blocks.input.w_t"][t][:, None], patches.flatten(2).transpose(1, 2)], 1)
    tokens = tokens + state["blocks.input.w_pos"]
    tokens = F.layer_norm(tokens, tokens.shape[-1:], state["blocks.input.ln.g"], state["blocks.input.ln.b"], 1e-5)
    return second_implementation(state, tokens, False, torch.zeros(len(image), dtype=torch.long))


def second_text(state: dict[str, Tensor], prompts: list[str]) -> Tensor:
    """Embeddings (N, D) of prompts: start, at most 75 tokens and end, zeros behind; the end's row is read."""
    state = {name: value.double() for name, value in state.items()}
    rows = [[49406, *open_clip.SimpleTokenizer().encode(prompt)[:75], 49407] for prompt in prompts]
    ids = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    tokens = state["blocks.input.w_voc"][ids] + state["blocks.input.w_pos"]
    return second_implementation(state, tokens, True, torch.tensor([len(row) - 1 for row in rows]))


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return random_state(SMALL.image(), 0), random_state(SMALL.text(), 1)


@pytest.fixture
def folder(tmp_path, states) -> Path:
    for name, state in zip(("clip_image_enc.pt", "clip_text_enc.pt"), states, strict=True):
        torch.save(state, tmp_path / name)
    return tmp_path


@pytest.fixture
def encoder(folder) -> NoisyCLIP:
    return load_noisy_clip(folder / "clip_image_enc.pt").double()


def embed(encoder: NoisyCLIP, image: Tensor, t: list[float]) -> Tensor:
    found = encoder(image, torch.tensor(t, dtype=torch.float64), encoder.full_depth).embed
    assert found is not None
    return found


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-9 * float(wanted.abs().max())


def test_the_published_layout_is_read_off_and_filled_to_the_last_name():
    layout = Layout()
    image, text = (
        {k: torch.empty(v, device="meta") for k, v in part().items()} for part in (layout.image, layout.text)
    )
    config = glide.config(image, text)
    assert config.clip["embed_dim"] == 512
    assert config.clip["vision_cfg"] == {
        "image_size": 64, "patch_size": 4, "width": 768, "head_width": 64, "layers": 12
    }  # fmt: skip
    assert config.clip["text_cfg"] == glide.TEXT
    assert (config.beta_schedule, config.conditioning) == ("cosine", "token")
    with torch.device("meta"):
        wanted = NoisyCLIP(config, build_clip(config.clip)).state_dict()
    found = glide.translate(image, text)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    assert glide.config(image, None) == config


def test_image_embeddings_equal_a_second_implementation(encoder, states, draw):
    image = draw(3, 3, 16, 16).double()
    wanted = second_image(states[0], image, [0, 333, 999])
    assert float(wanted.std()) > 0.1
    assert_close(embed(encoder, image, [0, 333, 999]), wanted)
    for i, t in enumerate((0, 333, 999)):
        assert_close(embed(encoder, image[i : i + 1], [t]), wanted[i : i + 1])
    shared = second_image(states[0], image, [7, 7, 7])
    assert_close(embed(encoder, image, [7]), shared)
    assert_close(embedding(encoder, image, torch.tensor([7.0])), F.normalize(shared, dim=1))


def test_text_embeddings_equal_a_second_implementation(encoder, states):
    assert_close(encoder.encode_text(PROMPTS), F.normalize(second_text(states[1], PROMPTS), dim=1))


def test_between_two_timesteps_the_token_lies_between_theirs(encoder, states, draw):
    image, times = draw(1, 3, 16, 16).double(), states[0]["blocks.input.w_t"].double()
    rest = states[0] | {"blocks.input.w_t": (0.75 * times[40] + 0.25 * times[41])[None]}
    assert_close(embed(encoder, image, [40.25]), second_image(rest, image, [0]))


def test_maps_come_before_the_embedding_and_are_as_deep_as_asked(encoder, draw):
    image, t = draw(2, 3, 16, 16).double(), torch.tensor([5.0, 600.0]).double()
    features = encoder(image, t, 3)
    assert [m.shape for m in features.maps] == [(2, 128, 4, 4)] * 3
    assert features.embed is None
    deep = encoder(image, t, encoder.full_depth)
    assert len(deep.maps) == 5
    assert torch.equal(deep.maps[2], features.maps[2])


def test_it_reads_noise_of_the_cosine_schedule(encoder):
    assert encoder.reads == "noisy"
    assert torch.equal(encoder.table.ratio, TimestepTable.from_name("cosine").ratio)


def test_without_its_text_half_it_says_where_to_put_it(folder):
    (folder / "clip_text_enc.pt").unlink()
    alone = load_noisy_clip(folder / "clip_image_enc.pt")
    with pytest.raises(ValueError, match=r"beside clip_image_enc\.pt, as clip_text_enc\.pt"):
        alone.encode_text(["a"])
    (folder / "clip_image_enc.pt").rename(folder / "other.pt")
    with pytest.raises(ValueError, match="name the image half clip_image_enc"):
        load_noisy_clip(folder / "other.pt").encode_text(["a"])


def test_what_is_not_whole_is_refused(folder, states):
    with pytest.raises(ValueError, match="Choose the image half"):
        load_noisy_clip(folder / "clip_text_enc.pt")
    cut = {k: v for k, v in states[0].items() if "block_1.f_mlp" not in k}
    torch.save(cut, folder / "clip_image_enc.pt")
    with pytest.raises(ValueError, match=r"not a whole image half.*Missing: blocks\.block_1\.f_mlp.*Download"):
        load_noisy_clip(folder / "clip_image_enc.pt")
    torch.save({**states[0], "blocks.input.w_t": torch.zeros(500, 128)}, folder / "clip_image_enc.pt")
    with pytest.raises(ValueError, match=r"w_t \(500, 128\) instead of \(1000, 128\)"):
        load_noisy_clip(folder / "clip_image_enc.pt")
    torch.save(states[0], folder / "clip_image_enc.pt")
    torch.save({k: v for k, v in states[1].items() if k != "blocks.input.w_pos"}, folder / "clip_text_enc.pt")
    with pytest.raises(ValueError, match=r"not a whole text half.*Missing: blocks\.input\.w_pos"):
        load_noisy_clip(folder / "clip_image_enc.pt")


def test_our_own_file_keeps_it(encoder, tmp_path, draw):
    save_noisy_clip(tmp_path / "glide.safetensors", encoder.float(), half=False)
    loaded, image = load_noisy_clip(tmp_path / "glide.safetensors"), draw(1, 3, 16, 16)
    assert loaded.config == encoder.config
    assert torch.equal(loaded(image, torch.tensor([500.5]), 6).embed, encoder(image, torch.tensor([500.5]), 6).embed)
    assert torch.equal(loaded.encode_text(["a"]), encoder.encode_text(["a"]))
