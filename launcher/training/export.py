"""From a checkpoint to a Hugging Face folder that `from_pretrained` loads."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from launcher.checkpoints import folders
from launcher.checkpoints.manifest import faults_of, read_manifest
from launcher.checkpoints.retention import candidate_of
from launcher.data.store import PreparedData
from launcher.errors import CheckpointError, StorageError
from launcher.models.build import DTYPES
from launcher.planning.plan import Plan
from launcher.recipe.tasks import TASKS
from launcher.tasks import make_task
from launcher.tasks.distillation import PROJECTIONS
from launcher.training.consolidation import averaged_weights, trained_state_dict, whole_weights


def checkpoint_to_export(checkpoints: Path, plan: Plan) -> Path:
    """The newest complete checkpoint, or the best one, as `export.checkpoint` says."""
    present = folders.complete(checkpoints)
    if plan.recipe.export.checkpoint == "best":
        scores = [(candidate.eval_loss, folder) for folder in present
                  if (candidate := candidate_of(folder)).eval_loss is not None]  # fmt: skip
        if scores:
            return min(scores)[1]
    return present[-1]


def export_checkpoint(folder: Path, plan: Plan, tokenizer_directory: Path, target: Path) -> Path:
    """Write a checkpoint as a Hugging Face folder: safetensors, config, generation config, tokenizer.

    The folder appears whole or not at all; one that is there already is replaced.

    Args:
        folder: of a complete checkpoint.
        plan: of the run.
        tokenizer_directory: the run's tokenizer.
        target: the folder to make.

    Raises:
        CheckpointError: the weights do not fit the plan's model.
        StorageError: the folder cannot be written.
    """
    manifest = read_manifest(folder)
    if wrong := faults_of(folder, contents=plan.recipe.checkpoint.verify == "full"):
        raise CheckpointError(f"checkpoint {folder} is damaged: {'; '.join(wrong)}. Export another one with --step.")
    if plan.recipe.adapter is not None:
        return _export_adapter(folder, plan, tokenizer_directory, target)
    dtype = DTYPES[plan.recipe.export.dtype or plan.recipe.training.precision]
    task = make_task(plan, PreparedData.load(tokenizer_directory.parent).facts)
    config = task.config()
    config.use_cache = True
    with torch.device("meta"):
        model = task.auto_class.from_config(config, dtype=dtype)
    with scratch_beside(target) as scratch:
        weights = averaged_weights if plan.recipe.training.uses_average else whole_weights
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if tensor.ndim == 0}
        state = {
            name: _in_file(tensor, dtype, scratch).view(shapes.get(name, tensor.shape))
            for name, tensor in weights(folder, manifest)
            if not name.startswith(PROJECTIONS)
        }
        # Tied weights may be absent from the state (one copy is stored); everything else must match.
        mismatch = (set(model.state_dict()) ^ set(state)) - set(model.all_tied_weights_keys)
        if mismatch:
            raise CheckpointError(
                f"checkpoint {folder} does not hold the plan's model; differing names: {sorted(mismatch)[:5]}"
            )
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        write_folder(model, target, tokenizer_of(model, plan, tokenizer_directory))
    return target


def tokenizer_of(model: Any, plan: Plan, tokenizer_directory: Path) -> Any:
    """The run's tokenizer, whose special tokens the model generates with; `None` for a task without one."""
    if not TASKS[plan.recipe.task].tokens:
        return None
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    if model.can_generate():
        generation = model.generation_config or GenerationConfig()
        generation.bos_token_id = tokenizer.bos_token_id
        # An encoder-decoder's targets need not end with the tokenizer's end of text.
        decodes = model.config.is_encoder_decoder
        generation.eos_token_id = model.config.eos_token_id if decodes else tokenizer.eos_token_id
        generation.decoder_start_token_id = model.config.decoder_start_token_id if decodes else None
        generation.pad_token_id = tokenizer.pad_token_id
        model.generation_config = generation
    return tokenizer


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder beside the target for weights on their way into it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise StorageError(f"export to {target} failed: {error}") from error


def _in_file(tensor: torch.Tensor, dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """Copy a weight into memory that a file stands behind, so that a model needs no more memory than there is.

    Args:
        tensor: to copy.
        dtype: of the copy, unless the tensor holds whole numbers.
        folder: for the file.

    Raises:
        OSError: the disk is full.
    """
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if tensor.numel() == 0:
        return tensor.to(dtype)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        os.posix_fallocate(file.fileno(), 0, tensor.numel() * dtype.itemsize)  # a page without a place would be SIGBUS
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=dtype)
    return copy.view(tensor.shape).copy_(tensor)


def _export_adapter(folder: Path, plan: Plan, tokenizer_directory: Path, target: Path) -> Path:
    """Write an adapter's run: `adapter/` for peft, and beside it the whole model with the adapter merged into it.

    A prompt cannot be merged: then the folder itself is the adapter's.
    """
    whole = plan.model_copy(update={"zero_stage": 0})
    model = make_task(whole, PreparedData.load(tokenizer_directory.parent).facts).build_model()
    manifest = read_manifest(folder)
    averaged = plan.recipe.training.uses_average
    state = dict(averaged_weights(folder, manifest)) if averaged else trained_state_dict(folder, manifest.zero_stage)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := trained - set(state):
        raise CheckpointError(f"checkpoint {folder} does not hold the plan's adapter; missing: {sorted(missing)[:5]}")
    model.load_state_dict({name: state[name] for name in trained}, strict=False)
    dtype = DTYPES[plan.recipe.export.dtype or plan.recipe.training.precision]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory) if TASKS[plan.recipe.task].tokens else None
    adapter: Any = model.to(dtype)
    if plan.recipe.adapter is not None and plan.recipe.adapter.is_prompt:
        write_folder(adapter, target, tokenizer)
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        write_folder(adapter, Path(scratch) / "adapter")
        merged = adapter.merge_and_unload()
        merged.config.use_cache = True
        write_folder(merged, target, tokenizer)
        shutil.copytree(Path(scratch) / "adapter", target / "adapter")
    return target


def write_folder(model: Any, target: Path, tokenizer: Any = None) -> None:
    """Write a model and its tokenizer into a folder that appears whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        replace_folder(temporary, target)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"export to {target} failed: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(made: Path, target: Path) -> None:
    """Put a folder that is whole into the place of another one, or of none."""
    shutil.rmtree(target, ignore_errors=True)
    made.rename(target)
