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
         "tokenizer", "chat_template", "name", "modules"}  # fmt: skip
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
PER_MODEL = ("weight", "density", "gamma", "scale")
"""Parameters that mergekit looks for beside each model; it looks for others beside slices and in the whole file."""
EPSILON_PER_MODEL = ("della", "della_linear")
FALLBACKS: Values = {"scale": 1.0, "gamma": 0.01, "epsilon": 0.15, "density": 1.0, "threshold": 1e-5, "tolerance": 1e-5,
                     "r": 0.1, "alpha": 0.2}  # fmt: skip
"""What mergekit takes where the filters of a parameter, by our name for it, leave tensors without a value."""
MORE: dict[str, set[str]] = {
    "multislerp": {"eps"},
    "nuslerp": {"nuslerp_row_wise"},
    **{name: {"rescale"} for name in ("ties", "breadcrumbs", "breadcrumbs_ties")},
}
"""Parameters that mergekit's methods have and ours do not: with one of them, mergekit's own code is used. Any other
parameter is one that mergekit does not use either: it is left out with a warning."""
MODULE = "default"
"""What mergekit calls the only module of models that have one."""
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
        raise ValueError(f"'{path}' is not a mergekit file: it has no merge_method")
    found = cast("Values", content)
    odd = sorted(set(found) - KNOWN)
    if odd:
        raise ValueError(f"the mergekit file has '{odd[0]}', which is not supported")
    try:
        module, found = _only_module(found)
        reader = _Reader(found, path.parent, module)
        translated = reader.config()
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"the mergekit file '{path}' is not valid for mergekit: {error}") from error
    return {**translated, **({"unused": reader.unused} if reader.unused else {}), **own}


def _only_module(content: Values) -> tuple[Values, Values]:
    """What a file says of the only module, if it does, and the file as if it were written without.

    Raises:
        ValueError: there are others.
    """
    if "modules" not in content:
        return {}, content
    modules: Any = content["modules"]
    if "models" in content or "slices" in content:
        raise ValueError("the mergekit file has `modules`, and `models` or `slices` beside them")
    if not isinstance(modules, dict) or list(cast("Values", modules)) != [MODULE]:
        named = ", ".join(map(str, cast("Values", modules))) if isinstance(modules, dict) else str(modules)
        raise ValueError(
            f"`modules` of the mergekit file are {named or 'none'}: Luthier merges models of one module, "
            f"which is called {MODULE}"
        )
    module = dict(modules[MODULE] or {})
    rest = {key: value for key, value in content.items() if key != "modules"}
    return module, {**rest, **{key: module[key] for key in ("models", "slices") if module.get(key)}}


def _entries(content: Values, key: str, inside: str = "model") -> list[Values]:
    """A list of mappings, each of which names something under `inside`."""
    value: Any = content.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) and inside in item for item in value):
        raise ValueError(f"`{key}` of the mergekit file is not a list of entries that have `{inside}`")
    return cast("list[Values]", value)


def _setting(
    name: str, parameters: Sequence[Values], outer: Sequence[Values], default: Any, rest: Any = None, *, strict: bool
) -> Any:
    """What is said of a parameter: of all models, or ``per_model``; the default, or None, where nothing is.

    Args:
        name: The parameter.
        parameters: Those of each model.
        outer: What they fall back on.
        default: What it is where nothing is said.
        rest: What it is for tensors that filters leave out.
        strict: Whether it is an error when filters leave tensors without a value; else nothing is said.
    """
    scopes = [[own, *outer] for own in parameters] or [list(outer)]
    several = [_resolved(name, chain, default, rest, strict=strict) for chain in scopes]
    return several[0] if all(item == several[0] for item in several) else {"per_model": several}


def _resolved(name: str, scopes: Sequence[Values], default: Any, rest: Any = None, *, strict: bool = True) -> Any:
    """What a parameter is, said by the nearest of several scopes.

    Filters that leave tensors without a value are followed by what the next scope says, and in the end by `rest`.

    Raises:
        ValueError: filters leave tensors without a value.
    """
    entries: list[Values] = []
    plain = default
    rest = default if rest is None else rest
    for values in scopes:
        if name not in values:
            continue
        listed: Any = [values[name]] if isinstance(values[name], dict) else values[name]
        if not (isinstance(listed, list) and listed and isinstance(listed[-1], dict)):
            plain = rest = values[name]
            break
        for entry in cast("list[Values]", listed):
            entries.append({**entry, "filter": entry.get("filter")})
            if entries[-1]["filter"] in (None, "*"):
                return entries
    if entries and rest is None and not strict:
        return None
    if entries and rest is None:
        raise ValueError(f"the filters of {name} in the mergekit file leave tensors without a value")
    return [*entries, {"filter": None, "value": rest}] if entries else plain


