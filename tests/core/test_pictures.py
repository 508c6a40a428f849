"""Tables of pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import ImageFont

from sdg_core.pictures import draw_table, shortened, to_picture


def test_a_table_holds_every_picture_as_it_is_below_its_names():
    pictures = torch.rand(2, 3, 3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn = np.asarray(
        draw_table(pictures, ["a row", "a name that is far too long for a row as narrow as this is"], "abc")
    )
    windows = np.lib.stride_tricks.sliding_window_view(drawn, (40, 60, 3))[:, :, 0]
    for picture in pictures.flatten(0, 1):
        wanted = np.asarray(to_picture(picture))
        assert int((windows[:, :, 20, 30] == wanted[20, 30]).all(axis=-1).sum()) >= 1
        assert any(
            (windows[y, x] == wanted).all() for y, x in np.argwhere((windows[:, :, 0, 0] == wanted[0, 0]).all(-1))
        )


def test_a_name_is_shortened_to_its_place():
    font = ImageFont.load_default(size=12)
    assert shortened("short", font, 100) == "short"
    cut = shortened("a name that is far too long", font, 60)
    assert cut.endswith("...")
    assert font.getlength(cut) <= 60 < font.getlength(f"{cut[:-3]}xx...")
