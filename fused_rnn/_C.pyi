from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def isa_supported() -> list[str]: ...
def isa_used() -> str: ...
def set_isa(name: str) -> str: ...
def test_activation(name: str, x: Tensor) -> Tensor: ...
def usable_threads() -> int: ...
def available_processors() -> int: ...
def set_processors(count: int) -> int: ...
def scratch_held() -> int: ...
def plan(
    kind: int,
    T: int,
    B: int,
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
) -> dict[str, Any]: ...
