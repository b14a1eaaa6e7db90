"""The config fields that training stages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from luthier.api.artifact import ArtifactKind
from luthier.api.config import (
    AdapterUse,
    Config,
    DatasetInputs,
    Estimate,
    ModelInput,
    NotIdentity,
    ObjectiveUse,
    OptimizerUse,
    RegularizerUse,
    StageConfig,
    full_precision_problems,
    schema_problems,
)
from luthier.api.data import Schema
from luthier.api.estimates import Shape, Training, memory_of

CHARACTERS_PER_TOKEN = 4
ROW_TOKENS = 24
"""Tokens of a row that are none of its text's: about what a chat template adds."""


class ObjectiveConfig(Config):
    """Base of an objective's config: what a plan has to know of it."""

    schemas: ClassVar[tuple[Schema, ...]] = ("messages",)
    """The schemas of the rows that it can be trained on."""


class BadRows(Config):
    """What to do with rows that cannot be used as they are."""

    drop_up_to: float = Field(default=0.01, ge=0, le=1)
    """The share of a split's rows that may be left out, each reported; with more of them the stage stops."""


class ExpertChoice(Config):
    """Which experts of a mixture are trained, in layers that hold them in one parameter."""

    named: list[int] | dict[int, list[int]] | None = None
    """Their numbers, for all blocks or by the number of the block."""
    share: float | None = Field(default=None, gt=0, le=1)
    """In each block the fewest that together take this share of what the training rows send to experts (ESFT,
    arXiv:2407.01906)."""
    by: Literal["tokens", "weights"] = "tokens"
    """What is shared out: tokens, or their weights in the result."""
    rows: int = Field(default=64, gt=0)
    """The training rows that are looked at."""

    @model_validator(mode="after")
    def _one_way(self) -> ExpertChoice:
        if (self.named is None) == (self.share is None):
            raise ValueError("give `named` or `share`")
        listed = self.named.values() if isinstance(self.named, dict) else [self.named or []]
        if self.named is not None and (not self.named or not all(listed)):
            raise ValueError("`named` names no expert")
        if any(number < 0 for numbers in listed for number in numbers):
            raise ValueError("experts are counted from 0")
        return self


