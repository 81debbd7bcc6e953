"""Describes the machine and the versions that a measurement ran with."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import rocketkv
from rocketkv.backends import library


def describe_machine() -> dict[str, object]:
    """Describe the processor and the memory, without a name of the machine."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe_versions() -> dict[str, str]:
    """List the versions that the measurement ran with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "rocketkv": rocketkv.__version__,
        "instruction_set": library.instruction_set(),
    }


def last_level_cache_bytes() -> int:
    """Return the bytes of the largest cache of the first core; 32 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
