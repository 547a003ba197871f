// The CQC loss as plain pointers and sizes: what cpu/ops.cpp hands to the kernels.
#pragma once

#include <cstdint>

#include "cpu/threads.h"
#include "dtype.h"

namespace mrcn {

// The samples of the identities that both modalities have, grouped: the samples of identity i in modality m
// are order[m][start[m][i]] to order[m][start[m][i + 1] - 1].
struct CqcGroups {
  int64_t identities;
  const int64_t* order[2];  // visible, infrared
  const int64_t* start[2];
};

struct CqcFeatures {
  Dtype dtype;
  int64_t dimensions;     // D
  const void* sets[6];    // v, v+, v-, n-, n+, n; rows of D
  int64_t row_stride[6];  // in elements
  bool normalize;         // rows are divided by their lengths before the centers are made
};

struct CqcForward {
  CqcGroups groups;
  CqcFeatures features;
  double margin;
  bool detach_negative;
  void* losses;   // (identities,), accumulation type
  void* weights;  // (identities, 8), accumulation type: one per distance, see cqc/cpu/kernels.cpp
  ParallelFor parallel;
};

struct CqcBackward {
  CqcGroups groups;
  CqcFeatures features;
  const void* weights;
  const void* gradient;  // (identities,) or one for all, accumulation type
  bool detach_negative;
  int64_t gradient_stride;     // 0: one for all
  void* feature_gradients[6];  // contiguous rows of D; rows of identities that aren't shared are not written
  ParallelFor parallel;
};

}  // namespace mrcn
