// The block's operations on tensors, for any device: checks the arguments, brings them into a layout that the
// kernels read, and allocates the results.
#pragma once

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "block/params.h"

namespace mrcn {
namespace {

using Tensors = std::vector<Tensor>;

// --- layouts: the same rules as `is_planes` and `is_pixels` in backends/shapes.py ------------------------------

inline bool is_planes(const Tensor& x) {
  const int64_t height = x.size(2), width = x.size(3);
  return (width == 1 || x.stride(3) == 1) && (height == 1 || x.stride(2) == width);
}

inline int64_t pixel_pitch(const Tensor& x) { return x.size(3) > 1 ? x.stride(3) : x.stride(2); }

inline bool is_pixels(const Tensor& x) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  return (channels == 1 || x.stride(1) == 1) &&
         (height == 1 || width == 1 || x.stride(2) == width * pixel_pitch(x));
}

// `x` in the layout of the call: `x` itself, or a dense copy where `x` is in another layout or not aligned.
inline Tensor in_layout(const Tensor& x, bool pixels) {
  if ((pixels ? is_pixels(x) : is_planes(x)) && is_aligned(x)) return x;
  Tensor copy = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
      pixels ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  torch::stable::copy_(copy, x);
  return copy;
}

inline FeatureMap map_of(const Tensor& x, bool pixels, int64_t first_sample = 0) {
  char* data = static_cast<char*>(x.data_ptr());
  const int64_t sample = x.stride(0);
  return {data + first_sample * sample * int64_t(x.element_size()), sample, x.stride(1),
      pixels ? pixel_pitch(x) : 1};
}

// --- arguments ------------------------------------------------------------------------------------------

inline Gate gate_of(int64_t number) {
  check(number >= 0 && number < gate_kinds, "gate: got ", number, ", expected 0 to ", gate_kinds - 1,
      ", a place in mrcn_fast.gates.FUSED");
  return Gate(number);
}

// The arguments of a call as the kernels read them. The tensors own the memory that the pointers refer to.
struct Ready {
  BlockShape shape;
  BlockParameters parameters;
  Tensors inputs, kept;
  ScalarType dtype, sums, of_parameters;
  std::vector<int64_t> sizes;

