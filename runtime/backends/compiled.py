"""Which of a bundle's compiled engines runs here: of those for this machine, the last that was compiled."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from aesanet.bundle import GraphName
from aesanet.engines import (
    ENGINES_FOLDER,
    MODULES,
    Flavour,
    engine_kind,
    library_version,
    load_library,
    misfits,
    read_engine,
    runs_on,
    short_key,
)
from aesanet.errors import BackendError, BundleError, EngineMisfitError
from aesanet.files import CacheFile
from aesanet.gpu import Gpu, cuda_gpu, load_cuda, load_driver
from aesanet.runtime.backends.base import BundleFiles, EngineOptions, Support
from aesanet.runtime.backends.tensorrt import TensorRTBackend
from aesanet.runtime.cuda.device import CudaDevice
from aesanet.runtime.cuda.kernels import LateKernels
from aesanet.runtime.cuda.shapes import GRAPHS_KEPT

_Used = TypeVar("_Used")


def open_tensorrt(files: BundleFiles, options: EngineOptions) -> TensorRTBackend:
    """The last compiled of a bundle's engines that can run here, with CUDA graphs unless they are not wanted.

    Raises BackendError with why each cannot: EngineMisfitError where all are for other machines.
    """
    cuda = load_cuda()
    gpu = cuda_gpu(cuda)

    def opened(key: str, trt: Any, plans: Mapping[GraphName, bytes]) -> TensorRTBackend:
        graphs_kept = 0 if options.cuda_graphs is False else GRAPHS_KEPT
        kernels = LateKernels(options.specialize, CacheFile("kernels", {"engine": key, "GPU": str(gpu)}))
        device = CudaDevice(cuda, load_driver())
        backend = TensorRTBackend(plans, trt, device, graphs_kept, kernels)
        _try(backend, files.manifest.window.window_samples)
        with device.current():
            kernels.keep()  # a process that is killed later has made most of them by now
        backend.kind = engine_kind(key)  # what was found of one engine says nothing of another
        return backend

    return first_that_runs(files, gpu, opened)


def first_that_runs(files: BundleFiles, gpu: Gpu, use: Callable[[str, Any, Mapping[GraphName, bytes]], _Used]) -> _Used:
    """What `use` makes of the last compiled of a bundle's engines that is for this machine and that it can use.

    use : is given an engine's key, its library's module and its plans, and may raise BackendError

    Raises as `open_tensorrt`.
    """
    refused = []
    error_type: type[BackendError] = EngineMisfitError
    for key in reversed(files.manifest.engines):
        try:
            engine = read_engine(files.folder, files.manifest, key)
            trt = load_library(engine.flavour)
            if wrong := misfits(engine, trt, gpu):
                raise EngineMisfitError("; ".join(wrong))
            folder = files.folder / ENGINES_FOLDER / key
            plans = {name: (folder / plan.file).read_bytes() for name, plan in engine.plans.items()}
            return use(key, trt, plans)
        except (BackendError, BundleError) as error:
            error_type = error_type if isinstance(error, EngineMisfitError) else BackendError
            refused.append(f"engine {short_key(key)}: {error}")
    raise error_type(f"{'; '.join(refused)}; `aesanet compile {files.folder}` makes one for this machine")


def _try(backend: TensorRTBackend, window_samples: int) -> None:
    """Score a window of silence: what cannot run shows now and not after hours; what is compiled late is, too."""
    scores = backend.scores(np.zeros((1, window_samples), np.float32), np.array([window_samples]))
    if not np.isfinite(scores).all():
        raise BackendError(f"silence scores {scores[0].tolist()}")


def support() -> Support:
    """Whether TensorRT or TensorRT-RTX can run here; which of the two, a bundle's engines say."""
    found: dict[Flavour, str] = {}
    for flavour, module in MODULES.items():
        if (version := library_version(flavour)) is not None:
            found[flavour] = f"{module} {version}"
    if not found:
        return Support(None, (), "not installed: pip install 'aesanet[gpu]', or 'aesanet[rtx]' for RTX GPUs")
    versions = " and ".join(found.values())
    try:
        gpu = cuda_gpu(load_cuda())
    except BackendError as error:
        return Support(None, (), f"{versions}; cannot run: {error}")
    reasons = []
    for flavour in found:
        try:
            if runs_on(load_library(flavour), gpu):
                return Support(versions, (("cuda", "fp16"),), f"of a compiled bundle, on {gpu}")
            reasons.append(f"{MODULES[flavour]} has no kernels for {gpu}; pip install 'aesanet[gpu]'")
        except BackendError as error:  # which does not keep the other library from running
            reasons.append(str(error))
    return Support(None, (), f"{versions}; cannot run: {'; '.join(reasons)}")
