"""Ablation: no local response normalisation (run 148: no normalisation layer of either kind).

    python main.py --config=configs/ablation_lrn.py

The paper: LRN "reduces our top-1 and top-5 error rates by 1.4 % and 1.2 %" (3.3). The source: run
148, 42.03 / 19.36 % against run 145's 40.66 / 18.21 % on ILSVRC-2012 val, ten views, one seed each.
On CIFAR-10 the paper reports a four-layer net at 13 % test error without and 11 % with it.

The learning rates of both runs were changed by hand, and their biases kept a rate of 0.02 to the
end (layer-params-148.cfg, layer-params-145.cfg). Here all rates follow the base's schedules, so
that normalisation is the only change.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no normalisation',
    source='paper 3.3; runs 148, 145',
    data='ILSVRC-2012 val',
    top1=1.4,
    top5=1.2,
    words='the spatial norm is removed as well',
)


def get_config(scale: str = 'quickstart'):
    """Return the base without 'lrn' and 'spatial_norm' in any layer."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_lrn'
    for name in config.model.layers:
        layer = config.model[name]
        layer.ops = tuple(op for op in layer.ops if op not in ('lrn', 'spatial_norm'))
    return config
