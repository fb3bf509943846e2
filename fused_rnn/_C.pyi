from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def isa_supported() -> list[str]: ...
def isa_used() -> str: ...
def set_isa(name: str) -> str: ...
def test_activation(name: str, x: Tensor, bfloat16: bool = False) -> Tensor: ...
def usable_threads() -> int: ...
def available_processors() -> int: ...
def set_processors(count: int) -> int: ...
def scratch_held() -> int: ...
def packed_bytes_held() -> int: ...
def packed_bytes_limit() -> int: ...
def set_packed_bytes_limit(bytes: int) -> None: ...
def clear_packed() -> None: ...
def team_is_late() -> bool: ...
def judge_team(threads: int, wall_us: float, own_us: float) -> None: ...
def expect_teams_in_time() -> None: ...
def peak_flops(dtype: int, seconds: float) -> float: ...
def plan(
    kind: int,
    T: int,
    B: int,
    batch_sizes: list[int] | None,
    input_size: int,
    hidden_size: int,
    state_size: int,
    directions: int,
    dtype: int,
    backward: bool,
) -> dict[str, Any]: ...
def cuda_plan_for(
    kind: int,
    T: int,
    B: int,
    input_size: int,
    hidden_size: int,
    state_size: int,
    directions: int,
    dtype: int,
    backward: bool,
    device: dict[str, Any],
    tf32: bool,
    layers: int = 1,
) -> dict[str, Any]: ...

# These only in a build with CUDA.
def cuda_plan(
    kind: int,
    T: int,
    B: int,
    input_size: int,
    hidden_size: int,
    state_size: int,
    directions: int,
    dtype: int,
    backward: bool,
    device: int,
    layers: int = 1,
) -> dict[str, Any]: ...
def cuda_device(index: int) -> dict[str, Any]: ...
def cuda_barrier(kind: str, rounds: int) -> None: ...
def cuda_allow(
    block: bool = True,
    cluster: bool = True,
    grid: bool = True,
    none: bool = True,
    counted: bool = True,
    team_blocks: int = 0,
    most_columns: int = 0,
    most_steps: int = 0,
    layers: int = 0,
) -> dict[str, Any]: ...
def run_layers(
    kind: int,
    input_size: int,
    hidden_size: int,
    state_size: int,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    recompute: bool,
    input: Any,
    hx: Any,
    params: Any,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...
def run_cell(
    kind: int, input_size: int, hidden_size: int, input: Any, hx: Any, params: Any, /
) -> tuple[Tensor, Tensor | None] | None: ...
