"""What the recipe's trainings rest on: steps of Muon, resuming, captions. Nothing here trains a model to the end."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

RECIPE = Path(__file__).parents[2] / "recipes" / "avatars"


@pytest.fixture(autouse=True)
def recipe(monkeypatch):
    """The recipe's scripts can be imported, as they import each other."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield
    for name in [name for name, module in sys.modules.items() if str(RECIPE) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6)])
def test_muon_steps_have_singular_values_of_about_one(shape):
    from muon import orthogonal

    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    step = orthogonal(g)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.3
    assert values.max() < 1.3
    along = (left.T @ step @ right.T).diagonal()  # the same directions as the gradient's
    torch.testing.assert_close(along.sort().values, values.sort().values, rtol=1e-6, atol=1e-9)


def test_muon_takes_matrices_and_leaves_vectors_and_named_ones(tmp_path):
    from muon import split

    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "conv": nn.Conv2d(3, 2, 3), "last": nn.Linear(2, 2)})
    model["last"].bias.requires_grad_(False)
    matrices, rest = split(model, ("embedding",))
    assert [tuple(p.shape) for p in matrices] == [(2, 3, 3, 3), (2, 2)]
    assert [tuple(p.shape) for p in rest] == [(4, 3), (2,)]


def trained(folder: Path, steps: int, stop: int | None = None, muon: float = 0.02) -> dict[str, Tensor]:
    """The averaged weights of a small training of ``steps``, stopped after ``stop`` of them."""
    from loop import Plan, train

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    plan = Plan(folder / "small.pt", images=4 * steps, batch=4, lr=0.01, seed=3, muon=muon)

    class Stopped(Exception):
        pass

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if step == stop:
            raise Stopped
        x = torch.randn(4, 4, generator=generator).double()
        return (model(x) - x[:, :2]).square().mean(), {}

    try:
        return train(plan, model, loss)
    except Stopped:
        return {}


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, monkeypatch, muon):
    import loop

    whole = trained(tmp_path / "whole", 12, muon=muon)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    trained(tmp_path / "parts", 12, stop=5, muon=muon)
    again = trained(tmp_path / "parts", 12, muon=muon)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=1e-9, atol=1e-12)


def test_every_caption_says_only_what_the_drawing_shows():
    """Each phrase belongs to one value of one attribute, and captions name the drawing's own values only."""
    from data import LABELS
    from world_data import caption, phrases

    of = {}
    for name, values in LABELS.items():
        for value in values:
            for said in phrases(name, value):
                assert said not in of
                of[said] = (name, value)
    rng = random.Random(0)
    for _ in range(300):
        row = [rng.randrange(-1, len(values)) for values in LABELS.values()]
        row[0] = max(row[0], 0)
        text = caption(np.array(row, np.int8), rng)
        shown = {(name, values[v]) for (name, values), v in zip(LABELS.items(), row, strict=True) if v >= 0}
        parts = text.replace(" and ", ", ").replace(" with ", ", ").split(", ")
        named = {
            of[part.removeprefix("a ")] if part.removeprefix("a ") in of else of[part] for part in parts if part in of
        }
        assert named <= shown
        assert named or len(parts) == 1 or "style" in dict(shown)


@pytest.fixture
def made_up_world(tmp_path):
    """Folders of a few random pictures with labels and latents, as the recipe's scripts leave them."""
    from data import LABELS

    data, out, rng = tmp_path / "data", tmp_path / "out", np.random.default_rng(0)
    data.mkdir(), out.mkdir()
    for split, count in (("train", 24), ("test", 6)):
        labels = np.stack([rng.integers(len(values), size=count) for values in LABELS.values()], axis=1)
        np.save(data / f"{split}_labels.npy", labels.astype(np.int8))
        np.save(data / f"{split}_64.npy", rng.integers(256, size=(count, 64, 64, 3), dtype=np.uint8))
        np.save(out / f"world_latents_{split}.npy", rng.normal(size=(count, 4, 32, 32)).astype(np.float16))
    torch.save({"factors": torch.randn(3, 4), "bias": torch.zeros(3)}, out / "world_format.pt")
    return data, out


def test_what_a_card_trains_runs_on_a_cpu_and_goes_on_where_it_stopped(made_up_world, capsys):
    import train_world_on_card as script

    data, out = made_up_world
    script.Card(data, out, "cpu", images=2).run()
    told = capsys.readouterr().out
    for name in script.IMAGES:
        average = torch.load(out / f"{name}.pt", weights_only=True)["ema"]
        assert all(torch.isfinite(value).all() for value in average.values() if value.is_floating_point())
        assert f"{name} 1.000 step 1 loss" in told
    assert (out / "noisy_clip_latents_retrieval.pt").exists()
    (out / "adm.pt").unlink()
    script.Card(data, out, "cpu", images=2).run()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["adm"]


def test_a_step_on_a_card_is_the_cpus(tmp_path):
    """The same rates, gradients and averages as ``loop.train``, but for where random numbers come from."""
    from card import train_on_card
    from loop import Plan, train

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    plan = Plan(tmp_path / "small.pt", images=12 * 4, batch=4, lr=0.01, seed=3, muon=0.02, ema=0.0)
    kept = []
    for runs in (train, train_on_card):
        made = model()
        average = runs(plan, made, lambda step, generator, made=made: ((made(x) - x[:, :2]).square().mean(), {}))
        kept.append((made, average))
        plan.out.unlink()
    (ours, first), (theirs, second) = kept
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(second[name].double(), first[name], rtol=1e-4, atol=1e-6)
