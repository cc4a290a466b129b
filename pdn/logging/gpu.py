"""Temperature, clocks, power and memory errors of a GPU, from NVML where pynvml is installed."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

INTERVAL_S = 10.0  # a look takes the driver up to some milliseconds


class GpuMonitor:
    """Looks at one GPU now and then.

    Without pynvml, or where NVML answers with an error, there is nothing to read: the second is
    said once. What a GPU does not have, such as error correction, is left out.

    Args:
        uuid: of the GPU, as NVML names it.
        clock: seconds, ascending.
    """

    def __init__(self, uuid: str, clock: Callable[[], float] = time.monotonic):
        self._clock, self._next = clock, clock()
        self._nvml: Any = None
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except ImportError:
            self._nvml = None
        except Exception as error:
            self._give_up(error)

    def read(self) -> dict[str, float]:
        """Return the GPU's state, at most every ten seconds; else nothing.

        ``gpu/temperature_c``, ``gpu/power_w``, ``gpu/sm_clock_mhz``, ``gpu/memory_clock_mhz``,
        ``gpu/slowed_down`` (1: its clocks are held down for heat or power), and
        ``gpu/memory_errors``, uncorrected since the driver was loaded.
        """
        if self._nvml is None or self._clock() < self._next:
            return {}
        self._next = self._clock() + INTERVAL_S
        nvml, handle = self._nvml, self._handle
        looks: dict[str, Callable[[], float]] = {
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "slowed_down": lambda: self._slowed_down(),
            "memory_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
        }
        found: dict[str, float] = {}
        try:
            for name, look in looks.items():
                try:
                    found[f"gpu/{name}"] = look()
                except nvml.NVMLError_NotSupported:
                    continue
        except Exception as error:
            self._give_up(error)
        return found

    def _slowed_down(self) -> int:
        nvml = self._nvml
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        held = (
            nvml.nvmlClocksThrottleReasonSwPowerCap
            | nvml.nvmlClocksThrottleReasonHwSlowdown
            | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
        )
        return int(bool(reasons & held))

    def _give_up(self, error: Exception) -> None:
        self._nvml = None
        log.warning("NVML: %s: %s; the GPU is watched no more", type(error).__name__, error)


def gpu_monitor(device: torch.device) -> GpuMonitor | None:
    """Return the monitor of a CUDA device, None for any other."""
    if device.type != "cuda":
        return None
    return GpuMonitor(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
