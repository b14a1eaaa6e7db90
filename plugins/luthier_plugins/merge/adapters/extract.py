"""The stage ``extract_lora``."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from typing import Literal

from luthier.api import Facts, ModelError, Stage
from luthier.merging.check import check_stored, is_vocabulary
from luthier.merging.files import DTYPES
from luthier.merging.lowrank import TRANSPOSED, in_file
from luthier.merging.merge import open_inputs
from luthier.merging.pool import by_matrix
from luthier.merging.reader import full_of, whole
from luthier.modeling.adapters import linear_modules
from luthier_plugins.merge.adapters.config import ExtractLoraConfig
from luthier_plugins.merge.adapters.files import Factors, low_rank, write_adapter


class ExtractLora(Stage[ExtractLoraConfig]):
    """The first singular vectors of tuned minus base, linear layer by linear layer."""

    def run(self) -> Facts:
        context = self.context
        with ExitStack() as stack:
            inputs = open_inputs(
                [context.artifact(self.config.model)], context.artifact(self.config.base), context, stack
            )
            tuned, base = inputs.models[0], inputs.base
            assert base is not None, "the config requires a base"
            check_stored(inputs, "compared")
            shapes = [{name: header.shape for name, header in model.headers.items()} for model in (tuned, base)]
            if shapes[0] != shapes[1]:
                odd = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
                raise ModelError(
                    f"the two models do not have the same tensors: {', '.join(odd[:5])}",
                    hint="name the model it was tuned from as `base`",
                )
            turned = base.config.get("model_type") in TRANSPOSED
            modules = {
                in_file(f"{module}.weight", base.headers): module
                for module in linear_modules(full_of(context.artifact(self.config.base)).path)
            }
            factors: dict[str, Factors] = {}
            kept: dict[str, float] = {}
            left_out: list[str] = []
            names = [name for name, header in base.headers.items() if header.dtype in DTYPES]

            def work(name: str) -> tuple[Factors, float] | Literal["same", "left out"]:
                delta = whole(tuned, name) - whole(base, name)
                if not bool(delta.any()):
                    return "same"
                if name not in modules or (is_vocabulary(name) and not self.config.head):
                    return "left out"
                # The head of such models is a linear layer like others.
                matrix = delta.T if turned and not is_vocabulary(name) else delta
                return low_rank(matrix, self.config.r, self.config.energy)

            found_by_name = by_matrix(work, names, lambda name: math.prod(base.headers[name].shape))
            results = stack.enter_context(closing(found_by_name))
            for done, (name, found) in enumerate(zip(names, results, strict=True)):
                context.progress(done, len(names), "tensors")
                if found == "left out":
                    left_out.append(name)
                elif found != "same":
                    factors[modules[name]], kept[name] = found
        if not factors:
            raise ModelError("no linear layer differs between the two models", hint="is `base` the right one?")
        if left_out:
            context.warn(
                f"{len(left_out)} tensors differ that the adapter, of linear layers, does not hold, so their "
                f"change is lost: {', '.join(left_out[:5])}"
            )
        facts = write_adapter(
            context.out,
            factors,
            context.artifact(self.config.base),
            context.artifact(self.config.model),
            transposed=turned,
        )
        ranks = [pair[1].shape[0] for pair in factors.values()]
        return {
            **facts,
            "ranks": {"smallest": min(ranks), "largest": max(ranks)},
            "kept": min(kept.values()),
            "left_out": left_out,
        }
