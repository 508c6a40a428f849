"""One network of the angle as an eps, a v and a flow model: closed forms, one denoised, its precision and its files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from sdg_core.files import save
from sdg_core.method import Convention, LatentFormat, TimestepTable
from sdg_core.models import ADMConfig, ADMDenoiser, ADMUNet, load_adm, read_adm
from sdg_core.models.faces import FLOW_SHIFT

pytestmark = pytest.mark.usefixtures("float64")

FACES = ["eps", "v", "flow"]
TIMESTEPS = [0, 1, 40, 300, 750, 998, 999]
LATENT = LatentFormat("toy", 4, ((0.3, -0.2, 0.5, 0.1), (0.1, 0.4, -0.3, 0.2), (-0.5, 0.2, 0.1, 0.7)))
CONFIG = ADMConfig(
    image_size=16,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    head_channels=32,
    learn_sigma=False,
    prediction="v",
    beta_schedule="scaled_linear",
    channels=4,
    latent_format=LATENT,
    time="angle",
)
TABLE = TimestepTable.from_name(CONFIG.beta_schedule)


def random_unet(config: ADMConfig = CONFIG) -> ADMUNet:
    """The same weights for every face."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = ADMUNet(config)
        for parameter in unet.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet.requires_grad_(False).eval()


def faces(config: ADMConfig = CONFIG) -> dict[str, ADMUNet]:
    return {face: random_unet(replace(config, prediction=face)) for face in FACES}


def per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def rms(x: Tensor) -> Tensor:
    """Per sample, (B,)."""
    return x.square().mean(dim=(1, 2, 3)).sqrt()


