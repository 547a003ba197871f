// The block operations as plain pointers and sizes: what ops.h hands to the kernels.
#pragma once

#include <cstdint>

#include "block/sets.h"
#include "cpu/threads.h"
#include "dtype.h"

namespace mrcn {

// In the order of FUSED in mrcn_fast/gates.py: operations take a gate by its number.
enum class Gate { se, eca, cbam_channel };

constexpr int most_gate_parameters = 4;

// A feature map in memory, strides in elements. Planes: the pixels of a plane are contiguous, `channel` lies
// between planes. Pixels: the channels of a pixel are contiguous, `pixel` lies between pixels.
struct FeatureMap {
  void* data;
  int64_t sample;
  int64_t channel;
  int64_t pixel;
};

struct BlockShape {
  Mode mode;
  Gate gate;
  Dtype dtype;
  bool pixels;  // channels_last
  bool to_input;
  int64_t samples, channels, length;  // N, C, H·W
  int64_t hidden;                     // width of the gate's hidden layer (SE, CBAM) or of its kernel (ECA)
  int threads;
  ParallelFor parallel;
};

// Parameters, contiguous, in the accumulation type (double for f64, else float) or, on a GPU, in that of the
// maps.
struct BlockParameters {
  bool precise;             // in the accumulation type
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
  void* statistics;  // accumulation type. CPU: (modalities, N, C, 2), mean and 1/σ; CUDA: (N, saved_row)
  bool stream;       // outputs beyond the cache: stores that don't read what they overwrite
};

struct BlockBackward {
  BlockShape shape;
  BlockParameters parameters;
  FeatureMap inputs[most_inputs];
  FeatureMap gradients[most_sets];  // data null: no gradient
  const void* statistics;
  FeatureMap input_gradients[most_inputs];
  void* norm_weight_gradient;  // in the parameters' type
  void* norm_bias_gradient;
  void* gate_gradient[most_gate_parameters];
  bool stream;
};

}  // namespace mrcn
