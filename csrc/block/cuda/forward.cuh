// What the forward kernels share: moments of planes, and their arguments.
#pragma once

#include "block/cuda/schedule.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// --- moments ------------------------------------------------------------------------------------------

// The moments of a plane minus its first pixel, so that the mean keeps its digits far from zero.
template <class A>
struct Moments {
  A count{}, mean{}, squares{};  // squares = Σ (x - mean)²

  // Joins the moments of more pixels (Chan et al.).
  MRCN_DEVICE void join(const Moments& other) {
    if (other.count == 0) return;
    const A total = count + other.count, delta = other.mean - mean, part = other.count / total;
    mean += delta * part;
    // The parentheses matter: delta * delta may be infinite, and before the first values count is 0.
    squares += other.squares + delta * (delta * (count * part));
    count = total;
  }
  MRCN_DEVICE Moments from_lane(int mask) const {
    return {exchange(count, mask), exchange(mean, mask), exchange(squares, mask)};
  }
};

// Adds a line of a plane. It is joined as a group with its own mean, which saves a division per pixel.
template <class A, int n>
MRCN_DEVICE void add_line(const A (&x)[n], A pivot, int filled, Moments<A>& moments) {
  A sum(0), squares(0);
  unroll<n>([&](auto j) {
    if (j.v < filled) sum += x[j.v] - pivot;
  });
  const A mean = sum / A(filled);
  unroll<n>([&](auto j) {
    if (j.v >= filled) return;
    const A d = (x[j.v] - pivot) - mean;
    squares += d * d;
  });
  moments.join({A(filled), mean, squares});
}

// Adds the channels of a pixel to moments_of(0), moments_of(1), ... (Welford).
template <class A, int n, class F>
MRCN_DEVICE void add_line(const A (&x)[n], const A (&pivot)[n], const F& moments_of) {
  const A count = moments_of(constant<0>{}).count + 1, part = A(1) / count;
  unroll<n>([&](auto j) {
    Moments<A>& m = moments_of(j);
    const A d = x[j.v] - pivot[j.v], delta = d - m.mean;
    m.mean += delta * part;
    m.squares += delta * (d - m.mean);
    m.count = count;
  });
}

// --- arguments ----------------------------------------------------------------------------------------

template <class T>
struct ForwardArguments {
  Common<acc_t<T>> common;
  acc_t<T> eps;
  FeatureMap inputs[2];
  FeatureMap made[4];
  FeatureMap passed[2];  // (concat) where the inputs are copied to; otherwise without data
};

// Everything in the arguments but `common`, and `common.wide`.
template <class P, class T>
inline void set_maps(const BlockForward& call, ForwardArguments<T>& a) {
  a.eps = acc_t<T>(call.eps);
  const Sets& sets = sets_of(call.shape.mode);
  for (int m = 0; m < P::inputs; ++m) {
    a.inputs[m] = call.inputs[m];
    if (sets.concat) a.passed[m] = call.outputs[m == 0 ? 0 : sets.all() - 1];
  }
  for (int set = 0; set < P::sets; ++set) a.made[set] = call.outputs[sets.first_made() + set];
  a.common.wide = lines_aligned<T>(a.inputs, call.shape) && lines_aligned<T>(a.made, call.shape) &&
                  lines_aligned<T>(a.passed, call.shape);
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
