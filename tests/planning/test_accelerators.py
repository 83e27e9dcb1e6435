import pytest

from launcher.planning.accelerators import ACCELERATORS, model_flops_per_token, peak_flops
from launcher.planning.model_shape import model_shape


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_known_devices(name: str, bf16: float) -> None:
    assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == bf16
    single = peak_flops(name, "fp32")
    assert single is not None
    assert single < bf16


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GB200",
        "NVIDIA A10",
        "Tesla V100-SXM2-16GB",
        "cpu",
        "",
    ],
)
def test_an_unknown_device_has_no_peak_rather_than_a_guessed_one(name: str) -> None:
    assert all(peak_flops(name, precision) is None for precision in ("fp32", "bf16", "fp16"))


def test_no_name_fits_two_rows() -> None:
    patterns = [accelerator.pattern for accelerator in ACCELERATORS]
    assert len(patterns) == len(set(patterns))


def test_flops_of_gpt2_by_hand() -> None:
    shape = model_shape({"model_type": "gpt2"})
    assert shape is not None
    embeddings = 50257 * 768 + 1024 * 768
    matrices = 124_439_808 - embeddings + 50257 * 768
    assert model_flops_per_token(shape, 1024) == 6 * matrices + 12 * 12 * 12 * 64 * 1024


def test_tying_the_head_changes_no_flops() -> None:
    untied, tied = (model_shape({"model_type": "llama", "tie_word_embeddings": tie}) for tie in (False, True))
    assert untied is not None
    assert tied is not None
    assert untied.num_parameters - tied.num_parameters == 32000 * 4096
    assert model_flops_per_token(untied, 2048) == model_flops_per_token(tied, 2048)


def test_llm_foundrys_published_utilisation_follows_from_the_formula() -> None:
    # MosaicML llm-foundry, scripts/train/benchmarking/README.md: MPT-1.3B, 8 x H100, sequence 2048: 45,455 tokens/s a
    # GPU are 41.82 % of 989 TFLOP/s. They multiply all parameters by 6, the 2048 x 2048 learned positions too.
    shape = model_shape({"model_type": "mpt"})
    assert shape is not None
    flops = model_flops_per_token(shape, 2048) + 6 * 2048 * 2048
    assert 45_455 * flops / 989e12 == pytest.approx(0.4182, abs=1e-4)


def test_a_mixture_of_experts_counts_the_chosen_experts_alone() -> None:
    mixtral = model_shape({"model_type": "mixtral"})
    assert mixtral is not None
    # Mixtral of Experts (arXiv 2401.04088): 47 billion parameters, 13 billion active ones.
    assert round(mixtral.num_parameters / 1e9) == 47
    active = mixtral.num_active_parameters_non_embedding + 2 * 32000 * 4096
    assert round(active / 1e9) == 13
    assert model_flops_per_token(mixtral, 1) < 6 * 13e9
