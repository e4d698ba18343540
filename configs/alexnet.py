"""AlexNet as its authors ran it (runs 145 and 170 of the released 2012 program).

    python main.py --config=configs/alexnet.py                  # quickstart
    python main.py --config=configs/alexnet.py:fashion_mnist    # one of the other scales
    python main.py --config=configs/alexnet.py:pictures --config.data.name=NAME    # your own images

| scale | data | net | expect: top-1 / top-5 error, centre crop; ten views |
|---|---|---|---|
| quickstart | Fashion-MNIST at 112 px | widths / 4 | see README; minutes on a CPU |
| fashion_mnist | Fashion-MNIST at 224 px | full | for comparison: 10.1 % (its benchmark page) |
| imagenet2012 | ILSVRC-2012 | full | run 170 on val: 42.34 / 19.58 %; 40.53 / 18.05 % |
| imagenet2010 | ILSVRC-2010 | full | run 145 on test: 39.02 / 18.30 %; 37.47 / 17.00 % |
| pictures | your own at 112 px | widths / 4 | openclipart-png: 44.50 / 19.65 %; 44.75 / 19.53 % |
| pictures_full | your own at 224 px | full | not run |

Your own images must be prepared first, with `python -m alexnet_jax prepare folder --source=FOLDER
--name=NAME`. Classes, channels and splits are taken from the data; for a missing split, a tenth of
the training split is held out. The number of epochs is a guess; change it with --config.epochs.
Debian's openclipart-png has 6,484 training images and 22 classes, the largest of which makes up
27 % of the test split; its result is from one seed, twenty minutes on two busy cores.

The source of each constant is cited next to it: [p 3.3] is a section of Krizhevsky, Sutskever,
Hinton (2012), [source] the released program: `layers/layer-params-*.cfg`, with the authors' notes.
"""

from ml_collections import ConfigDict

SCALES = ('quickstart', 'fashion_mnist', 'imagenet2012', 'imagenet2010')
PICTURES = ('pictures', 'pictures_full')
RUN_170_EPOCHS = 95.0  # [source]


def get_config(scale: str = 'quickstart') -> ConfigDict:
    """Return the recipe as run, at one of SCALES or PICTURES."""
    if scale not in (*SCALES, *PICTURES):
        raise ValueError(f"scale '{scale}' is not one of {', '.join((*SCALES, *PICTURES))}")
    config = ConfigDict()
    config.name = 'alexnet'
    config.scale = scale
    config.seed = 0
    config.batch_size = 128  # [p 5]
    epochs = dict(quickstart=4.0, fashion_mnist=10.0, pictures=20.0)
    config.epochs = epochs.get(scale, RUN_170_EPOCHS)
    config.model = model()
    config.data = data(scale)
    config.preprocess = preprocess(config.get_ref('epochs'))
    config.optimizer = optimizer(config.get_ref('epochs'))
    config.loop = loop()
    # data -1: all remaining devices. placement: 'towers' or 'one_weird_trick', see mesh.py.
    config.mesh = dict(data=-1, tower=1, placement='towers', cpu_devices=0)
    # How long processes wait for others to join, and for a missing heartbeat.
    config.processes = dict(join_timeout_secs=300.0, peer_timeout_secs=60.0)
    if scale == 'imagenet2010':
        by_hand(config)
    if scale in PICTURES:
        config.model.channels = config.model.fc8.features = 0  # taken from the data
    if scale in ('quickstart', 'fashion_mnist'):
        config.model.channels = 1  # stored grey; 3 repeats the grey value
        config.model.fc8.features = 10
        config.model.init_scaling = 'fan_in'
        # These images have no margin to crop. A black one is added, 1 of their 28 px on each
        # side, and crops shift them within it.
        config.preprocess.resize_px, config.preprocess.image_px = 224, 240
        # A run of a few epochs is too short for run 170's 250-fold decrease of the rate.
        config.optimizer.weights.factor = 20.0
    if scale == 'quickstart':
        quarter(config, resize_px=112, image_px=120)
    if scale == 'pictures':
        quarter(config, resize_px=128, image_px=128)
        config.optimizer.weights.factor = 20.0
    return config


def quarter(config: ConfigDict, resize_px: int, image_px: int) -> None:
    """Divide the widths by four and use crops of 112 px: minutes on a CPU."""
    # Operations this small do not use two cores; one device per core is a quarter faster.
    config.mesh.cpu_devices = 2
    config.model.input_px = 112
    config.preprocess.update(resize_px=resize_px, image_px=image_px)
    # Units have fewer inputs, and the run few epochs: larger rates.
    config.optimizer.weights.rate, config.optimizer.biases.rate = 0.02, 0.04
    config.model.init_scaling = 'fan_in'
    narrow(config.model, 4)


