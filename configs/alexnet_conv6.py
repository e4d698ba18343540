"""The paper's "1 CNN*": a sixth convolutional layer over the last pooling layer (run 146).

    python main.py --config=configs/alexnet_conv6.py

The paper: "training one CNN, with an extra sixth convolutional layer over the last pooling layer,
to classify the entire ImageNet Fall 2011 release (15M images, 22K categories), and then
'fine-tuning' it on ILSVRC-2012 gives an error rate of 16.6 %" (6.1). The source: run 146-2012-2011,
38.99 / 16.62 % on ILSVRC-2012 val, ten views, one seed; run 145 has 40.66 / 18.21 %. No run has the
layer without pre-training, so its own contribution was not measured in 2012.

conv6 reads both towers' conv5: 3 x 3, pad 1, 128 maps per tower, std 0.03, bias 1, ReLU
(layers-146-2012-2011.cfg). 61,555,304 parameters with 1000 classes.

Run 146's biases kept their rate of 0.02 to the end, except conv6's (0.022 in its last file,
layer-params-146-2012-2011.cfg). Here they follow the base's schedule, so that conv6 is the only
change.

The sequence of 2012 is 145 -> 146-2009 (conv1 to conv5 carried over) -> 146-2011 (all convolutions;
a linear layer of 2 x 1024 units before its 21,843 classes) -> 146-2012-2011 (all but the last
layer). The corresponding commands, where BIG is the larger data set and SMALL the one to fine-tune
on:

    python main.py --config=configs/alexnet.py:imagenet2012 --workdir=workdirs/145
    python main.py --config=configs/finetune.py:imagenet2012,alexnet_conv6 \\
        --config.data.name=BIG --config.init_from=workdirs/145 --workdir=workdirs/146-big \\
        --config.init_layers="('conv1', 'conv2', 'conv3', 'conv4', 'conv5')" \\
        --config.optimizer.multipliers.conv6=10.0 --config.optimizer.multipliers.fc6=10.0 \\
        --config.optimizer.multipliers.fc7=10.0
    python main.py --config=configs/finetune.py:imagenet2012,alexnet_conv6 \\
        --config.data.name=SMALL --config.init_from=workdirs/146-big --workdir=workdirs/146

The second command needs init_layers: conv6 does not change the shapes of fc6 and fc7, so they would
also be carried over. The rates are those of configs/finetune.py. In 2012, 146-2009 and 146-2011
used 0.001 in the layers carried over and 0.01 in the new ones, then 0.001 in all layers after 2.2
of 6.6 and 6 of 8.1 epochs; 146-2012-2011 used 0.001 (conv1 0.0001, frozen at epoch 7; the last
layer 0.01 until epoch 9), divided by ten at epochs 22 and 42 of 54.
"""

from configs import Claim, alexnet

CLAIM = Claim(
    row='a sixth convolution after the last pooling',
    source='paper 6.1; run 146-2012-2011',
    data='none',
    top1=None,
    top5=None,
    words='with pre-training on Fall 2011: -1.7 / -1.6 on ILSVRC-2012 val',
)


def get_config(scale: str = 'quickstart'):
    """Return the base with conv6 between conv5 and fc6, at one of alexnet.SCALES."""
    config = alexnet.get_config(scale)
    config.name = 'alexnet_conv6'
    model = config.model
    model.layers = (*model.layers[:5], 'conv6', *model.layers[5:])
    model.conv6 = alexnet.conv(
        model.conv5.features, 3, 1, alexnet.SAME_3, 'all', 0.03, 1.0, 3 * 3 * 256, ('relu',)
    )
    return config
