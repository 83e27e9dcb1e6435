"""Sections of a recipe about how the model and its states are spread over workers."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from launcher.recipe.section import Section


def _or_auto(schema: dict[str, Any]) -> None:
    section = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"const": "auto", "description": "Have the planner choose."}, section]


class ParallelSection(Section):
    """How a model is spread over workers; what is left of the world size is data parallel.

    `parallel: auto` has the planner choose: the fastest layout that fits the machines, with micro batch and
    accumulation, and with ZeRO stage, offload and recomputation where the recipe leaves them out.
    """

    model_config = ConfigDict(json_schema_extra=_or_auto)

    auto: bool = False
    """Have the planner choose; the same as `parallel: auto`."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers that share each layer's matrices."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Stages that share the layers."""
    pipeline_partition: Literal["parameters", "time"] = "parameters"
    """What the stages share equally: parameters (memory), or an estimate of the time of each layer."""
    sequence_parallel_size: int = Field(default=1, ge=1)
    """Workers that share each sequence."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Workers that share the experts of a mixture-of-experts model."""

    @model_validator(mode="before")
    @classmethod
    def _read_auto(cls, value: Any) -> Any:
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _auto_or_sizes(self) -> "ParallelSection":
        if self.auto and any(name.endswith("_size") for name in self.model_fields_set):
            raise ValueError("auto chooses all sizes; leave them out, or leave auto out")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Every size by its field's name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_size")}


class ZeroSection(Section):
    """ZeRO (Rajbhandari et al., arXiv 1910.02054): which model states are sharded, and where they live."""

    stage: int | None = Field(default=None, ge=0, le=3)
    """0: none; 1: optimizer states; 2: and gradients; 3: and parameters. Default: the DeepSpeed config's, or 2."""
    offload_optimizer: Literal["none", "cpu", "nvme"] | None = None
    """Keep optimizer states in host memory (stages 1 to 3), or in files on NVMe (stage 3, with nvme_path)."""
    offload_param: Literal["none", "cpu", "nvme"] | None = None
    """Keep parameters in host memory (stage 3); `nvme` is known and refused."""
    nvme_path: str | None = None
    """Folder on a disk of each node for what is offloaded to nvme. A start makes a folder of its own in it, and
    removes it at its end; those of starts that were killed are removed by the next start there."""
    hpz_partition_size: int | None = Field(default=None, ge=2)
    """Of stage 3: each so many workers (those of a node) keep a second copy of the weights among them, from which the
    backward pass gathers them (ZeRO++, arXiv 2306.10209, section 3.2)."""


class DeepSpeedSection(Section):
    """The DeepSpeed JSON under the recipe."""

    config: str | None = None
    """A file, or the name of one in `deepspeed_configs/`; default: the one for zero.stage and its offload."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed keys laid over the file; a key that the pinned DeepSpeed does not know is an error."""
