"""NVIDIA's Polygraphy as a contestant: its runners, given what aesanet's engines are given.

ONNX Runtime as it comes, with the bundle's FP32 graphs; TensorRT (or TensorRT-RTX) with its compiled plans, one runner
a graph, with what they hand each other left on the GPU.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aesanet.benchmarks.contestants import About, Opened, Part, Work, millions, versions
from aesanet.bundle import GRAPH_NAMES, GraphName
from aesanet.gpu import cuda_gpu, load_cuda
from aesanet.lengths import num_tokens
from aesanet.models.checkpoint import load_checkpoint
from aesanet.runtime.backends.base import BundleFiles
from aesanet.runtime.backends.compiled import first_that_runs
from aesanet.runtime.backends.tensorrt import engine_profiles
from aesanet.runtime.cuda.shapes import choose_profile


def open_onnxruntime(work: Work) -> Opened:
    """Sessions with nothing set but their threads."""
    import onnxruntime
    from polygraphy.backend.onnxrt import OnnxrtRunner

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work.threads

    def runner(path: Path) -> Any:
        return OnnxrtRunner(partial(onnxruntime.InferenceSession, path, options, providers=["CPUExecutionProvider"]))

    graphs = BundleFiles.open(work.bundle).graphs("fp32")
    runners = {name: runner(graphs[name]) for name in GRAPH_NAMES}
    return _opened(runners, versions("polygraphy", "onnxruntime"), work)


def open_tensorrt(work: Work) -> Opened:
    """The last compiled of the bundle's engines that fits this GPU; memory for the shapes that are run and no more."""
    files = BundleFiles.open(work.bundle)
    trt, plans = first_that_runs(files, cuda_gpu(load_cuda()), lambda key, trt, plans: (trt, plans))
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(trt.__name__ == "tensorrt_rtx"))
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    engines = {name: EngineFromBytes(plan)() for name, plan in plans.items()}
    batch, samples = work.waveform.shape
    profile = choose_profile(engine_profiles(engines["frontend"]), samples, batch).index
    runners = {
        name: TrtRunner(engine, optimization_profile=profile, allocation_strategy="runtime")
        for name, engine in engines.items()
    }
    told = f"{versions('polygraphy')}, {trt.__name__} {trt.__version__}"
    return _opened(runners, told, work, copy_outputs_to_host=False)


def _opened(runners: dict[GraphName, Any], told: str, work: Work, **between: bool) -> Opened:
    """Runners as they score; `between` is how those are asked that others follow."""
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    for runner in runners.values():
        runner.activate()  # until the process ends
    tokens = num_tokens(work.num_samples)

    def waveforms() -> np.ndarray:
        fbank = runners["frontend"].infer({"waveform": work.waveform}, **between)["fbank"]
        features = runners["encoder"].infer({"fbank": fbank, "num_tokens": tokens}, **between)["features"]
        return np.array(runners["head"].infer({"features": features, "num_tokens": tokens})["scores"])

    def encoder() -> np.ndarray:
        return np.array(runners["encoder"].infer({"fbank": work.fbank, "num_tokens": tokens})["features"])

    runs: dict[Part, Callable[[], np.ndarray]] = {"waveforms": waveforms, "encoder": encoder}
    model = load_checkpoint(work.checkpoint)
    return Opened(About(told, model.config.weights, millions(model), work.batch), runs[work.part])
