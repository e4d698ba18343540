"""A picture, however it is encoded, as the data set holds it; and into a JPEG.

One way for all: preparation, reading of sets with images of all sizes, and image files that are to
be classified go through `decode`, and so get the same bits.
"""

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's own limit, above which it warns of decompression bombs. ImageNet's pictures are below.
MOST_PIXELS = 89_478_485
# Of those that Pillow reads; its PostScript would start an interpreter.
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'PPM', 'TIFF', 'WEBP', 'AVIF', 'JPEG2000')


class BadImage(ValueError):
    """These bytes give no image; what it says completes a sentence: '<file> is no image'."""


def picture(encoded: bytes, px: int) -> np.ndarray:
    """An encoded picture in the form of 2012: uint8 RGB [px, px, 3], see `stored`.

    The paper's section 2: the shorter side is resized to 256 and the central square kept.

    Raises:
        BadImage: it cannot be decoded, or is too large to be decoded safely.
    """
    return decode(encoded, (px, px, 3))


def decode(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """An encoded picture as uint8 of `shape` (height, width, channels), see `stored`.

    What it is called or claims to be does not matter: the bytes are looked at. Of an animation the
    first frame, of several pages the first.

    Raises:
        BadImage: it cannot be decoded, or is too large to be decoded safely.
    """
    return np.asarray(decode_image(encoded, shape)).reshape(shape)


def decode_image(encoded: bytes, shape: tuple[int, int, int]) -> Image.Image:
    """As `decode`, for Pillow; to encode it again from there saves a copy.

    Raises:
        BadImage: as `decode`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as found:
            if found.width * found.height > MOST_PIXELS:
                raise BadImage(_too_large(f'{found.width:,} x {found.height:,}'))
            return _fitted(found, shape)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage('is no image') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(_too_large('too many')) from None
    except Exception as error:  # of damaged files decoders raise whatever they stumble over
        reason = str(error) or type(error).__name__
        raise BadImage(f'cannot be read as an image: {reason}') from None


def stored(picture: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture in the data set's form: uint8 [height, width, channels] of `shape`.

    Turned upright by its EXIF tag, alpha laid on black, 16 bits cut to their upper 8, CMYK and
    palettes made RGB, colour made grey (or grey repeated) as the data has it; then the largest
    centre part of the stored proportions is resized, shorter side to shorter side, bicubic and
    antialiased. A picture of the stored size and kind comes through unchanged.

    Why black: it is what surrounds an image in this program (a crop that hangs over, a margin, a
    convolution's padding), and what Fashion-MNIST's clothes lie on.

    Raises:
        ValueError: pixels whose range is not known (32 bits an entry).
    """
    return np.asarray(_fitted(picture, shape)).reshape(shape)


def _fitted(picture: Image.Image, shape: tuple[int, int, int]) -> Image.Image:
    height, width, channels = shape
    picture = _upright(picture)
    if picture.mode.startswith('I'):
        picture = _upper_bits(picture)
    if picture.mode == 'F':
        raise ValueError('its pixels are floating-point numbers of unknown range')
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
    """uint8 RGB [H, W, 3], or Pillow's image of it, as a JPEG (4:2:0, as cameras write it)."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, 'jpeg', quality=quality, comment=b'')  # the source's is not data
    return buffer.getvalue()


def planes(image: Image.Image) -> np.ndarray:
    """Pillow's RGB image as uint8 [3, H, W], which it has quicker than [H, W, 3]."""
    lines = np.frombuffer(image.tobytes('raw', 'RGB;L'), np.uint8)  # red, green, blue of each line
    return lines.reshape(image.height, 3, image.width).transpose(1, 0, 2)


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()  # now, so that damaged pixels are not mistaken for a damaged tag below
    with contextlib.suppress(Exception):  # a tag that cannot be read says nothing; there are such
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _upper_bits(picture: Image.Image) -> Image.Image:
    """Pillow keeps 16-bit grey as integers, and would clip them at 255."""
    values = np.asarray(picture)
    if values.size and not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError('its pixels are integers of more than 16 bits')
    return Image.fromarray((values >> 8).astype(np.uint8))


def _too_large(size: str) -> str:
    return f'has {size} pixels, and more than {MOST_PIXELS:,} may be a decompression bomb'
