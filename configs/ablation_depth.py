"""Ablation: one of the middle convolutional layers removed.

    python main.py --config=configs/ablation_depth.py                     # conv4, quickstart
    python main.py --config=configs/ablation_depth.py:quickstart,conv3    # or conv5

The paper: "removing any of the middle layers results in a loss of about 2 % for the top-1
performance of the network" (7). No run was found, and the paper does not explain how the
neighbouring layers were connected. Here nothing else is removed with the layer:

| removed | changes in the other layers | parameters, full size |
|---|---|---|
| conv3 | conv4 reads both towers instead: the net without conv4, except for conv4's bias of 1 | 60,301,288 |
| conv4 | none: conv5 reads conv3's maps of its tower | 60,301,288 |
| conv5 | conv4 is pooled instead; fc6 reads 384 maps instead of 256, so there are more parameters | 79,396,968 |

conv1 and conv2 are not middle layers: they reduce the maps from 224 px to 13.
"""  # noqa: E501 (a table)

from configs import Claim, alexnet

MIDDLE = ('conv3', 'conv4', 'conv5')
CLAIM = Claim(
    row='one convolution removed (conv4)',
    source='paper 7',
    data='ILSVRC, year not given',
    top1=2.0,
    top5=None,
    words='approximate; any of the middle layers',
)


def get_config(scale: str = 'quickstart,conv4'):
    """Return the base without a layer; `scale`: one of alexnet.SCALES, a comma, one of MIDDLE."""
    scale, _, removed = scale.partition(',')
    removed = removed or 'conv4'
    if removed not in MIDDLE:
        raise ValueError(f"layer '{removed}' is not one of {', '.join(MIDDLE)}")
    config = alexnet.get_config(scale)
    config.name = f'ablation_depth_{removed}'
    model = config.model
    model.layers = tuple(name for name in model.layers if name != removed)
    if removed == 'conv3':
        model.conv4.reads, model.conv4.reference_fan_in = 'all', model.conv3.reference_fan_in
    if removed == 'conv5':
        model.conv4.ops = model.conv5.ops
        model.fc6.reference_fan_in = 6 * 6 * 384
    return config