def moments(unet: ADMUNet, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (B, 1, 1, 1) of the x that a model of this face is given."""
    if unet.config.prediction == "flow":
        return per_sample(1 - timesteps / 1000), per_sample(timesteps / 1000)
    ratio = per_sample(TABLE.sigma(timesteps))
    return 1 / (1 + ratio.square()).sqrt(), ratio / (1 + ratio.square()).sqrt()


class GaussianNetwork:
    """v of x_vp where x_0 ~ N(0, variance): E[x_0] = cos(a) variance / q x_vp and E[eps] = sin(a) / q x_vp, with
    q = cos(a)^2 variance + sin(a)^2."""

    def __init__(self, variance: float) -> None:
        self.variance = variance

    def __call__(self, x_vp: Tensor, time: Tensor) -> Tensor:
        a = per_sample(time) * math.pi / 2000
        power = a.cos().square() * self.variance + a.sin().square()
        eps, x_0 = a.sin() / power * x_vp, a.cos() * self.variance / power * x_vp
        return a.cos() * eps - a.sin() * x_0


@pytest.mark.parametrize("variance", [0.04, 1.0, 9.0])
@pytest.mark.parametrize("face", FACES)
def test_the_ideal_network_of_gaussian_data_gives_its_denoised_through_every_face(face, variance, draw, monkeypatch):
    """E[x_0 | x_t] = alpha variance / (alpha^2 variance + sigma^2) x_t, in each convention."""
    denoiser = ADMDenoiser(faces()[face])
    monkeypatch.setattr(denoiser.unet, "network", GaussianNetwork(variance))
    if face == "flow":
        sigma = torch.tensor([1e-4, 0.01, 0.2, 0.5, 0.9, 0.999, 1.0])
    else:
        sigma = TABLE.sigma(torch.tensor(TIMESTEPS))
    alpha, s = (per_sample(part) for part in (denoiser.convention.alpha(sigma), sigma))
    x = (alpha.square() * variance + s.square()).sqrt() * draw(7, 4, 16, 16)
    wanted = alpha * variance / (alpha.square() * variance + s.square()) * x
    torch.testing.assert_close(denoiser(x, sigma), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("face", FACES)
def test_the_output_is_what_the_face_predicts_between_timesteps_too(face, draw, monkeypatch):
    """Where the data is one picture x_0, the network can tell eps: (x_vp - cos(a) x_0) / sin(a)."""
    unet, timesteps = faces()[face], torch.tensor([0.25, 437.3, 998.9])
    x_0, eps = draw(1, 4, 16, 16), draw(3, 4, 16, 16, seed=1)
    alpha, sigma = moments(unet, timesteps)

    def network(x_vp: Tensor, time: Tensor) -> Tensor:
        a = per_sample(time) * math.pi / 2000
        return a.cos() * (x_vp - a.cos() * x_0) / a.sin() - a.sin() * x_0

    monkeypatch.setattr(unet, "network", network)
    size = (alpha.square() + sigma.square()).sqrt()
    wanted = {"eps": eps, "v": (alpha * eps - sigma * x_0) / size, "flow": eps - x_0}[face]
    torch.testing.assert_close(unet(alpha * x_0 + sigma * eps, timesteps), wanted, rtol=1e-9, atol=1e-9)


def test_every_face_gives_one_denoised_at_equal_noise(draw):
    """At x_ve = x_0 + ratio * eps, and at x_flow = x_ve / (1 + ratio) with s = ratio / (1 + ratio)."""
    ratio, x = TABLE.sigma(torch.tensor(TIMESTEPS)), draw(7, 4, 16, 16)
    x_ve = x * per_sample((1 + ratio.square()).sqrt())
    seen = {}
    for face, unet in faces().items():
        denoiser = ADMDenoiser(unet)
        flow = denoiser.convention is Convention.FLOW
        seen[face] = denoiser(x_ve / per_sample(1 + ratio), ratio / (1 + ratio)) if flow else denoiser(x_ve, ratio)
    assert float((seen["v"] - x).square().mean()) > 0.1
    for face in ("eps", "flow"):
        torch.testing.assert_close(seen[face], seen["v"], rtol=1e-9, atol=1e-9)


def test_as_v_it_is_the_network_at_its_angle_bit_for_bit(draw):
    unet, timesteps = random_unet(), torch.tensor(TIMESTEPS)
    x, time = draw(7, 4, 16, 16), 1000 / (math.pi / 2) * TABLE.sigma(timesteps).atan()
    assert torch.equal(unet(x, timesteps), unet.network(x, time))
    assert float(time[0]) < 20
    assert 950 < float(time[-1]) < 1000


def test_a_network_of_a_schedule_has_no_face(draw):
    """And is what it was: its forward is its network, on x and timesteps as they are."""
    x, timesteps = draw(2, 4, 16, 16), torch.tensor([3.0, 871.5])
    for face in FACES:
        unet = random_unet(replace(CONFIG, time="schedule", prediction=face))
        assert torch.equal(unet(x, timesteps), random_unet().network(x, timesteps))


def test_pure_noise_is_finite_for_the_flow(draw):
    """At s = 1 there is no signal: x_0 is -v, and flow = x + v."""
    unet, x = faces()["flow"], draw(1, 4, 16, 16)
    wanted = x + unet.network(x, torch.tensor([1000.0]))
    torch.testing.assert_close(unet(x, torch.tensor([1000.0])), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("face", FACES)
def test_in_half_precision_a_face_adds_one_rounding_to_the_networks_own(face, dtype, draw):
    """d eps = cos(a) dv and d flow = (cos(a) + sin(a)) dv, by RMS; timesteps come in float32, as a host's."""
    exact, half = faces()[face], faces()[face].to(dtype)
    timesteps = torch.tensor([0.0, 1.0, 40.0, 300.5, 750.0, 999.0], dtype=torch.float32)
    alpha, sigma = moments(exact, timesteps.double())
    size = (alpha.square() + sigma.square()).sqrt()
    x = (size * draw(6, 4, 16, 16)).to(dtype)
    x_vp = x.double() / size
    time = 1000 / (math.pi / 2) * torch.atan2(sigma, alpha).flatten()
    own = rms(half.network(x_vp.to(dtype), time.float()).double() - exact.network(x_vp, time))
    got, wanted = half(x, timesteps), exact(x.double(), timesteps.double())
    gain = {"eps": alpha / size, "v": torch.ones(()), "flow": (alpha + sigma) / size}[face].flatten()
    rounding = torch.finfo(dtype).eps / 2 * rms(wanted)
    assert got.dtype == dtype
    assert bool((rms(got.double() - wanted) <= 1.1 * (gain * own + rounding)).all())


@pytest.mark.parametrize("face", FACES)
def test_the_angle_is_not_rounded_to_half(face, draw, monkeypatch):
    """Else all times above 512 would be half a step apart, and bfloat16's four."""
    unet, seen = faces()[face], []
    monkeypatch.setattr(unet, "network", lambda x, time: seen.append((x.dtype, time)) or torch.zeros_like(x))
    timesteps = torch.tensor([998.3, 998.4], dtype=torch.float32)
    unet(draw(2, 4, 16, 16).bfloat16(), timesteps)
    ((dtype, time),) = seen
    wanted = 1000 / (math.pi / 2) * torch.atan2(*reversed(moments(unet, timesteps.double()))).flatten()
    assert (dtype, time.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(time.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("face", FACES)
def test_samples_do_not_mix(face, draw):
    unet, x, timesteps = faces()[face], draw(3, 4, 16, 16), torch.tensor([0.0, 500.0, 999.0])
    singles = torch.cat([unet(x[i : i + 1], timesteps[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(unet(x, timesteps), singles, rtol=1e-9, atol=1e-9)


def write(path, config: ADMConfig = CONFIG) -> ADMUNet:
    unet = random_unet(config)
    save(path, "adm", asdict(config), unet.state_dict(), half=False)
    return unet


@pytest.mark.parametrize("face", [None, *FACES])
def test_one_file_is_opened_with_any_face(face, tmp_path, draw):
    unet = write(tmp_path / "model.safetensors")
    loaded = load_adm(tmp_path / "model.safetensors", face)
    assert loaded.config == replace(CONFIG, prediction=face or "v", flow_shift=FLOW_SHIFT if face else 1.0)
    assert read_adm(tmp_path / "model.safetensors", face)[0] == loaded.config
    x, timesteps = draw(2, 4, 16, 16), torch.tensor([3.0, 871.5])
    assert torch.equal(loaded(x, timesteps), faces()[face or "v"](x, timesteps))
    assert torch.equal(loaded.network(x, timesteps), unet.network(x, timesteps))


def test_the_config_survives_json_and_files_without_a_time_are_of_a_schedule():
    fields = json.loads(json.dumps(asdict(CONFIG)))
    assert ADMConfig.from_json(fields) == CONFIG
    del fields["time"]
    assert ADMConfig.from_json(fields) == replace(CONFIG, time="schedule")


@pytest.mark.parametrize("face", FACES)
def test_other_files_have_no_faces(face, tmp_path):
    write(tmp_path / "eps.safetensors", replace(CONFIG, time="schedule", prediction="eps"))
    published = replace(CONFIG, time="schedule", prediction="eps", channels=3, latent_format=None)
    torch.save(random_unet(published).state_dict(), tmp_path / "published.pt")
    for name in ("eps.safetensors", "published.pt"):
        wanted = rf'Got the face "{face}" for {name}.*predict eps alone; wanted a network of the angle\. Leave'
        with pytest.raises(ValueError, match=wanted):
            load_adm(tmp_path / name, face)


def test_an_unknown_face_is_refused(tmp_path):
    write(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r'Got the face "x_0" for model\.safetensors; wanted "eps", "v" or "flow"'):
        load_adm(tmp_path / "model.safetensors", "x_0")
