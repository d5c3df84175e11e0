"""Files for devices: LiteRT models, their predictions and latencies, and bit-packed weights.

Converting needs TensorFlow, whichever backend Keras runs on; running needs LiteRT
(`ai-edge-litert`). Both are imported when they are used, not before. Archives of weights need
neither.
"""

from keras_compaware.export.codes import CodesResult, SavedCodes, load_codes, save_codes
from keras_compaware.export.interpreter import Latency, latency, predict
from keras_compaware.export.litert import ExportError, ExportResult, to_litert

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
]
