"""A four-layer convolutional net for figure 1: ReLU or tanh, and no regularisation of any kind.

    python main.py --config=experiments/figure1_net.py:fashion_mnist,relu
    python main.py --config=experiments/figure1_net.py:cifar10,tanh       # the paper's data

The paper (3.1) does not specify "a four-layer convolutional neural network". This one has the
widths, kernels and pools (all maxima here) of the CIFAR-10 nets that came with cuda-convnet: three
convolutions of 5 x 5 with 32, 32 and 64 maps, each pooled 3/2, and ten outputs.
"""

from configs import alexnet

PIXELS = {'fashion_mnist': (28, 1), 'cifar10': (32, 3)}  # size and channels
FUNCTIONS = ('relu', 'tanh')


def get_config(scale: str = 'fashion_mnist,relu'):
    """Return the config; `scale` is one of PIXELS, a comma and one of FUNCTIONS."""
    data, _, function = scale.partition(',')
    if data not in PIXELS or function not in FUNCTIONS:
        known = f'{" or ".join(PIXELS)}, a comma, {" or ".join(FUNCTIONS)}'
        raise ValueError(f"'{scale}' is not {known}")
    config = alexnet.get_config('fashion_mnist')
    config.name, config.scale = f'figure1_{function}', data
    config.epochs = {'fashion_mnist': 1.0, 'cifar10': 40.0}[data]
    net(config.model, data, function)
    config.data.name = data
    if data == 'cifar10':
        config.data.train, config.data.validation = 'train[:45000]', 'train[45000:]'
    config.data.test = 'test[:1000]'  # it is about training errors
    size, _ = PIXELS[data]
    config.preprocess.resize_px = config.preprocess.image_px = size
    config.preprocess.update(crop=False, mirror=False, colour_noise=0.0, noise_divisor=1.0)
    config.preprocess.scale = 1 / 64  # about unit variance
    config.optimizer.weight_decay = 0.0
    for kind in ('weights', 'biases'):
        config.optimizer[kind].update(kind='constant', rate=0.01)
    config.optimizer.late_freeze.layer = 'none'
    config.loop.log_every_steps = 10
    config.loop.evaluate_every_epochs = config.loop.checkpoint_every_epochs = config.epochs
    config.loop.tensorboard = False
    return config


def net(model, data: str, function: str) -> None:
    """Replace the eight layers of AlexNet by three convolutions and a fully connected layer."""
    size, channels = PIXELS[data]
    model.input_px, model.channels, model.towers = size, channels, 1
    model.layers = ('conv1', 'conv2', 'conv3', 'fc8')
    model.init_scaling = 'none'
    for name, features in (('conv1', 32), ('conv2', 32), ('conv3', 64)):
        model[name].update(features=features, kernel_px=5, stride_px=1, padding_px=alexnet.SAME_5)
        model[name].ops = ('pool', function)
    for name in model.layers:
        model[name].update(reads='all', init='xavier', bias=0.0)  # scaled by itself: Glorot, Bengio
