"""Small calls of every kernel for compute-sanitizer to watch, and compared with the reference: numbers count, too."""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import _C

VARIANTS = ("none", "block", "cluster", "grid")


def call(layer: torch.nn.Module, sequence: Tensor, packed: bool) -> list[Tensor]:
    """Output and gradients of the parameters."""
    layer.zero_grad(set_to_none=True)
    lengths = torch.arange(sequence.shape[1]) % sequence.shape[0] + 1
    result = layer(pack_padded_sequence(sequence, lengths, enforce_sorted=False) if packed else sequence)[0]
    output = result.data if packed else result
    output.sum().backward()
    return [output.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]


def main() -> int:
    torch.backends.cudnn.allow_tf32 = False
    worst = 0.0
    cells = (fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN)
    dtypes = (torch.bfloat16, torch.float32)
    for variant, cell, dtype, packed in itertools.product(VARIANTS, cells, dtypes, (False, True)):
        _C.cuda_allow(**{name: name == variant for name in VARIANTS})
        torch.manual_seed(0)
        layer = cell(16, 40, bidirectional=True, dtype=dtype, device="cuda")
        sequence = torch.randn(4, 9, 16, device="cuda", dtype=dtype)
        found = call(layer, sequence, packed)
        with fused_rnn.use_backend("reference"):
            expected = call(layer, sequence, packed)
        for ours, theirs in zip(found, expected, strict=True):
            scale = theirs.abs().max().clamp(min=1e-3)
            error = ((ours - theirs).abs().max() / scale / torch.finfo(dtype).eps).item()
            worst = max(worst, error)
            if not error < 64:
                print(f"{variant} {cell.__name__} {dtype} packed={packed}: off by {error:.3g} epsilons")
                return 1
    print(f"all right, at most {worst:.3g} epsilons from the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
