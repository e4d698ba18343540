"""Archives, development kits and pictures as ImageNet has them, for tests."""

import gzip
import io
import tarfile

import numpy as np
from PIL import Image


def tar_bytes(named):
    """A tar file of (name, contents), in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for name, content in named:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_devkit(path, year, synsets, truths):
    """Write a development kit.

    Args:
        path: the .tar.gz file.
        year: 2010 or 2012.
        synsets: WordNet id, words and number of training pictures of number 1, 2, ...
        truths: {file name: numbers of the classes}.
    """
    from scipy.io import savemat

    rows = np.zeros(
        len(synsets) + 1,
        [(f'ILSVRC{year}_ID', 'O'), ('WNID', 'O'), ('words', 'O'), ('num_train_images', 'O')],
    )
    for i, (wnid, words, count) in enumerate(synsets):
        rows[i] = (float(i + 1), wnid, words, float(count))
    # The real kit lists the nodes above the classes, too.
    rows[-1] = (float(max(1000, len(synsets)) + 1), 'n00001740', 'entity', 0.0)
    meta = io.BytesIO()
    savemat(meta, {'synsets': rows[:, None]})
    folder = 'devkit-1.0/data' if year == 2010 else 'ILSVRC2012_devkit_t12/data'
    named = [(f'{folder}/meta.mat', meta.getvalue())]
    for name, numbers in truths.items():
        named.append((f'{folder}/{name}', ''.join(f'{n}\n' for n in numbers).encode()))
    path.write_bytes(gzip.compress(tar_bytes(named)))


def jpeg(picture, **options):
    """Return a picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, 'jpeg', **({'quality': 92} | options))
    return buffer.getvalue()


def odd_ones(photo):
    """Return the kinds of file in the real archives that are no plain JPEGs, and other odd ones."""
    png, exif = io.BytesIO(), Image.Exif()
    photo.save(png, 'png')
    exif[0x0112] = 6  # held upright: to be turned by 90 degrees
    return {
        'CMYK': jpeg(photo.convert('CMYK')),
        'PNG': png.getvalue(),
        'grey': jpeg(photo.convert('L')),
        'EXIF': jpeg(photo, exif=exif),
        'progressive': jpeg(photo, progressive=True),
        'narrow': jpeg(photo.resize((1, 500))),
        'flat': jpeg(photo.resize((500, 1))),
        'tiny': jpeg(photo.resize((1, 1))),
        'large': jpeg(photo.resize((4000, 3000))),
        'more bytes than it needs': jpeg(photo) + b'\0',
    }
