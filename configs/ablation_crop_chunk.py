"""Ablation: 32 consecutive images share one crop and one reflection, as in the 2012 program.

    python main.py --config=configs/ablation_crop_chunk.py

The paper does not mention it: it has "random 224 x 224 patches (and their horizontal reflections)"
(4.1). The base draws a crop for every image, so here the *ablation* is what was run in 2012: four
crops per batch instead of 128. Both draw the colour noise separately for every image.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='32 images share a crop',
    source='the program',
    data='none',
    top1=None,
    top5=None,
    words='not compared in 2012',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with crops and mirrors shared by 32 images."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_crop_chunk'
    config.preprocess.images_per_crop = 32
    return config
