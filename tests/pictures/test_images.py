"""Pictures and masks as inputs: everything they may be, against diffusers' VaeImageProcessor where the two agree."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from nativesd.errors import SourceError, UsageError
from nativesd.pictures import images, masks
from nativesd.pictures.embedded import read_texts


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure at every scale."""
    rng = np.random.default_rng(seed)
    parts = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (k, k, 3), np.uint8)).resize((width, height)), float)
        for k in (2, 5, 17, 40)
    ]
    return Image.fromarray(np.mean(parts, axis=0).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- reading -----------------------------------------------------------------------------------------------------


def test_the_same_picture_from_everything(tmp_path: Path) -> None:
    picture = photo(7, 5)
    array = np.asarray(picture)
    picture.save(tmp_path / "a.png")
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sources = [
        picture, tmp_path / "a.png", str(tmp_path / "a.png"), array, array / 255, (array / 255).astype(np.float32),
        array.astype(np.uint16) * 257, tensor, tensor[None], tensor / 255, (tensor / 255).double()[None],
        np.dstack([array, np.full((5, 7), 255, np.uint8)]), picture.convert("RGBA"), array[:, ::-1][:, ::-1],
    ]  # fmt: skip
    for source in sources:
        found = images.read_image(source)
        assert found.mode == "RGB"
        assert (pixels(found) == array).all()


def test_grey_pictures(tmp_path: Path) -> None:
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    sources = [
        Image.fromarray(grey), grey, grey[:, :, None], grey / 255, torch.from_numpy(grey), torch.from_numpy(grey)[None],
        torch.from_numpy(grey)[None, None] / 255, deep, tmp_path / "deep.png", deep.convert("I"),
        Image.fromarray((grey / 255).astype(np.float32)),
    ]  # fmt: skip
    for source in sources:
        found = images.read_image(source)
        assert found.mode == "RGB"
        assert (pixels(found) == grey[:, :, None]).all()


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[:] = [(10, 20, 30, 255)]
    rgba[0, 0] = (10, 20, 30, 0)
    rgba[1, 1] = (0, 0, 0, 51)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    for source in (rgba, Image.fromarray(rgba), rgba / 255, torch.from_numpy(rgba).permute(2, 0, 1)):
        found = images.read_image(source)
        assert found.getpixel((0, 0)) == (255, 255, 255)
        assert found.getpixel((1, 0)) == (10, 20, 30)
        assert found.getpixel((1, 1)) == (204, 204, 204)
    found = images.read_image(tmp_path / "palette.png")
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 200)]
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)])
    assert images.read_image(grey_alpha).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV", "LAB", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    found = images.read_image(Image.new(mode, (3, 2)))
    assert (found.mode, found.size) == ("RGB", (3, 2))


