// Elements of every dtype, one at a time, and unrolled loops, for CPUs and GPUs.
//
// Everything lives in the namespace MRCN_ISA: what is compiled for one instruction set must never be linked
// into code for another.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace mrcn::MRCN_ISA {

#if defined(__CUDACC__)
#define MRCN_INLINE __host__ __device__ __forceinline__
#define MRCN_BODY
#else
#define MRCN_INLINE inline __attribute__((always_inline))
// Stands after the arguments of a lambda that is the body of a loop. Without it, the compiler does not inline
// some of them.
#define MRCN_BODY __attribute__((always_inline))
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The accumulation type of an element's type.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulate<T>::type;

// f(T{}), where T is the type of the elements. MRCN_ELEMENT names the only type of a build that serves no
// other.
template <class F>
inline auto with_element([[maybe_unused]] Dtype dtype, const F& f) {
#if defined(MRCN_ELEMENT)
  return f(MRCN_ELEMENT{});
#else
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::f64:
      return f(double{});
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      break;
  }
  return f(f16{});
#endif
}

// --- one element --------------------------------------------------------------------------------------

MRCN_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
MRCN_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

MRCN_INLINE float get(const float* p) { return *p; }
MRCN_INLINE double get(const double* p) { return *p; }
MRCN_INLINE float get(const bf16* p) { return bits_to_float(uint32_t(p->bits) << 16); }
MRCN_INLINE float get(const f16* p) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(p->bits));
#elif defined(__F16C__)
  return _cvtsh_ss(p->bits);
#elif defined(__ARM_NEON)
  __fp16 value;
  std::memcpy(&value, p, 2);
  return float(value);
#else
  const uint32_t sign = uint32_t(p->bits & 0x8000u) << 16;
  const uint32_t rest = p->bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals right by itself.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000u)));
#endif
}

MRCN_INLINE void put(float* p, float v) { *p = v; }
MRCN_INLINE void put(double* p, double v) { *p = v; }
MRCN_INLINE void put(bf16* p, float v) {
#if defined(__CUDA_ARCH__)
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
#else
  const uint32_t bits = float_to_bits(v);
  // To nearest, ties to even; a NaN keeps its sign and becomes quiet.
  p->bits = uint16_t(v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
#endif
}
MRCN_INLINE void put(f16* p, float v) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(v));
#elif defined(__F16C__)
  p->bits = uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  const __fp16 value = __fp16(v);
  std::memcpy(p, &value, 2);
#else
  const uint32_t bits = float_to_bits(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    p->bits = uint16_t(sign | 0x7e00u);
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    p->bits = uint16_t(sign | 0x7c00u);
  } else if (rest < 0x38800000u) {  // subnormal half: adding 1/2 lets the float's own rounding drop the bits
    p->bits = uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  } else {
    p->bits = uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
  }
#endif
}

template <int value>
struct constant {
  static constexpr int v = value;
};

// Calls f(constant<0>), f(constant<1>), ... f(constant<n - 1>): loops over the feature sets are unrolled and
// every index in them is known when they are compiled.
template <int n, int i = 0, class F>
MRCN_INLINE void unroll(const F& f) {
  if constexpr (i < n) {
    f(constant<i>{});
    unroll<n, i + 1>(f);
  }
}

template <class I>
MRCN_INLINE constexpr I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
MRCN_INLINE constexpr I most(I a, I b) {
  return a < b ? b : a;
}

}  // namespace mrcn::MRCN_ISA
