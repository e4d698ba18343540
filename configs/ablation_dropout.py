"""Ablation: no dropout.

    python main.py --config=configs/ablation_dropout.py

The paper: "Without dropout, our network exhibits substantial overfitting. Dropout roughly doubles
the number of iterations required to converge" (4.2). No figure, no run found. With dropout goes the
halving of fc6's and fc7's outputs at test.

A run of few epochs hardly overfits, and sees the price of dropout rather than its worth. At
quickstart it may see neither: with nothing dropped the logits are several times as large, its rates
are too, and of some seeds the loss jumps and stays at ln(10).
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no dropout',
    source='paper 4.2',
    data='none',
    top1=None,
    top5=None,
    words='substantial overfitting; half the iterations',
)


def get_config(scale: str = 'quickstart'):
    """Base, 'dropout' taken out of every layer's list."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_dropout'
    for name in config.model.layers:
        layer = config.model[name]
        layer.ops = tuple(word for word in layer.ops if word != 'dropout')
    return config
