"""Files that run on devices: export to LiteRT, predictions and latencies of what was exported.

Converting needs TensorFlow, whichever backend Keras runs on; running needs LiteRT
(`ai-edge-litert`). Both are imported when they are used, not before.
"""

from keras_compaware.export.interpreter import Latency, latency, predict
from keras_compaware.export.litert import ExportError, ExportResult, to_litert

__all__ = ["ExportError", "ExportResult", "Latency", "latency", "predict", "to_litert"]
