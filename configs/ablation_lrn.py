"""Ablation: no local response normalisation (run 148: no normalisation layer of either kind).

    python main.py --config=configs/ablation_lrn.py

The paper: LRN "reduces our top-1 and top-5 error rates by 1.4 % and 1.2 %" (3.3). The source: run
148, 42.03 / 19.36 % against run 145's 40.66 / 18.21 % on ILSVRC-2012 val, ten views, one seed each.
The paper has CIFAR-10 too: a four-layer net at 13 % test error without and 11 % with it.

Both runs were driven by hand, and their biases kept the rate of 0.02 to the end
(layer-params-148.cfg, layer-params-145.cfg). Here rates follow the base's schedule, weights' and
biases', so that normalisation is the only change.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no normalisation',
    source='paper 3.3; runs 148, 145',
    data='ILSVRC-2012 val',
    top1=1.4,
    top5=1.2,
    words='the spatial norm is taken away too',
)


def get_config(scale: str = 'quickstart'):
    """Base, and 'lrn' and 'spatial_norm' taken out of every layer's list."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_lrn'
    for name in config.model.layers:
        layer = config.model[name]
        layer.ops = tuple(word for word in layer.ops if word not in ('lrn', 'spatial_norm'))
    return config
