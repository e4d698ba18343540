"""Fine-tuning: continue training a net on new images and classes.

    python -m alexnet_jax prepare folder --source=my_images --name=flowers
    python main.py --config=configs/finetune.py --config.data.name=flowers \\
        --config.init_from=workdirs/alexnet-imagenet2012-0 --workdir=workdirs/flowers

The net must be the one that `init_from` (WORKDIR, or WORKDIR:step) was trained with. The default is
the base at imagenet2012; another scale and another config follow the colon:

    --config=configs/finetune.py:imagenet2012,variant_torchvision      # also after `weights import`
    --config=configs/finetune.py:quickstart

Layers with the same name and shape are copied from the source, and the others are initialised from
scratch; one log line lists them. The last layer has one unit for each class of the data
(`model.fc8.features=0`), and is copied only if the class names are the same. To copy fewer layers
(the quotes are for the shell):

    --config.init_layers="('conv1', 'conv2', 'conv3', 'conv4', 'conv5')"

The mean image is also the source's, because its layers were trained on images minus that mean;
init_statistics=data computes it from the new images. Once started, a run does not need its source.
If there are only train/ and val/ folders, there is no test split: set
--config.data.test=validation.

Learning rates per layer: `--config.optimizer.multipliers.conv1=0.0` freezes conv1. The new last
layer has 10.0; set the same for other new layers.

The recipe is Caffe's for fine-tuning CaffeNet on Flickr Style (its examples/
finetune_flickr_style): a tenth of the rates used from scratch, divided by ten after
each fifth of the run, and ten times higher in the new last layer. Caffe's recipe runs 100,000 steps
of 50 images; the ten epochs here are a guess. Expect: not run here with ImageNet weights, which
were not available.
"""

import importlib

from configs import alexnet

SCALES = alexnet.SCALES


def get_config(scale: str = 'imagenet2012'):
    """Return the recipe for a net: 'SCALE', or 'SCALE,CONFIG' with the name of a file here."""
    scale, _, base = scale.partition(',')
    config = importlib.import_module(f'configs.{base or "alexnet"}').get_config(scale)
    config.name = 'finetune'
    config.init_from = ''  # WORKDIR[:step]
    config.init_statistics = 'source'
    config.init_layers = ()  # () copies all that match
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
    config.model[layers[-1]].features = 0  # the number of classes in the data
    optimizer = config.optimizer
    for kind in ('weights', 'biases'):
        rate = optimizer[kind].rate / 10
        optimizer[kind] = alexnet.schedule('dexp', rate, factor=1e4, switches=4)
    optimizer.late_freeze.layer = 'none'
    optimizer.multipliers = dict.fromkeys(layers, 1.0) | {layers[-1]: 10.0}
    return config
