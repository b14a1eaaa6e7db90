"""What plugin authors import. Loads no torch, and pydantic only when a config is touched."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from luthier.api.component import KINDS, Component, Kind
from luthier.api.hooks import hookimpl

if TYPE_CHECKING:
    from luthier.api.artifact import ARTIFACT_KINDS, Artifact, ArtifactKind
    from luthier.api.config import (
        AdapterUse,
        AugmenterUse,
        Config,
        DatasetInput,
        DatasetInputs,
        Estimate,
        ExporterUse,
        Field,
        FileSource,
        FormatUse,
        Gate,
        Input,
        MergeUse,
        MetricUse,
        ModelInput,
        ModelSource,
        NotIdentity,
        OneOrMany,
        Pattern,
        PreferenceLossUse,
        QuantizerUse,
        RegularizerUse,
        Source,
        StageConfig,
        SubComponent,
        TrackerUse,
        Use,
        other_formats,
    )
    from luthier.api.context import StageContext
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
    from luthier.api.protocols import (
        Adapter,
        Augmenter,
        Executor,
        Exporter,
        Facts,
        Format,
        Message,
        Metric,
        Prediction,
        PreferenceBatch,
        PreferenceLoss,
        Quantizer,
        Regularizer,
        Reward,
        Row,
        Stage,
        Teacher,
        TokenLoss,
        Tracker,
    )
    from luthier.api.training import PreferenceTrainingConfig, TrainingConfig

_HOME = {
    "artifact": ("ARTIFACT_KINDS", "Artifact", "ArtifactKind"),
    "config": (
        "AdapterUse", "AugmenterUse", "Config", "DatasetInput", "DatasetInputs", "Estimate", "ExporterUse", "Field",
        "FileSource", "FormatUse", "Gate", "Input", "MergeUse", "MetricUse", "ModelInput", "ModelSource",
        "NotIdentity", "OneOrMany", "Pattern", "PreferenceLossUse", "QuantizerUse", "RegularizerUse",
        "Source", "StageConfig", "SubComponent", "TrackerUse", "Use", "other_formats",
    ),
    "context": ("StageContext",),
    "errors": (
        "DataError", "GateError", "Interrupted", "LuthierError", "ModelError", "PluginError", "Problem",
        "RecipeError", "StageError", "StoreError",
    ),
    "protocols": (
        "Adapter", "Augmenter", "Executor", "Exporter", "Facts", "Format", "Message", "Metric",
        "Prediction", "PreferenceBatch", "PreferenceLoss", "Quantizer", "Regularizer", "Reward", "Row",
        "Stage", "Teacher", "TokenLoss", "Tracker",
    ),
    "training": ("PreferenceTrainingConfig", "TrainingConfig"),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ARTIFACT_KINDS",
    "Adapter",
    "AdapterUse",
    "Artifact",
    "ArtifactKind",
    "Augmenter",
    "AugmenterUse",
    "Component",
    "Config",
    "DataError",
    "DatasetInput",
    "DatasetInputs",
    "Estimate",
    "Executor",
    "Exporter",
    "ExporterUse",
    "Facts",
    "Field",
    "FileSource",
    "Format",
    "FormatUse",
    "Gate",
    "GateError",
    "Input",
    "Interrupted",
    "KINDS",
    "Kind",
    "LuthierError",
    "MergeUse",
    "Message",
    "Metric",
    "MetricUse",
    "ModelError",
    "ModelInput",
    "ModelSource",
    "NotIdentity",
    "OneOrMany",
    "Pattern",
    "PluginError",
    "Prediction",
    "PreferenceBatch",
    "PreferenceLoss",
    "PreferenceLossUse",
    "PreferenceTrainingConfig",
    "Problem",
    "Quantizer",
    "RecipeError",
    "Regularizer",
    "QuantizerUse",
    "RegularizerUse",
    "Reward",
    "Row",
    "Source",
    "Stage",
    "StageConfig",
    "StageContext",
    "StageError",
    "StoreError",
    "SubComponent",
    "Teacher",
    "TokenLoss",
    "Tracker",
    "TrackerUse",
    "TrainingConfig",
    "Use",
    "hookimpl",
    "other_formats",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'luthier.api' has no attribute '{name}'")
    return getattr(import_module(f"luthier.api.{_MODULE[name]}"), name)
