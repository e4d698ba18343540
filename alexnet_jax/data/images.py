"""Decode images to the format in which a data set is stored, and encode them as JPEG.

Preparation, the readers of records, and the classification of image files all use this module, so
their results are bitwise identical. simplejpeg decodes plain JPEGs of the stored size: its output
is bitwise identical to Pillow's, it takes half the CPU time, and other threads can run meanwhile.
Pillow reads everything else.
"""

import contextlib
import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's own limit, above which it warns of decompression bombs. ImageNet's pictures are below.
MOST_PIXELS = 89_478_485
# Some of those that Pillow reads: its PostScript would start an interpreter.
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'PPM', 'TIFF', 'WEBP', 'AVIF', 'JPEG2000')


class BadImage(ValueError):
    """Bytes that cannot be decoded; the message completes '<file> ...': 'is not an image'."""


def decode(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode a picture to uint8 of `shape` [H, W, C], see `decode_into`."""
    out = np.empty(shape, np.uint8)
    decode_into(encoded, out)
    return out


def decode_into(encoded: bytes | memoryview, out: np.ndarray) -> None:
    """Decode a picture into `out`, uint8 [H, W, C], contiguous; see `stored` for the conversions.

    The format is recognised by the bytes, not by a name. The first frame of an animation is read,
    and the first page of several.

    Raises:
        BadImage: it cannot be decoded, or is too large to be decoded safely.
    """
    encoded = bytes(encoded)
    with contextlib.suppress(ValueError):  # not a JPEG, or damaged: Pillow decides
        if _is_plain_jpeg(encoded, out.shape):
            space = 'GRAY' if out.shape[2] == 1 else 'RGB'
            simplejpeg.decode_jpeg(encoded, space, buffer=out)
            return
    out[...] = np.asarray(decode_image(encoded, out.shape)).reshape(out.shape)


def _is_plain_jpeg(encoded: bytes, shape: tuple[int, ...]) -> bool:
    """Check that a JPEG's pixels need no conversion to `shape`; ValueError if it is not a JPEG."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
    spaces = ('Gray',) if shape[2] == 1 else ('Gray', 'YCbCr', 'RGB')
    # The marker of an APP1 segment, whose EXIF or XMP may turn the picture; never part of a scan.
    return (height, width) == shape[:2] and space in spaces and b'\xff\xe1' not in encoded


def decode_image(
    encoded: bytes, shape: tuple[int, int, int], most_pixels: int = MOST_PIXELS
) -> Image.Image:
    """Decode a picture by Pillow, converted to `shape`; encoding that image again saves a copy.

    An image of more than MOST_PIXELS, if `most_pixels` allows it, is first shrunk to at least twice
    `shape`, a JPEG while it is read.

    Raises:
        BadImage: it cannot be decoded, or is too large to be decoded safely.
    """
    Image.MAX_IMAGE_PIXELS = None  # the limit below replaces Pillow's
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as found:
            pixels = found.width * found.height
            if pixels <= most_pixels:
                return stored(found if pixels <= MOST_PIXELS else _shrunk(found, shape), shape)
    except UnidentifiedImageError:
        raise BadImage('is not an image of a known format (HEIC: convert it to JPEG)') from None
    except Exception as error:  # decoders raise many types for damaged files
        reason = str(error) or type(error).__name__
        raise BadImage(f'cannot be read as an image: {reason}') from None
    raise BadImage(
        f'has {pixels:,} pixels; more than {most_pixels:,} may be a decompression bomb: '
        f'make it smaller (`prepare ... --max_megapixels={-(-pixels // 10**6)}` accepts it)'
    )


def stored(picture: Image.Image, shape: tuple[int, int, int]) -> Image.Image:
    """Convert a picture to the stored form of a data set, of `shape` [H, W, C].

    It is turned upright by its EXIF tag, alpha is composited on black, 16 bits are cut to the upper
    8, CMYK and palettes become RGB, colour becomes grey or grey is repeated. Then the largest
    centre part of the stored proportions is resized, shorter side to shorter side, bicubic and
    antialiased. A picture of the stored size and kind is not changed.

    Black is also what surrounds an image elsewhere (crops beyond the border, the padding of a
    convolution), and the background of Fashion-MNIST.

    Raises:
        ValueError: the range of its pixels is not known (32 bits an entry).
    """
    height, width, channels = shape
    picture = _upright(picture)
    if picture.mode[0] in 'IF':
        picture = _upper_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'black'), picture)
    if picture.mode not in ('L', 'RGB'):
        picture = picture.convert('RGB')
    wanted = 'L' if channels == 1 else 'RGB'
    if picture.mode != wanted:  # it would copy, and a copy of a large picture is large
        picture = picture.convert(wanted)
    if picture.size == (width, height):  # fitting would copy it
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)


def jpeg(image: np.ndarray | Image.Image, quality: int) -> bytes:
    """Encode uint8 RGB [H, W, 3], or Pillow's image of it, as JPEG (4:2:0, as cameras do)."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, 'jpeg', quality=quality, comment=b'')  # not the source's
    return buffer.getvalue()


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()  # now, so that damaged pixels are not mistaken for a damaged tag below
    with contextlib.suppress(Exception):  # real files have tags that cannot be read
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _upper_bits(picture: Image.Image) -> Image.Image:
    """Return the upper 8 bits of 16-bit grey, which Pillow would clip at 255."""
    values = np.asarray(picture)
    if picture.mode == 'F' or not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError('its pixels are floating-point numbers or have more than 16 bits')
    return Image.fromarray((values >> 8).astype(np.uint8))


def _shrunk(picture: Image.Image, shape: tuple[int, int, int]) -> Image.Image:
    """Shrink a large picture by an integer factor, to at least twice `shape`."""
    height, width, _ = shape
    picture.draft(None, (2 * width, 2 * height))  # a JPEG is decoded at 1/2, 1/4 or 1/8
    factor = min(picture.width // (2 * width), picture.height // (2 * height))
    if factor < 2 or picture.mode not in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA'):
        return picture
    picture = _upright(picture)
    mode = 'RGBA' if picture.has_transparency_data else 'RGB'
    return (picture if picture.mode == mode else picture.convert(mode)).reduce(factor)
