"""Which engine runs a bundle: the one asked for, or the fastest that this machine has."""

from collections.abc import Callable
from typing import Literal, get_args

from aesanet.choices import one_of
from aesanet.errors import BackendError, BundleError, InputError
from aesanet.runtime.backends import compiled, onnxruntime, openvino
from aesanet.runtime.backends.base import (
    Backend,
    BundleFiles,
    CudaGraphs,
    Device,
    EngineOptions,
    Precision,
    Support,
)
from aesanet.runtime.cuda.kernels import Specialize

BackendName = Literal["onnxruntime", "openvino", "tensorrt"]

_Open = Callable[[BundleFiles, EngineOptions], Backend]
_ENGINES: dict[BackendName, tuple[_Open, Callable[[], Support]]] = {
    "onnxruntime": (onnxruntime.OnnxRuntimeBackend, onnxruntime.support),
    "openvino": (openvino.OpenVINOBackend, openvino.support),
    "tensorrt": (compiled.open_tensorrt, compiled.support),
}

# Fastest first: on CPUs by benchmarks/results/peers.csv, and a GPU before any CPU.
_FASTEST_FIRST: tuple[tuple[BackendName, Device, Precision, str], ...] = (
    ("tensorrt", "cuda", "fp16", "the bundle has an engine for this GPU"),
    ("onnxruntime", "cuda", "fp16", "a CUDA GPU is here, and the bundle has FP16 graphs"),
    ("onnxruntime", "cuda", "fp32", "a CUDA GPU is here"),
    ("openvino", "cpu", "bf16", "the fastest here: this processor computes in bf16"),
    ("openvino", "cpu", "fp32", "the fastest FP32 on a CPU"),
    ("onnxruntime", "cpu", "fp32", "OpenVINO, which is faster, is not installed"),
)


def supported_backends() -> dict[BackendName, Support]:
    """What each engine can run on this machine."""
    return {name: support() for name, (_, support) in _ENGINES.items()}


def open_backend(
    files: BundleFiles,
    name: BackendName | Literal["auto"] = "auto",
    device: Device | Literal["auto"] = "auto",
    precision: Precision | Literal["auto"] = "auto",
    threads: int | None = None,
    cuda_graphs: CudaGraphs = None,
    specialize: Specialize = "lazy",
) -> tuple[Backend, str]:
    """Open the fastest engine that fits what was asked for (see `EngineOptions`), and say why it was taken.

    Raises InputError for what cannot be chosen, BundleError for a file that is damaged, and BackendError that says what
    the machine's engines can do and what to install.
    """
    one_of("backend", name, "auto", *get_args(BackendName))
    one_of("device", device, "auto", *get_args(Device))
    one_of("precision", precision, "auto", *get_args(Precision))
    one_of("cuda_graphs", cuda_graphs, None, True, False, "try")
    one_of("specialize", specialize, *get_args(Specialize))
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; give 1 or more, or None for the engine's own choice")
    here = supported_backends()
    failed: list[str] = []
    for engine, on, in_precision, reason in _FASTEST_FIRST:
        asked = (
            name in ("auto", engine),
            device in ("auto", on),
            precision in ("auto", in_precision),
            on == "cuda" or cuda_graphs is not True,
        )
        if not all(asked):
            continue
        if (on, in_precision) not in here[engine].runs:
            continue
        if (missing := lacking(files, engine, in_precision)) is not None:
            failed.append(f"{engine} {on} {in_precision}: {missing}")
            continue
        try:
            backend = _ENGINES[engine][0](files, EngineOptions(on, in_precision, threads, cuda_graphs, specialize))
        except BundleError:  # a damaged graph is to be mended, and not gone around
            raise
        except Exception as error:  # engines raise what they like; the next one may do
            failed.append(f"{engine} {on} {in_precision} could not load the bundle: {error}")
            continue
        return backend, "; ".join(failed) or (reason if name == "auto" else "as asked")
    if precision == "fp16":
        if not any("fp16" in (can for _, can in support.runs) for support in here.values()):
            failed.append("fp16 needs a CUDA GPU, and TensorRT or onnxruntime-gpu")
        if "fp16" not in files.forms:
            failed.append(_NO_HALF)
    if cuda_graphs is True and (device == "cpu" or not any("cuda" in dict(support.runs) for support in here.values())):
        failed.append("CUDA graphs need a CUDA GPU, and TensorRT or onnxruntime-gpu")
    found = "; ".join([*(f"{engine}: {support.detail}" for engine, support in here.items()), *failed])
    raise BackendError(
        f"no engine for backend={name}, device={device}, precision={precision} on this machine ({found})"
    )


def open_exactly(files: BundleFiles, name: BackendName, options: EngineOptions) -> Backend:
    """Open one engine and no other; raises what it raises."""
    return _ENGINES[name][0](files, options)


_NO_HALF = "the bundle has no FP16 graphs, which `aesanet export --fp16` makes"


def lacking(files: BundleFiles, engine: BackendName, precision: Precision) -> str | None:
    """What an engine needs of a bundle that this one has not."""
    if precision == "fp16" and "fp16" not in files.forms:
        return _NO_HALF
    if engine == "tensorrt" and not files.manifest.engines:
        return "the bundle has no engine, which `aesanet compile` makes"
    return None
