"""Has a quantizer store a model's weights."""

from __future__ import annotations

from luthier.api import Facts, Stage
from luthier.merging.folding import full_weights
from luthier.modeling.calibration import tuned_on
from luthier.modeling.quantizing import quantize, refuse_quantized
from luthier_plugins.quantize.config import QuantizeConfig


class Quantize(Stage[QuantizeConfig]):
    """The stage ``quantize``."""

    def run(self) -> Facts:
        model = self.context.artifact(self.config.model)
        refuse_quantized(model, "quantized again")
        data = self.context.artifacts([self.config.calibration]) if self.config.calibration else tuned_on(model)
        source = full_weights(model, self.context.scratch / "folded")
        return quantize(model, source, self.config.method, data, self.config.max_kl, self.context)
