"""Trains a network so that it becomes small, beside its dense twin.

The network is trained with the compression that the configuration describes, turned into really
smaller layers, exported to LiteRT and measured. The same network without compression, the dense
twin, is trained once and stands beside it in the table at the end.

  python -m apps.train --config=configs/digits_low_rank.py --workdir=runs/digits
  python -m apps.train --config=configs/digits_low_rank.py --workdir=runs/rare \\
      --config.rules.low_rank.every=100 --config.epochs=20

Running it again on the same --workdir resumes an interrupted run. KERAS_BACKEND chooses the
backend: tensorflow, jax or torch.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from keras_compaware.cli import train

if __name__ == "__main__":
    train.run()
