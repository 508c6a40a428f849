"""The suite of `sdg bench` that needs the host's UNet, on a small one."""

from __future__ import annotations

import pytest

from sdg_core.bench import unet


@pytest.fixture
def small(comfyui_path, monkeypatch):
    from sdg_core.avatars import load_bundled_clip
    from sdg_core.encoders import from_clean

    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_path))
    monkeypatch.setattr(unet, "SD15", unet.SD15 | {"model_channels": 32})
    monkeypatch.setattr(unet, "VAE", unet.VAE | {"ch": 32})
    monkeypatch.setattr(unet, "noisy_clip", lambda: from_clean(load_bundled_clip()).requires_grad_(False))


def test_unet_rows_have_the_promised_names(small):
    rows = {row.name: row.value for row in unet.unet_rows(1, side=64, progress=lambda what: None)}
    promised = {"step_ratio", "speedup_over_through_unet", "speedup_over_mpgd", "extra_memory_mb"}
    assert promised <= set(rows)
    assert rows["step_ratio"] > 0
    assert all(rows[name] > 0 for name in rows if name.startswith("speedup"))


def test_a_missing_host_is_told_of(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set COMFYUI_PATH to its folder"):
        unet.find_host()
