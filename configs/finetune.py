"""Fine-tuning: a trained net on other images and other classes.

    python -m alexnet_jax prepare folder --source=my_images --name=flowers
    python main.py --config=configs/finetune.py --config.data.name=flowers \\
        --config.init_from=workdirs/alexnet-imagenet2012-0 --workdir=workdirs/flowers

The net is the one that `init_from` (WORKDIR, or WORKDIR:step) was trained as, 2012's if nothing
else is said; scale and config of another one follow the colon:

    --config=configs/finetune.py:imagenet2012,variant_torchvision      # of `weights import` too
    --config=configs/finetune.py:quickstart

Layers are carried over by name where the shapes agree, and the rest starts fresh; one line prints
which. The last layer starts fresh too where the classes differ by name, as wide as the data has
classes (`model.fc8.features=0`). To carry over fewer (the quotes are for the shell):

    --config.init_layers="('conv1', 'conv2', 'conv3', 'conv4', 'conv5')"

The mean image is the source's too, as its layers have learned to see images minus that one;
init_statistics=data measures the new images. A started run needs its source no more. Pictures in
train/ and val/ alone have no split to test on: --config.data.test=validation.

Rates a layer: `--config.optimizer.multipliers.conv1=0.0` freezes conv1; 10.0 is the new last
layer's, and for other fresh layers to be set.

The recipe is Caffe's for fine-tuning CaffeNet on Flickr Style (its examples/
finetune_flickr_style): rates of a tenth of those from scratch, divided by ten after each fifth of
the run, ten times as high in the new last layer. There it was 100,000 steps of 50 images; ten
epochs are a guess. Expect: not run here on ImageNet's weights, which were not at hand.
"""

import importlib

from configs import alexnet

SCALES = alexnet.SCALES


def get_config(scale: str = 'imagenet2012'):
    """Fine-tune the net of a scale: 'SCALE', or 'SCALE,CONFIG' with a file's name in configs/."""
    scale, _, base = scale.partition(',')
    config = importlib.import_module(f'configs.{base or "alexnet"}').get_config(scale)
    config.name = 'finetune'
    config.init_from = ''  # WORKDIR[:step]
    config.init_statistics = 'source'
    config.init_layers = ()  # all that match
    config.epochs = 10.0
    config.data = dict(
        name='none',
        data_dir='data',
        train='train',
        validation='validation',
        test='test',
        workers=-1,
        resident_gib=4.0,
    )
    layers = config.model.layers
    config.model[layers[-1]].features = 0  # as many as the data has classes
    optimizer = config.optimizer
    for kind in ('weights', 'biases'):
        rate = optimizer[kind].rate / 10
        optimizer[kind] = alexnet.schedule('dexp', rate, factor=1e4, switches=4)
    optimizer.late_freeze.layer = 'none'
    optimizer.multipliers = dict.fromkeys(layers, 1.0) | {layers[-1]: 10.0}
    return config