class TrainingConfig(StageConfig):
    """What every training stage has: what is trained, on what, how long, how fast and in which batches."""

    dated: ClassVar[bool] = True
    learns_from: ClassVar[tuple[str, ...]] = ("data",)

    model: ModelInput
    """The model to train; an adapter is trained further, on its base, loaded as it was."""
    data: DatasetInputs
    """The rows: one dataset, or several that are trained on together."""
    weights: list[Annotated[float, Field(ge=0)]] | None = None
    """How many rows an epoch takes of each dataset, beside each other: `[0.8, 0.2]` takes one of the second for four of
    the first, such as to replay what a model learned before. An epoch has all rows of the first; by default of all."""
    adapter: AdapterUse | None = None
    """Train an adapter instead of all weights."""
    objective: ObjectiveUse = Field(default=cast("Any", "cross_entropy"))
    """What training minimises."""
    optimizer: OptimizerUse = Field(default=cast("Any", "adamw"))
    """How weights follow their gradients."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What the weights of a frozen base under an adapter are loaded in; trained weights are always fp32. `auto`: as
    `precision` is."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; 1 when neither this nor `steps` is given."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; instead of `epochs`."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """The peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """How the learning rate falls after warm-up; `wsd`: it stays, and falls along a line at the end."""
    decay: float = Field(default=0.1, gt=0, le=1)
    """The share of steps at the end over which the learning rate of `wsd` falls."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """The share of steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """The weight decay of matrices; norms and biases have none."""
    batch_size: int = Field(default=8, gt=0)
    """Rows in an optimizer step, however they are cut."""
    micro_batch_size: Annotated[Literal["auto"] | Annotated[int, Field(gt=0)], NotIdentity()] = "auto"
    """Rows in one forward pass of one process. `auto`: as many of a step as fit, fewer after running out of memory. It
    changes memory and speed, and nothing else but rounding (and the loss that balances experts, where a model's config
    asks for it: it warns then)."""
    max_length: int = Field(default=1024, gt=1)
    """The longest row in tokens; longer ones are handled as `on_long` says, never cut in silence."""
    max_long: Annotated[float | None, Field(ge=0, le=1), NotIdentity()] = None
    """The share of a dataset's rows that may be too long; by default any. More of them stop the stage."""
    min_trained: Annotated[float | None, Field(ge=0, le=1), NotIdentity()] = None
    """The share of a dataset's tokens that has to be trained; by default any. Fewer stop the stage."""
    bad_rows: BadRows = BadRows()
    """Rows that the chat template refuses, renders without a part of them, or leaves without a stop token; pairs whose
    sides become the same tokens."""
    allow_leakage: Annotated[str | None, Field(min_length=1), NotIdentity()] = None
    """Why rows that the recipe tests on may be trained on; by default nothing is trained then."""
    gradient_checkpointing: Annotated[Literal["auto"] | bool, NotIdentity()] = "auto"
    """Compute activations twice instead of keeping them: less memory, more time. `auto`: where one row would not fit
    otherwise."""
    activation_offload: Annotated[bool, NotIdentity()] = False
    """Keep activations in the computer's memory instead of the GPU's: less of the latter, a little more time."""
    attention: Annotated[Literal["auto", "sdpa", "flash", "eager"], NotIdentity()] = "auto"
    """How attention is computed. `auto`: as transformers does by itself; `flash` wants a GPU and flash-attn, or the
    package `kernels`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The precision of forward and backward passes; trained weights and optimizer states stay in fp32. `auto`: bf16 on
    a GPU that has it, and on a CPU where a short probe finds that it pays."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients whose norm is larger are scaled down to it; 0: never."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """The size of noise that is added to embeddings while training (NEFTune, arXiv:2310.05914)."""
    train: list[str] = []
    """Patterns for the names of weights that are trained, such as `model.layers.2*.mlp.*`; the others stay as they
    are. `routers` are the weights that send tokens to experts. Each has to match something; none: all are trained."""
    experts: ExpertChoice | None = None
    """Train some experts of a mixture, and nothing else but what `train` names."""
    eval_every: int | None = Field(default=None, gt=0)
    """Steps between looks at the validation split; by default once an epoch, or with `steps` as often as a checkpoint
    is written."""
    keep_best: bool = False
    """Store the weights with the lowest loss on the validation split, instead of the last."""
    patience: int | None = Field(default=None, gt=0)
    """End training after so many looks at the validation split without a lower loss."""
    regularizers: list[RegularizerUse] = []
    """Terms added to the loss."""
    save_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What trained weights are stored in. `auto`: a full model in the dtype it came in, or in fp32 where rounding to
    that would undo more than a twentieth of what was trained; an adapter in fp32."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How weights are rounded to fewer bits; `stochastic` keeps small changes on average, drawn with the seed."""
    on_divergence: Annotated[Literal["stop", "warn"], NotIdentity()] = "stop"
    """What to do where the mean loss of ten steps is far above that of the first ten: stop, name the batch that it
    began with, and keep the checkpoint before it; or train on."""
    save_every: Annotated[int, NotIdentity()] = Field(default=200, gt=0)
    """Steps between checkpoints, from which a killed stage resumes."""
    log_every: Annotated[int, NotIdentity()] = Field(default=10, gt=0)
    """Steps between logged metrics."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        if not isinstance(self.objective.config, ObjectiveConfig):
            raise ValueError(f"the config of {self.objective.name} is not an ObjectiveConfig")
        if (self.resources.gpus or 0) > 1:
            raise ValueError("training runs in one process so far: ask for one GPU at most")
        for name in ("train", "experts"):
            if getattr(self, name) and self.adapter is not None:
                raise ValueError(f"an adapter says itself what it trains: leave `{name}` or `adapter` out")
        if self.weights is not None and len(self.weights) != len(self.data):
            raise ValueError(f"`weights` has {len(self.weights)} numbers for {len(self.data)} datasets")
        if self.weights and not self.weights[0]:
            raise ValueError("the first of `weights` is 0: an epoch is one pass over the first dataset")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError("`warmup` and `decay` together are more than all steps")
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"`micro_batch_size` {self.micro_batch_size} is more than `batch_size` {self.batch_size}: a pass "
                "takes a part of a step's rows"
            )
        return self

    @property
    def leakage_allowed(self) -> str | None:
        return self.allow_leakage

    @property
    def fails_on_long(self) -> bool:
        """Whether a row that is too long stops the stage."""
        return False

    @property
    def trained_answers(self) -> Literal["all", "apart", "last"]:
        """Which answers of a conversation are trained."""
        return "all"

    @property
    def schemas(self) -> tuple[Schema, ...]:
        """The schemas of the rows that the stage can be trained on."""
        assert isinstance(self.objective.config, ObjectiveConfig), "checked when the config was read"
        return self.objective.config.schemas

    def produces(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> ArtifactKind:
        return "adapter" if self.adapter is not None or "adapter" in inputs["model"] else "model"

    def kind_problems(self, inputs: Mapping[str, Sequence[ArtifactKind]]) -> list[str]:
        found: list[str] = []
        if self.adapter is not None and "adapter" in inputs["model"]:
            found.append(
                "the model is an adapter already: leave `adapter` out to train it further, or fold it first, as in "
                "`folded: {uses: merge, models: [ADAPTER], method: passthrough}`, for a new one or all weights"
            )
        for name in ("train", "experts"):
            if getattr(self, name) and "adapter" in inputs["model"]:
                found.append(f"the model is an adapter, which says itself what is trained: leave `{name}` out")
        if self.dtype == "bf16" and self.adapter is None and "model" in inputs["model"]:
            found.append("all weights are trained, and those stay in fp32: leave `dtype` out, or train an `adapter`")
        return found

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        return [
            *schema_problems(f"the objective {self.objective.name}", inputs, self.schemas),
            *full_precision_problems(inputs, ("model",), "train the full-precision model, and quantize what comes out"),
            *_no_training_rows(inputs),
            *self._nothing_to_look_at(inputs),
            *self._unknown_targets(inputs),
        ]

    def _nothing_to_look_at(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """A problem where the validation split is to decide something, and there is none."""
        data = [facts for facts in inputs.get("data", []) if "rows" in facts]
        if not data or any(facts["rows"].get("validation") for facts in data):
            return []
        asked = [name for name in ("keep_best", "patience", "eval_every") if getattr(self, name)]
        return [f"`{name}` asks for a validation split, which the data has not" for name in asked]

    def _unknown_targets(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """A problem for each layer that the adapter is to go on and that a model does not have."""
        wanted: Any = getattr(self.adapter.config, "target_modules", None) if self.adapter is not None else None
        listed = cast("list[str]", wanted) if isinstance(wanted, list) else []
        names = [name.rpartition(".")[2] for name in listed]
        found: list[str] = []
        for facts in inputs.get("model", []):
            known: Sequence[str] = facts.get("layer_names", ())
            for name in (name for name in names if known and name not in known):
                near = get_close_matches(name, known, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(known)}"
                found.append(f"`target_modules` names '{name}', which the model has not: {hint}")
        return found

    def input_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        found = self.early_problems(inputs)
        if self.dtype != "auto" and any("load_options" in facts for facts in inputs.get("model", [])):
            found.append("the adapter says how its base is loaded: leave `dtype` out")
        return found

    def estimate(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Estimate:
        parameters = sum(facts.get("parameters", 0) for facts in inputs.get("model", []))
        data = inputs.get("data", [])
        sizes = [facts.get("rows", {}).get("train", 0) for facts in data]
        rows = sum(sizes)
        if self.weights and len(sizes) == len(self.weights):
            rows = round(sizes[0] * sum(self.weights) / self.weights[0])
        if self.steps is not None and rows:
            rows = self.steps * self.batch_size
        elif self.epochs is not None:
            rows = round(rows * self.epochs)
        tokens = _tokens(data, rows)
        shapes = [shape for facts in inputs.get("model", []) if (shape := Shape.of(facts)) is not None]
        # Where no more is known: weights, gradients and two moments in fp32, four bytes each.
        memory = memory_of(shapes[0], self.training_of(tokens / rows if rows else 0.0)) if shapes else 16 * parameters
        work = (self.work, parameters) if parameters else None
        disk = 14 * parameters
        return Estimate(rows or None, tokens or None, disk or None, memory or None, work)

    @property
    def work(self) -> str:
        """Names what makes one training as fast as another."""
        adapter = "all weights" if self.adapter is None else self.adapter.name
        return " ".join([adapter, self.objective.name, self.precision, str(self.gradient_checkpointing)])

    def training_of(self, row: float) -> Training:
        """How it is trained, for rows of so many tokens on the average."""
        adapter: Any = None if self.adapter is None else self.adapter.config
        bits: int | None = getattr(adapter, "bits", None)
        base = f"{bits}bit" if bits else "bf16" if "bf16" in (self.dtype, self.precision) else "fp32"
        rows = self.micro_batch_size if isinstance(self.micro_batch_size, int) else self.batch_size
        return Training(
            rank=None if adapter is None else getattr(adapter, "r", 1),
            base=base,
            halves=self.precision == "bf16",
            optimizer=self.optimizer.name,
            pass_tokens=round(rows * min(row, self.max_length)),
            kept=self.gradient_checkpointing is not True,
        )


def _no_training_rows(inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A problem for each dataset without rows to train on."""
    return [
        f"the data has no rows in the split 'train' (it has: {', '.join(facts['rows']) or 'none'})"
        for facts in inputs.get("data", [])
        if "rows" in facts and not facts["rows"].get("train")
    ]


