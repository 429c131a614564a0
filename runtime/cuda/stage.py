"""One graph's TensorRT engine at work: contexts by profile, and CUDA graphs of the runs that come again."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from aesanet.errors import BackendError
from aesanet.runtime.cuda.complaints import Complaints, process_logger
from aesanet.runtime.cuda.device import CudaDevice
from aesanet.runtime.cuda.kernels import LateKernels

_SEEN_RUNS: Final = 1024  # that are remembered as run once
_IDLE_RUNS: Final = 4  # times the graphs that are kept: only a graph that was idle for so long gives way to another
_CAPTURE_FAILURES: Final = 3  # after which nothing is captured any more

_log = logging.getLogger("aesanet")

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

    A run that comes again is captured as a CUDA graph, in a context of its own as TensorRT wants it, and launched as
    that from then on; at most `graphs_kept` are kept, and one that is still in use never gives way. A run that cannot
    be captured (some loops cannot) is given layer by layer, as are all with `graphs_kept` 0. TensorRT-RTX captures by
    itself, as it alone knows when a kernel gives way to one made for the shape; each context of it keeps one graph.

    kernels : that TensorRT-RTX makes, and shares with the bundle's other engines
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        name: str,
        device: CudaDevice,
        stream: Any,
        graphs_kept: int,
        kernels: LateKernels,
    ) -> None:
        self.name = name
        self._trt, self._device, self._stream = trt, device, stream
        self._complaints = complaints = Complaints(trt)
        # Must outlive its engine.
        self._runtime = complaints.of(complaints.ask("to start", trt.Runtime, process_logger(trt)))
        self.engine = complaints.of(self._ask("plan", self._runtime.deserialize_cuda_engine, plan))
        for index in range(self.engine.num_io_tensors):
            tensor = self.engine.get_tensor_name(index)
            if self.engine.get_tensor_location(tensor) != trt.TensorLocation.DEVICE:
                raise BackendError(f"the {name} wants {tensor} in the host's memory; compile the bundle again")
        self._config, self._capturing = self._new_config(kernels), self._new_config(kernels)
        self._captures_itself = hasattr(self._capturing, "cuda_graph_strategy")
        if self._captures_itself:
            self._capturing.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._graphs_kept = graphs_kept
        self._contexts: dict[int, _Context] = {}
        self._seen: OrderedDict[Run, None] = OrderedDict()
        self._graphs: OrderedDict[Run, _Graph] = OrderedDict()  # the one used last at the end
        self._runs = self._failures = 0

    def activation_bytes(self, profile: int, shapes: Shapes) -> int:
        """Working memory that a run of these shapes needs."""
        return self._shape(self._context(profile), shapes)

    def run(self, run: Run, capture: bool = True) -> None:
        """Give a run to the stream; raises BackendError or DeviceMemoryError with TensorRT's reason.

        capture : whether the run is worth a CUDA graph, if it comes again
        """
        self._runs += 1
        if (graph := self._graphs.get(run)) is not None:
            self._graphs.move_to_end(run)
            graph.used = self._runs
            if graph.handle is None:
                self._execute(graph.context)
            else:
                self._device.launch(graph.handle, self._stream)
        elif not (capture and run in self._seen and self._has_room() and self._run_captured(run)):
            self._seen[run] = None
            if len(self._seen) > _SEEN_RUNS:
                self._seen.popitem(last=False)
            self._enqueue(self._context(run.profile), run)

    def forget_graphs(self) -> None:
        """Drop all CUDA graphs, as addresses in them are no longer good; the stream must be idle."""
        while self._graphs:
            self._drop(self._graphs.popitem()[1])
        self._seen.clear()

    def forget_contexts(self) -> None:
        """Drop all graphs and contexts, which hold memory of their own; the stream must be idle."""
        self.forget_graphs()
        self._contexts.clear()

    def close(self) -> None:
        """Let go of graphs, contexts and the engine, each before what it needs; the stream must be idle."""
        self.forget_contexts()
        self._config = self._capturing = self.engine = self._runtime = None

    def _has_room(self) -> bool:
        """Whether a graph can be kept: there is room, or the oldest is out of use."""
        if not self._graphs_kept:  # those of before it failed stay
            return False
        if len(self._graphs) < self._graphs_kept:
            return True
        oldest = next(iter(self._graphs.values()), None)
        return oldest is not None and self._runs - oldest.used > _IDLE_RUNS * self._graphs_kept

    def _run_captured(self, run: Run) -> bool:
        """Give a run to the stream in a context of its own, and keep that with its graph; whether it was given."""
        given, handle = False, None
        try:
            context = self._new_context(run.profile, self._capturing)
            self._enqueue(context, run)  # not captured: the first run in new shapes sets things up
            given = True
            if not self._captures_itself:
                with self._device.capture(self._stream) as captured:
                    self._execute(context)
                (handle,) = captured
        except BackendError as error:
            self._device.synchronize_stream(self._stream)  # the context may be at work, and goes now
            self._failures += 1
            if self._failures == _CAPTURE_FAILURES:
                self._graphs_kept = 0
                # As text: a record that kept the error would keep the engine.
                _log.warning("the %s runs without CUDA graphs: %s", self.name, str(error))
            return given
        if len(self._graphs) >= self._graphs_kept:
            self._drop(self._graphs.popitem(last=False)[1])  # idle for longer than batches are under way
        self._graphs[run] = _Graph(handle, context, self._runs)
        return given

    def _drop(self, graph: "_Graph") -> None:
        if graph.handle is not None:
            self._device.destroy(graph.handle)

    def _enqueue(self, context: "_Context", run: Run) -> None:
        if (needed := self._shape(context, run.shapes)) > run.memory[1]:
            raise BackendError(f"the {self.name} needs {needed} bytes of working memory, and has {run.memory[1]}")
        for name, address in run.addresses:
            self._ask(f"address of {name}", context.trt.set_tensor_address, name, address)
        self._tell("working memory", context.trt.set_device_memory, *run.memory)
        self._execute(context)

    def _execute(self, context: "_Context") -> None:
        execute = partial(self._ask, "run", context.trt.execute_async_v3, int(self._stream))
        again, self._device.spoilt = self._device.spoilt, False
        try:
            execute()
        except BackendError:
            if not again:
                raise
            execute()  # what failed while it was to be captured, by whichever engine, may have been told only now

    def _shape(self, context: "_Context", shapes: Shapes) -> int:
        """Set the shapes of a context's inputs; returns the working memory that it then needs, laid out for them."""
        if context.shapes != shapes:
            context.shapes = None
            for name, shape in shapes:
                self._ask(f"shape {shape} of {name}", context.trt.set_input_shape, name, shape)
            context.needed = int(self._tell("shapes", context.trt.update_device_memory_size_for_shapes))
            context.shapes = shapes
        return context.needed

    def _context(self, profile: int) -> "_Context":
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile, self._config)
        return self._contexts[profile]

    def _new_config(self, kernels: LateKernels) -> Any:
        """How contexts are made: their working memory is given to them."""
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        kernels.configure(self._trt, config)
        return config

    def _new_context(self, profile: int, config: Any) -> "_Context":
        context = self._complaints.of(self._ask("context", self.engine.create_execution_context, config))
        self._ask(f"profile {profile}", context.set_optimization_profile_async, profile, int(self._stream))
        return _Context(context)

    def _ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        return self._complaints.ask(f"the {self.name}'s {what}", call, *arguments)

    def _tell(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        return self._complaints.tell(f"the {self.name}'s {what}", call, *arguments)


@dataclass(eq=False)
class _Context:
    """TensorRT's context, and what its shapes were last set to."""

    trt: Any
    shapes: Shapes | None = None
    needed: int = 0


@dataclass(eq=False)
class _Graph:
    """A captured run, the context that must live as long, and the number of the run that used it last.

    handle : CUDA's; None where the context itself replays what it captured
    """

    handle: Any
    context: _Context
    used: int
