"""Prints the accuracy of a .keras or .tflite model on a data set.

python -m apps.evaluate --model=runs/digits/model.tflite --data=digits
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from keras_compaware.cli import evaluate

if __name__ == "__main__":
    evaluate.run()
