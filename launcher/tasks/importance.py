"""How much each weight matters to an earlier task (`optimizer.ewc`): the diagonal of the Fisher information."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.data.prepare import prepare
from launcher.data.progress import ProgressReporter
from launcher.data.sampler import evaluation_rows
from launcher.data.store import IMPORTANCE, PreparedData
from launcher.errors import RecipeError
from launcher.planning.alone import plan_alone
from launcher.recipe.schema import Recipe
from launcher.recipe.training_sections import EwcSection
from launcher.tasks.asking import asked_device, model_identity

BYTES_PER_NUMBER = 4


class Importance:
    """The mean over samples of the squared gradient of each one's summed loss, in fp32, at the pretrained weights.

    That is the empirical Fisher information: of the true targets, not of ones drawn from the model. Nothing is dropped
    out.

    Args:
        task: class of the recipe's task.
        recipe: names model and earlier data.
        section: `optimizer.ewc` of it.
        prepared: the new data, whose classes the earlier data must have.
    """

    name = "importance of the weights"

    def __init__(self, task: Any, recipe: Recipe, section: EwcSection, prepared: PreparedData) -> None:
        self.section = section
        self._plan = plan_alone(recipe, 1)
        self._earlier = prepare(_earlier(recipe, section), progress=False)
        theirs, ours = self._earlier.facts.get("labels"), prepared.facts.get("labels")
        if theirs != ours:
            raise RecipeError.single(
                "optimizer.ewc.sources",
                f"their classes are {', '.join(theirs or ())}, those of data.sources {', '.join(ours or ())}: name all "
                "of them in classification.labels",
            )
        self._task = task(self._plan, prepared.facts)

    def identity(self) -> Any:
        """Earlier data, how many of its samples, and the model."""
        return [self._earlier.fingerprint, self.section.samples, model_identity(self._plan)]

    def size(self) -> int:
        """A number for each weight."""
        numbers = sum(int(values.numel()) for values in self._model.parameters() if values.requires_grad)
        return BYTES_PER_NUMBER * numbers

    def build(self, folder: Path, reporter: ProgressReporter) -> list[str]:
        """Run the samples one by one."""
        from safetensors.torch import save_file

        samples = chosen_samples(self._earlier.split("train"), self.section.samples)
        with reporter.stage(self.name, len(samples), "samples") as advance:
            found: dict[str, Tensor] = {}
            for sample in samples:
                add_squared_gradient(self._task, self._model, sample, found)
                advance(1)
        save_file({name: (total / len(samples)).cpu() for name, total in found.items()}, folder / IMPORTANCE)
        return [f"optimizer.ewc: the importance of the weights is that of {len(samples)} earlier samples"]

    @cached_property
    def _model(self) -> Any:
        return self._task.build_model().to(asked_device()).eval()


def _earlier(recipe: Recipe, section: EwcSection) -> Recipe:
    data = recipe.data.model_copy(
        update={"sources": section.sources, "validation_sources": (), "validation_fraction": 0.0}
    )
    optimizer = recipe.optimizer.model_copy(update={"ewc": None})
    return recipe.model_copy(update={"data": data, "optimizer": optimizer, "distillation": None})


def chosen_samples(datasets: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """Samples that are spread evenly over all of them."""
    sources, rows = evaluation_rows([len(dataset) for dataset in datasets], count)
    return [datasets[source][row] for source, row in zip(sources.tolist(), rows.tolist(), strict=True)]


def add_squared_gradient(task: Any, model: Any, sample: Mapping[str, Any], found: dict[str, Tensor]) -> None:
    """Add one sample's squared gradients to the sums, by parameter."""
    batch = {name: values.to(next(model.parameters()).device) for name, values in task.collate([sample]).items()}
    task.loss(model, batch).loss_sum.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = parameter.grad.float().square()
            found[name] = square if name not in found else found[name].add_(square)
            parameter.grad = None
