"""One graph's TensorRT engine at work: contexts by profile, and CUDA graphs of the runs that come again."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeAlias

from aesanet.errors import BackendError, DeviceMemoryError
from aesanet.runtime.device import CudaDevice

_SEEN_RUNS = 1024  # that are remembered as run once

Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Of a graph's inputs, by name."""


@dataclass(frozen=True)
class Run:
    """All that a CUDA graph of one run is bound to: profile, shapes of inputs, addresses of tensors, working memory."""

    profile: int
    shapes: Shapes
    addresses: tuple[tuple[str, int], ...]
    memory: tuple[int, int]
    """Address and bytes of what the layers leave each other."""


class Stage:
    """One engine. All its runs are given to one stream, so that they may share working memory.

    A run that comes a second time is captured as a CUDA graph, in a context of its own as TensorRT wants it, and is
    launched as that from the third time on; the `graphs_kept` used last are kept. A run that cannot be captured (some
    loops cannot) is given layer by layer, as are all with `graphs_kept` 0.

    complaints : TensorRT's own lines, which its logger adds to
    """

    def __init__(
        self, trt: Any, plan: bytes, name: str, device: CudaDevice, stream: Any, complaints: list[str], graphs_kept: int
    ) -> None:
        self.name = name
        self._trt, self._device, self._stream, self._complaints = trt, device, stream, complaints
        self._runtime = trt.Runtime(_logger(trt, complaints))  # must outlive its engine
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise BackendError(f"{trt.__name__} {trt.__version__} cannot load the {name}: {self._reason()}")
        self._config = self._runtime_config()
        # RTX captures by itself: it alone knows when a kernel gives way to one that is made for the shape.
        native = hasattr(self._config, "cuda_graph_strategy")
        if native and graphs_kept:
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._graphs_kept = 0 if native else graphs_kept
        self._contexts: dict[int, Any] = {}
        self._seen: OrderedDict[Run, None] = OrderedDict()
        self._graphs: OrderedDict[Run, tuple[Any, Any]] = OrderedDict()  # with their contexts

    def activation_bytes(self, profile: int, shapes: Shapes) -> int:
        """Working memory that a run of these shapes needs."""
        context = self._context(profile)
        self._set_shapes(context, shapes)
        return int(context.update_device_memory_size_for_shapes())

    def run(self, run: Run) -> None:
        """Give a run to the stream; raises BackendError or DeviceMemoryError with TensorRT's reason."""
        if run in self._graphs:
            self._graphs.move_to_end(run)
            self._device.launch(self._graphs[run][0], self._stream)
        elif run in self._seen and self._graphs_kept:
            context = self._new_context(run.profile)
            self._enqueue(context, run)  # not captured: the first run in new shapes sets things up
            self._capture(context, run)
        else:
            self._seen[run] = None
            if len(self._seen) > _SEEN_RUNS:
                self._seen.popitem(last=False)
            self._enqueue(self._context(run.profile), run)

    def forget_graphs(self) -> None:
        """Drop all CUDA graphs, as addresses in them are no longer good; the device must be idle."""
        for graph, _ in self._graphs.values():
            self._device.destroy(graph)
        self._graphs.clear()
        self._seen.clear()

    def _capture(self, context: Any, run: Run) -> None:
        try:
            with self._device.capture(self._stream) as captured:
                self._execute(context)
        except BackendError:
            self._graphs_kept = 0
            return
        if len(self._graphs) >= self._graphs_kept:
            self._device.synchronize_all()  # the oldest may be at work, and its context goes with it
            _, (oldest, _) = self._graphs.popitem(last=False)
            self._device.destroy(oldest)
        self._graphs[run] = (captured[0], context)

    def _enqueue(self, context: Any, run: Run) -> None:
        self._set_shapes(context, run.shapes)
        for name, address in run.addresses:
            self._must(context.set_tensor_address(name, address), f"address of {name}")
        context.set_device_memory(*run.memory)
        self._execute(context)

    def _execute(self, context: Any) -> None:
        self._must(context.execute_async_v3(int(self._stream)), "run")

    def _set_shapes(self, context: Any, shapes: Shapes) -> None:
        for name, shape in shapes:
            self._must(context.set_input_shape(name, shape), f"shape {shape} of {name}")

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Any:
        context = self.engine.create_execution_context(self._config)
        self._must(context is not None, "context")
        self._must(context.set_optimization_profile_async(profile, int(self._stream)), f"profile {profile}")
        return context

    def _runtime_config(self) -> Any:
        """How contexts are made: their working memory is given to them, and RTX's share what it compiles for the GPU.

        TensorRT before 10.11 takes the strategy in place of a config.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self.engine, "create_runtime_config"):
            return strategy
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            config.set_runtime_cache(config.create_runtime_cache())
        return config

    def _must(self, success: bool, what: str) -> None:
        if not success:
            reason = self._reason()
            memory = "out of memory" in reason.lower() or "outofmemory" in reason.lower()
            raise (DeviceMemoryError if memory else BackendError)(
                f"{self._trt.__name__} refused the {self.name}'s {what}: {reason}"
            )

    def _reason(self) -> str:
        reason = "; ".join(self._complaints) or "no reason was given"
        self._complaints.clear()
        return reason


def _logger(trt: Any, complaints: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                complaints.append(message)

    return Logger()
