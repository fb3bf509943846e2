"""What is measured of serving: contests, and who takes part in each.

A contestant whose library is not there is left out.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn

from .. import demo
from . import peers
from .cases import CELLS, Case, Shape
from .peers import FUSED, Problem, tensors_of
from .serving import FUSED_FLOAT32, INT8_TOLERANCE, LOOP, Contest, Contestant, Field

# In the order of the report: a step of a stream, a pool beside as many streams, int8, and whole programs.
GROUPS = ("step", "pool", "int8", "voice", "agent")

STEP_SIZES = (8, 32, 64, 128, 256)
SESSIONS, POOL_SIZE = 256, 128  # of the pools that the bar is about
# T, B, I, H of LSTMs in int8: those that the bar was set on, then a row of each size for some, more and many steps.
INT8_TABLE = (
    (1, 1, 128, 128),
    (1, 1, 512, 512),
    (30, 1, 128, 128),
    (100, 1, 256, 256),
    (20, 1, 1024, 1024),
    (40, 16, 256, 512),
)
INT8_GRID = tuple((T, 1, H, H) for H in (64, 128, 256, 512, 1024) for T in (1, 10, 100))
# Of GRUs and RNNs, which no other engine has in int8.
INT8_OWN = tuple((T, 1, H, H) for H in (256, 512, 1024) for T in (1, 20))


def contests() -> list[Contest]:
    """Return all contests that this build and this machine have, by group."""
    found = [
        Contest(
            "step",
            f"{cell} step B1 H{size}",
            cell,
            {"B": 1, "I": size, "H": size},
            functools.partial(step_field, cell, size),
            quick=size in (8, 128) and cell != "rnn",
        )
        for cell, size in itertools.product(CELLS, STEP_SIZES)
    ]
    found += [
        Contest(
            "pool",
            pool_name(cell, size),
            cell,
            {"B": SESSIONS, "I": size, "H": size},
            functools.partial(pool_field, cell, SESSIONS, size),
            quick=cell == "lstm" and size == POOL_SIZE,
        )
        for cell, size in itertools.product(CELLS, STEP_SIZES)
    ]
    shapes = [("lstm", sizes) for sizes in dict.fromkeys(INT8_TABLE + INT8_GRID)]
    shapes += [(cell, sizes) for cell in ("gru", "rnn") for sizes in INT8_OWN]
    found += [
        Contest(
            "int8",
            f"{cell} int8 {Shape('int8', B, T, inputs, H).name}",
            cell,
            {"B": B, "T": T, "I": inputs, "H": H},
            functools.partial(int8_field, cell, Shape("int8", B, T, inputs, H)),
            quick=(T, H) in ((1, 512), (30, 128)),
        )
        for cell, (T, B, inputs, H) in shapes
    ]
    if silero() is not None:
        sizes = {"B": 1, "I": 128, "H": 128}
        name = "lstm voice activity, a chunk of 32 ms"
        found.append(Contest("voice", name, "lstm", sizes, voice_field, steps=VOICE_CHUNKS, quick=True))
    sizes = {"B": 1, "I": 2, "H": AGENT_SIZE}
    found.append(
        Contest("agent", f"gru agent's step H{AGENT_SIZE}", "gru", sizes, agent_field, steps=AGENT_STEPS, quick=True)
    )
    return found


def pool_name(cell: str, size: int) -> str:
    return f"{cell} pool of {SESSIONS} H{size}"


def select(*, pattern: str = "", cells: Sequence[str] = CELLS, quick: bool = False) -> list[Contest]:
    """Return the contests to measure.

    Args:
        pattern: regular expression searched in their names, in any case of letters; empty takes every one.
        cells: of `cases.CELLS`.
        quick: only those marked quick.
    """
    wanted = re.compile(pattern, re.IGNORECASE)
    return [
        contest
        for contest in contests()
        if contest.cell in cells and (contest.quick or not quick) and wanted.search(contest.name)
    ]


def _engines(case: Case, problem: Problem) -> Iterator[Contestant]:
    """The other engines that there are for a case."""
    for peer in peers.PEERS:
        if peer is not FUSED and peer.available() and peer.supports(case):
            yield Contestant(peer.name, peer.make(problem), peer.pool)


def step_field(cell: str, size: int) -> Field:
    """One step of one row, called from Python: a `Stream`, `torch.nn`'s cell, engines with bound buffers."""
    case = Case(Shape("step", 1, 1, size, size, single_step=True), cell, "inference", "float32")
    problem = Problem(case)
    stream = fused_rnn.Stream(problem.module)
    stream.state = problem.inputs[1]
    ours = functools.partial(stream.step, problem.inputs[0])
    h = next(tensors_of(problem.module(*problem.inputs)))
    return Field([Contestant(FUSED.name, ours), *_engines(case, problem)], [h])