def _tokens(data: Sequence[Mapping[str, Any]], rows: int) -> int:
    """About how many tokens so many rows have."""
    known = sum(sum(facts.get("rows", {}).values()) for facts in data if "characters" in facts)
    texts = sum(facts.get("characters", 0) / facts.get("characters_per_token", CHARACTERS_PER_TOKEN) for facts in data)
    return round((texts / known + ROW_TOKENS) * rows) if known else 0


class TuningConfig(TrainingConfig):
    """What stages have that train on answers."""

    on_long: Literal["drop", "fail"] = "drop"
    """What to do with rows longer than `max_length`, or than the model's context: leave them out and say which, or
    stop."""

    @property
    def fails_on_long(self) -> bool:
        return self.on_long == "fail"

    def early_problems(self, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        found = super().early_problems(inputs)
        if any("chat_template" in facts and facts["chat_template"] is None for facts in inputs.get("model", [])):
            found.append(
                "the model has no chat template, and answers stand in one: give it one first, as in "
                "`with-template: {uses: merge, models: [MODEL], method: passthrough, chat_template: chatml}` (names: "
                "alpaca, chatml, exaone, llama3, mistral), or train on texts with `pretrain`"
            )
        schemas = list(dict.fromkeys(str(facts["schema"]) for facts in inputs.get("data", []) if "schema" in facts))
        if len(schemas) > 1:
            # A batch of one and a batch of the other would be trained on in two ways.
            found.append(f"the datasets have different schemas ({', '.join(schemas)}): train on one after the other")
        return found


class PreferenceTuningConfig(TuningConfig):
    """What the presets have that train on preferences."""

    beta: Annotated[float | None, NotIdentity()] = Field(default=None, gt=0)
    """The objective's `beta`, in short: how strongly the model is held to the reference, or what weight the odds ratio
    has."""

    @model_validator(mode="before")
    @classmethod
    def _beta_is_the_objectives(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = cast("dict[str, Any]", values)
        beta, chosen = given.get("beta"), given.get("objective", cls.model_fields["objective"].default)
        if beta is None or not isinstance(chosen, (str, dict)):
            return given
        inside: dict[str, Any] = {"uses": chosen} if isinstance(chosen, str) else cast("dict[str, Any]", chosen)
        if inside.get("beta") not in (None, beta):
            raise ValueError("`beta` stands beside `objective` and inside of it, with two values: give one")
        return {**given, "objective": {**inside, "beta": beta}}
