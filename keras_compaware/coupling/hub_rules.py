"""How channels pass through blocks of KerasHub, which are known by name: it is not imported."""

from keras_compaware._graph import HUB_BLOCKS
from keras_compaware.coupling.flow import NAMED_RULES
from keras_compaware.coupling.layer_rules import check_activation


def _transformer(call, flow):
    """The hidden units of the feed-forward part. What the block reads and returns stays whole.

    So do the heads of its attention: the block has no argument for their width, which it finds by
    dividing that of its input by their number.
    """
    layer = call.operation
    for tensor in call.inputs:
        if not flow.is_fixed(tensor):
            reason = f"of '{call.path}' ({type(layer).__name__}) only the hidden units can be cut"
            flow.freeze(flow.channels(tensor).ids, reason)
    first, second = layer._feedforward_intermediate_dense, layer._feedforward_output_dense
    with flow.inside(first.name):
        ids = flow.produce(first.kernel, 1, name=f"{call.path}/units")
        flow.carry(first.bias, 0, ids, "producer")
    with flow.inside(second.name):
        flow.consume(second.kernel, 0, ids)
    flow.read_inside(call, second, ids, -1)
    check_activation(call, flow, ids, layer.activation)
    flow.configure(call, lambda keep, config: {"intermediate_dim": keep.count(ids)})


for _name in HUB_BLOCKS:
    NAMED_RULES[_name] = _transformer
