// Products of bytes on matrix tiles: of one instruction set (tiles.h), for streams whose kernels another one has.
#pragma once

#include "element.h"

namespace fused_rnn {

// c (rows x panels of `columns`) = rows of `depth` bytes times packed panels (stored.h), exactly. Rows hold bytes
// without a sign. columns: 16, 32, 48 or 64; depth: a multiple of four.
using ByteTiles = void (*)(int64_t columns, int64_t rows, int64_t depth, const Int8* const* a, const Int8* b,
                           int64_t panels, int32_t* c, int64_t c_stride);

}  // namespace fused_rnn