def model() -> ConfigDict:
    """Return run 145's layer table: 96-256-384-384-256-4096-4096-1000, both towers together."""
    return ConfigDict(
        dict(
            layers=('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8'),
            towers=2,  # [p 3.2]
            input_px=224,
            channels=3,
            # 224 px give 55 positions, as the last window extends 3 px into zeros [source]; the
            # 227 px of later copies are a workaround. LRN before the ReLU, in conv1 only [source];
            # [p 3.5] has relu, lrn, pool.
            conv1=conv(96, 11, 4, ((0, 3), (0, 3)), 'all', 0.01, 0.0, 363, ('lrn', 'pool', 'relu')),
            # Only the [source] has a spatial norm.
            conv2=conv(
                256, 5, 1, SAME_5, 'own', 0.01, 1.0, 1200, ('relu', 'lrn', 'spatial_norm', 'pool')
            ),
            # 0.03 in conv3 to conv5: [source]; with the 0.01 of [p 5] the logits are 14 times
            # weaker. Bias 0 in conv3 and 1 in conv2, 4 and 5: [p 5] and [source] agree.
            conv3=conv(384, 3, 1, SAME_3, 'all', 0.03, 0.0, 2304, ('relu',)),
            conv4=conv(384, 3, 1, SAME_3, 'own', 0.03, 1.0, 1728, ('relu',)),
            conv5=conv(256, 3, 1, SAME_3, 'own', 0.03, 1.0, 1728, ('pool', 'relu')),
            fc6=fc(4096, 'all', 0.01, 1.0, 9216, ('relu', 'dropout')),
            fc7=fc(4096, 'all', 0.01, 1.0, 4096, ('relu', 'dropout')),
            fc8=fc(1000, 'all', 0.01, 0.0, 4096, ()),
            # The [source] divides alpha by the window's size; [p 3.3] has 1e-4.
            lrn=dict(size=5, k=2.0, alpha=1e-4 / 5, beta=0.75),
            lrn_reads='own',  # [source]; 'all': windows cross towers, as in Caffe and PyTorch
            spatial_norm=dict(size=5, k=1.0, alpha=0.001 / 25, beta=0.75),  # [source]
            # [p 3.4]. rounding: windows past the edge are dropped ('down'), or kept ('up') as in
            # cuda-convnet and Caffe. At the sizes of 2012 there are none.
            pool=dict(kind='max', window_px=3, stride_px=2, rounding='down'),
            # 'mask': zero units in training, halve all of them at test time [p 4.2; source].
            dropout=dict(keep=0.5, kind='mask'),
            # 'fan_in': multiply each std by sqrt(reference_fan_in / fan_in), so that a narrowed net
            # propagates the signal like the full one; 'none': use the stds as they are.
            init_scaling='none',
            compute_dtype='float32',
        )
    )


SAME_3 = ((1, 1), (1, 1))
SAME_5 = ((2, 2), (2, 2))


def conv(features, kernel_px, stride_px, padding_px, reads, init_std, bias, reference_fan_in, ops):
    """Return a convolution's row; `init_std` is of an untruncated Gaussian.

    `reference_fan_in` is a unit's fan-in in the full-size net, for which `init_std` is chosen. A
    config that changes a layer's inputs at full size must also set it, so that the narrowed net
    starts with the same signal strength.
    """
    return dict(
        kind='conv',
        features=features,
        kernel_px=kernel_px,
        stride_px=stride_px,
        padding_px=padding_px,
        reads=reads,
        init='gaussian',
        init_std=init_std,
        reference_fan_in=reference_fan_in,
        bias=bias,
        ops=ops,
    )


def fc(features, reads, init_std, bias, reference_fan_in, ops):
    """Return a fully connected layer's row."""
    return dict(
        kind='fc',
        features=features,
        reads=reads,
        init='gaussian',
        init_std=init_std,
        reference_fan_in=reference_fan_in,
        bias=bias,
        ops=ops,
    )


def narrow(model: ConfigDict, divisor: int) -> None:
    """Divide the width of every layer but the last; needs init_scaling='fan_in' to train."""
    for name in model.layers[:-1]:
        model[name].features //= divisor


def activate(model: ConfigDict, activation: str) -> None:
    """Replace every ReLU, and the biases that provide "the ReLUs with positive inputs" [p 5]."""
    for name in model.layers:
        layer = model[name]
        layer.ops = tuple(activation if op == 'relu' else op for op in layer.ops)
        layer.bias = 0.0