class _Reader:
    """Translates one file.

    Args:
        content: What it says.
        folder: What its paths start from.
        module: What it says of the model's only module, if it does.
    """

    def __init__(self, content: Values, folder: Path, module: Values) -> None:
        self.content = content
        self.folder = folder
        self.method = str(content["merge_method"])
        self.unused: list[str] = []
        self.misplaced: set[str] = set()
        # What all models and slices fall back on, the nearest first.
        self.shared = [*([self._cleaned(module)] if module else []), self._cleaned(content)]

    def config(self) -> Values:
        base = self._place(self.content["base_model"]) if "base_model" in self.content else None
        result: Values = {}
        if "models" in self.content:
            entries = [
                (self._place(entry["model"]), self._cleaned(entry)) for entry in _entries(self.content, "models")
            ]
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
        template = self.content.get("chat_template")
        if template is not None:
            result["chat_template"] = str(template)
        return result | self._vocabulary(result)

    def _vocabulary(self, result: Values) -> Values:
        """What the file says of tokens."""
        named: Any = self.content.get("tokenizer")
        if named is not None and not isinstance(named, dict):
            raise ValueError("`tokenizer` of the mergekit file is not a mapping")
        settings = cast("Values", named or {})
        odd = sorted(set(settings) - {"source", "tokens", "pad_to_multiple_of"})
        if odd:
            raise ValueError(f"`tokenizer` of the mergekit file has '{odd[0]}', which is not supported")
        source = self.content.get("tokenizer_source") or (
            settings.get("source", "union") if named is not None else None
        )
        if source is None:
            return {}
        made: Values = {"tokenizer": source if source == "union" else self._tokenizer_model(source, result)}
        if settings.get("tokens"):
            made["tokens"] = [self._token(token, dict(entry or {})) for token, entry in settings["tokens"].items()]
        if settings.get("pad_to_multiple_of"):
            made["pad_to_multiple_of"] = settings["pad_to_multiple_of"]
        return made

    def _token(self, token: str, entry: Values) -> Values:
        """Where a token's rows come from."""
        source: Any = entry.get("source")
        force = {"force": True} if entry.get("force") else {}
        if source is None and force:
            raise ValueError(f"the token {token!r} of the mergekit file is forced, but not to any value")
        if source is None:
            return {"token": token}
        if isinstance(source, dict) and "kind" in source:
            about = cast("Values", source)
            if about["kind"] == "zero":
                return {"token": token, "zero": True, **force}
            like = about["token"] if about.get("token") is not None else about["token_id"]
            return {"token": token, "model": self._place(about["model"]), "like": like, **force}
        return {"token": token, "model": self._place(source), **force}

    def _tokenizer_model(self, tokenizer: Any, result: Values) -> str:
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
            # A base that such a method does not use is a model like the others.
            entries = [(base, {}), *entries]
        result: Values = {"models": [place for place, _ in entries]}
        if base is not None and self.method not in WITHOUT_BASE:
            result["base"] = base
        parameters = [own for _, own in entries]
        given = {key for values in (*parameters, *self.shared) for key in values}
        method = self._method(parameters, self.shared, given)
        if method["uses"] != "mergekit" and self.method in WEIGHTED:
            result["weights"] = [self._weight([own, *self.shared]) for own in parameters]
        return {**result, "method": method}

    def _of_slices(self, slices: Sequence[Values], base: str | None) -> Values:
        made = [self._slice(entry, base) for entry in slices]
        given = {key for _, own, outer in made for values in (*own, *outer) for key in values}
        methods = [self._method(own, outer, given) for _, own, outer in made]
        method = methods[0]
        parts = [part for part, _, _ in made]
        if any(other != method for other in methods):
            # What the whole file says, and in each slice all that is otherwise there.
            method = self._method([], self.shared, given, strict=False)
            for part, own in zip(parts, methods, strict=True):
                settings = {key: value for key, value in own.items() if method.get(key) != value}
                part |= {"settings": settings} if settings else {}
        result: Values = {"slices": parts}
        if base is not None and self.method not in WITHOUT_BASE:
            result["base"] = base
        return {**result, "method": method}

    def _slice(self, entry: Values, base: str | None) -> tuple[Values, list[Values], list[Values]]:
        """One slice; the parameters of each source; and what they fall back on: the slice's, then the file's."""
        if entry.get("residual_weight") is not None:
            self.misplaced.add("residual_weight")
        own_base = self._place(entry["base_model"]) if entry.get("base_model") else base
        outer = [self._cleaned(entry), *self.shared]
        sources: list[tuple[Values, Values]] = []
        base_layers: list[int] | None = None
        for source in _entries(entry, "sources"):
            place = self._place(source["model"])
            own = self._cleaned(source)
            if "layer_range" not in source:
                raise ValueError("a source in the mergekit file has no layer_range")
            layers = list(source["layer_range"])
            if place == own_base and self.method not in WITHOUT_BASE:
                base_layers = layers
                continue
            made_of: Values = {"model": place, "layers": layers}
            if self.method in WEIGHTED:
                made_of["weight"] = self._weight([own, *outer])
            scopes = [own, *outer]
            if self.method == "passthrough" and any("scale" in values for values in scopes):
                made_of["scale"] = _resolved("scale", scopes, 1.0)
            first = self.method in BASE_IS_A_MODEL and place == own_base
            sources.insert(0 if first else len(sources), (made_of, own))
        if not sources and base_layers is not None:
            # Nothing changes the base there: it stands for a model that is the same.
            sources.append(({"model": own_base, "layers": base_layers}, {}))
        part: Values = {"sources": [made_of for made_of, _ in sources]}
        if own_base != base and self.method not in WITHOUT_BASE:
            part["base"] = own_base
        if base_layers not in (None, sources[0][0]["layers"]):
            part["base_layers"] = base_layers
        # Every source now has a scale.
        beside = {"scale"} if self.method == "passthrough" else set[str]()
        kept = [
            {key: value for key, value in values.items() if key not in beside}
            for values in (*(own for _, own in sources), *outer)
        ]
        return part, kept[: len(sources)], kept[len(sources) :]

    @staticmethod
    def _cleaned(entry: Values) -> Values:
        """The parameters beside something, without those that change no result."""
        return {key: value for key, value in dict(entry.get("parameters") or {}).items() if key not in IGNORED}

    def _method(
        self, parameters: Sequence[Values], outer: Sequence[Values], given: set[str], *, strict: bool = True
    ) -> Values:
        """The method with its parameters.

        Args:
            parameters: Those of each model.
            outer: What they fall back on, the nearest first.
            given: The names of all that are given anywhere in the file.
            strict: Whether filters that leave tensors without a value are an error; else the parameter is left out.
        """
        names = OURS.get(self.method)
        if names is not None:
            own = set(PER_MODEL) | ({"epsilon"} if self.method in EPSILON_PER_MODEL else set[str]())
            self.misplaced |= {name for values in parameters for name in values} - own
            parameters = [{name: value for name, value in values.items() if name in own} for values in parameters]
            given = given - (self.misplaced - {name for values in outer for name in values})
        if names is None or given & MORE.get(self.method, set()):
            # As mergekit has it, through its own code.
            values = {key: _setting(key, parameters, outer, None, strict=strict) for key in sorted(given)}
            self.unused = sorted(self.misplaced)
            there = {key: value for key, value in values.items() if value is not None}
            return {"uses": "mergekit", "name": self.method, "parameters": there}
        weight = {"weight"} if self.method in WEIGHTED else set[str]()
        self.unused = sorted({*(given - set(names) - weight), *self.misplaced})
        result: Values = {"uses": RENAMED.get(self.method, self.method), **DEFAULTS.get(self.method, {})}
        for theirs, ours in names.items():
            if theirs not in given:
                continue
            rest = result.get(ours, FALLBACKS.get(ours))
            value = _setting(theirs, parameters, outer, result.get(ours), rest, strict=strict)
            result |= {} if value is None else {ours: value}
        return result

    def _weight(self, scopes: Sequence[Values]) -> Any:
        value = _resolved("weight", scopes, None)
        if value is None:
            raise ValueError(f"{self.method} needs a weight for every model in the mergekit file")
        return value

    def _place(self, model: Any) -> str:
        """A folder, relative to the file or the working directory, else a hub id; ``model+adapter`` is both."""
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
