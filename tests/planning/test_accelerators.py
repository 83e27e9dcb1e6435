import re
from pathlib import Path

import pytest

from launcher.errors import PlanError
from launcher.planning.accelerators import (
    ACCELERATORS,
    NETWORKS,
    AcceleratorFile,
    find_accelerator,
    find_network,
    model_flops_per_token,
    peak_flops,
)
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
    assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == pytest.approx(bf16)
    single = peak_flops(name, "fp32")
    assert single is not None
    assert single < bf16
    assert re.fullmatch(find_accelerator(name).pattern, name)


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
    names = [accelerator.name for accelerator in ACCELERATORS]
    patterns = [accelerator.pattern for accelerator in ACCELERATORS]
    assert len(patterns) == len(set(patterns))
    assert len(names) == len({name.lower() for name in names})


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_every_number_of_the_catalogue_has_a_source(accelerator) -> None:
    assert set(accelerator.sources) == {"memory", "peak", "memory_bandwidth"}
    links = (accelerator.intra_node, accelerator.inter_node, accelerator.host)
    assert all(len(source) > 10 for source in [*accelerator.sources.values(), *(link.source for link in links)])
    assert all(link.bandwidth > 1e9 and 0 < link.latency < 1e-3 for link in links)
    # What a roofline needs: compute is dearer to reach than memory, memory than links, and half beats single.
    assert accelerator.peak["bf16"] > accelerator.peak["fp32"] > accelerator.memory_bandwidth
    assert accelerator.memory_bandwidth >= accelerator.intra_node.bandwidth >= accelerator.inter_node.bandwidth
    if "fp8" in accelerator.peak:
        assert accelerator.peak["fp8"] == pytest.approx(2 * accelerator.peak["bf16"], rel=0.02)


def test_a_device_is_found_by_its_name_in_any_case() -> None:
    assert find_accelerator("h100-80gb").memory == 81559 << 20
    assert find_accelerator("CPU").peak["fp32"] == 118e9


def test_an_unknown_device_is_an_error_that_says_how_to_describe_it(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        find_accelerator("H100-80G")
    text = str(caught.value)
    assert "did you mean H100-80GB?" in text
    assert "write its numbers to a YAML file" in text
    required = [name for name, field in AcceleratorFile.model_fields.items() if field.is_required()]
    assert len(required) >= 6
    assert all(name in text for name in required)


DESCRIBED = """\
name: MI250
memory_gib: 64
fp32_tflops: 45.3
bf16_tflops: 181
fp16_tflops: 181
memory_gb_per_second: 1638
intra_node_gb_per_second: 150
inter_node_gbit_per_second: 100
host_gb_per_second: 32
"""


def test_a_file_describes_another_device(tmp_path: Path) -> None:
    path = tmp_path / "mi250.yaml"
    path.write_text(DESCRIBED)
    device = find_accelerator(str(path))
    assert device.name == "MI250"
    assert device.memory == 64 << 30
    assert device.peak == pytest.approx({"fp32": 45.3e12, "bf16": 181e12, "fp16": 181e12})
    assert device.inter_node.bandwidth == 12.5e9
    assert device.sources["peak"] == str(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("memory_gib: 64", "line 2  memory_gib: is -1, but must be greater than 0"),
        ("name: MI250", "name"),
    ],
)
def test_a_wrong_file_is_an_error_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(DESCRIBED.replace(line, "memory_gib: -1" if "gib" in line else "nam: x"))
    with pytest.raises(PlanError, match=re.escape(str(path))) as caught:
        find_accelerator(str(path))
    assert message in str(caught.value)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        find_accelerator("no-such-gpu.yaml")


def test_networks_by_name_and_by_number() -> None:
    assert find_network("ndr-400") is NETWORKS["NDR-400"]
    assert find_network("200").bandwidth == find_network("200 Gbit/s").bandwidth == 25e9
    assert all(len(link.source) > 10 for link in NETWORKS.values())
    for wrong in ("InfiniBand", "0", "-3", "200 GB"):
        with pytest.raises(PlanError, match="known: NDR-400"):
            find_network(wrong)


def test_flops_of_gpt2_by_hand() -> None:
    shape = model_shape({"model_type": "gpt2"})
    assert shape is not None
    embeddings = 50257 * 768 + 1024 * 768
    matrices = 124_439_808 - embeddings + 50257 * 768
    assert model_flops_per_token(shape, 1024) == 6 * matrices + 12 * 12 * 12 * 64 * 1024
