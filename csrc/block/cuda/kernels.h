// The block's operations on a GPU as plain pointers and sizes: what ops.cpp hands to the kernels.
#pragma once

#include "block/params.h"

namespace mrcn::cuda {

// Numbers of the accumulation type that a sample's forward leaves to its backward: mean and 1/σ of every
// plane, and the gates' hidden layers. `saved_row` in mrcn_fast/backends/shapes.py says the same.
int64_t saved_row(const BlockShape& shape);

// Bytes of scratch memory, not cleared.
int64_t forward_scratch(const BlockShape& shape);
int64_t backward_scratch(const BlockShape& shape);

// One launch each, of tensors with at least one sample; `statistics` are rows as long as `saved_row`. 0 or
// CUDA's number of what went wrong.
int block_forward(const BlockForward& call, void* scratch, void* stream);
int block_backward(const BlockBackward& call, void* scratch, void* stream);

// What the number of any launch means.
const char* launch_error(int error);

}  // namespace mrcn::cuda
