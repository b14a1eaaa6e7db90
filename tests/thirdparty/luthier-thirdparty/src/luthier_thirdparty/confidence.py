"""A regularizer that reads the batch."""

from luthier.api import CompletionBatch, Regularizer, TokenBatch
from torch import Tensor, nn

from luthier_thirdparty.config import ConfidenceConfig


class Confidence(Regularizer[ConfidenceConfig]):
    """strength * the mean likelihood of the targets, less the longer the prompts are."""

    def penalty(self, model: nn.Module, batch: TokenBatch, outputs: CompletionBatch) -> Tensor:
        share = len(outputs.logps) / batch.attention_mask.sum()
        return self.config.strength * share * outputs.logps.exp().mean()
