"""Kernels on a GPU: compiled by NVRTC through cuda-core, kept on disk, started by the driver on torch's stream."""

import ctypes
from functools import cache

import torch
from cuda.bindings import driver, nvrtc
from cuda.core import Kernel as CompiledKernel
from cuda.core import ObjectCode, ProgramOptions
from cuda.core import Program as Source
from cuda.core.utils import FileStreamProgramCache

from rocketkv.backends.cuda.arguments import Layer
from rocketkv.backends.cuda.launch import Kernel, Program, Shape
from rocketkv.folders import cache_folder

LINKED_MAJOR = 9  # of the compute capability: the first with programmatic dependent launch, and with clusters
MOST_CLUSTER = 8  # blocks of a cluster that every such GPU takes, if it is no slice with fewer multiprocessors


def check_compiler() -> None:
    """Raise RuntimeError if there is no NVRTC, or if it does not know a GPU of this machine."""
    _, known = nvrtc.nvrtcGetSupportedArchs()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor not in known:
            raise RuntimeError(f"NVRTC does not know sm_{major}{minor}")


def compile_for(program: Program, architecture: str, logs: object = None) -> bytes:
    """Compile a kernel, or read from the cache folder what an earlier call compiled.

    Args:
        program: the kernel with its constants.
        architecture: the device's architecture, such as `sm_90`.
        logs: an object whose `write` takes the compiler's remarks, with registers and spills; it compiles anew.

    Returns:
        The machine code, a cubin.

    Raises:
        InputError: the cache folder cannot be made.
    """
    options = ProgramOptions(arch=architecture, std="c++17", ptxas_options=None if logs is None else ["-v"])
    kept = None if logs is not None else FileStreamProgramCache(cache_folder() / "kernels")
    return bytes(Source(program.source(), "c++", options).compile("cubin", logs=logs, cache=kept).code)


@cache
def gpu_of(device: torch.device) -> "Gpu":
    """Return the GPU with this name, which loads each kernel once."""
    return Gpu(device)


class Gpu:
    """A GPU as `Device` describes it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        self.num_cores: int = properties.multi_processor_count
        self.overlaps: bool = properties.major >= LINKED_MAJOR
        self.most_cluster = MOST_CLUSTER if self.overlaps and self.num_cores >= MOST_CLUSTER else 1
        self._architecture = f"sm_{properties.major}{properties.minor}"
        self._kernels: dict[Program, Kernel] = {}

    def load(self, program: Program) -> Kernel:
        """See `Device`."""
        if program not in self._kernels:
            code = ObjectCode.from_cubin(compile_for(program, self._architecture))
            self._kernels[program] = GpuKernel(code.get_kernel(program.kernel), self._device)
        return self._kernels[program]


class GpuKernel:
    """A kernel on a GPU as `Kernel` describes it."""

    def __init__(self, compiled: CompiledKernel, device: torch.device) -> None:
        self._compiled = compiled  # keeps the code alive
        self._device = device
        self._function = driver.CUfunction(int(compiled.handle))

    def __call__(self, layer: Layer, shape: Shape) -> None:
        """See `Kernel`."""
        parameters = ctypes.c_void_p(ctypes.addressof(layer))
        config = _config(shape)
        with torch.cuda.device(self._device):  # the default stream is that of the current device
            config.hStream = torch.cuda.current_stream(self._device).cuda_stream
            (error,) = driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(parameters), 0)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver does not start a kernel with grid {shape.grid}: {error.name}")


def _config(shape: Shape) -> driver.CUlaunchConfig:
    """Return what the driver is told of a launch, but for the stream."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = shape.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
    config.sharedMemBytes = shape.shared_bytes
    config.attrs = _attributes(shape.overlaps, shape.cluster)
    config.numAttrs = len(config.attrs)
    return config


@cache
def _attributes(overlaps: bool, cluster: int) -> list[driver.CUlaunchAttribute]:
    """Return the attributes of such launches; making them takes the host some microseconds."""
    overlap, clusters = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    clusters.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    dimension = clusters.value.clusterDim
    dimension.x, dimension.y, dimension.z = 1, cluster, 1
    return overlaps * [overlap] + (cluster > 1) * [clusters]
