"""Ablation: no spatial norm after conv2's LRN.

    python main.py --config=configs/ablation_spatial_norm.py

Only the source has this layer; the paper does not mention it. No run isolates it. Run 167 has
neither it nor conv2's LRN: 40.49 / 18.12 % against run 170's 40.53 / 18.05 % on ILSVRC-2012 val,
ten views, one seed each. That comparison is confounded with the schedule: run 167's weight rates
fall 1000-fold over the run (`dexp[1000,4]`) and its noise ends at epoch 63, run 170's fall 250-fold
and its noise ends at epoch 68. So no figure is claimed. Run 169, the same net as run 170 with a
500-fold decrease, has 40.60 / 18.11 %: the schedule alone has as large an effect.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no spatial norm',
    source='the program; runs 167, 170',
    data='ILSVRC-2012 val',
    top1=None,
    top5=None,
    words="-0.04 / +0.07 with conv2's LRN removed as well; confounded with the schedule",
)


def get_config(scale: str = 'quickstart'):
    """Return the base without 'spatial_norm' in conv2."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_spatial_norm'
    ops = config.model.conv2.ops
    config.model.conv2.ops = tuple(op for op in ops if op != 'spatial_norm')
    return config
