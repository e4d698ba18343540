"""Ablation: pooling windows that do not overlap, 2 x 2 px every 2 px (run 147).

    python main.py --config=configs/ablation_overlap.py

The paper: overlapping "reduces the top-1 and top-5 error rates by 0.4 % and 0.3 %" against windows
of 2 px, "which produces output of equivalent dimensions" (3.4). The source: run 147,
41.06 / 18.51 % against run 145's 40.66 / 18.21 % on ILSVRC-2012 val, ten views, one seed each.

Run 147 pads conv2 by 1 px instead of 2, and conv5 by 0. As pooling windows may extend past the edge
(cuda-convnet), this keeps the dimensions: 55 px -> 28, conv2 26 -> 13, conv5 11 -> 6; at quickstart
27 -> 14, 12 -> 6, 4 -> 2. The net has the same number of parameters as the base.

In 2012 the windows were not the only difference. Run 147's biases ended at a rate of 0.002, run
145's at 0.02, and run 147's notes do not mention the end of the colour noise, which was at epoch 67
in run 145 (layer-params-147.cfg, layer-params-145.cfg). Here rates and noise follow the base's
schedules, which divide the biases' rate once, as run 147 did.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='pooling windows do not overlap',
    source='paper 3.4; runs 147, 145',
    data='ILSVRC-2012 val',
    top1=0.4,
    top5=0.3,
    words='',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with pooling windows of 2 px and the paddings of run 147."""
    config = alexnet.get_config(scale)
    config.name = 'ablation_overlap'
    model = config.model
    model.pool.window_px, model.pool.rounding = 2, 'up'
    model.conv2.padding_px = alexnet.SAME_3
    model.conv5.padding_px = ((0, 0), (0, 0))
    return config
