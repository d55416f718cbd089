"""Repainting a part: which part, brought to its size and put back; and what is under the mask at first."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from nativesd.errors import UsageError
from nativesd.pictures.region import cut_out, fill_masked, put_back, widened


def painted(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    ("box", "ratio", "size", "wanted"),
    [
        ((0, 0, 128, 32), 1, (512, 512), (0, 0, 128, 128)),  # the example of A1111's docstring, moved into the picture
        ((100, 200, 228, 232), 1, (512, 512), (100, 152, 228, 280)),
        ((100, 500, 228, 512), 1, (512, 512), (100, 384, 228, 512)),  # moved up from the lower edge
        ((500, 100, 512, 228), 1, (512, 512), (384, 100, 512, 228)),
        ((0, 0, 400, 100), 1, (400, 120), (0, 0, 400, 120)),  # no more than there is
        ((10, 10, 40, 40), 1, (64, 64), (10, 10, 40, 40)),
        ((10, 10, 41, 40), 1, (64, 64), (10, 10, 41, 41)),  # the odd pixel after it
        ((10, 20, 30, 40), 2, (64, 64), (0, 20, 40, 40)),
    ],
)
def test_a_box_grows_to_the_ratio(
    box: tuple[int, int, int, int], ratio: float, size: tuple[int, int], wanted: tuple[int, int, int, int]
) -> None:
    assert widened(box, ratio, size) == wanted


def test_a_part_goes_back_to_where_it_was() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    picture, mask = Image.fromarray(noise), painted((120, 90), (50, 30, 70, 50))
    part, part_mask, box = cut_out(picture, mask, 6, 64, 64)
    assert box == (44, 24, 76, 56)
    assert part.size == part_mask.size == (64, 64)
    red = put_back(picture, Image.new("RGB", (64, 64), "red"), mask, box)
    found = np.asarray(red)
    inside = np.asarray(mask) > 0
    assert (found[inside] == (255, 0, 0)).all()
    np.testing.assert_array_equal(found[~inside], noise[~inside])


def test_a_part_of_another_shape_than_the_picture_has_room_for() -> None:
    picture, mask = Image.new("RGB", (100, 30), "blue"), painted((100, 30), (0, 0, 100, 30))
    part, _, box = cut_out(picture, mask, 0, 64, 64)
    assert box == (0, 0, 100, 30)
    assert np.unique(np.asarray(put_back(picture, part, mask, box)).reshape(-1, 3), axis=0).tolist() == [[0, 0, 255]]


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(UsageError, match="black everywhere"):
        cut_out(Image.new("RGB", (8, 8)), Image.new("L", (8, 8)), 4, 8, 8)


def test_filling_takes_the_colours_around_and_leaves_the_rest() -> None:
    picture = Image.new("RGB", (64, 64), "green")
    picture.paste("red", (24, 24, 40, 40))
    mask = painted((64, 64), (24, 24, 40, 40))
    filled = np.asarray(fill_masked(picture, mask)).astype(int)
    assert np.abs(filled - (0, 128, 0)).max() <= 8
