"""Turns a trained model into a smaller one that computes the same function.

python -m apps.compact --model=runs/digits/model.keras --out=small.keras
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from keras_compaware.cli import compact

if __name__ == "__main__":
    compact.run()
