"""TensorRT's names over PyTorch on a real GPU: what drives engines is tested there where TensorRT is not to be had.

A plan is the simulated one (see simulated_tensorrt); what it computes, the network does, at the addresses and on the
stream that it is given, and TensorRT's rules on working memory and alignment are kept.
"""

from types import SimpleNamespace
from warnings import catch_warnings, simplefilter

import torch
from simulated_tensorrt import SimulatedContext, SimulatedEngine, SimulatedTensorRT


class TorchTensorRT(SimulatedTensorRT):
    def __init__(self, model):
        super().__init__(cuda=None)
        self.model = model
        # As TensorRT has it; for a packed sequence the host would wait for all that the GPU has to do.
        model.head.lstm.forward = model.head.lstm._forwards

    def _load(self, plan):
        engine = super()._load(plan)
        engine.create_execution_context = lambda runtime_config: TorchContext(engine)
        return engine


class TorchContext(SimulatedContext):
    def __init__(self, engine: SimulatedEngine):
        super().__init__(engine)
        name = {"fbank": "frontend", "features": "encoder", "scores": "head"}[engine.output]
        self.network = getattr(engine.trt.model, name)

    def execute_async_v3(self, stream):
        assert self.laid_out == self.given, "working memory is divided for other shapes"
        if self.memory[1] < self._needed(self.given):
            return self._refuse("the memory is too small for these shapes")
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)), torch.inference_mode(), catch_warnings():
                simplefilter("ignore")  # of how the LSTM's weights lie
                found = self.network(*(self._view(name, shape) for name, shape in self.given.items()))
                self._view(self.engine.output, tuple(found.shape)).copy_(found)
        except RuntimeError as error:
            return self._refuse(str(error).partition("\n")[0])
        return True

    def _view(self, name, shape):
        interface = {
            "shape": shape,
            "typestr": "<i8" if name == "num_tokens" else "<f4",
            "data": (self.addresses[name], False),
            "strides": None,
            "version": 3,
        }
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device="cuda")
