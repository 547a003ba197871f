// The block operations as plain pointers and sizes: what ops.h hands to the kernels.
#pragma once

#include <cstdint>

#include "block/gate_table.h"
#include "block/sets.h"
#include "cpu/threads.h"
#include "dtype.h"

namespace mrcn {

// A feature map in memory; strides are in elements. In the layout of planes (contiguous), the pixels of each
// plane lie side by side and `channel` is the stride between planes. In the layout of pixels (channels_last),
// the channels of each pixel lie side by side and `pixel` is the stride between pixels.
struct FeatureMap {
  void* data;
  int64_t sample;   // stride
  int64_t channel;  // stride
  int64_t pixel;    // stride
};

struct BlockShape {
  Mode mode;
  Gate gate;
  Dtype dtype;
  bool pixels;  // the maps are in the layout of pixels
  bool to_input;
  int64_t samples, channels, length;  // N, C, H·W
  int64_t hidden;                     // width of the gate's hidden layer (SE, CBAM) or convolution (ECA)
  int threads;
  ParallelFor parallel;
};

// Contiguous parameters, all in one type: the accumulation type (double for f64, otherwise float) or, on a
// GPU, also the type of the maps.
struct BlockParameters {
  bool precise;             // the type is the accumulation type
  const void* norm_weight;  // (modalities, C)
  const void* norm_bias;
  const void* gate[most_gate_parameters];  // in the order of gates.py
};

struct BlockForward {
  BlockShape shape;
  BlockParameters parameters;
  double eps;
  FeatureMap inputs[most_inputs];
  FeatureMap outputs[most_sets];
  // What the backward needs, in the accumulation type. CPU: (modalities, N, C, 2), mean and 1/σ; CUDA: (N,
  // saved_row).
  void* statistics;
  bool stream;  // the outputs exceed the caches: they are written by stores that bypass them
};

struct BlockBackward {
  BlockShape shape;
  BlockParameters parameters;
  FeatureMap inputs[most_inputs];
  FeatureMap gradients[most_sets];  // without data where there is no gradient
  const void* statistics;
  FeatureMap input_gradients[most_inputs];
  void* norm_weight_gradient;  // these three in the type of the parameters
  void* norm_bias_gradient;
  void* gate_gradient[most_gate_parameters];
  bool stream;
};

}  // namespace mrcn
