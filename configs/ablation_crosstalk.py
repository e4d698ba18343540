"""Ablation: no cross-talk between the two towers before fc8; slightly wider towers (run 150).

    python main.py --config=configs/ablation_crosstalk.py

Not in the paper. The source: run 150, 41.83 / 19.33 % against run 145's 40.66 / 18.21 % on
ILSVRC-2012 val, ten views, one seed each. Its towers are wider to compensate for the lost
connections: 160 maps per tower in conv2 (128 in the base), 4096 units per tower in fc6 (2048); fc7
keeps 2048 per tower (layers-150.cfg, sections fc4096a/b and fc2048ba/bb). 60,714,408 parameters; at
quickstart a quarter of these widths.

Both runs' biases kept their rate of 0.02 to the end (layer-params-150.cfg, layer-params-145.cfg).
Here they follow the base's schedule, which divides it once, so that the towers are the only change.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='no cross-talk between towers',
    source='runs 150, 145',
    data='ILSVRC-2012 val',
    top1=1.17,
    top5=1.12,
    words='wider towers: conv2 by a quarter, fc6 doubled',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with the widths of run 150; layers before fc8 read their own tower."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_crosstalk'
    model = config.model
    for name in ('conv3', 'fc6', 'fc7'):
        model[name].reads = 'own'
    model.conv2.features = model.conv2.features * 160 // 128
    model.fc6.features *= 2
    model.conv3.reference_fan_in = 3 * 3 * 160
    model.fc6.reference_fan_in = 6 * 6 * 128
    return config
