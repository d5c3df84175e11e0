"""Fashion-MNIST, a small CNN: how often to compress, after Lee et al. (2021).

  KERAS_BACKEND=jax python -m apps.sweep --config=configs/sweeps/frequency_cnn.py \\
      --workdir=runs/frequency_cnn --data_dir=DIR

Every trial trains 20,000 steps of 16 images from scratch; all kernels but that of the output are
compressed. What is compared is the compressed network at the end, with batch-norm statistics
estimated again.
"""

from ml_collections import ConfigDict

from configs import common


def get_config():
    config = common.fashion_mnist("small_cnn")
    config.model_args = ConfigDict({"filters": (8, 16, 32), "units": 64})
    config.batch_size = 16
    config.sweep = ConfigDict(sort_keys=False)
    config.sweep.families = common.frequency_families()
    config.sweep.every = [1, 10, 100, 200, 500, 1000]
    config.sweep.schedules = ConfigDict(sort_keys=False)
    config.sweep.schedules.constant = {"schedule": "constant"}
    config.sweep.schedules.cosine = {"schedule": "cosine"}
    config.sweep.seeds = [0, 1, 2]
    config.sweep.steps = 20_000
    return config