def test_exif_orientation(tmp_path: Path) -> None:
    picture = photo(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert (pixels(images.read_image(source)) == np.rot90(pixels(picture), -1)).all()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert images.read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    data = io.BytesIO()
    photo(64, 64).save(data, "png")
    files = {
        "empty.png": b"", "text.png": b"hello", "cut.png": data.getvalue()[:2000],
        "spoilt.png": data.getvalue()[:60] + b"\0" * 200 + data.getvalue()[260:],
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=f"{name} is not a picture that can be read"):
            images.read_image(tmp_path / name)
    with pytest.raises(SourceError, match=r"none\.png does not exist"):
        images.read_image(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(SourceError, match="not a picture: name the file itself"):
            images.read_image(path)
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n")
    with pytest.raises(SourceError, match="its format is none of those known"):
        images.read_image(tmp_path / "program.eps")


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (13_000, 13_000)).save(tmp_path / "large.png")
    for read in (images.read_image, read_texts):
        with pytest.raises(SourceError, match=r"13000x13000 pixels, over the 50000000 .*NATIVESD_MAX_PIXELS="):
            read(tmp_path / "large.png")
    photo(64, 32).save(tmp_path / "small.png")
    monkeypatch.setenv("NATIVESD_MAX_PIXELS", "2047")
    with pytest.raises(SourceError, match=r"64x32 pixels, over the 2047 .*NATIVESD_MAX_PIXELS=2048"):
        images.read_image(tmp_path / "small.png")
    monkeypatch.setenv("NATIVESD_MAX_PIXELS", "2048")
    assert images.read_image(tmp_path / "small.png").size == (64, 32)
    monkeypatch.setenv("NATIVESD_MAX_PIXELS", "many")
    with pytest.raises(UsageError, match="NATIVESD_MAX_PIXELS must be a whole number, not 'many'"):
        images.read_image(tmp_path / "small.png")


def test_an_absurdly_large_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    photo(64, 64).save(tmp_path / "bomb.png")
    with pytest.raises(SourceError, match=r"bomb.png is not a picture that can be read: .*exceeds limit"):
        images.read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 2)), r"shape \(2, 3, 2\)"),
        (np.zeros((3,)), r"shape \(3,\)"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3)), r"shape \(1, 4, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4), r"shape \(2, 3, 4, 4\)"),
        (torch.zeros(5, 4, 3), r"shape \(5, 4, 3\)"),
        (np.full((4, 4), 1.5), "within 0 and 1, not 1.5 and 1.5"),
        (np.full((4, 4), -1.0), "within 0 and 1"),
        (torch.full((3, 4, 4), torch.nan), "within 0 and 1"),
        (np.full((4, 4), 256), "int64 must be within 0 and 255, not 256 and 256"),
        (np.full((4, 4), -1), "within 0 and 255"),
        (np.zeros((4, 4), np.complex64), "cannot be of complex64"),
        (None, "not NoneType"),
        ([1, 2], "not list"),
    ],
)
def test_what_is_no_picture(source: object, message: str) -> None:
    for read in (images.read_image, masks.read_mask):
        with pytest.raises(UsageError, match=message):
            read(source)  # type: ignore[arg-type]


# --- masks -------------------------------------------------------------------------------------------------------


def test_the_same_mask_from_everything(tmp_path: Path) -> None:
    white = np.zeros((4, 6), bool)
    white[1:3, 2:] = True
    grey = white.astype(np.uint8) * 255
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    painted = np.dstack([np.full((4, 6, 3), 77, np.uint8), 255 - grey])  # a picture with a hole
    Image.fromarray(painted).save(tmp_path / "hole.png")
    sources = [
        white, grey, rgb, grey[:, :, None], grey / 255, torch.from_numpy(white), torch.from_numpy(grey)[None],
        torch.from_numpy(grey)[None, None] / 255, Image.fromarray(grey), Image.fromarray(white), Image.fromarray(rgb),
        np.dstack([rgb, np.full((4, 6), 255, np.uint8)]), np.dstack([rgb, np.zeros((4, 6), np.uint8)]),
        painted, Image.fromarray(painted), tmp_path / "hole.png",
    ]  # fmt: skip
    for source in sources:
        found = masks.read_mask(source).image
        assert found.mode == "L"
        assert (pixels(found) == grey).all()


