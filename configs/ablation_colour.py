"""Ablation: no colour noise.

    python main.py --config=configs/ablation_colour.py

The paper: it "reduces the top-1 error rate by over 1 %" (4.1); no top-5, no data set, no run found.
With the noise goes the source's division by 1.1, which is there only while the noise is on.

Grey images have one principal component, the grey value itself: on Fashion-MNIST the noise is in
brightness only, one number an image added to all of its pixels, and so is what is taken away here.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no colour noise',
    source='paper 4.1',
    data='ILSVRC, not said which',
    top1=1.0,
    top5=None,
    words='top-1: more than that; brightness noise on grey images',
)


def get_config(scale: str = 'quickstart'):
    """Base, the noise's deviation 0, no division."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_colour'
    config.preprocess.colour_noise, config.preprocess.noise_divisor = 0.0, 1.0
    return config