  const void* keep(Tensor t) {
    kept.push_back(std::move(t));
    return kept.back().data_ptr();
  }
};

// Requires what mrcn_fast/checks.py requires, in a fraction of the time; the messages of checks.py are
// clearer.
template <class Device>
void check_features(const Tensors& inputs) {
  const Tensor& first = inputs[0];
  for (const Tensor& x : inputs) {
    check(x.dim() == 4, "features: got ", x.dim(), " dimensions, expected four, (N, C, H, W)");
    check(Device::serves(x) && x.get_device_index() == first.get_device_index(),
        "features: got a tensor on another device, expected ", Device::tensor);
    check(x.scalar_type() == first.scalar_type(), "features: got different dtypes, expected one");
    for (int d = 0; d < 4; ++d) {
      check(x.size(d) == first.size(d), "features: got sizes ", x.size(d), " and ", first.size(d),
          " in dimension ", d, ", expected equal shapes");
    }
  }
  check(first.size(1) >= 1, "features: got no channels, expected at least 1");
  check_countable({first.size(0), first.size(1), first.size(2), first.size(3), most_sets}, sizeof(double));
  const int64_t length = first.size(2) * first.size(3);
  check(length >= 2, "features: got planes of ", length, " element(s), expected at least 2");
}

// A parameter must have these sizes, lie on the features' device, and have their dtype or float32 (only their
// dtype, where that is float64).
template <class Device>
void check_parameter(const Tensor& p, const char* name, std::initializer_list<int64_t> sizes,
    const Tensor& features, ScalarType dtype) {
  bool fits = p.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && p.size(d++) == size;
  check(fits, name, ": got another shape than features of ", features.size(1), " channels need");
  check(Device::serves(p) && p.get_device_index() == features.get_device_index(), name,
      ": got a tensor on another device than the features");
  const ScalarType of_features = features.scalar_type();
  check(p.scalar_type() == dtype &&
            (dtype == of_features || (dtype == ScalarType::Float && of_features != ScalarType::Double)),
      name, ": got a dtype that does not fit, expected the features' or float32 for all parameters");
}

template <class Device>
Ready make_ready(Mode mode, const Tensors& inputs, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensors& gate_parameters, int64_t gate, bool to_input) {
  check_features<Device>(inputs);
  const Tensor& first = inputs[0];
  Ready ready;
  const Dtype dtype = dtype_of(first, "features");
  ready.dtype = first.scalar_type();
  ready.sums = precise(dtype);
  ready.sizes = {first.size(0), first.size(1), first.size(2), first.size(3)};
  const int64_t N = first.size(0), C = first.size(1), H = first.size(2), W = first.size(3), L = H * W;
  const bool pixels = !is_planes(first) && is_pixels(first);
  for (const Tensor& x : inputs) ready.inputs.push_back(in_layout(x, pixels));

  const Gate kind = gate_of(gate);
  const GateEntry& entry = entry_of(kind);
  const int64_t modalities = sets_of(mode).inputs, count = sets_of(mode).gates;
  check(int64_t(gate_parameters.size()) == entry.parameters, "gate_parameters of gate ", gate, ": got ",
      gate_parameters.size(), " tensors, expected ", entry.parameters);
  const int64_t width = gate_parameters[0].dim() > 1 ? gate_parameters[0].size(1) : 0;
  check(width > 0 && (!entry.odd_width || width % 2 == 1), "gate_parameters of gate ", gate,
      ": got a width of ", width, ", expected at least 1", entry.odd_width ? " and an odd one" : "");
  const ScalarType given = norm_weight.scalar_type();
  ready.of_parameters = Device::converts ? ready.sums : given;
  ready.parameters.precise = ready.of_parameters == ready.sums;
  const auto keep = [&](const Tensor& p, const char* name, std::initializer_list<int64_t> sizes) {
    check_parameter<Device>(p, name, sizes, first, given);
    return ready.keep(converted(p, ready.of_parameters));
  };
  ready.kept.reserve(2 + entry.parameters);
  ready.parameters.norm_weight = keep(norm_weight, "norm_weight", {modalities, C});
  ready.parameters.norm_bias = keep(norm_bias, "norm_bias", {modalities, C});
  const auto number = [&](Size size) { return size == Size::width ? width : C; };
  for (int i = 0; i < entry.parameters; ++i) {
    const Tensor& p = gate_parameters[i];
    const auto [rows, columns] = entry.sizes[i];
    ready.parameters.gate[i] = columns == Size::none
                                   ? keep(p, "gate_parameters", {count, number(rows)})
                                   : keep(p, "gate_parameters", {count, number(rows), number(columns)});
  }
  ready.shape = {mode, kind, dtype, pixels, to_input, N, C, L, width, Device::threads(), Device::parallel};
  return ready;
}

// --- results --------------------------------------------------------------------------------------------

// How many tensors the operations of a mode return: of the forward, the sets and what its backward takes of
// it; of the backward, the gradients of the inputs, of norm_weight, norm_bias and the gate's parameters.
constexpr size_t forward_results(Mode mode) { return sets_of(mode).all() / sets_of(mode).stacked() + 1; }
constexpr size_t backward_results(Mode mode) { return sets_of(mode).inputs + 2 + most_gate_parameters; }

// --- forward --------------------------------------------------------------------------------------------

// Returns the sets, each in a tensor or (concat) all in one, and then what the backward needs.
template <class Device>
Tensors forward(Mode mode, const Tensors& inputs, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensors& gate_parameters, int64_t gate, double eps, bool to_input) {
  const Ready ready =
      make_ready<Device>(mode, inputs, norm_weight, norm_bias, gate_parameters, gate, to_input);
  const int64_t N = ready.shape.samples;
  const bool pixels = ready.shape.pixels;
  const int sets = sets_of(mode).all(), stacked = sets_of(mode).stacked();
  BlockForward call{};
  call.shape = ready.shape;
  call.parameters = ready.parameters;
  call.eps = eps;

  std::vector<const void*> read;
  for (size_t j = 0; j < inputs.size(); ++j) {
    call.inputs[j] = map_of(ready.inputs[j], pixels);
    read.push_back(call.inputs[j].data);
  }
  std::vector<int64_t> sizes = ready.sizes;
  sizes[0] *= stacked;
  Tensors results = Device::maps(sets / stacked, sizes, inputs[0], pixels, read);
  for (int k = 0; k < sets; ++k) {
    call.outputs[k] = map_of(results[k / stacked], pixels, k % stacked * N);
  }
  results.push_back(Device::empty(Device::statistics(ready.shape), ready.sums, inputs[0], false));
  call.statistics = results.back().data_ptr();
  if (N > 0) Device::forward(call, inputs[0]);
  return results;
}

// --- backward -------------------------------------------------------------------------------------------

// Returns the gradients of the inputs, of norm_weight and norm_bias, and of four gate parameters. Where the
// gate has fewer parameters, the others are empty.
template <class Device>
Tensors backward(Mode mode, const std::vector<std::optional<Tensor>>& gradients, const Tensors& inputs,
    const Tensor& statistics, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensors& gate_parameters, int64_t gate, bool to_input) {
  const Ready ready =
      make_ready<Device>(mode, inputs, norm_weight, norm_bias, gate_parameters, gate, to_input);
  const int64_t N = ready.shape.samples, C = ready.shape.channels;
  const bool pixels = ready.shape.pixels;
  BlockBackward call{};
  call.shape = ready.shape;
  call.parameters = ready.parameters;
  int64_t numbers = 1;
  for (int64_t size : Device::statistics(ready.shape)) numbers *= size;
  check(statistics.numel() == numbers && statistics.scalar_type() == ready.sums && statistics.is_contiguous(),
      "statistics: expected what the forward gave for these inputs");
  call.statistics = statistics.data_ptr();

  const int stacked = sets_of(mode).stacked();
  Tensors readable;  // owns the copies of gradients in another layout
  for (size_t k = 0; k < gradients.size(); ++k) {
    if (!gradients[k].has_value()) continue;
    const Tensor& g = *gradients[k];
    check(g.dim() == 4 && g.size(0) == stacked * N && g.size(1) == C && g.size(2) == ready.sizes[2] &&
              g.size(3) == ready.sizes[3],
        "gradient ", k, ": got another shape than the forward's output");
    check(g.scalar_type() == ready.dtype, "gradient ", k, ": got another dtype than the forward's output");
    readable.push_back(in_layout(g, pixels));
    for (int s = 0; s < stacked; ++s) {
      call.gradients[k * stacked + s] = map_of(readable.back(), pixels, s * N);
    }
  }

  std::vector<const void*> read;
  for (size_t j = 0; j < inputs.size(); ++j) {
    call.inputs[j] = map_of(ready.inputs[j], pixels);
    read.push_back(call.inputs[j].data);
  }
  for (const FeatureMap& g : call.gradients) {
    if (g.data != nullptr) read.push_back(g.data);
  }
  Tensors results = Device::maps(int(inputs.size()), ready.sizes, inputs[0], pixels, read);
  for (size_t j = 0; j < inputs.size(); ++j) call.input_gradients[j] = map_of(results[j], pixels);
  const auto add_like = [&](const Tensor& p) {
    results.push_back(
        Device::empty({p.sizes().begin(), p.sizes().end()}, ready.of_parameters, inputs[0], false));
    return results.back().data_ptr();
  };
  call.norm_weight_gradient = add_like(norm_weight);
  call.norm_bias_gradient = add_like(norm_bias);
  for (size_t i = 0; i < gate_parameters.size(); ++i) call.gate_gradient[i] = add_like(gate_parameters[i]);
  Device::backward(call, inputs[0]);

  for (size_t k = inputs.size(); k < results.size(); ++k) {
    results[k] = converted(results[k], norm_weight.scalar_type());
  }
  while (results.size() < backward_results(mode)) {
    results.push_back(Device::empty({0}, norm_weight.scalar_type(), inputs[0], false));
  }
  return results;
}

// --- operations -----------------------------------------------------------------------------------------

// The results of an operation as a tuple, which torch takes.
template <size_t... i>
auto tuple_of(const Tensors& t, std::index_sequence<i...>) {
  return std::make_tuple(t[i]...);
}
template <size_t n>
auto results_of(const Tensors& t) {
  return tuple_of(t, std::make_index_sequence<n>{});
}

// The operations of a device. `Device` provides:
//
//   tensor               what its tensors are called in messages
//   serves(t)            whether t is such a tensor
//   converts             whether its kernels need parameters in the accumulation type
//   threads(), parallel  the threads that the kernels run on; none for a GPU
//   empty(sizes, dtype, like, channels_last)         a new tensor
//   maps(count, sizes, like, channels_last, beside)  new feature maps of `like`'s dtype; see make_maps
//   statistics(shape)    the shape of what a forward leaves to its backward
//   forward(call, like), backward(call, like)        run the kernels
template <class Device>
struct Operations {
  template <class Library>
  static void implement(Library& library) {
    implement_all(library, std::make_index_sequence<modes>{});
  }

