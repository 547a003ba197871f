// The gradients of the parameters on a GPU, which both backward kernels make last, and the scratch memory in
// which they leave before what is summed here.
#pragma once

#include "block/cuda/schedule.cuh"

namespace mrcn::MRCN_ISA {
namespace {

template <class T>
struct BackwardArguments {
  Common<acc_t<T>> common;
  FeatureMap inputs[2];
  FeatureMap gradients[4];  // of the made sets; without data where missing
  FeatureMap passed[2];     // (concat) of the inputs that are handed through
  FeatureMap input_gradients[2];
  Numbers<acc_t<T>> of_gamma, of_beta, of_parameters[4];
  int64_t singles;  // how many numbers of the gradients of parameters are summed by one thread each
};

// A sample's row of scratch memory: arrays of C numbers, then arrays for the hidden layers.
template <class P, class A>
struct BackwardScratch {
  const Common<A>& a;
  A* row;

  MRCN_DEVICE BackwardScratch(const Common<A>& all, int64_t i)
      : a(all), row(all.scratch + i * all.scratch_row) {}
  MRCN_DEVICE A* plane(int number) const { return row + number * a.C; }
  MRCN_DEVICE A* U(int m) const { return plane(m); }
  MRCN_DEVICE A* V(int m) const { return plane(P::inputs + m); }
  // The sample's part of ∂γ (which = 0) or ∂β.
  MRCN_DEVICE A* norm(int m, int which) const { return plane(2 * P::inputs + 2 * m + which); }
  MRCN_DEVICE A* s(int g) const { return plane(4 * P::inputs + g); }
  MRCN_DEVICE A* before(int g) const { return plane(4 * P::inputs + P::gate_count + g); }
  MRCN_DEVICE A* coefficients(int slot) const { return plane(4 * P::inputs + 2 * P::gate_count + slot); }
  // The gradient of GAP(M) (b = 0) or of GMP(M) (b = 1).
  MRCN_DEVICE A* of_pooled(int m, int b) const {
    return coefficients(P::backward_slots) + (b * P::inputs + m) * a.C;
  }
  MRCN_DEVICE A* extreme(int m) const { return of_pooled(m, 2); }
  MRCN_DEVICE A* count(int m) const { return of_pooled(m, 3); }
  MRCN_DEVICE A* layers() const { return of_pooled(0, 2 * a.branches()); }
  // The gradient before the ReLU of the hidden layer.
  MRCN_DEVICE A* inner(int g, int b) const { return layers() + int64_t(g * a.branches() + b) * a.R; }
  MRCN_DEVICE int64_t layer() const { return int64_t(P::gate_count) * a.hidden(); }
  // The part of a block of channels in the gradient of the hidden layers, which is the same for both
  // branches.
  MRCN_DEVICE A* share(int64_t block, int g) const {
    return layers() + (a.branches() + block) * layer() + int64_t(g) * a.R;
  }
};

inline int64_t backward_row(const BlockShape& shape, int blocks) {
  return with_pattern(shape.mode, [&](auto pattern) {
    using P = decltype(pattern);
    const int b = branches(shape), g = P::gate_count;
    return ((4 + 2 * b) * P::inputs + 2 * g + P::backward_slots) * shape.channels +
           (b + blocks) * g * hidden(shape);
  });
}

MRCN_DEVICE bool has(unsigned bits, int number) { return (bits >> number & 1u) != 0; }

// --- last items ---------------------------------------------------------------------------------------

// The input of a gate from a plane: GAP(M) (b = 0) or GMP(M) (b = 1).
template <class P, class A>
MRCN_DEVICE A pooled(
    const Saved<P, A>& saved, const BackwardScratch<P, A>& scratch, int m, int b, int64_t c) {
  const Plane<A> plane = saved.plane(m, c);
  if (b == 0) return pooled_residual(plane);
  return residual_at(plane, load_shared_by_blocks(scratch.extreme(m) + c));
}

// to[n] = the sum of f(saved, scratch) over the samples, in their order; 0 unless `used`.
template <class P, class A, class F>
MRCN_DEVICE void add_samples(const Common<A>& a, bool used, const Numbers<A>& to, int64_t n, const F& f) {
  A total(0);
  for (int64_t i = 0; i < a.N && used; ++i) total += f(Saved<P, A>(a, i), BackwardScratch<P, A>(a, i));
  to.set(n, total);
}

// Computes number n of the gradients of the parameters, which are counted in this order: γ, β and, of SE and
// CBAM, the weights of both layers, then their biases.
template <class T, class P>
MRCN_DEVICE void parameter_gradient(const BackwardArguments<T>& arguments, int64_t n) {
  using A = acc_t<T>;
  using Scratch = BackwardScratch<P, A>;
  const Common<A>& a = arguments.common;
  const int64_t norms = P::inputs * a.C, weights = P::gate_count * a.C * a.hidden();
  if (n < 2 * norms) {
    const int which = n < norms ? 0 : 1, m = int(n % norms / a.C);
    const Numbers<A>& to = which == 0 ? arguments.of_gamma : arguments.of_beta;
    add_samples<P>(a, true, to, n % norms, [&](const Saved<P, A>&, const Scratch& scratch) {
      return load_shared_by_blocks(scratch.norm(m, which) + n % a.C);
    });
    return;
  }
  n -= 2 * norms;
  if (n < weights) {
    const int64_t c = n % a.C;
    const int row = int(n / a.C % a.R), g = int(n / a.C / a.R);
    const bool used = has(a.given_gates, g);
    add_samples<P>(
        a, used, arguments.of_parameters[0], n, [&](const Saved<P, A>& saved, const Scratch& scratch) {
          A total(0);
          for (int b = 0; b < a.branches(); ++b) {
            total += load_shared_by_blocks(scratch.inner(g, b) + row) *
                     pooled(saved, scratch, modality<P>(g), b, c);
          }
          return total;
        });
    return;
  }
  n -= weights;
  if (n < weights) {
    const int row = int(n % a.R), g = int(n / a.R / a.C);
    const int64_t c = n / a.R % a.C;
    const bool used = has(a.given_gates, g);
    add_samples<P>(
        a, used, arguments.of_parameters[2], n, [&](const Saved<P, A>& saved, const Scratch& scratch) {
          const A before = load_shared_by_blocks(scratch.before(g) + c);
          A total(0);
          for (int b = 0; b < a.branches(); ++b) total += before * saved.hidden(g, b)[row];
          return total;
        });
    return;
  }
  n -= weights;
  if (n < P::gate_count * a.R) {
    const int row = int(n % a.R), g = int(n / a.R);
    add_samples<P>(a, true, arguments.of_parameters[1], n, [&](const Saved<P, A>&, const Scratch& scratch) {
      A total(0);
      for (int b = 0; b < a.branches(); ++b) total += load_shared_by_blocks(scratch.inner(g, b) + row);
      return total;
    });
    return;
  }
  n -= P::gate_count * a.R;
  const int64_t c = n % a.C;
  const int g = int(n / a.C);
  add_samples<P>(a, true, arguments.of_parameters[3], n, [&](const Saved<P, A>&, const Scratch& scratch) {
    return A(a.branches()) * load_shared_by_blocks(scratch.before(g) + c);
  });
}

// A warp computes the gradient of weight n of ECA's convolutions.
template <class T, class P>
MRCN_DEVICE void eca_gradient(const BackwardArguments<T>& arguments, int64_t n) {
  using A = acc_t<T>;
  const Common<A>& a = arguments.common;
  const int lane = threadIdx.x % warp_lanes, g = int(n / a.R);
  const int64_t shift = n % a.R - a.R / 2;
  A total(0);
  for (int64_t at = lane; at < a.N * a.C; at += warp_lanes) {
    const int64_t i = at / a.C, c = at % a.C;
    if (!has(a.given_gates, g)) break;
    const BackwardScratch<P, A> scratch(a, i);
    // The zeros of the padding count too: a gradient that is not finite makes them NaN.
    const bool inside = c + shift >= 0 && c + shift < a.C;
    const A z = inside ? pooled_residual(Saved<P, A>(a, i).plane(modality<P>(g), c + shift)) : A(0);
    total += load_shared_by_blocks(scratch.before(g) + c) * z;
  }
  for (int mask = 1; mask < warp_lanes; mask *= 2) total += exchange(total, mask);
  if (lane == 0) arguments.of_parameters[0].set(n, total);
}

// How many numbers are computed by one thread each; and how many last items there are, with those of ECA,
// whose numbers are computed by one warp each.
inline int64_t single_parameters(const BlockShape& s) {
  const int64_t layers =
      hidden(s) == 0 ? 0 : sets_of(s.mode).gates * (2 * s.channels * s.hidden + s.hidden + s.channels);
  return 2 * sets_of(s.mode).inputs * s.channels + layers;
}
inline int64_t last_items(const BlockShape& s) {
  const int64_t of_eca = s.gate == Gate::eca ? sets_of(s.mode).gates * s.hidden : 0;
  return divided(single_parameters(s), block_threads) + divided(of_eca, block_warps);
}

template <class T, class P>
MRCN_DEVICE void last_item(const BackwardArguments<T>& arguments, int64_t number, int64_t singles) {
  const auto& a = arguments.common;
  const int64_t blocks = (singles + block_threads - 1) / block_threads;
  if (number < blocks) {
    const int64_t n = number * block_threads + threadIdx.x;
    if (n < singles) parameter_gradient<T, P>(arguments, n);
  } else {
    const int64_t n = (number - blocks) * block_warps + threadIdx.x / warp_lanes;
    if (n < int64_t(P::gate_count) * a.R) eca_gradient<T, P>(arguments, n);
  }
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
