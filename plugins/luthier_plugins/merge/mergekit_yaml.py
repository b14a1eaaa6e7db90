"""mergekit's own YAML files as configs of the stage ``merge``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from luthier.artifacts.adapters import HUB_ID

Values = dict[str, Any]
KNOWN = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
         "tokenizer", "name"}  # fmt: skip
OURS: dict[str, dict[str, str]] = {
    "linear": {"normalize": "normalize"},
    "slerp": {"t": "t"},
    "nuslerp": {"nuslerp_flatten": "flatten"},
    "multislerp": {"normalize_weights": "normalize"},
    "karcher": {"max_iter": "steps", "tol": "tolerance"},
    "task_arithmetic": {"normalize": "normalize", "lambda": "scale"},
    "ties": {"density": "density", "normalize": "normalize", "lambda": "scale"},
    "dare_linear": {"density": "density", "rescale": "rescale", "normalize": "normalize", "lambda": "scale"},
    "dare_ties": {"density": "density", "rescale": "rescale", "normalize": "normalize", "lambda": "scale"},
    "della": {"density": "density", "epsilon": "epsilon", "rescale": "rescale", "normalize": "normalize",
              "lambda": "scale"},
    "della_linear": {"density": "density", "epsilon": "epsilon", "rescale": "rescale", "normalize": "normalize",
                     "lambda": "scale"},
    "breadcrumbs": {"density": "density", "gamma": "gamma", "normalize": "normalize", "lambda": "scale"},
    "breadcrumbs_ties": {"density": "density", "gamma": "gamma", "normalize": "normalize", "lambda": "scale"},
    "model_stock": {"filter_wise": "filter_wise"},
    "sce": {"select_topk": "density"},
    "nearswap": {"t": "t"},
    "arcee_fusion": {},
    "ram": {"epsilon": "threshold"},
    "ramplus_tl": {"epsilon": "threshold", "r": "r", "alpha": "alpha"},
    "passthrough": {"scale": "scale"},
}  # fmt: skip
"""mergekit's methods that Luthier has, and what their parameters are called here."""
DEFAULTS: dict[str, Values] = {
    **{name: {"density": 1.0} for name in ("ties", "dare_linear", "dare_ties", "della", "della_linear",
                                           "breadcrumbs", "breadcrumbs_ties")},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2},
}  # fmt: skip
"""Where mergekit's default is another than ours."""
RENAMED = {"ramplus_tl": "ram"}
BASE_IS_A_MODEL = ("slerp",)
"""Methods whose base is the first of the models here."""
WITHOUT_BASE = ("linear", "karcher", "passthrough", *BASE_IS_A_MODEL)
WEIGHTED = ("linear", "nuslerp", "multislerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della",
            "della_linear", "breadcrumbs", "breadcrumbs_ties")  # fmt: skip
IGNORED = ("int8_mask",)
"""Only saves memory there."""
MORE: dict[str, set[str]] = {
    "multislerp": {"eps"},
    "nuslerp": {"nuslerp_row_wise"},
    **{name: {"rescale"} for name in ("ties", "breadcrumbs", "breadcrumbs_ties")},
}
"""Parameters that mergekit's methods have and ours do not: with one of them, mergekit's own code is used. Any other
parameter is one that mergekit does not look at either: it is left out, and told."""
DTYPES = {"float32", "float16", "bfloat16"}


def as_config(values: Mapping[str, Any], folder: Path | None) -> Values:
    """A config of the stage ``merge`` that does what a mergekit file says.

    Args:
        values: The stage's own values; ``config`` names the file, the others win over what it says.
        folder: What relative paths start from.

    Raises:
        ValueError: the file cannot be read, or says something that Luthier cannot do.
    """
    own = {key: value for key, value in values.items() if key != "config"}
    path = Path(folder or ".") / Path(str(values["config"])).expanduser()
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the mergekit file '{path}' cannot be read: {error}") from error
    if not isinstance(content, dict) or "merge_method" not in content:
        raise ValueError(f"'{path}' is no mergekit file: it has no merge_method")
    found = cast("Values", content)
    if "modules" in found:
        raise ValueError("`modules` of mergekit files are not supported: merge each module's model on its own")
    odd = sorted(set(found) - KNOWN)
    if odd:
        raise ValueError(f"the mergekit file has '{odd[0]}', which is not supported")
    try:
        reader = _Reader(found, path.parent)
        translated = reader.config()
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"the mergekit file '{path}' is not as mergekit wants it: {error}") from error
    return {**translated, **({"unused": reader.unused} if reader.unused else {}), **own}


