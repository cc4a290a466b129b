"""What a run shows: the utilisation of the device that it is on, and of no other."""

import pytest

from pdn.logging.progress import peak_of


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_each_gpu_has_the_peak_of_its_own_data_sheet(name, teraflops):
    assert peak_of(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H200 Next",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA H100 NVL MIG 1g.12gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-40C",
        "NVIDIA B2000",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_that_is_not_in_the_table_has_no_peak(name):
    assert peak_of(name) is None
