// The kernels of the CQC loss for CUDA, as ops.cpp calls them: with plain pointers and sizes.
#pragma once

#include "cqc/params.h"

namespace mrcn {

struct CqcSamples {
  CqcFeatures features;
  bool wide;                 // rows, of the gradients too, start and end at multiples of 16 bytes
  const int64_t* labels[2];  // visible, infrared
  int count[2];
};

// Results are in the accumulation type, except integers.
struct CqcCudaForward {
  CqcSamples samples;
  double margin;
  void* losses;         // (B_v,): one slot for each visible sample; 0 in unused slots
  int64_t* identities;  // (B_v,): the largest int64 in unused slots
  // (9 B_v + B_n,): the weights of the eight distances of each slot, then the role of each sample. Where the
  // features are normalized, (3 B_v + 3 B_n,) more: the scale of each row.
  void* saved;
  void* total;
  int64_t* number;  // how many identities there are; the kernel first counts its finished blocks in it
};

struct CqcCudaBackward {
  CqcSamples samples;
  const void* gradient;     // one number per slot, or one for all; accumulation type
  int64_t gradient_stride;  // 0: one for all
  const void* saved;
  bool detach_negative;
  void* feature_gradients;  // (3 B_v + 3 B_n, D): the six sets, stacked
};

namespace cuda {

// One kernel launch each; the forward also clears its counter. Returns 0 or CUDA's error code.
int cqc_forward(const CqcCudaForward& call, void* stream);
int cqc_backward(const CqcCudaBackward& call, void* stream);

}  // namespace cuda
}  // namespace mrcn
