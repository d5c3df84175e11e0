"""From a trained model to a new, really smaller one."""

from keras_compaware.compaction.batch_norm import recalibrate_batch_norm
from keras_compaware.compaction.compact import CompactResult, CompactRow, compact
from keras_compaware.compaction.fold import fold_batch_norm
from keras_compaware.compaction.recover import RecoveredRow, RecoverResult, recover
from keras_compaware.compaction.shrink import shrink

__all__ = [
    "CompactResult",
    "CompactRow",
    "RecoverResult",
    "RecoveredRow",
    "compact",
    "fold_batch_norm",
    "recalibrate_batch_norm",
    "recover",
    "shrink",
]
