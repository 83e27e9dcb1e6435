"""How far the throughput model is from published figures, by source; with --fit, the constants that fit best.

    python benchmarks/throughput_error.py [--rows FILE.csv] [--fit] [--json]

`--rows` takes other published figures, in a file with the columns of `launcher/planning/published_throughput.csv`.
The fit changes one constant at a time, by ever smaller factors, and only rows that are marked as fitted count; each
constant is also held near its literature value, so that eleven rows cannot bend it far.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from launcher.planning import calibration
from launcher.planning.published import PublishedRow, by_source, read_rows

ROW_TOLERANCE = 0.04
"""Errors (logarithms) are divided by this; larger ones than it count less than their square."""


@dataclass(frozen=True)
class Constant:
    """One constant of the model.

    Attributes:
        name: for people.
        prior: what the literature, or a neighbouring program, makes likely.
        width: how far (logarithm) it may reasonably be from that.
        put: sets it.
    """

    name: str
    prior: float
    width: float
    put: Callable[[float], None]


def matrix(family: str, *formats: str) -> Callable[[float], None]:
    """Set the efficiency of matrix products."""

    def put(value: float) -> None:
        calibration.MATRIX_EFFICIENCY[family].update(dict.fromkeys(formats, value))  # type: ignore[arg-type]  # a table

    return put


def software(name: str, field: str) -> Callable[[float], None]:
    """Set a field of a program."""

    def put(value: float) -> None:
        calibration.SOFTWARE[name] = replace(calibration.SOFTWARE[name], **{field: value})  # type: ignore[arg-type]  # a table

    return put


def kernels_of_torch(value: float) -> None:
    """Compilation is worth a tenth beside what it saves in traffic (torchtitan's own comparison has 16 % together)."""
    software("torch-eager", "kernels")(value)
    software("torch-compile", "kernels")(min(1.1 * value, 1.0))


CONSTANTS = (
    Constant("matrix products, A100, 16 bit", 0.85, 0.05, matrix("A100", "bf16", "fp16")),
    Constant("matrix products, H100, 16 bit", 0.70, 0.05, matrix("H100", "bf16", "fp16")),
    Constant("matrix products, H100, fp8", 0.60, 0.08, matrix("H100", "fp8")),
    Constant("kernels, megatron-2021", 0.90, 0.08, software("megatron-2021", "kernels")),
    Constant("kernels, megatron-core", 0.90, 0.08, software("megatron-core", "kernels")),
    Constant("kernels, megatron-deepspeed", 0.65, 0.3, software("megatron-deepspeed", "kernels")),
    Constant("kernels, nanotron", 0.80, 0.1, software("nanotron", "kernels")),
    Constant("kernels, torch-eager", 0.80, 0.1, kernels_of_torch),
    Constant("fp8 casts, torch-compile", 1.0, 0.3, software("torch-compile", "fp8_cast")),
    Constant("seconds of a step, nanotron", 0.05, 1.0, software("nanotron", "step_seconds")),
    Constant("bandwidth, between nodes", 0.70, 0.2, lambda value: setattr(calibration, "OUTSIDE_EFFICIENCY", value)),
    Constant("congestion, EFA", 0.03, 1.0, lambda value: calibration.CONGESTION.update({"EFA-400": value})),
)


def fit() -> dict[str, float]:
    """Search the constants; leaves the best ones set."""
    values = {constant.name: constant.prior for constant in CONSTANTS}
    for constant in CONSTANTS:
        constant.put(constant.prior)
    best, step = _misfit(values), 0.2
    while step > 1e-3:
        improved = False
        for constant in CONSTANTS:
            for factor in (math.exp(step * constant.width), math.exp(-step * constant.width)):
                tried = {**values, constant.name: values[constant.name] * factor}
                constant.put(tried[constant.name])
                misfit = _misfit(tried)
                if misfit < best - 1e-9:
                    best, values, improved = misfit, tried, True
                else:
                    constant.put(values[constant.name])
        step = step if improved else step / 2
    return values


def _misfit(values: dict[str, float]) -> float:
    # Programs are read anew: rows hold the one that was set when they were made.
    errors = [math.log(1 + row.error) / ROW_TOLERANCE for row in read_rows() if row.fitted]
    distances = [math.log(values[constant.name] / constant.prior) / constant.width for constant in CONSTANTS]
    return sum(2 * (math.sqrt(1 + error**2) - 1) for error in errors) + sum(distance**2 for distance in distances)


def ranks(values: list[float]) -> list[int]:
    """Place of each value among all."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(index) for index in range(len(values))]


def spearman(rows: list[PublishedRow]) -> float:
    """Rank correlation of published and predicted throughput."""
    published, predicted = ranks([row.tokens_per_second for row in rows]), ranks([row.predicted for row in rows])
    squares = sum((one - other) ** 2 for one, other in zip(published, predicted, strict=True))
    return 1 - 6 * squares / (len(rows) * (len(rows) ** 2 - 1))


def main() -> None:
    """Print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.fit:
        for name, value in fit().items():
            print(f"{name:<32} {value:.3f}")
    rows = read_rows(arguments.rows)
    held_out = [row for row in rows if not row.fitted]
    facts = {
        "rows": len(rows),
        "held_out": len(held_out),
        "mape": fmean(abs(row.error) for row in held_out),
        "spearman": spearman(held_out),
    }
    if arguments.json:
        print(json.dumps(facts))
        return
    for source, of_source in by_source(rows):
        out = [abs(row.error) for row in of_source if not row.fitted]
        mean = f"{fmean(out):.1%} on {len(out)} rows held out" if out else "no row held out"
        print(f"{source}: {mean}")
        for row in of_source:
            used = "fitted" if row.fitted else ""
            print(
                f"    {row.model:<28} {row.work.layout.world_size:>5} devices {row.tokens_per_second:>9,.0f} "
                f"tokens/s, predicted {row.predicted:>9,.0f} {row.error:>+7.1%} {used}"
            )
    print(f"{len(held_out)} rows held out: MAPE {facts['mape']:.1%}, Spearman {facts['spearman']:.3f}")


if __name__ == "__main__":
    main()
