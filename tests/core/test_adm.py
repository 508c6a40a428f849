"""The ADM UNet against a second implementation, and its files."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.files import load, load_pickle, save
from sdg_core.method import timestep_embedding
from sdg_core.models import ADMConfig, ADMUNet, load_adm, read_adm

pytestmark = pytest.mark.usefixtures("float64")

PUBLISHED_SMALL = ADMConfig(
    image_size=64,
    model_channels=32,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_res_blocks=1,
    attention_levels=(3, 4, 5),
    head_channels=32,
)
"""The options of 256x256_diffusion_uncond at an eighth of its width."""

SMALL = ADMConfig(
    image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=32
)

VARIANTS = {
    "published": PUBLISHED_SMALL,
    "conv_updown": replace(SMALL, resblock_updown=False),
    "no_scale_shift": replace(SMALL, scale_shift_norm=False),
    "new_attention_order": replace(SMALL, new_attention_order=True),
    "heads_by_number": replace(SMALL, head_channels=0, heads=4),
    "fixed_sigma": replace(SMALL, learn_sigma=False),
    "old_defaults": replace(SMALL, resblock_updown=False, scale_shift_norm=False, num_res_blocks=2),
}


def random_unet(config: ADMConfig, seed: int = 0) -> ADMUNet:
    """Weights around their start, with the layers that start at zero filled too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = ADMUNet(config)
        for parameter in unet.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet.requires_grad_(False).eval()


