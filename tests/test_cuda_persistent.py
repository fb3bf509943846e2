"""The persistent CUDA kernels, executed on the CPU under the planner's own plans, against float64.

Most of host execution keeps few tiles of the weights in registers (``few_registers`` in csrc/cuda/plan.h), so that
small sizes go through the same code as large ones: tiles in registers and in shared memory, several slabs of k per
warp, sums split over warps, teams with idle blocks, column tiles with dead columns. ``FULL_SIZES`` run as on a GPU.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import zlib

import pytest
from support import cuda_host

pytestmark = pytest.mark.compiles

PASSES = ["forward", "backward"]
KINDS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
DTYPES = ["bfloat16", "float16", "tf32", "float32"]
EXCHANGES = ["none", "counted", "barriers", "memory"]

# Shapes for which something is different; the keys say what. `sms` is the size of the made-up GPU: with no more blocks
# than a team has, the whole batch falls to one team.
SHAPES = {
    "a block alone": "exchange=none T=4 B=3 H=24",
    "one unit": "exchange=none T=3 B=2 H=1",
    "one step": "exchange=counted blocks=2 T=1 B=3 H=16",
    "a cluster of 16": "exchange=counted blocks=16 T=3 B=2 H=128",
    "idle blocks in a cluster": "exchange=counted blocks=4 T=4 B=3 H=24",
    "idle blocks that meet at barriers": "exchange=barriers blocks=4 T=4 B=3 H=24",
    "units that do not fill the last octet": "exchange=counted blocks=2 T=4 B=3 H=13",
    "teams with fewer column tiles than others": "exchange=counted blocks=2 sms=4 T=5 B=17 H=15",
    "several column tiles, barriers": "exchange=barriers blocks=2 sms=2 T=4 B=20 H=16",
    "several column tiles through memory": "exchange=memory sms=3 T=4 B=20 H=24",
    "several column tiles in one block": "exchange=none sms=1 T=4 B=20 H=8",
    "teams one after the other": "exchange=counted blocks=2 sms=2 columns=3 T=3 B=10 H=16",
    "rows in registers and in shared memory": "exchange=counted blocks=8 T=2 B=2 H=264",
    "k in registers and in shared memory": "exchange=counted blocks=4 T=3 B=2 H=100",
    "many small blocks": "exchange=memory sms=20 T=3 B=2 H=150",
    "both directions": "exchange=counted blocks=2 directions=2 T=4 B=5 H=24",
    "falling lengths": "exchange=counted blocks=2 ragged=1 T=6 B=9 H=24",
    "falling lengths, several column tiles": "exchange=counted blocks=2 sms=4 directions=2 ragged=1 T=6 B=20 H=16",
    "falling lengths, barriers": "exchange=barriers blocks=2 sms=4 directions=2 ragged=1 T=6 B=20 H=16",
    "falling lengths through memory": "exchange=memory sms=4 directions=2 ragged=1 T=6 B=20 H=16",
    "a mask": "exchange=counted blocks=2 masked=1 directions=2 T=6 B=9 H=24",
    "a mask in one block": "exchange=none masked=1 T=6 B=3 H=24",
    "a mask, several column tiles, barriers": "exchange=barriers blocks=2 sms=4 directions=2 masked=1 T=6 B=20 H=16",
    "a mask through memory, idle warps": "exchange=memory sms=4 directions=2 masked=1 initial=0 T=6 B=20 H=13",
    "a mask, nothing saved": "exchange=counted blocks=2 masked=1 save=0 in_place=0 T=6 B=9 H=16",
    "resets, in one block": "exchange=none options=ra T=5 B=3 H=24",
    "resets, both directions": "exchange=counted blocks=2 options=ra directions=2 T=6 B=9 H=24",
    "resets to zeros, several column tiles, barriers": (
        "exchange=barriers blocks=2 sms=4 options=r directions=2 T=6 B=20 H=16"
    ),
    "resets through memory, a mask": "exchange=memory sms=4 options=ra masked=1 directions=2 T=6 B=20 H=13",
    "all options that draw": "exchange=counted blocks=4 options=radzc masked=1 directions=2 T=6 B=9 H=44",
    "all options, several column tiles": "exchange=counted blocks=2 sms=2 options=radzc T=5 B=20 H=40",
    "all options in one block": "exchange=none sms=1 options=radzc masked=1 T=4 B=20 H=8",
    "all options, idle blocks that meet at barriers": "exchange=barriers blocks=4 options=radzc T=4 B=3 H=24",
    "all options through memory": "exchange=memory sms=3 options=radzc T=4 B=20 H=24",
    "zoneout on average": "exchange=counted blocks=2 options=m T=5 B=3 H=24",
    "options with falling lengths": "exchange=counted blocks=2 sms=4 options=dzc directions=2 ragged=1 T=6 B=20 H=16",
    "options, nothing saved, no initial state": (
        "exchange=counted blocks=2 options=radzc save=0 initial=0 in_place=0 T=4 B=3 H=16"
    ),
    "clips, in one block": "exchange=none options=kg T=5 B=3 H=24",
    "clips, a mask, both directions": "exchange=counted blocks=2 options=kg masked=1 directions=2 T=7 B=9 H=24",
    "clips with falling lengths, barriers": (
        "exchange=barriers blocks=2 sms=4 options=kg directions=2 ragged=1 T=6 B=20 H=16"
    ),
    "clips of what is drawn through memory, a mask": "exchange=memory sms=3 options=radzckg masked=1 T=7 B=20 H=24",
    "clips of means, several column tiles": "exchange=counted blocks=2 sms=2 options=mkg T=5 B=20 H=40",
    "gradients that end": "exchange=counted blocks=2 options=t T=6 B=9 H=24",
    "gradients that end, and all other options": "exchange=none options=radzckgt T=5 B=3 H=24",
    "gradients that end at barriers": "exchange=barriers blocks=4 options=rt T=5 B=3 H=24",
    "gradients that end through memory": "exchange=memory sms=3 options=dgt T=5 B=20 H=24",
    "no initial state": "exchange=counted blocks=2 initial=0 T=3 B=3 H=16",
    "nothing saved, no biases": "exchange=counted blocks=2 save=0 bias=0 in_place=0 T=3 B=3 H=16",
    "no gradient of the output": "exchange=counted blocks=2 output=0 T=3 B=3 H=16",
    "no gradient of the last states": "exchange=counted blocks=2 final=0 T=3 B=3 H=16",
    "results apart from what they could replace": "exchange=counted blocks=2 in_place=0 T=3 B=3 H=16",
    "two layers": "exchange=counted layers=2 blocks=4 T=4 B=3 H=24",
    "two layers, a block each": "exchange=counted layers=2 blocks=2 T=4 B=3 H=16",
    "two layers, one step": "exchange=counted layers=2 blocks=4 T=1 B=3 H=16",
    "two layers, two steps, no initial state": "exchange=counted layers=2 blocks=4 initial=0 T=2 B=3 H=16",
    "two layers, no gradients but the output's": "exchange=counted layers=2 blocks=4 initial=0 final=0 T=4 B=3 H=16",
    "two layers, no gradient of the output": "exchange=counted layers=2 blocks=4 output=0 T=4 B=3 H=24",
    "two layers, nothing saved, no biases": "exchange=counted layers=2 blocks=4 save=0 bias=0 in_place=0 T=4 B=3 H=16",
    "two layers, units that do not fill the last octet": "exchange=counted layers=2 blocks=4 T=4 B=3 H=13",
    "two layers, k in registers and in shared memory": "exchange=counted layers=2 blocks=8 T=3 B=2 H=100",
    "two layers, teams one after the other": "exchange=counted layers=2 blocks=4 sms=4 columns=3 T=3 B=10 H=16",
    "two layers, falling lengths, several column tiles": (
        "exchange=counted layers=2 blocks=4 sms=4 ragged=1 T=6 B=20 H=24"
    ),
    "two layers, dropout": "exchange=counted layers=2 blocks=4 dropout=1 T=4 B=3 H=24",
    "two layers of many units, dropout, several column tiles": (
        "exchange=counted layers=2 blocks=2 sms=2 dropout=1 T=4 B=10 H=40"
    ),
    "three layers, dropout, falling lengths": "exchange=counted layers=3 blocks=8 dropout=1 ragged=1 T=6 B=9 H=13",
    "two layers, a mask": "exchange=counted layers=2 blocks=4 masked=1 T=6 B=9 H=24",
    "three layers, idle blocks": "exchange=counted layers=3 blocks=8 T=5 B=9 H=24",
    "three layers, a mask, nothing saved": (
        "exchange=counted layers=3 blocks=4 masked=1 save=0 in_place=0 T=6 B=9 H=13"
    ),
    "four layers, a cluster of 16": "exchange=counted layers=4 blocks=16 T=3 B=2 H=64",
}


def _run(name: str, case: str, variant: str = "plain", skip_site: str | None = None) -> str:
    result = cuda_host.run(cuda_host.build(name, variant), *case.split(), skip_site=skip_site)
    assert result.returncode == 0, f"{case}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("direction", PASSES)
def test_every_shape_agrees_with_float64(direction: str, name: str) -> None:
    float32 = "tf32" if "layers" in SHAPES[name] else "float32"
    for kind, dtype in (("lstm", "bfloat16"), ("gru", float32)):
        _run(f"persistent_{direction}", f"{SHAPES[name]} kind={kind} dtype={dtype}")


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("direction", PASSES)
def test_one_kind_of_warps_computes_the_same(direction: str, exchange: str) -> None:
    """The same sources for a GPU whose warps cannot hand registers to others; in every shape."""
    # Warps that do everything have no registers for options, and are never asked for them (persistent_has_options).
    shapes = [s for s in SHAPES.values() if f"exchange={exchange} " in s + " " and "options=" not in s]
    assert len(shapes) >= 3
    for number, shape in enumerate(shapes):
        float32 = "tf32" if "layers" in shape else "float32"
        kind, dtype = (("lstm", "bfloat16"), ("gru", float32))[number % 2]
        _run(f"persistent_{direction}", f"{shape} kind={kind} dtype={dtype}", "plain_one_role")


@pytest.mark.parametrize(
    ("direction", "letter"), [(d, letter) for d in PASSES for letter in ("radzcmk" if d == "forward" else "radzcmkgt")]
)
def test_an_option_that_a_kernel_is_not_given_is_missed(direction: str, letter: str) -> None:
    options = letter if letter in "mkgt" else "radzc"
    case = f"exchange=counted blocks=2 options={options} without={letter} T=5 B=3 H=24"
    result = cuda_host.run(cuda_host.build(f"persistent_{direction}"), *case.split())
    assert result.returncode == 1 and "WRONG" in result.stdout


# The sizes that the shapes of plan.h are made for, and a tail.
FULL_SIZES = {
    "lstm, bfloat16, H 768": "kind=lstm dtype=bfloat16 exchange=counted blocks=16 H=768",
    "lstm, float16, H 512": "kind=lstm dtype=float16 exchange=counted blocks=16 H=512",
    "gru, float16, H 650": "kind=gru dtype=float16 exchange=counted blocks=16 H=650",
    "rnn_tanh, bfloat16, H 1000": "kind=rnn_tanh dtype=bfloat16 exchange=counted blocks=16 H=1000",
    "lstm, tf32, H 512": "kind=lstm dtype=tf32 exchange=counted blocks=16 H=512",
    "gru, float32, H 256": "kind=gru dtype=float32 exchange=counted blocks=8 H=256",
    "lstm, bfloat16, H 520 through memory": "kind=lstm dtype=bfloat16 exchange=memory sms=33 H=520",
    "lstm, bfloat16, two layers, H 384": "kind=lstm dtype=bfloat16 exchange=counted layers=2 blocks=16 H=384",
    "gru, float16, three layers, H 256": "kind=gru dtype=float16 exchange=counted layers=3 blocks=16 H=256",
    "lstm, bfloat16, two layers, H 128": "kind=lstm dtype=bfloat16 exchange=counted layers=2 blocks=16 H=128",
    "gru, tf32, two layers, H 200": "kind=gru dtype=tf32 exchange=counted layers=2 blocks=16 H=200",
}


@pytest.mark.parametrize("name", FULL_SIZES)
@pytest.mark.parametrize("direction", PASSES)
def test_shapes_as_on_a_gpu_agree_with_float64(direction: str, name: str) -> None:
    _run(f"persistent_{direction}_full", f"{FULL_SIZES[name]} T=2 B=2")


def _drawn(direction: str, kind: str, dtype: str, exchange: str, layers: int = 1) -> str:
    """A case of this description with everything else drawn, the same in every run."""
    description = f"{direction} {kind} {dtype} {exchange}" + (f" {layers}" if layers > 1 else "")
    draw = random.Random(zlib.crc32(description.encode()))
    hidden = draw.choice([9, 15, 16, 24, 33])
    octets = (hidden + 7) // 8
    blocks = {"none": 1, "memory": octets}.get(exchange) or draw.choice([b for b in (2, 4) if octets > b // 2])
    directions = draw.choice([1, 2])
    case = {
        "kind": kind,
        "dtype": dtype,
        "exchange": exchange,
        "H": min(hidden, 24) if exchange == "none" else hidden,
        "T": draw.choice([2, 3, 5]),
        "B": draw.choice([1, 3, 8, 13]),
        "blocks": 0 if exchange == "memory" else blocks,
        "sms": directions * blocks * draw.choice([1, 2]),
        "directions": directions,
        "seed": draw.randrange(1000),
    }
    for flag in ("ragged", "in_place", "save", "initial", "bias", "final", "output"):
        case[flag] = draw.choice([0, 1])
    case["masked"] = 1 - case["ragged"]
    if layers == 1:
        # Resets are of padded batches.
        case["options"] = draw.choice(["", "", "zc", "d", "m", "dzc"] + ["r", "ra", "radzc", "kg"] * case["masked"])
    if layers > 1:
        case |= {
            "layers": layers,
            "dropout": draw.choice([0, 1]),
            "blocks": 4,
            "sms": 4 * draw.choice([1, 2]),
            "directions": 1,
        }
        case["H"] = draw.choice([9, 16, 24] if layers == 3 else [15, 24, 33])
    return " ".join(f"{name}={value}" for name, value in case.items())


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", PASSES)
def test_every_kernel_and_exchange_agrees_with_float64(direction: str, dtype: str, exchange: str) -> None:
    for kind in KINDS:
        _run(f"persistent_{direction}", _drawn(direction, kind, dtype, exchange))


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("direction", PASSES)
def test_every_kernel_of_several_layers_agrees_with_float64(direction: str, dtype: str, layers: int) -> None:
    for kind in ("lstm", "gru"):
        _run(f"persistent_{direction}", _drawn(direction, kind, dtype, "counted", layers))


# Small enough for the many threads that ThreadSanitizer keeps a history of.
RACE_CASES = {
    "none": "exchange=none sms=1 T=4 B=3 H=24",
    "counted": "exchange=counted blocks=2 sms=2 T=4 B=10 H=24",
    "barriers": "exchange=barriers blocks=4 sms=4 T=4 B=3 H=24",
    "memory": "exchange=memory sms=3 T=4 B=10 H=24",
    "wavefront": "exchange=counted layers=2 blocks=4 sms=4 dropout=1 T=5 B=10 H=24",
}
needs_setarch = pytest.mark.skipif(not shutil.which("setarch"), reason="ThreadSanitizer needs a fixed address layout")


@needs_setarch
@pytest.mark.parametrize("exchange", RACE_CASES)
@pytest.mark.parametrize("direction", PASSES)
def test_no_thread_races_with_another(direction: str, exchange: str) -> None:
    kernels = [("lstm", "bfloat16"), ("gru", "float32"), ("rnn_tanh", "tf32")]
    if exchange == "wavefront":
        kernels = [("lstm", "bfloat16"), ("gru", "tf32")]
    for seed, (kind, dtype) in enumerate(kernels, start=1):
        _run(f"persistent_{direction}", f"{RACE_CASES[exchange]} kind={kind} dtype={dtype} seed={seed}", "thread")
    _run(f"persistent_{direction}", f"{RACE_CASES[exchange]} ragged=1 seed=4", "thread")
    _run(f"persistent_{direction}", f"{RACE_CASES[exchange]} masked=1 kind=gru seed=5", "thread")
    if exchange != "wavefront":
        _run(f"persistent_{direction}", f"{RACE_CASES[exchange]} options=radzckg seed=6", "thread")


@needs_setarch
@pytest.mark.parametrize("exchange", RACE_CASES)
@pytest.mark.parametrize("direction", PASSES)
def test_every_wait_is_missed_where_it_is_taken_out(direction: str, exchange: str) -> None:
    def cases(exchange: str) -> list[str]:
        """With one column tile, in which much stands close together, and with three, whose buffers are used again."""
        return [re.sub(r" B=\d+", f" B={batch}", RACE_CASES[exchange]) + " kind=gru" for batch in (10, 2, 20)]

    def sites(case: str) -> set[str]:
        listed = [line.split() for line in _run(f"persistent_{direction}", f"{case} sites=1").splitlines()]
        met = {(row[1], row[2]) for row in listed if len(row) == 3 and row[0] == "site"}
        return {site for function, site in met if "wait" in function or function in ("sync_threads", "named_barrier")}

    def is_noticed(site: str) -> bool:
        # A wrong number or a deadlock is found in a tenth of the time that a race takes. What several exchanges have in
        # common is not needed in all of them, and races are looked for in the smallest cases first.
        for variant, order in (("plain", (exchange, *RACE_CASES)), ("thread", RACE_CASES)):
            program = cuda_host.build(f"persistent_{direction}", variant)
            everywhere = dict.fromkeys(case for one in order for case in cases(one))
            for seed, case in itertools.product(range(3), everywhere):
                if cuda_host.run(program, *case.split(), f"seed={seed}", skip_site=site).returncode != 0:
                    return True
        return False

    waits = set().union(*(sites(case) for case in cases(exchange)))
    assert len(waits) >= 4
    assert not {site for site in waits if not is_noticed(site)}
