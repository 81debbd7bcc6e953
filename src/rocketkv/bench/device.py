"""The memory of the machine that a measurement runs on: how fast it is read, and how much of it is left."""

import os
from pathlib import Path

import torch

from rocketkv.bench.timing import timed
from rocketkv.errors import InputError
from rocketkv.machine import last_level_cache_bytes

READ_BYTES = 512 * 2**20  # the least bytes of one read that measures the bandwidth


class MemoryRead:
    """A call that reads more memory of a device than fits in its caches, which shows the memory's bandwidth.

    Attributes:
        num_bytes: the number of bytes that a call reads.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._buffer = torch.ones(max(READ_BYTES, 8 * last_level_cache_bytes()) // 4, device=device)
        self._device = device
        self.num_bytes = self._buffer.nbytes

    def __call__(self) -> float:
        """Read once and return the milliseconds."""
        return timed(self._buffer.sum, self._device)


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        InputError: the device is neither `cpu` nor `cuda`, or torch sees no GPU.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"device={device!r} is not known; choose from cpu, cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda' cannot be used: torch sees no GPU; leave --device out to measure the CPU.")


def measure_bandwidth(device: str = "cpu", reads: int = 5) -> float:
    """Return the bytes per second at which a device's memory can be read, the best of a few reads."""
    read = MemoryRead(device)
    return max(1000 * read.num_bytes / read() for _ in range(reads))


def available_bytes(device: str = "cpu") -> int | None:
    """Return the bytes of a device's memory that are free without swapping; None where the system does not tell."""
    if device != "cpu":
        torch.cuda.empty_cache()  # this frees memory that torch reserves without using it
        return int(torch.cuda.mem_get_info()[0])
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and (most := group.read_text().strip()).isdigit():
        limits.append(int(most) - int(group.with_name("memory.current").read_text()))
    return min(limits, default=None)


def check_memory(what: str, needed_bytes: float, device: str = "cpu") -> None:
    """Refuse a measurement that does not fit in memory.

    Raises:
        InputError: the measurement needs more bytes than are available.
    """
    available = available_bytes(device)
    if available is not None and needed_bytes > available:
        raise InputError(
            f"{what} needs {needed_bytes / 2**30:.1f} GiB of memory, but {available / 2**30:.1f} GiB are available; "
            "lower --seq-len or --batch, or choose a smaller geometry."
        )
