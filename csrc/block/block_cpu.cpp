// The block's operations on CPU tensors: layouts, outputs and parameters made ready for the kernels.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "block/block.h"
#include "common/isa.h"
#include "common/tensors.h"

namespace mrcn {
namespace {

using Tensors = std::vector<Tensor>;

// Beyond this many bytes written, outputs leave the caches before anybody reads them.
constexpr int64_t stream_bytes = int64_t(16) << 20;

// --- layouts: the same rules as `_is_planes` and `_is_pixels` in backends/native.py ----------------------------

bool is_planes(const Tensor& x) {
  const int64_t height = x.size(2), width = x.size(3);
  return (width == 1 || x.stride(3) == 1) && (height == 1 || x.stride(2) == width);
}

int64_t pixel_pitch(const Tensor& x) { return x.size(3) > 1 ? x.stride(3) : x.stride(2); }

bool is_pixels(const Tensor& x) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  return (channels == 1 || x.stride(1) == 1) &&
         (height == 1 || width == 1 || x.stride(2) == width * pixel_pitch(x));
}

// `x` readable in the call's layout: itself, or a dense copy where it is in neither or in the other one.
Tensor in_layout(const Tensor& x, bool pixels) {
  if (pixels ? is_pixels(x) : is_planes(x)) return x;
  Tensor copy = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
      pixels ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  torch::stable::copy_(copy, x);
  return copy;
}

FeatureMap map_of(const Tensor& x, bool pixels, int64_t first_sample = 0) {
  char* data = static_cast<char*>(x.data_ptr());
  const int64_t sample = x.stride(0);
  return {data + first_sample * sample * int64_t(x.element_size()), sample, x.stride(1),
      pixels ? pixel_pitch(x) : 1};
}

// --- arguments ------------------------------------------------------------------------------------------

Gate gate_of(const std::string& name) {
  if (name == "se") return Gate::se;
  if (name == "eca") return Gate::eca;
  check(name == "cbam-channel", "gate: got '", name, "', expected one of 'se', 'eca', 'cbam-channel'");
  return Gate::cbam_channel;
}

// A call's inputs, made ready; the tensors here own what the kernels' pointers point to.
struct Ready {
  BlockShape shape;
  BlockParameters parameters;
  Tensors inputs, kept;
  ScalarType dtype, sums;
  std::vector<int64_t> sizes;

