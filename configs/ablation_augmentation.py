"""Ablation: no crops and no mirrors: every image is its centre, as it stands, in every epoch.

    python main.py --config=configs/ablation_augmentation.py

The paper: "Without this scheme, our network suffers from substantial overfitting, which would have
forced us to use much smaller networks" (4.1). No figure, no run found. The colour noise stays.

At test nothing changes: one view is the centre, ten are still corners and mirror images, which such
a net has never seen.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no crops, no mirrors',
    source='paper 4.1',
    data='none',
    top1=None,
    top5=None,
    words='substantial overfitting; ten views show it crops and mirrors it never saw, one view '
    'is in table.csv',
)


def get_config(scale: str = 'quickstart'):
    """Base, its offsets fixed, its mirrors off."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_augmentation'
    config.preprocess.crop = config.preprocess.mirror = False
    return config