def pool_field(cell: str, sessions: int, size: int) -> Field:
    """A step of every session: a `StreamPool`, and a `Stream` for each in a loop."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(nn, cell.upper())(size, size)
        x = torch.randn(sessions, size)
    pool = fused_rnn.StreamPool(module, sessions)
    slots = [pool.open() for _ in range(sessions)]
    pairs = [(fused_rnn.Stream(module).step, row) for row in x.split(1)]
    first: list[Tensor] = []  # of the loop: what is compared

    def loop() -> Any:
        if not first:
            first.extend(step(row).clone() for step, row in pairs)
            return torch.cat(first)
        for step, row in pairs:
            step(row)
        return first

    ours = functools.partial(pool.step, x, slots)
    return Field([Contestant(FUSED.name, ours), Contestant(LOOP, loop)], [module(x[None])[0][0]])


def int8_field(cell: str, shape: Shape) -> Field:
    """A call of T steps in int8, ours on a `Stream`, beside ONNX Runtime's int8, and our own float32."""
    case = Case(shape, cell, "inference", "float32")
    problem = Problem(case)
    quantized = fused_rnn.quantize(problem.module)
    x = problem.inputs[0]
    output = problem.module(x)[0]
    contestants = [
        Contestant(FUSED.name, _stream_run(quantized, x), tolerance=INT8_TOLERANCE),
        Contestant("fused layer", functools.partial(quantized, x), tolerance=INT8_TOLERANCE),
        Contestant(FUSED_FLOAT32, _stream_run(problem.module, x)),
    ]
    engine = peers.ONNX_RUNTIME_INT8
    if engine.available() and engine.supports(case):
        contestants.append(Contestant(engine.name, engine.make(problem), engine.pool, tolerance=INT8_TOLERANCE))
    return Field(contestants, [output])


def _stream_run(module: nn.Module, x: Tensor) -> peers.Run:
    """A chunk of a stream into memory that is there; the state goes on from call to call."""
    stream = fused_rnn.Stream(module, batch_size=x.shape[1])
    out = torch.empty(*x.shape[:2], stream.output_size)
    if x.shape[0] > 1:
        return functools.partial(stream.chunk, x, out=out)
    row, whole = x[0], out[0]

    def step() -> Tensor:
        stream.step(row, out=whole)
        return out

    return step


# Voice activity ------------------------------------------------------------------------------------------------------

VOICE_CHUNKS = 31  # about a second
_VOICE_MODEL = "silero_vad.onnx"
_VOICE_MODEL_16K = "silero_vad_openvino_16k.onnx"  # the half for 16 kHz alone, without branches


@functools.cache
def silero() -> ModuleType | None:
    """Return the module of the example on voice activity; `None` without the source or without the package's files."""
    path = demo.EXAMPLES / "common" / "silero.py"
    if not path.is_file():
        return None
    name = f"{__package__}._silero"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = (module.WEIGHTS[0], _VOICE_MODEL, _VOICE_MODEL_16K)
    return module if all(module.package_file(name) for name in names) else None


def voice_field() -> Field:
    """A second of sound, chunk after chunk, from the beginning: the example beside the package's own files."""
    module = silero()
    assert module is not None
    generator = torch.Generator().manual_seed(0)
    tone = torch.arange(VOICE_CHUNKS * module.CHUNK) * (2 * math.pi * 150 / module.SAMPLE_RATE)
    sound = 0.1 * torch.stack([torch.sin(harmonic * tone) for harmonic in range(1, 8)]).sum(0)
    chunks = (sound + 0.01 * torch.randn(len(sound), generator=generator)).split(module.CHUNK)
    listener = module.Listener(module.Detector.load(module.package_file(module.WEIGHTS[0])))
    with warnings.catch_warnings():  # TorchScript is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        script: Any = torch.jit.load(str(module.package_file(module.WEIGHTS[0]))).eval()

    def listened() -> Tensor:
        listener.reset()
        return torch.tensor([listener.hear(chunk) for chunk in chunks])

    def scripted() -> Tensor:
        script.reset_states()
        return torch.tensor([script(chunk[None], module.SAMPLE_RATE).item() for chunk in chunks])

    contestants = [Contestant(FUSED.name, listened, tolerance=_VOICE_TOLERANCE), Contestant("TorchScript", scripted)]
    if peers.ONNX_RUNTIME.available():
        for name, file in (("ONNX Runtime", _VOICE_MODEL), ("ONNX Runtime, 16 kHz", _VOICE_MODEL_16K)):
            run = _voice_in_onnx_runtime(module, file, chunks)
            contestants.append(Contestant(name, run, peers.ONNX_RUNTIME.pool, tolerance=_VOICE_TOLERANCE))
    return Field(contestants, [scripted()])