  const void* keep(Tensor t) {
    kept.push_back(std::move(t));
    return kept.back().data_ptr();
  }
};

Ready make_ready(Mode mode, const Tensors& inputs, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensors& gate_parameters, const std::string& gate, bool to_input) {
  const Tensor& first = inputs[0];
  for (const Tensor& x : inputs) {
    check(x.dim() == 4, "features: got ", x.dim(), " dimensions, expected four, (N, C, H, W)");
    check(x.is_cpu(), "features: got a tensor on another device, expected a CPU tensor");
    check(x.scalar_type() == first.scalar_type(), "features: got different dtypes, expected one");
    for (int d = 0; d < 4; ++d) {
      check(x.size(d) == first.size(d), "features: got sizes ", x.size(d), " and ", first.size(d),
          " in dimension ", d, ", expected equal shapes");
    }
  }
  Ready ready;
  const Dtype dtype = dtype_of(first, "features");
  ready.dtype = first.scalar_type();
  ready.sums = precise(dtype);
  ready.sizes = {first.size(0), first.size(1), first.size(2), first.size(3)};
  const int64_t N = first.size(0), C = first.size(1), L = first.size(2) * first.size(3);
  check(L >= 2, "features: got planes of ", L, " element(s), expected at least 2");
  const bool pixels = !is_planes(first) && is_pixels(first);
  for (const Tensor& x : inputs) ready.inputs.push_back(in_layout(x, pixels));

  const Gate kind = gate_of(gate);
  const size_t expected = kind == Gate::eca ? 1 : 4;
  const int64_t count = gates(mode);
  check(gate_parameters.size() == expected, "gate_parameters of '", gate, "': got ", gate_parameters.size(),
      " tensors, expected ", expected);
  const int64_t width = gate_parameters[0].dim() > 1 ? gate_parameters[0].size(1) : 0;
  const int64_t numbers[4] = {
      kind == Gate::eca ? count * width : count * width * C, count * width, count * C * width, count * C};
  ready.kept.reserve(2 + expected);
  for (size_t i = 0; i < expected; ++i) {
    check(width > 0 && gate_parameters[i].numel() == numbers[i], "gate_parameters of '", gate, "': got ",
        gate_parameters[i].numel(), " elements in parameter ", i, ", expected ", numbers[i]);
    ready.parameters.gate[i] = ready.keep(converted(gate_parameters[i], ready.sums));
  }
  for (const Tensor* p : {&norm_weight, &norm_bias}) {
    check(p->numel() == modalities(mode) * C, "norm_weight, norm_bias: got ", p->numel(),
        " elements, expected ", modalities(mode) * C);
  }
  ready.parameters.norm_weight = ready.keep(converted(norm_weight, ready.sums));
  ready.parameters.norm_bias = ready.keep(converted(norm_bias, ready.sums));
  ready.shape = {
      mode, kind, dtype, pixels, to_input, N, C, L, width, int(torch::stable::get_num_threads()), pool};
  return ready;
}

bool beyond_cache(const Ready& ready, int maps) {
  const BlockShape& s = ready.shape;
  const int64_t bytes = maps * s.samples * s.channels * s.length * int64_t(ready.inputs[0].element_size());
  return bytes >= stream_bytes;
}

// Rows of pixels can be streamed only where each starts at a whole vector.
bool rows_aligned(const Ready& ready) {
  return !ready.shape.pixels || ready.shape.channels * int64_t(ready.inputs[0].element_size()) % 64 == 0;
}

// --- forward --------------------------------------------------------------------------------------------

// The made sets, each a tensor or (concat) six in one, and then the statistics.
Tensors forward(Mode mode, const Tensors& inputs, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensors& gate_parameters, const std::string& gate, double eps, bool to_input) {
  const Ready ready = make_ready(mode, inputs, norm_weight, norm_bias, gate_parameters, gate, to_input);
  const int64_t N = ready.shape.samples, C = ready.shape.channels;
  const bool pixels = ready.shape.pixels;
  const int sets = mode == Mode::concat ? 6 : mode == Mode::pair ? 4 : mode == Mode::snr ? 3 : 1;
  BlockForward call{};
  call.shape = ready.shape;
  call.parameters = ready.parameters;
  call.eps = eps;
  call.stream = beyond_cache(ready, sets) && rows_aligned(ready);

  Tensors results;
  if (mode == Mode::concat) {
    std::vector<int64_t> sizes = ready.sizes;
    sizes[0] *= sets;
    results.push_back(make_output(sizes, ready.dtype, inputs[0], pixels));
    for (int k = 0; k < sets; ++k) call.outputs[k] = map_of(results[0], pixels, k * N);
  } else {
    for (int k = 0; k < sets; ++k) {
      results.push_back(make_output(ready.sizes, ready.dtype, inputs[0], pixels));
      call.outputs[k] = map_of(results[k], pixels);
    }
  }
  results.push_back(make_output({modalities(mode), N, C, 2}, ready.sums, inputs[0], false));
  call.statistics = results.back().data_ptr();
  for (size_t j = 0; j < inputs.size(); ++j) call.inputs[j] = map_of(ready.inputs[j], pixels);
  if (N > 0) kernels().block_forward(call);
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> block_forward(Tensor visible, Tensor infrared,
    Tensor norm_weight, Tensor norm_bias, Tensors gate_parameters, std::string gate, double eps,
    bool to_input) {
  Tensors r =
      forward(Mode::pair, {visible, infrared}, norm_weight, norm_bias, gate_parameters, gate, eps, to_input);
  return {r[0], r[1], r[2], r[3], r[4]};
}

std::tuple<Tensor, Tensor> block_concat_forward(Tensor visible, Tensor infrared, Tensor norm_weight,
    Tensor norm_bias, Tensors gate_parameters, std::string gate, double eps, bool to_input) {
  Tensors r = forward(
      Mode::concat, {visible, infrared}, norm_weight, norm_bias, gate_parameters, gate, eps, to_input);
  return {r[0], r[1]};
}

std::tuple<Tensor, Tensor> restitute_forward(Tensor features, Tensor norm_weight, Tensor norm_bias,
    Tensors gate_parameters, std::string gate, double eps, bool to_input) {
  Tensors r =
      forward(Mode::restitute, {features}, norm_weight, norm_bias, gate_parameters, gate, eps, to_input);
  return {r[0], r[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> snr_forward(Tensor features, Tensor norm_weight, Tensor norm_bias,
    Tensors gate_parameters, std::string gate, double eps) {
  Tensors r = forward(Mode::snr, {features}, norm_weight, norm_bias, gate_parameters, gate, eps, false);
  return {r[0], r[1], r[2], r[3]};
}

// --- backward -------------------------------------------------------------------------------------------

struct Gradients {
  Tensors inputs;
  Tensor norm_weight, norm_bias;
  Tensors gate;
};

Gradients backward(Mode mode, const std::vector<std::optional<Tensor>>& gradients, const Tensors& inputs,
    const Tensor& statistics, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensors& gate_parameters, const std::string& gate, bool to_input) {
  const Ready ready = make_ready(mode, inputs, norm_weight, norm_bias, gate_parameters, gate, to_input);
  const int64_t N = ready.shape.samples, C = ready.shape.channels;
  const bool pixels = ready.shape.pixels;
  BlockBackward call{};
  call.shape = ready.shape;
  call.parameters = ready.parameters;
  call.stream = beyond_cache(ready, modalities(mode)) && rows_aligned(ready);

  check(statistics.numel() == modalities(mode) * N * C * 2 && statistics.scalar_type() == ready.sums &&
            statistics.is_contiguous(),
      "statistics: expected what the forward gave for these inputs");
  call.statistics = statistics.data_ptr();

  Tensors readable;  // owns the copies of gradients in neither layout
  for (size_t k = 0; k < gradients.size(); ++k) {
    if (!gradients[k].has_value()) continue;
    const Tensor& g = *gradients[k];
    const int64_t batch = mode == Mode::concat ? 6 * N : N;
    check(g.dim() == 4 && g.size(0) == batch && g.size(1) == C && g.size(2) == ready.sizes[2] &&
              g.size(3) == ready.sizes[3],
        "gradient ", k, ": got another shape than the forward's output");
    check(g.scalar_type() == ready.dtype, "gradient ", k, ": got another dtype than the forward's output");
    readable.push_back(in_layout(g, pixels));
    if (mode == Mode::concat) {
      for (int s = 0; s < 6; ++s) call.gradients[s] = map_of(readable.back(), pixels, s * N);
    } else {
      call.gradients[k] = map_of(readable.back(), pixels);
    }
  }

  Gradients result;
  for (size_t j = 0; j < inputs.size(); ++j) {
    call.inputs[j] = map_of(ready.inputs[j], pixels);
    result.inputs.push_back(make_output(ready.sizes, ready.dtype, inputs[0], pixels));
    call.input_gradients[j] = map_of(result.inputs[j], pixels);
  }
  const auto like = [&](const Tensor& p) {
    return make_output({p.sizes().begin(), p.sizes().end()}, ready.sums, p, false);
  };
  result.norm_weight = like(norm_weight);
  result.norm_bias = like(norm_bias);
  call.norm_weight_gradient = result.norm_weight.data_ptr();
  call.norm_bias_gradient = result.norm_bias.data_ptr();
  for (size_t i = 0; i < gate_parameters.size(); ++i) {
    result.gate.push_back(like(gate_parameters[i]));
    call.gate_gradient[i] = result.gate[i].data_ptr();
  }
  kernels().block_backward(call);

  result.norm_weight = converted(result.norm_weight, norm_weight.scalar_type());
  result.norm_bias = converted(result.norm_bias, norm_bias.scalar_type());
  for (size_t i = 0; i < gate_parameters.size(); ++i) {
    result.gate[i] = converted(result.gate[i], gate_parameters[i].scalar_type());
  }
  return result;
}

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> block_backward(Optional visible_restituted,
    Optional visible_compensated, Optional infrared_compensated, Optional infrared_restituted, Tensor visible,
    Tensor infrared, Tensor statistics, Tensor norm_weight, Tensor norm_bias, Tensors gate_parameters,
    std::string gate, bool to_input) {
  Gradients g = backward(Mode::pair,
      {visible_restituted, visible_compensated, infrared_compensated, infrared_restituted},
      {visible, infrared}, statistics, norm_weight, norm_bias, gate_parameters, gate, to_input);
  return {g.inputs[0], g.inputs[1], g.norm_weight, g.norm_bias, g.gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> block_concat_backward(Optional features, Tensor visible,
    Tensor infrared, Tensor statistics, Tensor norm_weight, Tensor norm_bias, Tensors gate_parameters,
    std::string gate, bool to_input) {
  Gradients g = backward(Mode::concat, {features}, {visible, infrared}, statistics, norm_weight, norm_bias,
      gate_parameters, gate, to_input);
  return {g.inputs[0], g.inputs[1], g.norm_weight, g.norm_bias, g.gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> restitute_backward(Optional restituted, Tensor features,
    Tensor statistics, Tensor norm_weight, Tensor norm_bias, Tensors gate_parameters, std::string gate,
    bool to_input) {
  Gradients g = backward(Mode::restitute, {restituted}, {features}, statistics, norm_weight, norm_bias,
      gate_parameters, gate, to_input);
  return {g.inputs[0], g.norm_weight, g.norm_bias, g.gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> snr_backward(Optional restituted, Optional contaminated,
    Optional normalized, Tensor features, Tensor statistics, Tensor norm_weight, Tensor norm_bias,
    Tensors gate_parameters, std::string gate) {
  Gradients g = backward(Mode::snr, {restituted, contaminated, normalized}, {features}, statistics,
      norm_weight, norm_bias, gate_parameters, gate, false);
  return {g.inputs[0], g.norm_weight, g.norm_bias, g.gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mrcn_fast, CPU, library) {
  library.impl("block_forward", TORCH_BOX(&block_forward));
  library.impl("block_backward", TORCH_BOX(&block_backward));
  library.impl("block_concat_forward", TORCH_BOX(&block_concat_forward));
  library.impl("block_concat_backward", TORCH_BOX(&block_concat_backward));
  library.impl("restitute_forward", TORCH_BOX(&restitute_forward));
  library.impl("restitute_backward", TORCH_BOX(&restitute_backward));
  library.impl("snr_forward", TORCH_BOX(&snr_forward));
  library.impl("snr_backward", TORCH_BOX(&snr_backward));
}

}  // namespace mrcn
