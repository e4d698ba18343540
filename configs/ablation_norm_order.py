"""Ablation: the paper's order in conv1, ReLU before LRN before pooling.

    python main.py --config=configs/ablation_norm_order.py

The paper: LRN "after applying the ReLU nonlinearity in certain layers" (3.3, 3.5). In run 145 the
first LRN sees conv1's signed values, is pooled, and the ReLU comes last; a negative value then
takes part in the sums of squares of its neighbours. In conv2 both have ReLU, LRN, pool.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='ReLU, LRN, pool in conv1',
    source='paper 3.5 against the program',
    data='none',
    top1=None,
    top5=None,
    words='not compared in 2012',
)


def get_config(scale: str = 'quickstart'):
    """Base, conv1 in the paper's order."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_norm_order'
    config.model.conv1.then = ('relu', 'lrn', 'pool')
    return config
