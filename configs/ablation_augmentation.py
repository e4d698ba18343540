"""Ablation: no random crops and no mirrors: every epoch sees the centre of every image.

    python main.py --config=configs/ablation_augmentation.py

The paper: "Without this scheme, our network suffers from substantial overfitting, which would have
forced us to use much smaller networks" (4.1). No figure, and no run found. The colour noise stays.

The tests stay: one view is the centre, and the ten views include corners and mirror images, which
this net has never seen in training.
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
    """Return the base without random crops and mirrors."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_augmentation'
    config.preprocess.crop = config.preprocess.mirror = False
    return config
