"""The plan's memory against torch.cuda.max_memory_allocated, on 24 shapes, as one table.

    python benchmarks/gpu/memory.py [--tiny] [--json]

CUDA's context and NCCL's buffers are not in torch's count, so they are left out of the plan's figure here.
"""

import argparse
import json
from itertools import product
from statistics import fmean

from harness import Case, as_json, choose_device, join, measure


def cases() -> list[Case]:
    """Widths, lengths, batches, recomputation and ZeRO stages."""
    found = []
    for (hidden, layers), (length, batch), checkpointing, stage in product(
        ((1024, 16), (2048, 12)), ((1024, 8), (2048, 4), (8192, 1)), (False, True), (1, 3)
    ):
        config = {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 256,
            "max_position_embeddings": length,
        }  # fmt: skip
        name = f"h{hidden}-l{layers}-t{length}-b{batch}-zero{stage}{'-recomputing' * checkpointing}"
        found.append(Case(name, config, length, batch, zero={"stage": stage}, checkpointing=checkpointing))
    return found


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two small shapes on the CPU, to see that the path runs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = join(choose_device(tiny=arguments.tiny))
    chosen = [case.tiny() for case in cases()[:2]] if arguments.tiny else cases()
    results = [measure(case, device, steps=1, warm_up=2) for case in chosen]
    if arguments.json:
        print(json.dumps([as_json(result) for result in results], indent=1))
        return
    errors = []
    print(f"{'shape':<44}{'planned':>12}{'measured':>12}{'error':>9}")
    for result in results:
        planned = result.planned_bytes or 0
        error = planned / result.peak_bytes - 1 if result.peak_bytes else float("nan")
        errors.append(error)
        sizes = f"{planned / 2**30:>8.2f} GiB{result.peak_bytes / 2**30:>8.2f} GiB"
        print(f"{result.name:<44}{sizes}{error:>+9.1%}")
    print(f"mean absolute error {fmean(map(abs, errors)):.1%}, least {min(errors):+.1%}, on {results[0].device}")


if __name__ == "__main__":
    main()
