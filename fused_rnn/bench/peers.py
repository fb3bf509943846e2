"""Who is measured: one small adapter for each implementation.

A new peer is a class with the members of `Peer`, listed in `PEERS`. It imports its library inside its methods, so that
every peer stays optional.
"""

import copy
import functools
import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from . import onnx_model
from .cases import DTYPES, Case

if TYPE_CHECKING:
    from ..explain import Explanation

Run = Callable[[], Any]

_TORCH_LAYERS: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_TORCH_CELLS: dict[str, type[nn.Module]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Problem:
    """The tensors of a case: the same numbers for every peer.

    Attributes:
        module: the `torch.nn` layer or cell that holds the weights.
        inputs: what its forward takes: (T, B, I); for a cell (B, I) and the state, (B, H) or a pair of them.
        grad_output: dL/d output for training, shaped like the first result.
        options: keyword arguments with which `module` was made.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        shape = case.shape
        self.case = case
        self.options: dict[str, Any] = {"input_size": shape.input_size, "hidden_size": shape.hidden_size}
        if not shape.single_step:
            self.options |= {"num_layers": shape.num_layers, "bidirectional": shape.bidirectional}
        dtype = DTYPES[case.dtype]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            table = _TORCH_CELLS if shape.single_step else _TORCH_LAYERS
            self.module = table[case.cell](**self.options).to(dtype)
            if shape.single_step:
                state = tuple(
                    torch.randn(shape.batch_size, shape.hidden_size).to(dtype)
                    for _ in range(2 if case.cell == "lstm" else 1)
                )
                features = torch.randn(shape.batch_size, shape.input_size).to(dtype)
                self.inputs: tuple[Any, ...] = (features, state if case.cell == "lstm" else state[0])
                outputs: tuple[int, ...] = (shape.batch_size, shape.hidden_size)
            else:
                self.inputs = (torch.randn(shape.seq_length, shape.batch_size, shape.input_size).to(dtype),)
                outputs = (shape.seq_length, shape.batch_size, shape.num_directions * shape.hidden_size)
            self.grad_output = torch.randn(outputs).to(dtype)
        self.module.train(case.training)
        for tensor in self.input_tensors():
            tensor.requires_grad_(case.training)

    def input_tensors(self) -> list[Tensor]:
        return list(tensors_of(self.inputs))

    def result_names(self) -> list[str]:
        """Name what `tensors_of` finds in the result of a run, in its order."""
        lstm = self.case.cell == "lstm"
        if self.case.shape.single_step:
            names = ["h", "c"] if lstm else ["h"]
            inputs = ["input", "h_0", "c_0"] if lstm else ["input", "h_0"]
        else:
            names = ["output", "h_n", "c_n"] if lstm else ["output", "h_n"]
            inputs = ["input"]
        if self.case.training:
            weights = [name for name, _ in self.module.named_parameters()]
            names += [f"gradient of {name}" for name in (*inputs, *weights)]
        return names

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same numbers in another dtype."""
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module).to(dtype)
        flat = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.input_tensors()]
        state = () if len(flat) == 1 else (tuple(flat[1:]) if len(flat) == 3 else flat[1],)
        other.inputs = (flat[0], *state)
        other.grad_output = self.grad_output.to(dtype)
        return other


def tensors_of(nested: Any) -> Iterator[Tensor]:
    """Walk the tensors of nested tuples in order."""
    if isinstance(nested, Tensor):
        yield nested
    else:
        for item in nested:
            yield from tensors_of(item)


class Peer(Protocol):
    """An implementation to measure.

    Attributes:
        name: in tables and results.
        pool: whose threads it computes on. Threads spin for a while after a call, so that the next call finds them
            awake; contestants with different pools must not run while the other's are spinning.
    """

    name: str
    pool: str

    def available(self) -> bool:
        """Tell whether it can be used on this machine."""

    def version(self) -> str:
        """Return the version of the library behind it, which is available."""

    def supports(self, case: Case) -> bool:
        """Tell whether it can do what the case asks."""

    def make(self, problem: Problem) -> Run:
        """Return a call without arguments that computes the case once.

        Its result, nested as it likes, holds the tensors that `problem.result_names()` names, in that order. Grad mode
        is set by the caller, the thread count by `torch.set_num_threads`.
        """


def module_run(module: nn.Module, problem: Problem) -> Run:
    """Return the run of a module that is called as `torch.nn` calls it."""
    forward = functools.partial(module, *problem.inputs)
    if not problem.case.training:
        return forward
    wanted = [*problem.input_tensors(), *module.parameters()]

    def forward_backward() -> tuple[Any, ...]:
        results = forward()
        first = next(tensors_of(results))
        return results, torch.autograd.grad(first, wanted, problem.grad_output)

    return forward_backward


class TorchNN:
    name = "torch.nn"
    pool = "openmp"

    def available(self) -> bool:
        return True

    def version(self) -> str:
        return torch.__version__

    def supports(self, case: Case) -> bool:
        return True

    def make(self, problem: Problem) -> Run:
        return module_run(problem.module, problem)