 private:
  template <class T, size_t>
  using Numbered = T;

  // The two operations of a mode with the arguments of their schemas. Their numbers come from the table in
  // sets.h: a feature map per input, a gradient per result, and the flag to_input or none.
  template <Mode mode, class, class, class>
  struct OfMode;

  template <Mode mode, size_t... input, size_t... result, size_t... flag>
  struct OfMode<mode, std::index_sequence<input...>, std::index_sequence<result...>,
      std::index_sequence<flag...>> {
    static auto run_forward(Numbered<Tensor, input>... inputs, Tensor norm_weight, Tensor norm_bias,
        Tensors gate_parameters, int64_t gate, double eps, Numbered<bool, flag>... to_input) {
      return results_of<forward_results(mode)>(forward<Device>(
          mode, {inputs...}, norm_weight, norm_bias, gate_parameters, gate, eps, (to_input || ... || false)));
    }

    static auto run_backward(Numbered<std::optional<Tensor>, result>... gradients,
        Numbered<Tensor, input>... inputs, Tensor statistics, Tensor norm_weight, Tensor norm_bias,
        Tensors gate_parameters, int64_t gate, Numbered<bool, flag>... to_input) {
      return results_of<backward_results(mode)>(backward<Device>(mode, {gradients...}, {inputs...},
          statistics, norm_weight, norm_bias, gate_parameters, gate, (to_input || ... || false)));
    }
  };

  template <class Library, size_t... mode>
  static void implement_all(Library& library, std::index_sequence<mode...>) {
    (implement_mode<Mode(mode)>(library), ...);
  }

  template <Mode mode, class Library>
  static void implement_mode(Library& library) {
    constexpr Sets sets = sets_of(mode);
    using Both = OfMode<mode, std::make_index_sequence<sets.inputs>,
        std::make_index_sequence<forward_results(mode) - 1>, std::make_index_sequence<sets.restitutes>>;
    const std::string name = sets.name;
    library.impl((name + "_forward").c_str(), TORCH_BOX(&Both::run_forward));
    library.impl((name + "_backward").c_str(), TORCH_BOX(&Both::run_backward));
  }
};

}  // namespace
}  // namespace mrcn
