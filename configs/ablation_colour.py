"""Ablation: no colour noise.

    python main.py --config=configs/ablation_colour.py

The paper: it "reduces the top-1 error rate by over 1 %" (4.1). It gives no top-5 error and no data
set, and no run was found. The source's division by 1.1 is also removed, because it is part
of the noise.

Grey images have one principal component, the grey value. On Fashion-MNIST the noise is therefore a
single brightness offset per image, added to all of its pixels.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no colour noise',
    source='paper 4.1',
    data='ILSVRC, year not given',
    top1=1.0,
    top5=None,
    words='the paper: "over 1 %"; on grey images only brightness varies',
)


def get_config(scale: str = 'quickstart'):
    """Return the base without colour noise and its division."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_colour'
    config.preprocess.colour_noise, config.preprocess.noise_divisor = 0.0, 1.0
    return config
