"""Training speed on one GPU against published figures, with random weights and tokens and without a hub or Ray.

    python benchmarks/gpu/throughput.py [pretrain lora full offload long] [--steps 10] [--tiny] [--json]

Each case takes less than 8 minutes on an H100. What the published figures were measured on is said beside them.
"""

import argparse
import json

from harness import Case, as_json, as_text, choose_device, join, measure

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip

CASES = {
    # MPT-1.3B's shape in a family that transformers runs with fused attention.
    "pretrain": Case(
        "pretrain",
        {
            "model_type": "gpt_neox", "vocab_size": 50368, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        sequence_length=2048, micro_batch_size=8, accumulation=2,
        published=(45_455, "llm-foundry, 8 H100 each"),
    ),
    "lora": Case(
        "lora", LLAMA_3_8B, sequence_length=4096, micro_batch_size=2, accumulation=4, lora_rank=16,
        published=(12_473, "NeMo Automodel, one H100"),
    ),
    "full": Case(
        "full",
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 4096, "tie_word_embeddings": True,
        },
        sequence_length=4096, micro_batch_size=2, checkpointing=True,
        published=(9_174, "torchtune, one A100, 16-bit optimizer states"),
    ),
    "offload": Case(
        "offload",
        {**LLAMA_3_8B, "num_hidden_layers": 18, "vocab_size": 128256},
        sequence_length=2048, micro_batch_size=4, accumulation=8, checkpointing=True,
        zero={"stage": 2, "offload_optimizer": "cpu"},
    ),
    "long": Case(
        "long",
        {**LLAMA_3_8B, "num_hidden_layers": 4, "max_position_embeddings": 32768},
        sequence_length=32768, micro_batch_size=1, checkpointing=True, tiles=8,
    ),
}  # fmt: skip


def main() -> None:
    """Measure the named cases, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to see that the path runs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no case is named {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    device = join(choose_device(tiny=arguments.tiny))
    results = []
    for name in arguments.cases or CASES:
        case = CASES[name].tiny() if arguments.tiny else CASES[name]
        result = measure(case, device, steps=arguments.steps, warm_up=arguments.warm_up)
        results.append(as_json(result))
        if not arguments.json:
            print(as_text(result, case), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
