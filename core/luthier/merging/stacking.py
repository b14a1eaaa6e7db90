"""What a config says of each layer, so that layers keep their kind wherever they are put."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from luthier.api import ModelError
from luthier.merging.reader import Source, full_of

Config = Mapping[str, Any]
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers")
"""Keys with a list that has an entry for every layer."""
NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "cross_attention_layers")
"""Keys with the numbers of some layers."""
DENSE, STEP, FIRST = "mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace"


def count_key(config: Config) -> str:
    """The key of the number of layers.

    Raises:
        ModelError: the config gives it in no known way.
    """
    found = next((key for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in config), None)
    if found is None:
        raise ModelError("the config does not give the number of layers", hint="this architecture cannot be stacked")
    return found


class Kinds:
    """The kind of every layer of a model, as transformers works it out of its config: lists, numbers and rules.

    Args:
        model: The model.

    Raises:
        ModelError: transformers does not know the architecture.
    """

    def __init__(self, model: Source) -> None:
        from transformers import AutoConfig

        folder = full_of(model.artifact).path
        try:
            self._config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        # transformers may raise anything, down to errors of libraries below it.
        except Exception as error:
            raise ModelError(f"transformers cannot read the config: {error}", where=str(folder)) from error
        config: Config = self._config.to_dict()
        self.count = int(config[count_key(config)])
        self.of = {key: list(found) for key, found in self._found(config)}

    def worked_out(self, config: Config) -> Config:
        """What transformers makes of another config of the same architecture."""
        made: Any = type(self._config).from_dict(dict(config))
        return made.to_dict()

    def _found(self, config: Config) -> Iterator[tuple[str, Sequence[Any]]]:
        layers = range(self.count)
        for key in LISTS:
            if isinstance(config.get(key), list) and len(config[key]) == self.count:
                yield key, config[key]
        step = config.get(STEP) or 1
        for key in NUMBERS:
            if config.get(key) is not None:
                numbers = set(config[key])
                apart = (lambda layer: (layer + 1) % step != 0) if key == DENSE else (lambda layer: False)
                yield key, [layer in numbers or apart(layer) for layer in layers]
        if config.get(FIRST) is not None:
            yield FIRST, [layer < config[FIRST] for layer in layers]

    def at(self, layer: int) -> dict[str, Any]:
        """What is said of one layer."""
        return {key: found[layer] for key, found in self.of.items()}


def kinds_by(models: Sequence[Source]) -> Callable[[Source], Kinds]:
    """The kinds of models, each read once."""
    known: dict[str, Kinds] = {}
    for model in models:
        known.setdefault(model.artifact.key, Kinds(model))
    return lambda model: known[model.artifact.key]


def restacked(config: Config, layers: Sequence[Mapping[str, Any]], lead: Kinds) -> dict[str, Any]:
    """A config for a new stack of layers.

    Args:
        config: The config to change.
        layers: What is said of each layer where it came from, see `Kinds.at`.
        lead: The kinds of the model that the config is of.

    Raises:
        ModelError: the architecture has no way to say which layers are of which kind.
    """
    result = {**config, count_key(config): len(layers)}
    found = {key: [layer.get(key) for layer in layers] for key in layers[0]}
    for key, there in found.items():
        if key == FIRST:
            dense = there.index(False) if False in there else len(there)
            if any(there[dense:]):
                raise ModelError(
                    "the dense layers of this architecture come first, and these slices put one after "
                    "layers of experts",
                    hint="take the dense layers in the first slice only",
                )
            result[key] = dense
        elif key in NUMBERS:
            result[key] = [number for number, is_one in enumerate(there) if is_one]
            if key == DENSE and STEP in config:
                result[STEP] = 1
    lists = {key: there for key, there in found.items() if key in LISTS}
    ruled = lead.worked_out({key: value for key, value in result.items() if key not in lists})
    # A list that a rule gives anyway is written only where it was.
    return result | {key: there for key, there in lists.items() if key in config or ruled.get(key) != there}
