"""What plugin authors import. Loads no torch, and pydantic only when a config is touched."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from luthier.api.component import Component, Implementation, Kind
from luthier.api.hooks import hookimpl
from luthier.api.kinds import KINDS, KindInfo, kind_of_use

if TYPE_CHECKING:
    from luthier.api.artifact import ARTIFACT_KINDS, Artifact, ArtifactKind
    from luthier.api.config import (
        AdapterUse as AdapterUse,
    )
    from luthier.api.config import (
        AugmenterUse as AugmenterUse,
    )
    from luthier.api.config import (
        Config,
        DatasetInput,
        DatasetInputs,
        DataSource,
        DataSources,
        Estimate,
        Field,
        FileSource,
        Gate,
        Input,
        ModelInput,
        ModelSource,
        NotIdentity,
        OneOrMany,
        Pattern,
        Resources,
        Source,
        StageConfig,
        SubComponent,
        Use,
        full_precision_problems,
        schema_problems,
    )
    from luthier.api.config import (
        ExecutorUse as ExecutorUse,
    )
    from luthier.api.config import (
        ExporterUse as ExporterUse,
    )
    from luthier.api.config import (
        FormatUse as FormatUse,
    )
    from luthier.api.config import (
        GeneratorUse as GeneratorUse,
    )
    from luthier.api.config import (
        MergeMethodUse as MergeMethodUse,
    )
    from luthier.api.config import (
        MetricUse as MetricUse,
    )
    from luthier.api.config import (
        ObjectiveUse as ObjectiveUse,
    )
    from luthier.api.config import (
        OptimizerUse as OptimizerUse,
    )
    from luthier.api.config import (
        QuantizerUse as QuantizerUse,
    )
    from luthier.api.config import (
        RegularizerUse as RegularizerUse,
    )
    from luthier.api.config import (
        RewardUse as RewardUse,
    )
    from luthier.api.config import (
        StageUse as StageUse,
    )
    from luthier.api.config import (
        TrackerUse as TrackerUse,
    )
    from luthier.api.context import Context, StageContext
    from luthier.api.data import Augmenter, Conversation, Format, Message, Row, Schema
    from luthier.api.errors import (
        DataError,
        GateError,
        Interrupted,
        LuthierError,
        ModelError,
        PluginError,
        Problem,
        RecipeError,
        StageError,
        StoreError,
    )
    from luthier.api.evaluation import Answers, Choice, Choices, Metric, MetricConfig, Needs, Sample, Score
    from luthier.api.execution import (
        Event,
        Executor,
        ExecutorContext,
        Outcome,
        ProcessSession,
        RunInfo,
        Session,
        Slot,
        Tracker,
        WorkerLaunch,
    )
    from luthier.api.judging import Asks, JudgeConfig
    from luthier.api.serving import (
        Completion,
        Exporter,
        Generator,
        Quantizer,
        Request,
        Sampling,
        ToolEnvironment,
    )
    from luthier.api.stages import Facts, Stage
    from luthier.api.training import (
        Adapter,
        CompletionBatch,
        LossResult,
        Objective,
        Optimizer,
        Regularizer,
        Reward,
        Schedule,
        TokenBatch,
        Unit,
    )
    from luthier.api.tuning import BadRows, ObjectiveConfig, PreferenceTuningConfig, TrainingConfig, TuningConfig

_HOME = {
    "artifact": ("ARTIFACT_KINDS", "Artifact", "ArtifactKind"),
    "config": (
        "Config", "DataSource", "DataSources", "DatasetInput", "DatasetInputs", "Estimate", "Field", "FileSource",
        "Gate", "Input", "ModelInput", "ModelSource", "NotIdentity", "OneOrMany", "Pattern", "Resources", "Source",
        "StageConfig", "SubComponent", "Use", "full_precision_problems", "schema_problems",
    ),
    "context": ("Context", "StageContext"),
    "data": ("Augmenter", "Conversation", "Format", "Message", "Row", "Schema"),
    "errors": (
        "DataError", "GateError", "Interrupted", "LuthierError", "ModelError", "PluginError", "Problem", "RecipeError",
        "StageError", "StoreError",
    ),
    "evaluation": ("Answers", "Choice", "Choices", "Metric", "MetricConfig", "Needs", "Sample", "Score"),
    "execution": (
        "Event", "Executor", "ExecutorContext", "Outcome", "ProcessSession", "RunInfo", "Session", "Slot", "Tracker",
        "WorkerLaunch",
    ),
    "judging": ("Asks", "JudgeConfig"),
    "serving": ("Completion", "Exporter", "Generator", "Quantizer", "Request", "Sampling", "ToolEnvironment"),
    "stages": ("Facts", "Stage"),
    "training": (
        "Adapter", "CompletionBatch", "LossResult", "Objective", "Optimizer", "Regularizer", "Reward", "Schedule",
        "TokenBatch", "Unit",
    ),
    "tuning": ("BadRows", "ObjectiveConfig", "PreferenceTuningConfig", "TrainingConfig", "TuningConfig"),
}  # fmt: skip
"""Where each name is: imported when it is asked for."""
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ARTIFACT_KINDS",
    "Adapter",
    "Answers",
    "Artifact",
    "ArtifactKind",
    "Asks",
    "Augmenter",
    "BadRows",
    "Choice",
    "Choices",
    "Completion",
    "CompletionBatch",
    "Component",
    "Config",
    "Context",
    "Conversation",
    "DataError",
    "DatasetInput",
    "DatasetInputs",
    "Estimate",
    "Event",
    "Executor",
    "ExecutorContext",
    "Exporter",
    "Facts",
    "Field",
    "DataSource",
    "DataSources",
    "FileSource",
    "Format",
    "Gate",
    "GateError",
    "Generator",
    "Implementation",
    "Input",
    "Interrupted",
    "JudgeConfig",
    "KINDS",
    "Kind",
    "KindInfo",
    "LossResult",
    "LuthierError",
    "Message",
    "Metric",
    "MetricConfig",
    "ModelError",
    "ModelInput",
    "ModelSource",
    "Needs",
    "NotIdentity",
    "Objective",
    "ObjectiveConfig",
    "OneOrMany",
    "Optimizer",
    "Outcome",
    "Pattern",
    "PluginError",
    "PreferenceTuningConfig",
    "Problem",
    "ProcessSession",
    "Quantizer",
    "RecipeError",
    "Regularizer",
    "Request",
    "Resources",
    "Reward",
    "Row",
    "RunInfo",
    "Sample",
    "Sampling",
    "Schedule",
    "Schema",
    "Score",
    "Session",
    "Slot",
    "Source",
    "Stage",
    "StageConfig",
    "StageContext",
    "StageError",
    "StoreError",
    "SubComponent",
    "TokenBatch",
    "ToolEnvironment",
    "Tracker",
    "TrainingConfig",
    "TuningConfig",
    "Unit",
    "Use",
    "WorkerLaunch",
    "hookimpl",
    "full_precision_problems",
    "schema_problems",
]
"""Beside these, `AdapterUse`, `MetricUse`, ...: the types of fields that choose a component, one for every kind."""


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"luthier.api.{_MODULE[name]}"), name)
    if kind_of_use(name) is not None:
        return getattr(import_module("luthier.api.config"), name)
    raise AttributeError(f"module 'luthier.api' has no attribute '{name}'")
