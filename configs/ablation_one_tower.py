"""Ablation: one tower, with half the feature maps in conv1 to conv4 (run 145-half).

    python main.py --config=configs/ablation_one_tower.py

The paper: two towers reduce the errors "by 1.7 % and 1.2 %, respectively, as compared with a net
with half as many kernels in each convolutional layer trained on one GPU" (3.2). Its last
convolutional layer and fully connected layers are not halved, because they contain most of the
parameters (footnote 2). The source: run 145-half, 39.17 / 18.23 % against run 145's 37.47 / 17.00 %
on ILSVRC-2010 test, ten views, one seed each.

48-128-192-192-256-4096-4096-1000, 59,798,312 parameters; at quickstart a quarter of the widths.
The ablation is about width as much as about towers: a layer of the base that reads its own tower
reads as many maps as the same layer here.

Run 145-half's biases ended at a rate of 0.002 in conv1 and conv2 and of 0.02 in the other layers,
run 145's at 0.002 in every layer (layer-params-145-half.cfg, layer-params-145-2010.cfg). Here all
follow the base's schedule, which divides the rate once, so that the net is the only change.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='one tower, half the maps',
    source='paper 3.2; runs 145-half, 145',
    data='ILSVRC-2010 test',
    top1=1.7,
    top5=1.2,
    words='',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with one tower, conv1 to conv4 halved."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_one_tower'
    model = config.model
    model.towers = 1
    for name in ('conv1', 'conv2', 'conv3', 'conv4'):
        model[name].features //= 2
    model.conv3.reference_fan_in = 3 * 3 * 128
    return config
