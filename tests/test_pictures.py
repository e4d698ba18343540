"""Test decoding of all kinds of pictures, refusal of damaged and huge ones, and JPEG encoding."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from alexnet_jax.data import image_files, images
from tests import sources


def photo(width=96, height=64, seed=0):
    """Smooth colours without symmetry."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, 'png')
    return buffer.getvalue()


def picture_of(encoded, px):
    return images.decode(encoded, (px, px, 3))


def reference(picture, px):
    """Do as section 2 of the paper says: resize the picture, then crop the centre."""
    ratio = px / min(picture.size)
    size = [round(edge * ratio) for edge in picture.size]
    full = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = ((edge - px) // 2 for edge in size)
    return np.asarray(full.crop((left, top, left + px, top + px))).astype(int)


@pytest.mark.parametrize('size', [(96, 64), (64, 96), (64, 64), (32, 32), (320, 256)])
def test_the_shorter_side_is_resized_and_the_centre_kept(size):
    picture = photo(*size)
    found = picture_of(png(picture), 32)
    assert found.shape == (32, 32, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference(picture, 32))


def test_a_ratio_that_leaves_a_fraction_of_a_pixel():
    """97 x 62: the largest centre square begins at 17.5."""
    square = photo(97, 62).resize((32, 32), Image.Resampling.BICUBIC, box=(17.5, 0, 79.5, 62))
    np.testing.assert_array_equal(picture_of(png(photo(97, 62)), 32), np.asarray(square))


def test_every_kind_of_picture_is_read_as_the_plain_one():
    """All of `sources.odd_ones` show the same photograph."""
    picture = photo(400, 300)
    plain = picture_of(sources.jpeg(picture), 64).astype(int)
    odd = sources.odd_ones(picture)
    for kind in ('PNG', 'progressive', 'more bytes than it needs', 'large'):
        assert np.abs(picture_of(odd[kind], 64) - plain).mean() < 3, kind
    # Pillow's way from RGB to CMYK and back is not exact.
    assert np.abs(picture_of(odd['CMYK'], 64) - plain).mean() < 6
    turned = np.asarray(ImageOps.fit(picture, (64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(picture_of(odd['EXIF'], 64) - np.rot90(turned, -1)).mean() < 3
    grey = picture_of(odd['grey'], 64)
    assert (grey == grey[..., :1]).all()
    for kind in ('narrow', 'flat', 'tiny'):
        assert picture_of(odd[kind], 64).shape == (64, 64, 3), kind


def test_predict_reads_files_the_same_way(tmp_path):
    for kind, content in sources.odd_ones(photo(300, 200)).items():
        (tmp_path / 'a.jpg').write_bytes(content)
        np.testing.assert_array_equal(
            image_files.read(tmp_path / 'a.jpg', (64, 64, 3)), picture_of(content, 64), kind
        )


def test_the_stored_size_is_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(picture_of(png(Image.fromarray(image)), 64), image)
    encoded = images.jpeg(image, 90)
    with Image.open(io.BytesIO(encoded)) as picture:
        assert picture.format == 'JPEG'
        np.testing.assert_array_equal(picture_of(encoded, 64), np.asarray(picture))


def encoded_as(picture, **how):
    buffer = io.BytesIO()
    picture.save(buffer, 'jpeg', **how)
    return buffer.getvalue()


PLAIN = [
    *({'quality': q, 'subsampling': s} for q in (5, 90, 100) for s in ('4:4:4', '4:2:2', '4:2:0')),
    {'progressive': True, 'quality': 80},
    {'optimize': True, 'restart_marker_rows': 1},
    {'comment': b'\xff\xdaExif'},
    {'icc_profile': b'\xff\xda\xff\xe2' * 40_000},
]


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('how', PLAIN, ids=range(len(PLAIN)))
def test_a_plain_jpeg_gives_pillow_s_bits_without_pillow(how, mode, monkeypatch):
    """Sizes of all remainders of a block, so that borders are covered too."""
    for size in ((64, 48), (33, 50), (17, 1), (7, 95)):
        encoded = encoded_as(photo(*size).convert(mode), **how)
        shapes = [(*size[::-1], channels) for channels in ((3,) if mode == 'RGB' else (3, 1))]
        expected = [np.asarray(images.decode_image(encoded, s)).reshape(s) for s in shapes]
        with monkeypatch.context() as patch:
            patch.setattr(images, 'decode_image', None)
            for shape, pixels in zip(shapes, expected, strict=True):
                np.testing.assert_array_equal(images.decode(encoded, shape), pixels)
                np.testing.assert_array_equal(images.decode(memoryview(encoded), shape), pixels)


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
SEGMENT = b'\xff\xe1' + (len(XMP) + 2).to_bytes(2) + XMP


@pytest.mark.parametrize(
    'change',
    [
        lambda picture: encoded_as(picture, exif=b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0'
                                                 b'\x01\0\0\0\x06\0\0\0\0\0\0\0'),
        lambda picture: b'\xff\xd8' + SEGMENT + encoded_as(picture)[2:],
        lambda picture: encoded_as(picture, icc_profile=b'\xff\xda' * 9)[:20] + SEGMENT
                        + encoded_as(picture, icc_profile=b'\xff\xda' * 9)[20:],
        lambda picture: b'\xff\xd8\xff' + encoded_as(picture)[2:],
        lambda picture: encoded_as(picture.convert('CMYK')),
        lambda picture: encoded_as(picture.resize((40, 40))),
        lambda picture: encoded_as(picture) + b'more',
        png,
    ],
    ids=['EXIF', 'XMP', 'XMP later', 'fill byte', 'CMYK', 'another size', 'more', 'PNG'],
)  # fmt: skip
def test_any_other_picture_is_read_as_pillow_reads_it(change):
    encoded, shape = change(photo(32, 32)), (32, 32, 3)
    expected = np.asarray(images.decode_image(encoded, shape))
    np.testing.assert_array_equal(images.decode(encoded, shape), expected)


def test_a_picture_turned_by_its_tag_is_turned():
    upright, turned = photo(32, 32), b'\xff\xd8' + SEGMENT + encoded_as(photo(32, 32))[2:]
    found = images.decode(turned, (32, 32, 3))
    np.testing.assert_array_equal(
        found, np.rot90(images.decode(encoded_as(upright), (32, 32, 3)), -1)
    )


@pytest.mark.parametrize('damage', [slice(-2), slice(-600), slice(150), slice(2)])
def test_a_jpeg_cut_off_is_no_picture(damage):
    with pytest.raises(images.BadImage):
        images.decode(encoded_as(photo(64, 64))[damage], (64, 64, 3))


def test_a_comment_is_not_copied():
    """One that a PNG can hold and a JPEG cannot would not even be written."""
    buffer, about = io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_text('comment', 'x' * 70_000, zip=True)
    Image.new('RGB', (256, 256)).save(buffer, 'png', pnginfo=about)
    found = images.decode_image(buffer.getvalue(), (256, 256, 3))
    assert found.info['comment']
    assert b'xxx' not in images.jpeg(found, 90)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')  # as the commands do
def test_a_damaged_exif_tag_is_no_damaged_picture():
    encoded = sources.jpeg(photo(), exif=b'Exif\0\0' + b'II*\0\xff\xff\xff\xff')
    np.testing.assert_array_equal(picture_of(encoded, 32), picture_of(sources.jpeg(photo()), 32))


def bomb(side):
    """A PNG that claims side x side grey pixels: a few bytes."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', crc)

    header = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    parts = chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(b'')), chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def test_a_picture_above_the_limit_is_shrunk_while_it_is_read(monkeypatch):
    """A JPEG, and a PNG with alpha; a smaller limit than the real one, to be quick."""
    monkeypatch.setattr(images, 'MOST_PIXELS', 10**5)
    gradient = Image.linear_gradient('L').convert('RGB').resize((1000, 1000))
    expected = np.asarray(gradient.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    clear = gradient.copy()
    clear.putalpha(Image.new('L', gradient.size, 128))  # alpha of a half, on black
    for content, pixels in ((sources.jpeg(gradient), expected), (png(clear), expected // 2)):
        with pytest.raises(images.BadImage, match='has 1,000,000 pixels; more than 100,000 may be'):
            images.decode_image(content, (32, 32, 3), 10**5)
        found = np.asarray(images.decode_image(content, (32, 32, 3), 10**6))
        assert np.abs(found - pixels).max() < 6  # JPEG, and another filter


@pytest.mark.parametrize('side', [9_500, 20_000])
def test_a_decompression_bomb_is_refused(side):
    with pytest.raises(images.BadImage, match='decompression bomb'):
        picture_of(bomb(side), 256)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is not an image'),
        (b'<html>moved</html>', 'is not an image'),
        (sources.jpeg(photo())[:600], 'cannot be read as an image: '),
        (png(photo())[:-200], 'cannot be read as an image: '),
        (bomb(100), 'cannot be read as an image: '),
    ],
)
def test_what_is_no_picture(content, message):
    with pytest.raises(images.BadImage, match=message) as caught:
        picture_of(content, 64)
    assert '\n' not in str(caught.value)
