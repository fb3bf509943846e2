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
def run_layers(
    kind: int,
    input_size: int,
    hidden_size: int,
    state_size: int,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    input: Any,
    hx: Any,
    params: Any,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...
def run_cell(
    kind: int, input_size: int, hidden_size: int, input: Any, hx: Any, params: Any, /
) -> tuple[Tensor, Tensor | None] | None: ...