def data(scale: str) -> ConfigDict:
    """Return the data set and TFDS's expression for each split; test is used only to report."""
    # Decoded splits of up to resident_gib are kept in memory; larger ones are read by `workers`
    # threads (-1: one per core).
    how = dict(data_dir='data', workers=-1, resident_gib=4.0)
    if scale in ('quickstart', 'fashion_mnist'):
        splits = dict(train='train[:55000]', validation='train[55000:]', test='test')
        return ConfigDict(dict(name='fashion_mnist', **how, **splits))
    if scale in PICTURES:
        return ConfigDict(dict(name='none', **how, train='auto', validation='auto', test='auto'))
    # ILSVRC-2012's test labels are not public: val serves for validation and test, as in 2012.
    last = 'validation' if scale == 'imagenet2012' else 'test'
    splits = dict(train='train', validation='validation', test=last)
    return ConfigDict(dict(name=scale, **how, **splits))


def preprocess(epochs) -> ConfigDict:
    """Return crops, mirrors, mean image and colour noise [p 4.1]; pixels stay in 0-255 units."""
    return ConfigDict(
        dict(
            resize_px=256,
            image_px=256,
            crop=True,
            mirror=True,
            images_per_crop=1,  # the [source] shares one crop and mirror among 32 images
            mean='image',
            colour_noise=0.1,
            noise_divisor=1.1,  # [source]
            noise_until_epoch=epochs * (68 / RUN_170_EPOCHS),  # [source]
            scale=1.0,
        )
    )


def optimizer(epochs) -> ConfigDict:
    """Return run 170's update: momentum 0.9, decay 0.0005, batch 128 [p 5]; rates [source]."""
    return ConfigDict(
        dict(
            momentum=0.9,
            weight_decay=0.0005,
            # 0.01 / 250^(i/3): 0.01, 0.0015874, 0.00025198, 0.00004, at 25 / 50 / 75 % of the run
            weights=schedule('dexp', 0.01, factor=250.0, switches=3),
            biases=schedule('dexp', 0.02, factor=10.0, switches=1),  # 0.02, then 0.002 at 50 %
            late_freeze=dict(
                layer='conv1',
                slow_epoch=epochs * (74 / RUN_170_EPOCHS),
                slow_multiplier=0.0,
                freeze_epoch=epochs * (74 / RUN_170_EPOCHS),
            ),
        )
    )


def schedule(kind: str, rate: float, **values) -> dict:
    """Return a schedule with the fields of every kind, so that an override can change the kind."""
    defaults = dict(
        kind=kind,
        rate=rate,
        divisor=10.0,  # [p 5]
        at_epochs=(),
        factor=1.0,
        switches=0,
        patience_epochs=3.0,  # in the paper the authors decided
        max_drops=3,  # [p 5]
        floor=0.0,
    )
    return defaults | values


def loop() -> ConfigDict:
    """Return the settings of logging, evaluation and checkpoints; see config.Loop."""
    return ConfigDict(
        dict(
            log_every_steps=50,
            evaluate_every_epochs=1.0,
            checkpoint_every_epochs=1.0,
            eval_batch_size=500,
            prefetch_batches=2,
            tensorboard=True,
            # The folder of the compilation cache: a path, 'beside' (.jax_cache next to the
            # workdir), or 'none'.
            compilation_cache='beside',
            # The minimum standard deviation of the logits across images at initialisation. At
            # quickstart this recipe has 5e-2 and trains immediately; the paper's init has 3e-3 and
            # trains after some 80 steps. Without init_scaling they have 2e-4 and 7e-6, and the loss
            # is still ln(10) after 430 steps (experiments/results/dead_starts).
            min_logit_std=0.001,
            on_collapsed_init='warn',  # or 'error'
            # Training steps that are traced into <workdir>/profile (docs/performance.md); 0: none.
            profile_steps=0,
        )
    )


def by_hand(config: ConfigDict) -> None:
    """Use run 145's schedule on ILSVRC-2010, set by hand in 2012; it ends at epoch 93 [source]."""
    config.epochs = 93.0
    config.preprocess.noise_until_epoch = 68.0
    config.optimizer.weights.update(kind='steps', at_epochs=(23.0, 51.0, 78.0))
    # Divided once; the notes do not give the epoch, so half-way is used, as in run 170.
    config.optimizer.biases.update(kind='steps', at_epochs=(46.5,))
    late_freeze = dict(layer='conv1', slow_epoch=68.0, slow_multiplier=0.1, freeze_epoch=72.0)
    config.optimizer.late_freeze.update(late_freeze)
