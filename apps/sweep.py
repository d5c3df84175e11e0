"""Trains a network many times: how often it is compressed, by what, how much, with which seed.

Every point of the grid that the configuration spans is a trial, run in one of several worker
processes. Each that has ended is a line in results.jsonl, so the same command goes on with a sweep
that was stopped or killed. At the end stand tables and plots of test accuracy against the period,
beside the dense network, straight-through, a held mask and compression after training.

  python -m apps.sweep --config=configs/sweeps/digits.py --workdir=runs/sweep --dry_run
  python -m apps.sweep --config=configs/sweeps/digits.py --workdir=runs/sweep --workers=2

KERAS_BACKEND chooses the backend: tensorflow, jax or torch.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from keras_compaware.cli import sweep

if __name__ == "__main__":
    sweep.run()
