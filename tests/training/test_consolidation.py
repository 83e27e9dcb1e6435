"""Shards of tensor-parallel ranks are put together by what DeepSpeed writes down of their split."""

import torch

from launcher.training.joining import joined

PATTERNS = {
    "parameter_with_row_parallelism_patterns": [r".*o_proj\.weight$"],
    "tp_replicated_parameter_patterns": [r".*norm\.weight$"],
}


def test_rows_columns_and_copies() -> None:
    whole = {"q_proj.weight": torch.arange(12.0).view(4, 3), "o_proj.weight": torch.arange(8.0).view(2, 4)}
    norm = torch.ones(3)
    parts = [
        {
            "q_proj.weight": whole["q_proj.weight"].chunk(2, dim=0)[rank],
            "o_proj.weight": whole["o_proj.weight"].chunk(2, dim=1)[rank],
            "norm.weight": norm,
        }
        for rank in range(2)
    ]
    together = dict(joined(parts, PATTERNS))
    assert {name: tensor.tolist() for name, tensor in together.items()} == {
        "q_proj.weight": whole["q_proj.weight"].tolist(),
        "o_proj.weight": whole["o_proj.weight"].tolist(),
        "norm.weight": norm.tolist(),
    }


def test_the_second_name_of_a_tied_weight_is_left_to_the_model() -> None:
    parts = [
        {"embed.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)},
        {"embed.weight": torch.ones(2, 2)},
    ]
    assert list(dict(joined(parts, PATTERNS))) == ["embed.weight"]
