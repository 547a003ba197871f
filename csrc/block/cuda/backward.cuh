// What the backward kernels share: terms of gradients that are missing, the gradient of a gate's input, and
// their arguments.
#pragma once

#include "block/cuda/parameter_gradients.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// Sets zero in place of the sums of missing gradients. The gates that only sets without a gradient use are
// set to zero too: not even a NaN of theirs may reach a result.
template <class P, class A>
MRCN_DEVICE void drop_missing(const Common<A>& a, A (&sums)[P::sums]) {
  unroll<P::sets>([&](auto set) {
    if (has(a.given_sets, set.v)) return;
    sums[P::S(set.v)] = A(0);
    unroll<P::inputs>([&](auto m) {
      if constexpr (P::uses(set.v, m.v)) sums[P::T(set.v, m.v)] = A(0);
    });
  });
}

// The means, and by how much the gradient of each set counts in the gradients of the inputs.
template <class P, class A>
MRCN_DEVICE void make_scales(const Common<A>& a, const Plane<A> (&planes)[P::inputs],
    const A (&s)[P::gate_count], A (&k)[P::backward_slots]) {
  make_maps<P>(planes, s, a.to_input, k, false);
  unroll<P::sets>([&](auto set) {
    if (has(a.given_sets, set.v)) return;
    unroll<P::inputs>([&](auto m) {
      if constexpr (P::uses(set.v, m.v)) k[P::scale(set.v, m.v)] = A(0);
    });
  });
}

// The part of some channels in the gradient of a hidden layer's output.
template <class A>
MRCN_DEVICE A share_of_hidden(const Common<A>& a, int g, int row, int64_t c0, int channels, const A* before) {
  const Numbers<A> weight = a.parameters[2].from((g * a.C + c0) * a.R + row);
  A total(0);
  for (int c = 0; c < channels && has(a.given_gates, g); ++c) total += weight[int64_t(c) * a.R] * before[c];
  return total;
}

// The gradient of the input of all gates that see modality m: before_of(g, c) is the gradient before the
// sigmoid, inner_of(g) points to the gradient before the ReLU.
template <class P, class A, class Before, class Inner>
MRCN_DEVICE A of_pooled(
    const Common<A>& a, int m, int64_t c, const Before& before_of, const Inner& inner_of) {
  A total(0);
  for (int g = m; g < P::gate_count; g += P::inputs) {
    if (!has(a.given_gates, g)) continue;
    if (a.gate == Gate::eca) {
      for (int t = 0; t < a.R; ++t) {
        const int64_t to = c - t + a.R / 2;
        if (to >= 0 && to < a.C) total += a.parameters[0][g * a.R + t] * before_of(g, to);
      }
    } else {
      const Numbers<A> weight = a.parameters[0].from(int64_t(g) * a.R * a.C + c);
      const A* inner = inner_of(g);
      for (int row = 0; row < a.R; ++row) total += weight[row * a.C] * inner[row];
    }
  }
  return total;
}

// Everything in the arguments but `common`, and in it which gradients there are, and `wide`.
template <class P, class T>
inline void set_maps(const BlockBackward& call, BackwardArguments<T>& a) {
  using A = acc_t<T>;
  a.singles = single_parameters(call.shape);
  const Sets& sets = sets_of(call.shape.mode);
  for (int m = 0; m < P::inputs; ++m) {
    a.inputs[m] = call.inputs[m];
    a.input_gradients[m] = call.input_gradients[m];
    if (sets.concat) a.passed[m] = call.gradients[m == 0 ? 0 : sets.all() - 1];
  }
  for (int set = 0; set < P::sets; ++set) a.gradients[set] = call.gradients[sets.first_made() + set];
  const Given<P> given([&](int set) { return a.gradients[set].data != nullptr; });
  for (int set = 0; set < P::sets; ++set) a.common.given_sets |= unsigned(given.sets[set]) << set;
  for (int g = 0; g < P::gate_count; ++g) a.common.given_gates |= unsigned(given.gates[g]) << g;
  for (int m = 0; m < P::inputs; ++m) a.common.given_inputs |= unsigned(given.inputs[m]) << m;
  a.of_gamma = numbers<A>(call, call.norm_weight_gradient);
  a.of_beta = numbers<A>(call, call.norm_bias_gradient);
  for (int n = 0; n < 4; ++n) a.of_parameters[n] = numbers<A>(call, call.gate_gradient[n]);
  a.common.wide = lines_aligned<T>(a.inputs, call.shape) && lines_aligned<T>(a.gradients, call.shape) &&
                  lines_aligned<T>(a.passed, call.shape) && lines_aligned<T>(a.input_gradients, call.shape);
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
