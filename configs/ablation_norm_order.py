"""Ablation: the paper's order in conv1, ReLU before LRN before pooling.

    python main.py --config=configs/ablation_norm_order.py

The paper: LRN "after applying the ReLU nonlinearity in certain layers" (3.3, 3.5). In run 145 the
order is LRN, pool, ReLU: LRN sees conv1's signed values, and negative values contribute to
their neighbours' sums of squares. In conv2 both have ReLU, LRN, pool.

The paper's order was not run in 2012. The closest runs, on ILSVRC-2012 val, ten views, one seed
each: run 120-2012 has pool, ReLU, LRN in conv1, 41.04 / 18.71 %; run 131 LRN, pool, ReLU, 40.93 /
18.57 %. Compare these two only with each other: their net is not run 145's (32 maps per tower in
conv1, k = 1, and conv2 also reads a blurred image; layers-120.cfg, layers-131.cfg). Run 166 has run
145's net with LRN, spatial norm, pool, ReLU in conv2: 41.10 / 18.67 %, with rates that fall
1000-fold.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='ReLU, LRN, pool in conv1',
    source='paper 3.5 against the program',
    data='none',
    top1=None,
    top5=None,
    words='not compared in 2012; other orders in conv1: runs 120-2012, 131',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with the paper's order in conv1."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_norm_order'
    config.model.conv1.ops = ('relu', 'lrn', 'pool')
    return config
