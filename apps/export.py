"""Exports a Keras model to a LiteRT (TFLite) or ONNX file, run and compared before it is kept.

python -m apps.export --model=small.keras --out=small.tflite
python -m apps.export --model=small.keras --out=small.tflite --quantization=int8 --data=digits
python -m apps.export --model=small.keras --out=small.onnx
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

from keras_compaware.cli import export

if __name__ == "__main__":
    export.run()
