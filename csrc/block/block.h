// The block operations as plain pointers and sizes: what block_ops.h hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"

namespace mrcn {

enum class Gate { se, eca, cbam_channel };

// Which feature sets an operation makes (in this order) from which inputs.
enum class Mode {
  pair,       // (v, n) -> v+, v-, n-, n+
  concat,     // (v, n) -> v, v+, v-, n-, n+, n
  restitute,  // x -> x+
  snr,        // x -> restituted, contaminated, normalized
};

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
  const void* gate[4];  // in the order of gates.py
};

struct BlockForward {
  BlockShape shape;
  BlockParameters parameters;
  double eps;
  FeatureMap inputs[2];
  FeatureMap outputs[6];
  void* statistics;  // accumulation type. CPU: (modalities, N, C, 2), mean and 1/σ; CUDA: (N, saved_row)
  bool stream;       // outputs beyond the cache: stores that don't read what they overwrite
};

struct BlockBackward {
  BlockShape shape;
  BlockParameters parameters;
  FeatureMap inputs[2];
  FeatureMap gradients[6];  // data null: no gradient
  const void* statistics;
  FeatureMap input_gradients[2];
  void* norm_weight_gradient;  // in the parameters' type
  void* norm_bias_gradient;
  void* gate_gradient[4];
  bool stream;
};

constexpr int modalities(Mode mode) { return mode == Mode::pair || mode == Mode::concat ? 2 : 1; }
constexpr int gates(Mode mode) { return mode == Mode::pair || mode == Mode::concat ? 4 : 1; }

}  // namespace mrcn
