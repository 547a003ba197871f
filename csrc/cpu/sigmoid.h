// The logistic function, for numbers and for vectors.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace mrcn::MRCN_ISA {
namespace {

template <class A>
struct Exponent;
template <>
struct Exponent<float> {
  using bits = int32_t;
  static constexpr int mantissa = 23, bias = 127, terms = 7;
  static constexpr float limit = 87;  // up to here e^x and e^-x are normal numbers
};
template <>
struct Exponent<double> {
  using bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
  static constexpr double limit = 708;
};

template <int n>
constexpr double factorial = n * factorial<n - 1>;
template <>
constexpr double factorial<0> = 1;

// e^x, with x clamped to [-limit, limit]; NaN stays NaN. With x = n ln 2 + r and |r| <= ln 2 / 2, e^x = 2^n
// e^r. The Taylor series of e^r has as many terms as are above the rounding error.
template <class A, class V>
MRCN_INLINE V exponential(V x) {
  using E = Exponent<A>;
  typedef typename E::bits words __attribute__((vector_size(sizeof(V))));
  constexpr double ln2 = 0.6931471805599453094, high = 355.0 / 512;  // n * high is exact,
  constexpr A low = A(-2.121944400546905827679e-4);                  // and this is what it leaves of n ln 2
  constexpr A whole = A(3) * (typename E::bits(1) << (E::mantissa - 1));
  x = x > E::limit ? V{} + E::limit : x;
  x = x < -E::limit ? V{} - E::limit : x;
  // So large a number has no digits after the point, and its last bits are n.
  const V rounded = x * A(1 / ln2) + whole;
  const V n = rounded - whole;
  const V r = (x - n * A(high)) - n * low;
  V series = V{} + A(1 / factorial<E::terms>);
  unroll<E::terms>([&](auto k) MRCN_BODY { series = series * r + A(1 / factorial<E::terms - 1 - k.v>); });
  const words power = (words)rounded - (words)(V{} + whole) + E::bias;
  return series * (V)(power << E::mantissa);
}

template <class A>
MRCN_INLINE A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
}
template <class A, class V>
MRCN_INLINE V sigmoids(V x) {
  return x < -Exponent<A>::limit ? V{} : 1 / (1 + exponential<A>(-x));
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
