// The block's kernels for CUDA, as ops.cpp calls them: with plain pointers and sizes.
#pragma once

#include "block/params.h"

namespace mrcn::cuda {

// How many numbers of the accumulation type a forward leaves to its backward for each sample: mean and 1/σ of
// every plane, and the gates' hidden layers. Equals `saved_row` in mrcn_fast/backends/shapes.py.
int64_t saved_row(const BlockShape& shape);

// The bytes of scratch memory that the kernels need. It need not be cleared.
int64_t forward_scratch(const BlockShape& shape);
int64_t backward_scratch(const BlockShape& shape);

// One kernel launch each, for at least one sample. `statistics` has the shape (N, saved_row). Returns 0 or
// CUDA's error code.
int block_forward(const BlockForward& call, void* scratch, void* stream);
int block_backward(const BlockBackward& call, void* scratch, void* stream);

// The same by the kernels that hold a sample in shared memory (held.cuh); `margin` multiprocessors are left
// free. Returns false where they can't serve the call: the gate, the type or the size of a sample, or a
// device without a place for all blocks at once. Otherwise `error` is 0 or CUDA's error code.
int64_t held_forward_scratch(const BlockShape& shape);
int64_t held_backward_scratch(const BlockShape& shape);
bool held_forward(const BlockForward& call, int margin, void* scratch, void* stream, int* error);
bool held_backward(const BlockBackward& call, int margin, void* scratch, void* stream, int* error);

// The message for the error code of any launch.
const char* launch_error(int error);

}  // namespace mrcn::cuda