class FunctionalADM:
    """guided-diffusion's UNet as a walk over a state dict: what a block is follows from the keys it has.

    Only what leaves no key is taken from outside: where residual blocks resample, heads, and attention order.
    """

    def __init__(self, state: dict[str, Tensor], config: ADMConfig) -> None:
        self.state, self.config = state, config

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        per_level, n_in = self.config.num_res_blocks + 1, self.count("input_blocks")
        width = self.state["time_embed.0.weight"].shape[1]
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", self.sinusoid(t, width))))
        stack, h = [], x
        for i in range(n_in):
            h = self.block(f"input_blocks.{i}", h, emb, resample="down" if i and i % per_level == 0 else "")
            stack.append(h)
        h = self.block("middle_block", h, emb)
        n_out = self.count("output_blocks")
        for i in range(n_out):
            up = "up" if (i + 1) % per_level == 0 and i + 1 < n_out else ""
            h = self.block(f"output_blocks.{i}", torch.cat([h, stack.pop()], 1), emb, resample=up)
        return self.conv("out.2", F.silu(self.norm("out.0", h)))

    @staticmethod
    def sinusoid(t: Tensor, dim: int) -> Tensor:
        rows = [
            [fn(float(v) * 10000 ** (-i / (dim // 2))) for fn in (math.cos, math.sin) for i in range(dim // 2)]
            for v in t
        ]
        return torch.tensor(rows)

    def block(self, name: str, h: Tensor, emb: Tensor, resample: str = "") -> Tensor:
        """One TimestepEmbedSequential. In the encoder a resampling block stands alone; in the decoder it is last."""
        if f"{name}.weight" in self.state or f"{name}.0.weight" in self.state:
            return self.conv(f"{name}.0", h)
        parts = self.count(name)
        for j in range(parts):
            part = f"{name}.{j}"
            if f"{part}.qkv.weight" in self.state:
                h = self.attention(part, h)
            elif f"{part}.op.weight" in self.state:
                h = self.conv(f"{part}.op", h, stride=2)
            elif f"{part}.conv.weight" in self.state:
                h = self.conv(f"{part}.conv", self.doubled(h))
            else:
                h = self.res(part, h, emb, resample if j == parts - 1 and (resample == "down" or j > 0) else "")
        return h

    def res(self, name: str, x: Tensor, emb: Tensor, resample: str) -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resample:
            change = self.doubled if resample == "up" else self.halved
            h, x = change(h), change(x)
        h = self.conv(f"{name}.in_layers.2", h)
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        if self.config.scale_shift_norm:
            scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = x.reshape(b, c, -1)
        qkv = torch.einsum("oc,bcl->bol", self.state[f"{name}.qkv.weight"][:, :, 0], self.norm(f"{name}.norm", tokens))
        qkv = qkv + self.state[f"{name}.qkv.bias"][:, None]
        heads = c // self.config.head_channels if self.config.head_channels else self.config.heads
        ch = c // heads
        out = torch.zeros_like(tokens)
        for head in range(heads):
            mine = slice(head * ch, (head + 1) * ch)
            if self.config.new_attention_order:
                q, k, v = (part[:, mine] for part in qkv.split(c, dim=1))
            else:
                q, k, v = qkv[:, 3 * head * ch : 3 * (head + 1) * ch].split(ch, dim=1)
            weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(ch), dim=-1)
            out[:, mine] = torch.einsum("bts,bcs->bct", weight, v)
        out = torch.einsum("oc,bcl->bol", self.state[f"{name}.proj_out.weight"][:, :, 0], out)
        return x + (out + self.state[f"{name}.proj_out.bias"][:, None]).reshape(b, c, height, width)

    def count(self, name: str) -> int:
        found = {int(m[1]) for key in self.state if (m := re.match(rf"{re.escape(name)}\.(\d+)\.", key))}
        return len(found)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], 32, -1)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        weight, bias = self.state[f"{name}.weight"].view(shape), self.state[f"{name}.bias"].view(shape)
        return groups.reshape(x.shape) * weight + bias

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    @staticmethod
    def halved(x: Tensor) -> Tensor:
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


@pytest.mark.parametrize("name", VARIANTS)
def test_unet_equals_a_second_implementation(name, draw):
    config = VARIANTS[name]
    unet = random_unet(config)
    x, t = draw(2, 3, config.image_size, config.image_size), torch.tensor([3.0, 871.5])
    wanted = FunctionalADM(unet.state_dict(), config)(x, t)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(unet(x, t), wanted, rtol=1e-9, atol=1e-9)


def test_attention_orders_differ(draw):
    """Otherwise the comparison above would not tell them apart."""
    x, t = draw(1, 3, 16, 16), torch.tensor([10.0])
    unet, other = random_unet(SMALL), ADMUNet(VARIANTS["new_attention_order"]).eval()
    other.load_state_dict(unet.state_dict())
    assert float((unet(x, t) - other(x, t)).detach().abs().max()) > 1e-3


def test_timestep_embedding_has_cosines_first():
    embedded = timestep_embedding(torch.tensor([2.0]), 4)[0].tolist()
    wanted = [math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]
    assert embedded == pytest.approx(wanted, abs=1e-6)


def test_samples_do_not_mix(draw):
    unet, x, t = random_unet(SMALL), draw(3, 3, 16, 16), torch.tensor([0.0, 500.0, 999.0])
    singles = torch.cat([unet(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(unet(x, t), singles, rtol=1e-9, atol=1e-9)


def test_an_untrained_unet_predicts_zero(draw):
    assert not ADMUNet(SMALL)(draw(1, 3, 16, 16), torch.tensor([7.0])).any()


def test_patched_unet_is_a_unet_on_unshuffled_pixels(draw):
    config = replace(SMALL, patch=2)
    unet, x, t = random_unet(config), draw(2, 3, 32, 32), torch.tensor([3.0, 900.0])
    cells = x.reshape(2, 3, 16, 2, 16, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 16, 16)
    out = FunctionalADM(unet.state_dict(), config)(cells, t)
    wanted = out.reshape(2, 6, 2, 2, 16, 16).permute(0, 1, 4, 2, 5, 3).reshape(2, 6, 32, 32)
    torch.testing.assert_close(unet(x, t), wanted, rtol=1e-9, atol=1e-9)


def test_default_config_has_the_layout_of_the_published_256_px_model():
    with torch.device("meta"):
        state = ADMUNet(ADMConfig()).state_dict()
    assert sum(v.numel() for v in state.values()) == 552_814_086
    assert len(state) == 566
    shapes = {
        "time_embed.0.weight": (1024, 256),
        "time_embed.2.bias": (1024,),
        "input_blocks.0.0.weight": (256, 3, 3, 3),
        "input_blocks.3.0.in_layers.2.weight": (256, 256, 3, 3),
        "input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1),
        "input_blocks.10.1.qkv.weight": (1536, 512, 1),
        "input_blocks.17.1.proj_out.weight": (1024, 1024, 1),
        "middle_block.1.norm.weight": (1024,),
        "middle_block.2.out_layers.3.weight": (1024, 1024, 3, 3),
        "output_blocks.2.2.emb_layers.1.weight": (2048, 1024),
        "output_blocks.17.0.skip_connection.weight": (256, 512, 1, 1),
        "out.0.weight": (256,),
        "out.2.weight": (6, 256, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "input_blocks.9.1.qkv.weight" not in state
    assert not any(name.startswith(("input_blocks.18.", "output_blocks.18.")) for name in state)


@pytest.mark.parametrize(
    "config",
    [
        ADMConfig(),
        ADMConfig(image_size=128, channel_mult=(1, 1, 2, 3, 4), attention_levels=(2, 3, 4)),
        ADMConfig(model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention_levels=(1, 2, 3)),
        ADMConfig(model_channels=128, attention_levels=(4,), num_res_blocks=1),
        ADMConfig(model_channels=64, attention_levels=()),
        ADMConfig(model_channels=64, resblock_updown=False, attention_levels=(1, 3)),
        ADMConfig(model_channels=64, scale_shift_norm=False, learn_sigma=False),
        ADMConfig(model_channels=64, channel_mult=(2, 4), attention_levels=(0,)),
        ADMConfig(image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_levels=(4, 5, 6)),
    ],
)
def test_config_is_recovered_from_a_state_dict(config):
    with torch.device("meta"):
        state = ADMUNet(config).state_dict()
    assert ADMConfig.from_state_dict(state, config.image_size) == config


def test_foreign_state_dict_is_refused():
    with pytest.raises(ValueError, match=r"Not a guided-diffusion checkpoint.*Wanted"):
        ADMConfig.from_state_dict({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)})


def test_class_conditional_checkpoint_is_refused():
    state = {**random_unet(SMALL).state_dict(), "label_emb.weight": torch.zeros(1000, 128)}
    with pytest.raises(ValueError, match=r"class-conditional.*unconditional"):
        ADMConfig.from_state_dict(state)


def test_multiple_is_what_the_levels_and_the_patch_divide_by():
    assert ADMConfig().multiple == 32
    assert replace(SMALL, patch=4).multiple == 8


def assert_same_model(loaded: ADMUNet, unet: ADMUNet, x: Tensor) -> None:
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    t = torch.tensor([400.0])
    torch.testing.assert_close(loaded(x, t), unet(x, t), rtol=0, atol=0)


def test_published_pt_loads_by_its_own_shapes(tmp_path, draw):
    config = ADMConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,))
    unet = random_unet(config)
    torch.save(unet.state_dict(), tmp_path / "adm.pt")
    assert read_adm(tmp_path / "adm.pt")[0] == config
    assert_same_model(load_adm(tmp_path / "adm.pt"), unet, draw(1, 3, 16, 16))


def test_safetensors_keeps_weights_and_config(tmp_path, draw):
    config = replace(SMALL, prediction="v", beta_schedule="cosine", patch=2, new_attention_order=True)
    unet = random_unet(config)
    save(tmp_path / "adm.safetensors", "adm", asdict(config), unet.state_dict(), half=False)
    loaded = load_adm(tmp_path / "adm.safetensors")
    assert loaded.config == config
    assert_same_model(loaded, unet, draw(1, 3, 32, 32))


def test_half_files_come_back_as_rounded_float32(tmp_path):
    state = {"w": torch.tensor([1 / 3, 2.0], dtype=torch.float32), "n": torch.tensor([70_000])}
    save(tmp_path / "a.safetensors", "adm", {}, state)
    _, loaded = load(tmp_path / "a.safetensors", "adm")
    assert loaded["w"].dtype == torch.float32
    assert loaded["w"].tolist() == [float(torch.tensor(1 / 3, dtype=torch.float32).half()), 2.0]
    assert torch.equal(loaded["n"], state["n"])


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "ran"
    torch.save({"w": torch.zeros(1), "bomb": Bomb(trace)}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt was not loaded"):
        load_pickle(tmp_path / "bomb.pt")
    assert not trace.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"w": torch.zeros(1)}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="does not hold a plain state dict"):
        load_pickle(tmp_path / "nested.pt")


def test_a_damaged_pt_is_refused(tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="damaged"):
        load_pickle(tmp_path / "cut.pt")


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_adm(tmp_path / name)
