"""Compaction part-way through training: the smaller network is trained to the end."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_compaware.base import Chain, Compressor
from keras_compaware.cli.program import UserError
from keras_compaware.compaction import CompactResult
from keras_compaware.compressors import LowRank, Tucker2
from keras_compaware.recipe import Recipe


def epoch_of(config: Mapping[str, Any]) -> int | None:
    """Returns `config.compact_at_epoch`, or None, the default: compaction follows training.

    After so many epochs (Alvarez & Salzmann, 2017)

    - the rules end as they do at the end of training: what is left of proximal maps is applied, and
      every kernel is compressed exactly, `at_end` included,
    - `compact` makes a smaller network of plain layers, saved as `early.keras`,
    - this network is trained in the epochs that are left, without rules: low rank stays since the
      kernels are two or three layers by now, channels that were removed stay away, and kernels that
      are whole are trained freely. If nothing got smaller, the network goes on as it is.

    The learning rate goes on where it was in the schedule over all epochs, and so do the shuffling
    and the history. The optimizer's other state (momentum, second moments) begins anew, with its
    bias corrections: second moments of zero at a late step would let Adam take steps several times
    too large. Percentages in rules are of all steps of the run; a window or a ramp that has not
    ended by then does not end.

    Raises:
        UserError: If it is no integer between 1 and `config.epochs - 1`, or stands beside
            `config.shrink`.
    """
    epoch, epochs = config["compact_at_epoch"], config["epochs"]
    if epoch is None:
        return None
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 1 <= epoch < epochs:
        limits = f"from 1 to {epochs - 1}" if epochs > 1 else "below config.epochs, which is 1"
        raise UserError(
            f"config.compact_at_epoch must be an integer {limits}, so that the smaller network is "
            "trained in the epochs after it, or None: compaction follows training. "
            f"Received: {epoch!r}"
        )
    if config["shrink"]:
        raise UserError(
            "config.compact_at_epoch and config.shrink both train a smaller network further. "
            "Leave one of them out."
        )
    return epoch


def check(model: keras.Model, recipe: Recipe) -> None:
    """Raises a UserError if training further would undo what the rules leave.

    Args:
        model: The model, before training.
        recipe: Its recipe.
    """
    lost = [name for name, last in recipe.final_compressors(model).items() if not _is_kept(last)]
    if lost:
        raise UserError(
            "config.compact_at_epoch trains further without rules, so these kernels would not stay "
            f"compressed: {', '.join(lost)}. Low rank stays (LowRank without `tile`, Tucker2), and "
            "so do channels that are removed (rules in config.channels, regularizers)."
        )


def _is_kept(compressor: Compressor) -> bool:
    """Whether layers of the compacted model are the compression."""
    if isinstance(compressor, Chain):
        return all(map(_is_kept, compressor.compressors))
    return isinstance(compressor, Tucker2) or (
        isinstance(compressor, LowRank) and compressor.tile is None
    )


def is_smaller(compacted: CompactResult) -> bool:
    """Whether compaction has removed anything."""
    return bool(compacted.channels) or any(row.after < row.before for row in compacted.rows)
