"""Fashion-MNIST, a small network with batch normalisation. Group lasso on half of the channels and
neurons of each layer, with all that belongs to them, by its proximal map at every step: those
disappear, the others are free.

  python -m apps.train --config=configs/fashion_mnist_channels_cnn.py \\
      --workdir=runs/fashion_mnist_channels_cnn --data_dir=DIR

Run time: 208 s on 2 busy cores, besides 266 s for the dense twin, which is trained once. Result
with seed 0 on the TensorFlow backend: test accuracy 89.58 % (dense twin 90.82 %), 32,042 parameters
(111,146), LiteRT file 128 KB (436 KB), compressed by gzip 117 KB (402 KB), latency 20.2 µs (65.7
µs). Channels: conv1 32 -> 16, conv2 64 -> 32, conv3 128 -> 64, dense1 128 -> 112.
"""

from configs import common


def get_config():
    config = common.fashion_mnist("small_cnn")
    config.epochs = 8
    config.channels.group_lasso = common.rule(
        action="Proximal", regularizer="PartialGroupLasso", strength=0.06, fraction=0.5
    )
    return config
