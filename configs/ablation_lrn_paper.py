"""Ablation: LRN's alpha as printed in the paper, not divided by the window size.

    python main.py --config=configs/ablation_lrn_paper.py

The paper: k = 2, n = 5, alpha = 10^-4, beta = 0.75, "determined using a validation set", where
alpha multiplies the sum (3.3). The source divides alpha by n, as Caffe and PyTorch do, but
TensorFlow does not. The printed formula normalises five times as strongly as the net of 2012.

The two were not compared in 2012. The closest comparison, on ILSVRC-2012 val, ten views, one seed
each: run 135 is run 131 with k = 2 instead of 1, which halves alpha / k: 41.07 / 18.42 % against
40.93 / 18.57 %. Their net differs from run 145's in other ways too (ablation_norm_order.py).
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row="LRN's alpha five times larger",
    source='paper 3.3 against the program',
    data='none',
    top1=None,
    top5=None,
    words='not compared in 2012; k = 1 against k = 2: runs 131, 135',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with alpha 1e-4."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_lrn_paper'
    config.model.lrn.alpha = 1e-4
    return config
