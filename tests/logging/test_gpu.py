"""What NVML tells of a GPU goes into the metrics; without it nothing fails."""

import sys
import types

import pytest
import torch

from pdn.logging.gpu import INTERVAL_S, GpuMonitor, gpu_monitor


class NotSupportedError(Exception):
    pass


def nvml(**changed):
    """Return a stand-in for pynvml: a hot GPU without error correction."""

    def without():
        raise NotSupportedError("no ECC")

    names = dict(
        NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0,
        nvmlClocksThrottleReasonSwPowerCap=4, nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonSwThermalSlowdown=32, NVMLError_NotSupported=NotSupportedError,
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTemperature=lambda handle, kind: 83,
        nvmlDeviceGetPowerUsage=lambda handle: 640_500,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980, 2: 2619}[kind],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 32 | 1,
        nvmlDeviceGetTotalEccErrors=lambda *a: without(),
    )  # fmt: skip
    return types.SimpleNamespace(**(names | changed))


def test_a_gpu_is_read_at_most_every_ten_seconds(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    now = [100.0]
    monitor = GpuMonitor("GPU-1", clock=lambda: now[0])
    expected = {
        "gpu/temperature_c": 83, "gpu/power_w": 640.5, "gpu/sm_clock_mhz": 1980,
        "gpu/memory_clock_mhz": 2619, "gpu/slowed_down": 1,
    }  # fmt: skip
    assert monitor.read() == expected and monitor.read() == {}
    now[0] += INTERVAL_S
    assert monitor.read() == expected


@pytest.mark.parametrize("fails", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_a_driver_that_does_not_answer_is_said_once(monkeypatch, caplog, fails):
    def broken(*_):
        raise RuntimeError("driver gone")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(**{fails: broken}))
    monitor = GpuMonitor("GPU-1")
    assert monitor.read() == monitor.read() == {}
    assert [record.getMessage() for record in caplog.records] == [
        "NVML: RuntimeError: driver gone; the GPU is watched no more"
    ]


def test_without_pynvml_or_a_gpu_nothing_is_read(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMonitor("GPU-1").read() == {} and not caplog.records
    assert gpu_monitor(torch.device("cpu")) is None
