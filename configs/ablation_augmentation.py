"""Ablation: no random crops or mirrors: every epoch uses the centre crop of every image.

    python main.py --config=configs/ablation_augmentation.py

The paper: "Without this scheme, our network suffers from substantial overfitting, which would have
forced us to use much smaller networks" (4.1). It gives no figure, and no run was found. Colour
noise is still used.

Evaluation is unchanged: the single view is the centre crop, and the ten views include corner crops
and mirror images, which this net has never seen in training.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no crops, no mirrors',
    source='paper 4.1',
    data='none',
    top1=None,
    top5=None,
    words='substantial overfitting; ten views include crops and mirrors not seen in training; '
    'table.csv has one view',
)


def get_config(scale: str = 'quickstart'):
    """Return the base without random crops and mirrors."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_augmentation'
    config.preprocess.crop = config.preprocess.mirror = False
    return config
