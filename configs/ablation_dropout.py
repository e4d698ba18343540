"""Ablation: no dropout.

    python main.py --config=configs/ablation_dropout.py

The paper: "Without dropout, our network exhibits substantial overfitting. Dropout roughly doubles
the number of iterations required to converge" (4.2). It gives no figure, and no run was found. The
halving of fc6's and fc7's outputs at test time is also removed.

A run of a few epochs hardly overfits, so it measures the cost of dropout rather than its benefit.
At quickstart it may measure neither: without dropout the logits are several times larger, the
base's rates are too high for them, and with some seeds the loss jumps to ln(10) and stays there.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no dropout',
    source='paper 4.2',
    data='none',
    top1=None,
    top5=None,
    words='substantial overfitting; converges in half the iterations',
)


def get_config(scale: str = 'quickstart'):
    """Return the base without 'dropout' in any layer."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_dropout'
    for name in config.model.layers:
        layer = config.model[name]
        layer.ops = tuple(op for op in layer.ops if op != 'dropout')
    return config
