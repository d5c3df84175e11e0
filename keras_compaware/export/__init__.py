"""Files for devices: LiteRT models, their predictions and latencies, ONNX, and bit-packed weights.

LiteRT needs TensorFlow to convert, whichever backend Keras runs on, and `ai-edge-litert` to run;
ONNX needs `onnx` and `onnxruntime`, and TensorFlow with `tf2onnx` or PyTorch to convert. All are
imported when they are used, not before. Archives of weights need none of them.
"""

from keras_compaware.export._compare import ExportError, ExportResult
from keras_compaware.export.codes import CodesResult, SavedCodes, load_codes, save_codes
from keras_compaware.export.interpreter import Latency, latency, predict
from keras_compaware.export.litert import to_litert
from keras_compaware.export.onnx import to_onnx

__all__ = [
    "CodesResult",
    "ExportError",
    "ExportResult",
    "Latency",
    "SavedCodes",
    "latency",
    "load_codes",
    "predict",
    "save_codes",
    "to_litert",
    "to_onnx",
]
