"""Which channels of a model must be cut together: pure analysis of its graph."""

from keras_compaware.coupling import (  # noqa: F401 (they fill the table)
    hub_rules,
    layer_rules,
    operation_rules,
    recurrent_rules,
)
from keras_compaware.coupling.flow import (
    Channels,
    Flow,
    Keep,
    Uncoupled,
    register_channel_rule,
    register_operation_rule,
)
from keras_compaware.coupling.spaces import (
    Analysis,
    ChannelSpace,
    ChannelSpaces,
    Member,
    analyse,
    channel_spaces,
)
from keras_compaware.coupling.targets import coupled_targets

__all__ = [
    "Analysis",
    "ChannelSpace",
    "ChannelSpaces",
    "Channels",
    "Flow",
    "Keep",
    "Member",
    "Uncoupled",
    "analyse",
    "channel_spaces",
    "coupled_targets",
    "register_channel_rule",
    "register_operation_rule",
]