def _entries(content: Values, key: str, inside: str = "model") -> list[Values]:
    """A list of mappings, each of which names something under `inside`."""
    value: Any = content.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) and inside in item for item in value):
        raise ValueError(f"`{key}` of the mergekit file is no list of entries that have `{inside}`")
    return cast("list[Values]", value)


class _Reader:
    """Translates one file."""

    def __init__(self, content: Values, folder: Path) -> None:
        self.content = content
        self.folder = folder
        self.method = str(content["merge_method"])
        self.unused: list[str] = []
        self.shared: Values = {key: item for key, item in (content.get("parameters") or {}).items()
                               if key not in IGNORED}  # fmt: skip

    def config(self) -> Values:
        base = self._place(self.content["base_model"]) if "base_model" in self.content else None
        result: Values = {}
        if "models" in self.content:
            entries = [(self._place(entry["model"]), dict(entry.get("parameters") or {}))
                       for entry in _entries(self.content, "models")]  # fmt: skip
            result |= self._of_models(entries, base)
        elif "slices" in self.content:
            result |= self._of_slices(_entries(self.content, "slices", "sources"), base)
        else:
            raise ValueError("the mergekit file has neither `models` nor `slices`")
        stored = self.content.get("out_dtype") or self.content.get("dtype")
        if stored is not None:
            stored = str(stored).removeprefix("torch.")
            if stored not in DTYPES:
                raise ValueError(f"the dtype {stored} of the mergekit file is not one of {', '.join(sorted(DTYPES))}")
            result["dtype"] = stored
        named: Any = self.content.get("tokenizer") or {}
        odd = sorted(set(named) - {"source"}) if isinstance(named, dict) else [str(named)]
        if odd:
            raise ValueError(
                f"`tokenizer` of the mergekit file has '{odd[0]}', which is not supported: only `source` is"
            )
        tokenizer = self.content.get("tokenizer_source") or named.get("source")
        if tokenizer is not None:
            result["tokenizer"] = tokenizer if tokenizer == "union" else self._speaker(tokenizer, result)
        return result

    def _speaker(self, tokenizer: Any, result: Values) -> str:
        """Whose tokenizer the merged model has: ``base`` is the base's, else the first model's."""
        if tokenizer != "base":
            return self._place(tokenizer)
        models = result.get("models") or [source["model"] for part in result["slices"] for source in part["sources"]]
        return result.get("base") or models[0]

    def _of_models(self, entries: list[tuple[str, Values]], base: str | None) -> Values:
        if self.method in BASE_IS_A_MODEL and base is not None:
            if base not in [place for place, _ in entries]:
                entries = [(base, {}), *entries]
            entries.sort(key=lambda entry: entry[0] != base)
        elif self.method not in WITHOUT_BASE:
            entries = [entry for entry in entries if entry[0] != base]
        elif self.method != "passthrough" and base is not None and base not in [place for place, _ in entries]:
            # A base that such a method does not look at is a model like the others.
            entries = [(base, {}), *entries]
        result: Values = {"models": [place for place, _ in entries]}
        if base is not None and self.method not in WITHOUT_BASE:
            result["base"] = base
        method = self._method([parameters for _, parameters in entries])
        if method["uses"] != "mergekit" and self.method in WEIGHTED:
            result["weights"] = [self._weight(parameters) for _, parameters in entries]
        return {**result, "method": method}

    def _of_slices(self, slices: Sequence[Values], base: str | None) -> Values:
        made: list[Values] = []
        parameters: list[list[Values]] = []
        for entry in slices:
            if entry.get("parameters") or entry.get("base_model") or entry.get("residual_weight"):
                raise ValueError("a slice of the mergekit file has settings of its own, which is not supported: "
                                 "use filters or gradients, or a recipe")  # fmt: skip
            sources: list[tuple[Values, Values]] = []
            ranges: set[tuple[int, ...]] = set()
            for source in _entries(entry, "sources"):
                place = self._place(source["model"])
                own = dict(source.get("parameters") or {})
                first = self.method in BASE_IS_A_MODEL and place == base
                if "layer_range" not in source:
                    raise ValueError("a source in the mergekit file has no layer_range")
                if place == base and self.method not in WITHOUT_BASE:
                    ranges.add(tuple(source["layer_range"]))
                    continue
                made_of: Values = {"model": place, "layers": list(source["layer_range"])}
                if self.method in WEIGHTED:
                    made_of["weight"] = self._weight(own)
                if self.method == "passthrough" and "scale" in {*own, *self.shared}:
                    made_of["scale"] = self._complete(own.pop("scale", self.shared.get("scale")), "scale", 1.0)
                sources.insert(0 if first else len(sources), (made_of, own))
            if not sources:
                raise ValueError("a slice of the mergekit file is of the base alone, which is not supported")
            # The base's layers are those at the place of the first model's.
            if ranges - {tuple(sources[0][0]["layers"])}:
                raise ValueError("a slice of the mergekit file takes other layers of the base than of the models, "
                                 "which is not supported")  # fmt: skip
            made.append({"sources": [made_of for made_of, _ in sources]})
            parameters.append([own for _, own in sources])
        if self.method == "passthrough":
            # It stands beside every source now.
            self.shared.pop("scale", None)
        apart = [{key: value for key, value in own.items() if key != "weight"} for part in parameters for own in part]
        if len(slices) > 1 and any(own != apart[0] for own in apart):
            raise ValueError("the slices of the mergekit file have other parameters than each other, which is not "
                             "supported: use filters or gradients, or merges of their own")  # fmt: skip
        result: Values = {"slices": made}
        if base is not None and self.method not in WITHOUT_BASE:
            result["base"] = base
        return {**result, "method": self._method(parameters[0])}

    def _method(self, parameters: Sequence[Values]) -> Values:
        names = OURS.get(self.method)
        given = {key for values in parameters for key in values} | set(self.shared)
        if names is None or given & MORE.get(self.method, set()):
            return self._foreign(parameters, given)
        weight = {"weight"} if self.method in WEIGHTED else set[str]()
        self.unused = sorted(given - set(names) - set(IGNORED) - weight)
        result: Values = {"uses": RENAMED.get(self.method, self.method), **DEFAULTS.get(self.method, {})}
        for theirs, ours in names.items():
            if theirs in given:
                result[ours] = self._setting(theirs, parameters, DEFAULTS.get(self.method, {}).get(ours))
        return result

    def _foreign(self, parameters: Sequence[Values], given: set[str]) -> Values:
        """The method as mergekit has it, through its own code."""
        values = {key: self._setting(key, parameters, None) for key in sorted(given)}
        return {"uses": "mergekit", "name": self.method, "parameters": values}

    def _setting(self, name: str, parameters: Sequence[Values], default: Any) -> Any:
        if not any(name in values for values in parameters):
            return self._complete(self.shared[name], name, default, own=False)
        several = [self._complete(values.get(name, self.shared.get(name, default)), name, default,
                                  own=name in values) for values in parameters]  # fmt: skip
        return several[0] if all(item == several[0] for item in several) else {"per_model": several}

    def _weight(self, parameters: Values) -> Any:
        if "weight" not in parameters and "weight" not in self.shared:
            raise ValueError(f"{self.method} needs a weight for every model in the mergekit file")
        return self._complete(parameters.get("weight", self.shared.get("weight")), "weight", None,
                              own="weight" in parameters)  # fmt: skip

    def _complete(self, value: Any, name: str, default: Any, *, own: bool = True) -> Any:
        """Filters with an entry for all other parameters at the end: what the whole file says, else the default."""
        listed: Any = [value] if isinstance(value, dict) else value
        if not (isinstance(listed, list) and listed and isinstance(listed[-1], dict)):
            return value
        entries = [{**entry, "filter": entry.get("filter")} for entry in cast("list[Values]", listed)]
        if entries[-1]["filter"] in (None, "*"):
            return entries
        rest = self._complete(self.shared[name], name, default, own=False) if own and name in self.shared else default
        if rest is None:
            raise ValueError(f"the filters of {name} in the mergekit file leave tensors without a value")
        if isinstance(rest, list) and rest and isinstance(rest[0], dict):
            return [*entries, *cast("list[Values]", rest)]
        return [*entries, {"filter": None, "value": rest}]

    def _place(self, model: Any) -> str:
        """A model's folder, relative to the file or to where one stands; else its hub id. ``model+adapter`` is both."""
        if isinstance(model, dict):
            parts = [cast("Values", model)[key]["path"] for key in ("model", "lora") if model.get(key)]
            return "+".join(self._place(part) for part in parts)
        text = str(model)
        for path in (self.folder / Path(text).expanduser(), Path(text).expanduser()):
            if path.is_dir():
                return os.path.abspath(path)
        if "+" in text:
            return "+".join(self._place(part) for part in text.rsplit("+", 1))
        if not HUB_ID.fullmatch(text.partition("@")[0]):
            raise ValueError(f"there is no folder '{text}', which the mergekit file names")
        return f"hf:{text}"
