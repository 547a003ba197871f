// The CQC loss on a GPU as plain pointers and sizes: what ops.cpp hands to the kernels.
#pragma once

#include "cqc/params.h"

namespace mrcn {

struct CqcSamples {
  CqcFeatures features;
  bool wide;                 // rows, of the gradients too, start and end at multiples of 16 bytes
  const int64_t* labels[2];  // visible, infrared
  int count[2];
};

// Results in the accumulation type, but where integers.
struct CqcCudaForward {
  CqcSamples samples;
  double margin;
  void* losses;         // (B_v,): a slot for each visible sample, 0 in those left over
  int64_t* identities;  // (B_v,): the largest int64 in those left over
  // (9 B_v + B_n,): the weights of each slot's eight distances, each sample's role; where features are
  // normalized, (3 B_v + 3 B_n,) more: each row's scale.
  void* saved;
  void* total;
  int64_t* number;  // of identities; before it is known, blocks count themselves in it
};

struct CqcCudaBackward {
  CqcSamples samples;
  const void* gradient;     // one a slot, or one for all; accumulation type
  int64_t gradient_stride;  // 0: one for all
  const void* saved;
  bool detach_negative;
  void* feature_gradients;  // (3 B_v + 3 B_n, D): the six sets, stacked
};

namespace cuda {

// One launch each, and zeros for the forward's counter; 0 or CUDA's number of what went wrong.
int cqc_forward(const CqcCudaForward& call, void* stream);
int cqc_backward(const CqcCudaBackward& call, void* stream);

}  // namespace cuda
}  // namespace mrcn