def strokes(ground: tuple[int, int, int], colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A stroke, with a soft upper edge, on a transparent ground."""
    canvas = Image.new("RGBA", (8, 8), (*ground, 0))
    canvas.paste((*colour, 128), (2, 1, 6, 2))
    canvas.paste((*colour, 255), (2, 2, 6, 6))
    return canvas


def test_white_strokes_on_a_transparent_ground_are_repainted() -> None:
    expected = np.zeros((8, 8), np.uint8)
    expected[1, 2:6], expected[2:6, 2:6] = 128, 255
    for ground in ((0, 0, 0), (255, 255, 255), (200, 30, 90)):
        found = masks.read_mask(strokes(ground))
        assert (pixels(found.image) == expected).all()
        assert found.note == "mask: strokes on a transparent ground, what is white and opaque is repainted"
    black_and_white = strokes((0, 0, 0))
    black_and_white.paste((0, 0, 0, 255), (2, 4, 6, 6))  # painted over with black, which keeps
    expected[4:6] = 0
    assert (pixels(masks.read_mask(black_and_white).image) == expected).all()


def test_a_picture_with_holes_is_repainted_in_them() -> None:
    hole = Image.new("L", (64, 48), 255)
    hole.paste(0, (8, 8, 20, 20))
    for picture in (photo(64, 48), photo(64, 48).convert("L"), Image.new("RGB", (64, 48), (90, 120, 200)),
                    Image.new("RGB", (64, 48))):  # fmt: skip
        holed = picture.convert("RGBA")
        holed.putalpha(hole)
        found = masks.read_mask(holed)
        assert (pixels(found.image) == 255 - pixels(hole)).all()
        assert found.note == "mask: a picture with holes, what is transparent is repainted"


def test_masks_of_zeros_and_ones(tmp_path: Path) -> None:
    ones = np.zeros((8, 8), np.uint8)
    ones[2:6, 2:6] = 1
    Image.fromarray(ones).save(tmp_path / "ones.png")
    whole = Image.fromarray(ones.astype(np.int32))
    assert whole.mode == "I"
    for source in (ones, ones.astype(np.int64), ones.astype(np.uint16), ones.astype(np.float32), torch.from_numpy(ones),
                   Image.fromarray(ones), whole, tmp_path / "ones.png"):  # fmt: skip
        found = masks.read_mask(source)
        assert (pixels(found.image) == 255 * ones).all(), source
        floating = isinstance(source, np.ndarray) and source.dtype == np.float32
        assert (found.note is None) == floating
    assert masks.read_mask(ones * 255).note is None


@pytest.mark.parametrize("value", [255, 200, 65535])
def test_masks_of_mode_i(tmp_path: Path, value: int) -> None:
    numbers = np.zeros((8, 8), np.int32)
    numbers[2:6] = value
    expected = (numbers if value <= 255 else numbers // 257).astype(np.uint8)
    assert (pixels(masks.read_mask(Image.fromarray(numbers)).image) == expected).all()
    if value > 255:
        Image.fromarray(numbers.astype(np.uint16)).save(tmp_path / "deep.png")
        assert (pixels(masks.read_mask(tmp_path / "deep.png").image) == expected).all()


def test_a_black_mask_is_refused() -> None:
    for source in (np.zeros((4, 4), bool), Image.new("RGB", (4, 4)), Image.new("RGBA", (4, 4), (0, 0, 0, 255))):
        with pytest.raises(UsageError, match="black everywhere"):
            masks.read_mask(source)


@pytest.mark.parametrize("factor", [4, 8])
def test_masks_of_latents_are_those_of_diffusers(factor: int) -> None:
    mask = photo(72, 40).convert("L")
    processor = VaeImageProcessor(
        vae_scale_factor=factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    theirs = processor.preprocess(mask, height=80, width=64)
    theirs = torch.nn.functional.interpolate(theirs, size=(80 // factor, 64 // factor))
    fitted, _ = images.fit(mask, 64, 80)
    ours = masks.mask_to_latents(fitted, factor)
    assert ours.shape == (1, 1, 80 // factor, 64 // factor)
    assert 0.2 < theirs.mean() < 0.8
    assert (ours.round() == theirs).all()
    assert (masks.mask_to_tensor(fitted).round() == processor.preprocess(mask, height=80, width=64)).all()


def test_a_mask_too_small_for_the_latents() -> None:
    mask = Image.new("L", (64, 64))
    mask.putpixel((3, 3), 255)
    with pytest.raises(UsageError, match="nothing is left of the mask at 8 pixels per latent cell"):
        masks.mask_to_latents(mask, 8)
    mask.putpixel((8, 16), 255)
    assert masks.mask_to_latents(mask, 8).nonzero().tolist() == [[0, 0, 2, 1]]


def test_blur() -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    assert masks.blur(mask, 0) is mask
    row = pixels(masks.blur(mask, 4))[32]
    assert (np.diff(row) >= 0).all()
    assert row[0] == 0
    assert row[63] == 255
    assert abs(row[31:33].mean() - 127.5) < 3
    assert abs(row[28] - 255 * 0.19) < 12  # 3.5 pixels of a Gaussian of 4 to the left of the edge
    with pytest.raises(UsageError, match="blur must be 0 pixels or more, not -1"):
        masks.blur(mask, -1)


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["resize", "crop", "fill"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (200, 40), (101, 77)])
def test_fit_is_that_of_diffusers(mode: images.Fit, size: tuple[int, int]) -> None:
    picture = photo(101, 77)
    theirs = VaeImageProcessor().resize(
        picture, height=size[1], width=size[0], resize_mode="default" if mode == "resize" else mode
    )
    ours, note = images.fit(picture, *size, mode)
    assert ours.size == theirs.size == size
    # the band that "fill" adds is the edge here, and an interpolation of the two pixels at the edge there
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= (8 if mode == "fill" else 0)
    assert (note is None) == (size == picture.size)


def test_a_narrow_picture_is_not_scaled_as_a_whole() -> None:
    """That would be 134 thousand million pixels."""
    picture = Image.new("RGB", (1, 2000), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 990, 1, 1010))
    fitted = images.fit(picture, 8192, 8, "crop").image
    assert fitted.size == (8192, 8)
    assert fitted.getcolors() == [(8192 * 8, (0, 0, 255))]


def test_fit_says_what_it_did() -> None:
    picture = photo(1023, 770)
    assert images.fit(picture) == (images.fit(picture)[0], "1023x770 resized to 1016x768")
    assert images.fit(picture, factor=64)[1] == "1023x770 resized to 960x768"
    assert images.fit(picture, 512, 512, "crop")[1] == "1023x770 scaled and cropped to 512x512"
    assert images.fit(picture, 512, 512, "fill")[1] == "1023x770 scaled and filled up to 512x512"
    assert images.fit(picture, width=512)[0].size == (512, 384)
    assert images.fit(picture, height=384)[0].size == (504, 384)
    assert images.fit(photo(3, 5))[0].size == (8, 8)
    square = photo(64, 64)
    assert images.fit(square) == (square, None)


def test_crop_keeps_the_middle_and_fill_keeps_everything() -> None:
    picture = Image.new("RGB", (96, 32), "blue")
    picture.paste("red", (0, 0, 32, 32))
    picture.paste("white", (64, 0, 96, 32))
    assert set(images.fit(picture, 32, 32, "crop")[0].crop((4, 4, 28, 28)).getcolors()) == {(24 * 24, (0, 0, 255))}
    filled = images.fit(picture, 96, 96, "fill")[0]
    assert (pixels(filled) == pixels(picture)[:1]).all(), "all rows are the edge's"
    grey = images.fit(picture.convert("L"), 96, 96, "fill")[0]
    assert (grey.mode, grey.size) == ("L", (96, 96))


def test_sizes_that_cannot_be() -> None:
    picture = photo(8, 8)
    with pytest.raises(UsageError, match="resize mode must be one of resize, crop, fill, not 'stretch'"):
        images.fit(picture, 8, 8, "stretch")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be fitted into 0x8 pixels"):
        images.fit(picture, 0, 8)


def test_to_tensor() -> None:
    pictures = [photo(16, 8, seed) for seed in range(3)]
    found = images.to_tensor(pictures)
    theirs = VaeImageProcessor(vae_scale_factor=8).preprocess(pictures)
    assert found.dtype == torch.float32
    assert found.shape == (3, 3, 8, 16)
    assert (found - theirs).abs().max() < 1e-6
    assert images.to_tensor([Image.new("L", (2, 2), 255)]).unique().tolist() == [1.0]
    with pytest.raises(UsageError, match="must have one size, not 16x8, 8x8"):
        images.to_tensor([pictures[0], photo(8, 8)])
    with pytest.raises(UsageError, match="at least one picture"):
        images.to_tensor([])


# --- outpainting -------------------------------------------------------------------------------------------------


def test_pad_keeps_the_picture_and_marks_what_is_new() -> None:
    picture = photo(64, 48)
    canvas, mask, note = images.pad(picture, 16, 0, 0, 8, feather=0)
    assert canvas.size == mask.size == (80, 56)
    assert note == "64x48 extended to 80x56 (16 left, 8 bottom)"
    assert (pixels(canvas)[:48, 16:] == pixels(picture)).all()
    assert (pixels(canvas)[:48, :16] == pixels(picture)[:, :1]).all(), "the edge, drawn out"
    assert (pixels(mask)[:48, 16:] == 0).all()
    assert (pixels(mask)[48:] == 255).all()
    assert (pixels(mask)[:, :16] == 255).all()


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [
        ((64, 64), (8, 8, 8, 8), (80, 80, 8, 8)),
        ((64, 64), (0, 5, 0, 0), (72, 64, 0, 0)),
        ((64, 64), (5, 0, 3, 0), (72, 72, 8, 8)),
        ((64, 64), (5, 6, 0, 1), (80, 72, 5, 0)),
        ((63, 64), (0, 0, 8, 0), (64, 72, 0, 8)),
    ],
)
def test_pad_to_multiples(size: tuple[int, int], sides: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """What is missing to a multiple of 8 goes where something is added."""
    width, height, left, top = expected
    picture = photo(*size)
    canvas, mask, note = images.pad(picture, *sides)
    assert canvas.size == mask.size == (width, height)
    assert f"extended to {width}x{height}" in note
    assert (pixels(canvas)[top : top + size[1], left : left + size[0]] == pixels(picture)).all()


def test_feather() -> None:
    """1 at the seam, falling with the square, nothing along edges where nothing is added: ComfyUI's."""
    mask = pixels(images.pad(photo(128, 128), 8, 0, 0, 0, feather=16)[1])
    row = mask[64, 8:]
    assert row[0] == 255
    assert row[8] == round(255 * 0.25)
    assert (row[16:] == 0).all()
    assert (mask == mask[:1]).all()
    quarter, default = (pixels(images.pad(photo(128, 128), 0, 0, 0, 8, **kw)[1]) for kw in ({"feather": 32}, {}))
    assert (default == quarter).all(), "40 pixels, but a quarter of the picture at most"


def test_fills() -> None:
    picture = photo(64, 64)
    noise, gray = (pixels(images.pad(picture, 64, 0, 0, 0, fill=fill)[0])[:, :64] for fill in ("noise", "gray"))
    assert set(gray.ravel()) == {127}
    assert np.abs(noise.mean(axis=(0, 1)) - pixels(picture).mean(axis=(0, 1))).max() < 3
    assert np.abs(noise.std(axis=(0, 1)) - pixels(picture).std(axis=(0, 1))).max() < 3


def test_pads_that_cannot_be() -> None:
    picture = photo(8, 8)
    with pytest.raises(UsageError, match=r"extended by \(0, 0, 0, 0\)"):
        images.pad(picture, 0, 0, 0, 0)
    with pytest.raises(UsageError, match=r"extended by \(-8, 16, 0, 0\)"):
        images.pad(picture, -8, 16, 0, 0)
    with pytest.raises(UsageError, match="edge, noise, gray, not 'mirror'"):
        images.pad(picture, 8, 0, 0, 0, fill="mirror")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="feather must be 0 pixels or more, not -1"):
        images.pad(picture, 8, 0, 0, 0, feather=-1)


