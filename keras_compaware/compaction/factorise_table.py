"""Which kind of layer falls apart how."""

import keras

from keras_compaware.compaction.factorise import CONVOLUTIONS
from keras_compaware.compaction.factorise_attention import grouped_query, multi_head
from keras_compaware.compaction.factorise_layers import einsum, embedding, single, tied
from keras_compaware.compaction.factorise_recurrent import bidirectional, recurrent

# class -> function `(layer, Surroundings) -> Parts, or the reason why the layer stays`
KINDS = {
    keras.layers.Dense: single,
    **dict.fromkeys(CONVOLUTIONS, single),
    keras.layers.EinsumDense: einsum,
    keras.layers.Embedding: embedding,
    keras.layers.ReversibleEmbedding: tied,
    keras.layers.MultiHeadAttention: multi_head,
    keras.layers.GroupQueryAttention: grouped_query,
    keras.layers.LSTM: recurrent,
    keras.layers.GRU: recurrent,
    keras.layers.SimpleRNN: recurrent,
    keras.layers.RNN: recurrent,
    keras.layers.Bidirectional: bidirectional,
}


def fall_apart(layer, known):
    """Returns the `Parts` of a layer, or the reason why it stays, or None if no rule is for it.

    Args:
        layer: A built layer.
        known: The `Surroundings` of its model.
    """
    kinds = [kind for kind in type(layer).__mro__ if kind in KINDS]
    if not kinds:
        return None
    if kinds[0] is not type(layer):
        kind = type(layer).__name__
        if type(layer).__module__.split(".")[0] == "keras":
            return None  # another layer of Keras
        return f"a subclass of a Keras layer ({kind}) may compute something else"
    for inner in layer._flatten_layers():
        if getattr(inner, "quantization_mode", None) is not None:
            return f"quantized by Keras ({inner.quantization_mode})"
        if getattr(inner, "lora_enabled", False):
            return "LoRA is enabled"
    return KINDS[kinds[0]](layer, known)
