"""torchvision's `alexnet`: the one-tower net of Krizhevsky (2014), as PyTorch users know it.

    python main.py --config=configs/variant_torchvision.py:imagenet2012
    python -m alexnet_jax weights import torchvision alexnet-owt-7be5be79.pth --workdir=W

The weights: alexnet-owt-7be5be79.pth, 244 MB, 61,100,840 parameters, from
`torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url`. Expect on ILSVRC-2012 val, centre crop,
according to torchvision: 56.522 % top-1 and 79.066 % top-5 accuracy (not run here: neither the file
nor the data were available).

The net: widths 64-192-384-256-256, padding 2 in conv1, no LRN, inverted dropout before fc6 and fc7
(after conv5's pooling and after fc6's ReLU), pixels divided by 255, minus a mean and divided by a
standard deviation per channel. These are 0.229, 0.224 and 0.225; here all are 0.226, and an import
absorbs the difference into conv1's weights.

The training is that of torchvision's reference script (SGD, 0.01 divided by ten after 30 and 60
of 90 epochs, decay 1e-4, batch 256), with two differences: its crops vary in size and proportions
(RandomResizedCrop), and its biases have weight decay and a random initialisation.
"""

from configs import alexnet

WIDTHS = dict(conv1=64, conv2=192, conv3=384, conv4=256, conv5=256, fc6=4096, fc7=4096)


def get_config(scale: str = 'quickstart'):
    """Return torchvision's net and preprocessing, at one of alexnet.SCALES."""
    config = alexnet.get_config(scale)
    config.name = 'variant_torchvision'
    config.batch_size = 256 if scale.startswith('imagenet') else 128
    if scale.startswith('imagenet'):
        config.epochs = 90.0
    net(config.model, divisor=4 if scale == 'quickstart' else 1)
    preprocess = config.preprocess
    preprocess.mean, preprocess.scale = 'channel', 1 / (255 * 0.226)
    preprocess.colour_noise, preprocess.noise_divisor = 0.0, 1.0
    # 'dexp' with factor 100 and two switches: divided by ten after one and two thirds.
    rate = config.optimizer.weights.rate
    rates = alexnet.schedule('dexp', rate, factor=100.0, switches=2)
    config.optimizer.weights.update(rates)
    config.optimizer.biases.update(rates)
    config.optimizer.weight_decay = 1e-4
    config.optimizer.late_freeze.layer = 'none'
    return config


def net(model, divisor: int) -> None:
    """Turn the table of 2012 into torchvision's, its hidden widths divided."""
    model.towers = 1
    model.dropout.kind = 'inverted'
    for name in model.layers:
        layer = model[name]
        layer.reads, layer.init, layer.bias = 'all', 'fan_in_uniform', 0.0
        if name in WIDTHS:
            layer.features = WIDTHS[name] // divisor
    model.conv1.padding_px = alexnet.SAME_5  # 2 on each side
    model.conv1.ops = model.conv2.ops = ('relu', 'pool')
    model.conv5.ops = ('relu', 'pool', 'dropout')
    model.fc6.ops = ('relu', 'dropout')
    model.fc7.ops = ('relu',)