class FusedRNN:
    name = "fused"
    pool = "openmp"

    def available(self) -> bool:
        return True

    def version(self) -> str:
        import fused_rnn

        return fused_rnn.__version__

    def supports(self, case: Case) -> bool:
        return True

    def make(self, problem: Problem) -> Run:
        return module_run(self.module(problem), problem)

    def module(self, problem: Problem) -> nn.Module:
        """Return the fused layer with the problem's weights."""
        import fused_rnn

        name = type(problem.module).__name__
        module: nn.Module = getattr(fused_rnn, name)(**problem.options, dtype=DTYPES[problem.case.dtype])
        module.load_state_dict(problem.module.state_dict())
        return module.train(problem.case.training)

    def explain(self, problem: Problem) -> "Explanation":
        """Say which kernel runs the case, in the grad mode that holds."""
        import fused_rnn

        return fused_rnn.explain(self.module(problem), *problem.inputs)


class Buffers:
    """Where an engine that runs the ONNX model reads and writes: memory of ours, so that nothing is copied in a call.

    Attributes:
        inputs, outputs: by the model's names; tensors with the model's shapes.
        results: the same outputs, named and shaped as `torch.nn` returns them.
    """

    def __init__(self, problem: Problem) -> None:
        shape, cell = problem.case.shape, problem.case.cell
        states = ("h", "c") if cell == "lstm" else ("h",)
        features, *initial = problem.input_tensors()
        self.inputs = {"input": features.view(shape.seq_length, shape.batch_size, shape.input_size)}
        self.inputs |= {f"{state}_0": tensor.unsqueeze(0) for state, tensor in zip(states, initial, strict=False)}

        directions = shape.num_directions
        last = {
            state: torch.empty(shape.num_layers * directions, shape.batch_size, shape.hidden_size) for state in states
        }
        self.outputs = {
            f"{state}_n.{layer}": last[state][layer * directions : (layer + 1) * directions]
            for state in states
            for layer in range(shape.num_layers)
        }
        if shape.single_step:
            self.results = tuple(tensor.squeeze(0) for tensor in last.values())
        else:
            output = torch.empty(onnx_model.output_shape(problem.case))
            self.outputs["output"] = output
            joined = (shape.seq_length, shape.batch_size, directions * shape.hidden_size)
            self.results = (output.view(joined), *last.values())


class OnnxEngine:
    """What the engines that run the ONNX model have in common: forward in float32."""

    name: str
    pool: str
    package: str

    def available(self) -> bool:
        return all(importlib.util.find_spec(package) for package in ("onnx", self.package))

    def version(self) -> str:
        return importlib.metadata.version(self.package)

    def supports(self, case: Case) -> bool:
        return not case.training and case.dtype == "float32"


def onnx_session(model: bytes) -> Any:
    """Return the `onnxruntime.InferenceSession` of a model on the threads that PyTorch is set to."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxRuntime(OnnxEngine):
    name = pool = "ONNX Runtime"
    package = "onnxruntime"

    def model(self, problem: Problem) -> bytes:
        """Return the file of the ONNX model that is run."""
        model: bytes = onnx_model.build(problem.case, problem.module).SerializeToString()
        return model

    def make(self, problem: Problem) -> Run:
        session = onnx_session(self.model(problem))
        buffers = Buffers(problem)
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, buffers.inputs), (binding.bind_output, buffers.outputs)):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())

        def forward() -> tuple[Tensor, ...]:
            session.run_with_iobinding(binding)
            return buffers.results

        return forward


class OnnxRuntimeInt8(OnnxRuntime):
    """The same with int8 weights, and activations that are quantized as they come. It has that for LSTMs alone.

    Weights have 7 bits, as its documentation recommends, where the processor has no instructions that multiply bytes:
    it adds two products in 16 bits there, which 8 bits overflow.
    """

    name = "ONNX Runtime int8"

    def supports(self, case: Case) -> bool:
        return super().supports(case) and case.cell == "lstm"

    def model(self, problem: Problem) -> bytes:
        from onnxruntime.quantization import quantize_dynamic

        from .. import _C

        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # that a model could be prepared, which has one node
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "int8.onnx"
                model = onnx_model.build(problem.case, problem.module)
                seven_bits = not _C.multiplies_bytes()
                quantize_dynamic(model, path, op_types_to_quantize=["LSTM"], reduce_range=seven_bits)
                return path.read_bytes()
        finally:
            logging.disable(before)


class OpenVINO(OnnxEngine):
    name = pool = "OpenVINO"
    package = "openvino"

    def make(self, problem: Problem) -> Run:
        import openvino

        core = openvino.Core()
        model = core.read_model(onnx_model.build(problem.case, problem.module).SerializeToString())
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Where the processor has bfloat16 products, OpenVINO would round to bfloat16.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(model, "CPU", options).create_infer_request()
        buffers = Buffers(problem)
        for name, tensor in (buffers.inputs | buffers.outputs).items():
            request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))

        def forward() -> tuple[Tensor, ...]:
            request.infer(share_outputs=True)
            return buffers.results

        return forward


FUSED = FusedRNN()
TORCH_NN = TorchNN()
ONNX_RUNTIME = OnnxRuntime()
ONNX_RUNTIME_INT8 = OnnxRuntimeInt8()
OPENVINO = OpenVINO()
PEERS: tuple[Peer, ...] = (FUSED, TORCH_NN, ONNX_RUNTIME, OPENVINO)
