"""The launcher's expected errors: each one's text says what clashes and what to set instead."""

from cluster.errors import DocumentError, ExpectedError, Problem

__all__ = [
    "BadLossesError",
    "CheckpointError",
    "DataError",
    "DocumentError",
    "ExpectedError",
    "ModelError",
    "NumericError",
    "PlanError",
    "Problem",
    "RecipeError",
    "ResourceError",
    "RunDirectoryError",
    "SourceError",
    "StorageError",
    "TrainingError",
]


class RecipeError(DocumentError):
    """A recipe (or the DeepSpeed JSON it names) is wrong; lists every bad field with file and line."""


class PlanError(DocumentError):
    """Recipe and resources are each well-formed but do not go together."""


class DataError(ExpectedError):
    """The data named by the recipe is missing, empty or not of the stated form."""


class SourceError(DocumentError, DataError):
    """What is wrong with the data that a recipe names, each with the field that names it."""


class ModelError(ExpectedError):
    """transformers refuses the model, or the model does not fit the data."""


class CheckpointError(ExpectedError):
    """A checkpoint cannot be used for this run."""


class RunDirectoryError(ExpectedError):
    """The run directory cannot be created, written or used by this recipe."""


class ResourceError(ExpectedError):
    """The cluster does not have what the plan asks for."""


class StorageError(ExpectedError):
    """A file could not be written (disk full, read-only, gone)."""


class NumericError(ExpectedError):
    """The loss is not finite, or a spike."""


class BadLossesError(NumericError):
    """More losses were bad than the recipe lets a run leave out."""


class TrainingError(ExpectedError):
    """A worker failed for good; the text holds the failing rank's own traceback."""