# Of a probability, after a second of sums in another order.
_VOICE_TOLERANCE = 1e-4


def _voice_in_onnx_runtime(module: ModuleType, file: str, chunks: Sequence[Tensor]) -> peers.Run:
    session = peers.onnx_session(module.package_file(file).read_bytes())
    samples, output = torch.zeros(1, module.CONTEXT + module.CHUNK), torch.zeros(1, 1)
    context, chunk_of, end = samples[0, : module.CONTEXT], samples[0, module.CONTEXT :], samples[0, module.CHUNK :]
    states = torch.zeros(2, 1, 128), torch.zeros(2, 1, 128)
    bindings = []  # two: what one writes the other reads
    for before, after in (states, states[::-1]):
        binding = session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, "input", samples),
            (binding.bind_input, "state", before),
            (binding.bind_output, "output", output),
            (binding.bind_output, "stateN", after),
        ):
            bind(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())
        if any(wanted.name == "sr" for wanted in session.get_inputs()):
            binding.bind_cpu_input("sr", torch.tensor(module.SAMPLE_RATE).numpy())
        bindings.append(binding)

    def listened() -> Tensor:
        samples.zero_()
        states[0].zero_()
        heard = []
        for chunk, binding in zip(chunks, itertools.cycle(bindings), strict=False):
            context.copy_(end)
            chunk_of.copy_(chunk)
            session.run_with_iobinding(binding)
            heard.append(output.item())
        return torch.tensor(heard)

    return listened


# An agent ------------------------------------------------------------------------------------------------------------

AGENT_SIZE, AGENT_STEPS = 128, 50


class Pole:
    """A pole on a cart that the agent pushes left or right; it sees neither velocity (Barto, Sutton, Anderson 1983)."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.place, self.speed, self.angle, self.turning = 0.01, 0.0, 0.02, 0.0

    def push(self, right: bool) -> None:
        """0.02 s later; begins anew where it fell or left the track."""
        force = 10.0 if right else -10.0
        sine, cosine = math.sin(self.angle), math.cos(self.angle)
        # 1 kg of cart, 0.1 kg of pole, whose middle is 0.5 m away
        common = (force + 0.05 * self.turning**2 * sine) / 1.1
        turn = (9.8 * sine - cosine * common) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        push = common - 0.05 * turn * cosine / 1.1
        self.place += 0.02 * self.speed
        self.speed += 0.02 * push
        self.angle += 0.02 * self.turning
        self.turning += 0.02 * turn
        if abs(self.place) > 2.4 or abs(self.angle) > 0.21:
            self.begin()


def agent_field() -> Field:
    """A policy of a GRU cell and a linear layer acts step by step: on a `Stream`, on our cell, on `torch.nn`'s."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell, head = nn.GRUCell(2, AGENT_SIZE), nn.Linear(AGENT_SIZE, 2)
    fused_cell = fused_rnn.convert(cell, inplace=False)
    stream = fused_rnn.Stream(cell)
    runs = {
        FUSED.name: _acting(stream.step, head, stream.reset),
        "fused cell": _acting(_carried(fused_cell), head),
        peers.TORCH_NN.name: _acting(_carried(cell), head),
    }
    return Field(
        [Contestant(name, run, tolerance=_AGENT_TOLERANCE) for name, run in runs.items()],
        [runs[peers.TORCH_NN.name]()],
    )


# Of logits, after 50 steps; an action that differed would be far beyond it.
_AGENT_TOLERANCE = 1e-4


def _carried(cell: nn.Module) -> Callable[[Tensor, bool], Tensor]:
    state: list[Tensor | None] = [None]

    def step(x: Tensor, begins: bool = False) -> Tensor:
        state[0] = h = cell(x, None if begins else state[0])
        return h

    return step


def _acting(step: Callable[..., Tensor], head: nn.Module, reset: Callable[[], None] | None = None) -> peers.Run:
    """An episode from the beginning; returns the logits of its last step."""
    pole, x = Pole(), torch.zeros(1, 2)
    seen = x.numpy()

    def act() -> Tensor:
        pole.begin()
        if reset is not None:
            reset()
        for number in range(AGENT_STEPS):
            seen[0, 0], seen[0, 1] = pole.place, pole.angle
            h = step(x) if reset is not None else step(x, number == 0)
            logits: Tensor = head(h)
            pole.push(bool(logits[0, 1] > logits[0, 0]))
        return logits

    return act