@pytest.mark.parametrize("sides", [(8, 0, 0, 0), (5, 0, 3, 0), (5, 6, 8, 8), (0, 3, 0, 3)])
def test_a_mask_and_a_border(sides: tuple[int, int, int, int]) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(200, (20, 30, 28, 40))
    canvas, border, _ = images.pad(mask, *sides, feather=0)
    both = pixels(masks.add_border(mask, border, sides))
    new = pixels(border) == 255
    assert (both[new] == 255).all()
    assert (both[~new].reshape(64, 64) == pixels(mask)).all()
    assert (pixels(canvas)[~new].reshape(64, 64, 3)[..., 0] == pixels(mask)).all()


# --- back together -----------------------------------------------------------------------------------------------


def test_paste_keeps_what_is_not_masked() -> None:
    original, generated = photo(32, 16), photo(32, 16, seed=1)
    mask = np.zeros((16, 32), np.uint8)
    mask[:, 16:24] = 128
    mask[:, 24:] = 255
    found = pixels(images.paste(original, generated, Image.fromarray(mask)))
    assert (found[:, :16] == pixels(original)[:, :16]).all()
    assert (found[:, 24:] == pixels(generated)[:, 24:]).all()
    between = (pixels(original) + pixels(generated))[:, 16:24] / 2
    assert np.abs(found[:, 16:24] - between).max() <= 1.5
    with pytest.raises(UsageError, match="must have one size, not 32x16, 32x16, 8x8"):
        images.paste(original, generated, Image.new("L", (8, 8)))
