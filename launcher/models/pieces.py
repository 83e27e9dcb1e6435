"""Parts of a transformers causal language model, each built by itself, with the weights that the whole would have."""

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from launcher.errors import ModelError
from launcher.models.build import DTYPES, build_config, initialize_weights
from launcher.planning.plan import Plan

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Pieces:
    """Makes single modules of a plan's model; the whole stands on torch's meta device, without memory.

    Args:
        plan: of the run; its pretrained weights, if any, lie in a local folder.
        auto_class: the transformers auto class of the task.

    Raises:
        ModelError: transformers refuses the model, or its folder holds no safetensors files.
    """

    def __init__(self, plan: Plan, auto_class: Any) -> None:
        self.config = build_config(plan)
        self.config.use_cache = False
        self._seed = plan.recipe.seed
        self._dtype = torch.float32
        self._files: dict[str, Path] | None = None
        folder = plan.recipe.model.model_name_or_path
        if folder is not None:
            self._dtype = DTYPES[plan.recipe.training.precision]
            self._files = weight_files(Path(folder))
        attention = plan.recipe.model.attn_implementation
        try:
            with no_init_weights(), torch.device("meta"):
                self.skeleton = auto_class.from_config(self.config, attn_implementation=attention, dtype=self._dtype)
        except (ValueError, TypeError, ImportError, KeyError) as error:
            raise ModelError(f"transformers cannot build the model: {type(error).__name__}: {error}") from error

    def make(self, name: str) -> nn.Module:
        """Build one module on the host, with its weights; a second call builds it again.

        Random weights are those of `models.build`: a function of (seed, module name) alone.

        Args:
            name: of the module in the whole model, such as `model.layers.3`.

        Raises:
            ModelError: the folder of pretrained weights lacks some of them.
        """
        module: nn.Module = copy.deepcopy(self.skeleton.get_submodule(name)).to_empty(device="cpu")
        # Also with pretrained weights: buffers that no file holds get their values here.
        initialize_weights(self.skeleton, self._seed, partitioned=False, only=(name, module))
        if self._files is not None:
            self._load(module, name, self._files)
        return module

    def _load(self, module: nn.Module, name: str, files: Mapping[str, Path]) -> None:
        state = module.state_dict()
        missing = [key for key in state if f"{name}.{key}" not in files]
        if missing:
            raise ModelError(f"the folder of pretrained weights lacks {', '.join(f'{name}.{key}' for key in missing)}")
        with torch.no_grad():
            for key, weight in _read({f"{name}.{key}": files[f"{name}.{key}"] for key in state}):
                state[key.removeprefix(f"{name}.")].copy_(weight)


def weight_files(folder: Path) -> dict[str, Path]:
    """Find which file of a Hugging Face folder holds each weight.

    Raises:
        ModelError: it holds no safetensors files.
    """
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    if not (folder / _SINGLE).is_file():
        raise ModelError(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}, from which each pipeline stage reads its own weights; "
            "save the model again with save_pretrained of transformers"
        )
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)


def _read(places: Mapping[str, Path]) -> Iterable[tuple[str, Tensor]]:
    for path in dict.fromkeys(places.values()):
        with safe_open(path, framework="pt") as file:
            for name, place in places.items():
                if place == path:
                    yield name, file.get_tensor(name)


def transformers_name(name: str) -> str:
    """The name that a weight of a pipeline has in the whole model.

    Args:
        name: `INDEX.REST`, where the index is that of the layer in the pipeline, or `tied_modules.KEY.REST`.
    """
    index, _, rest = name.removeprefix("tied_modules.").partition(".")
    place, _, weight = rest.partition(".")
    if place == "layer":
        return f"model.layers.{int(index) - 1}.{weight}"
    whole = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[place]
    return f"{whole}.{weight}"
