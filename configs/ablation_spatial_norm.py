"""Ablation: no spatial norm behind conv2's LRN.

    python main.py --config=configs/ablation_spatial_norm.py

The paper does not know this layer, which stands in the source alone. Nobody has compared it by
itself: run 167 takes conv2's LRN away with it, 40.49 / 18.12 % against run 170's 40.53 / 18.05 % on
ILSVRC-2012 val, ten views, one seed each.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no spatial norm',
    source='the program; runs 167, 170',
    data='ILSVRC-2012 val',
    top1=None,
    top5=None,
    words="with conv2's LRN gone too: -0.04 / +0.07",
)


def get_config(scale: str = 'quickstart'):
    """Base, 'spatial_norm' taken out of conv2's list."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_spatial_norm'
    then = config.model.conv2.then
    config.model.conv2.then = tuple(word for word in then if word != 'spatial_norm')
    return config
