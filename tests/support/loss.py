"""The loss of a whole batch and the metrics beside it, as the training step combines them."""

from jaxtyping import Array, Float, Num

from pipeline.model.dflash.model import DraftModel
from pipeline.train.loss.objective import TrainBatch, draft_sums, normaliser
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import Objective


def draft_loss(
    draft: DraftModel, tables: FrozenTables, batch: TrainBatch, objective: Objective, *, remat: bool = False
) -> tuple[Float[Array, ""], dict[str, Num[Array, ""]]]:
    """Returns the loss and the metrics of a batch that goes through in one part."""
    total = normaliser(draft.config, batch, objective)
    sums = draft_sums(draft, tables, batch, objective, total, remat=remat)
    return sums.loss, sums.metrics()
