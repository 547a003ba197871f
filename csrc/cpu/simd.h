// Vectors of the instruction set for which a file is compiled, with loads and stores for every dtype.
//
// Everything lives in the namespace MRCN_ISA. Nothing of the C++ library is used that the compiler might emit
// as a function shared between files: the linker might take the copy that was compiled for AVX-512 for the
// baseline too.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace mrcn::MRCN_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

template <class A>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t mask __attribute__((vector_size(vector_bytes)));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t mask __attribute__((vector_size(vector_bytes)));
};
template <class A>
using vec = typename vector_of<A>::type;
template <class A>
constexpr int lanes = vector_bytes / sizeof(A);

constexpr int half_lanes = lanes<float>;
typedef uint32_t words __attribute__((vector_size(vector_bytes)));
typedef uint16_t halves __attribute__((vector_size(vector_bytes / 2)));

// --- vectors ------------------------------------------------------------------------------------------

template <class A>
MRCN_INLINE vec<A> all(A value) {
  return value - vec<A>{};  // -0 stays -0
}

template <class V, class T>
MRCN_INLINE V copy_in(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

MRCN_INLINE vec<float> load(const float* p) { return copy_in<vec<float>>(p); }
MRCN_INLINE vec<double> load(const double* p) { return copy_in<vec<double>>(p); }
MRCN_INLINE words widen(halves h) {
  // What GCC 12 makes of the general form goes through half vectors.
#if defined(__AVX512F__)
  return (words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif defined(__AVX2__)
  return (words)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, words);
#endif
}
MRCN_INLINE vec<float> load(const bf16* p) { return (vec<float>)(widen(copy_in<halves>(p)) << 16); }
MRCN_INLINE vec<float> load(const f16* p) {
#if defined(__AVX512F__)
  // The masked forms, whole: GCC 12 warns of its own header's undefined operand in the plain ones.
  return (vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)copy_in<halves>(p));
#elif defined(__AVX2__)
  return (vec<float>)_mm256_cvtph_ps((__m128i)copy_in<halves>(p));
#elif defined(__ARM_NEON)
  return (vec<float>)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)copy_in<halves>(p)));
#else
  vec<float> v;
  for (int i = 0; i < half_lanes; ++i) v[i] = get(p + i);
  return v;
#endif
}

MRCN_INLINE halves narrow(const bf16*, vec<float> v) {
#if defined(__AVX512BF16__)
  // To nearest, ties to even, as below; but what is subnormal becomes 0.
  return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const words bits = (words)v;
  const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const words quiet = (bits >> 16) | 0x40u;
  const words number = (words)(v == v);
  const words chosen = (rounded & number) | (quiet & ~number);
#if defined(__AVX512F__)
  return (halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)chosen);
#else
  return __builtin_convertvector(chosen, halves);
#endif
#endif
}
MRCN_INLINE halves narrow(const f16*, vec<float> v) {
#if defined(__AVX512F__)
  return (halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON)
  return (halves)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
#else
  halves h;
  for (int i = 0; i < half_lanes; ++i) {
    f16 one;
    put(&one, v[i]);
    h[i] = one.bits;
  }
  return h;
#endif
}

// Whether there is a streaming store (one that bypasses the caches) of this many bytes.
template <int bytes>
#if defined(__x86_64__)
constexpr bool can_stream = bytes >= 16;
#else
constexpr bool can_stream = false;
#endif

// Stores a whole vector. With `stream`, the address must be a multiple of its size.
template <bool stream, class V>
MRCN_INLINE void copy_out(void* p, V v) {
#if defined(__x86_64__)
  if constexpr (stream) {
    if constexpr (sizeof(V) == 16) {
      _mm_stream_si128((__m128i*)p, (__m128i)v);
      return;
    }
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) {
      _mm256_stream_si256((__m256i*)p, (__m256i)v);
      return;
    }
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
      _mm512_stream_si512((__m512i*)p, (__m512i)v);
      return;
    }
#endif
  }
#endif
  std::memcpy(p, &v, sizeof(V));
}

template <bool stream = false>
MRCN_INLINE void store(float* p, vec<float> v) {
  copy_out<stream>(p, v);
}
template <bool stream = false>
MRCN_INLINE void store(double* p, vec<double> v) {
  copy_out<stream>(p, v);
}
template <bool stream = false>
MRCN_INLINE void store(bf16* p, vec<float> v) {
  copy_out<stream>(p, narrow(p, v));
}
template <bool stream = false>
MRCN_INLINE void store(f16* p, vec<float> v) {
  copy_out<stream>(p, narrow(p, v));
}

// Stands between streaming stores and another thread that reads what they wrote.
MRCN_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The lanes of a vector are added half to half, in the same order for every width.
#if defined(__AVX2__)
MRCN_INLINE float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
MRCN_INLINE double sum_of(__m256d v) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
#endif
#if defined(__AVX512F__)
template <int half>
MRCN_INLINE __m256d half_of(__m512d v) {
  return _mm512_maskz_extractf64x4_pd(0xf, v, half);
}
MRCN_INLINE float sum_of(__m512 v) {
  return sum_of(_mm256_add_ps((__m256)half_of<0>((__m512d)v), (__m256)half_of<1>((__m512d)v)));
}
MRCN_INLINE double sum_of(__m512d v) { return sum_of(_mm256_add_pd(half_of<0>(v), half_of<1>(v))); }
#endif
template <class A>
MRCN_INLINE A sum(vec<A> v) {
#if defined(__AVX2__)
  return sum_of(v);
#else
  A parts[lanes<A>];
  std::memcpy(parts, &v, sizeof(v));
#pragma GCC unroll 8
  for (int width = lanes<A> / 2; width > 0; width /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
#endif
}

// As many values of A as a vector has doubles.
template <class A>
struct part_of {
  typedef A type __attribute__((vector_size(lanes<double> * sizeof(A))));
};
MRCN_INLINE vec<double> to_doubles(vec<double> v) { return v; }
MRCN_INLINE vec<double> to_doubles(part_of<float>::type v) {
  // GCC 12 takes the general form apart once more, and puts it together.
#if defined(__AVX512F__)
  return (vec<double>)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, vec<double>);
#endif
}
template <class A>
MRCN_INLINE vec<double> load_doubles(const A* p) {
  return to_doubles(copy_in<typename part_of<A>::type>(p));
}
template <class A>
MRCN_INLINE void store_doubles(A* p, vec<double> v) {
  const auto part = __builtin_convertvector(v, typename part_of<A>::type);
  std::memcpy(p, &part, sizeof(part));
}

// What stands at p, as one double or as a vector of them (V).
template <class V, class T>
MRCN_INLINE V doubles(const T* p) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return *p;
  } else {
    return load_doubles(p);
  }
}
template <class T, class V>
MRCN_INLINE void put_doubles(T* p, V v) {
  if constexpr (sizeof(V) == sizeof(double)) {
    *p = T(v);
  } else {
    store_doubles(p, v);
  }
}
MRCN_INLINE double root(double x) { return __builtin_sqrt(x); }
MRCN_INLINE vec<double> root(vec<double> x) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  return (vec<double>)_mm_sqrt_pd((__m128d)x);
#else
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = root(x[lane]);
  return x;
#endif
}

// A sum in the type of its terms, which are numbers or vectors. In double, for which there is no wider type
// to add partial sums in, the rounding errors are summed too (Knuth): those of equal terms would not cancel.
template <class V>
struct Total {
  V value{};

  MRCN_INLINE void operator+=(V term) { value += term; }
  MRCN_INLINE V get() const { return value; }
};
template <class V>
struct ExactTotal {
  V value{}, rest{};

  MRCN_INLINE void operator+=(V term) {
    const V before = value, after = before + term, added = after - before;
    rest += (before - (after - added)) + (term - added);
    value = after;
  }
  MRCN_INLINE V get() const { return rest - rest == 0 ? value + rest : value; }
};
template <>
struct Total<double> : ExactTotal<double> {};
template <>
struct Total<vec<double>> : ExactTotal<vec<double>> {};

// A sum of vectors, lane by lane in double.
template <class A>
struct WideSum {
  vec<double> part[sizeof(double) / sizeof(A)] = {};

  MRCN_INLINE void add(vec<A> v) {
    if constexpr (sizeof(A) == sizeof(double)) {
      part[0] += v;
    } else {
      typename part_of<A>::type half[2];
      std::memcpy(half, &v, sizeof(v));
      part[0] += to_doubles(half[0]);
      part[1] += to_doubles(half[1]);
    }
  }
  MRCN_INLINE double total() const {
    if constexpr (sizeof(A) == sizeof(double)) {
      return sum<double>(part[0]);
    } else {
      return sum<double>(part[0] + part[1]);
    }
  }
};

// p[i] += v[i]
template <class A>
MRCN_INLINE void add_doubles(double* p, A v) {
  if constexpr (sizeof(A) <= sizeof(double)) {
    *p += v;
  } else if constexpr (sizeof(v[0]) == sizeof(double)) {
    store(p, load(p) + v);
  } else {
    typename part_of<float>::type half[2];
    std::memcpy(half, &v, sizeof(v));
    store(p, load(p) + to_doubles(half[0]));
    store(p + lanes<double>, load(p + lanes<double>) + to_doubles(half[1]));
  }
}

// Σ a[i] b[i]
template <class A>
MRCN_INLINE A dot(const A* a, const A* b, int64_t n) {
  vec<A> s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * lanes<A> <= n; i += 2 * lanes<A>) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + lanes<A>) * load(b + i + lanes<A>);
  }
  A total = sum<A>(s0 + s1);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// y[i] += k x[i]
template <class A>
MRCN_INLINE void add_scaled(A* y, A k, const A* x, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) store(y + i, load(y + i) + k * load(x + i));
  for (; i < n; ++i) y[i] += k * x[i];
}

// Prefetches a line that will be read soon into the second-level cache; the first-level cache is too small
// for several streams. The CPU's own prefetcher does not suffice: maps are read as short runs, plane by
// plane, and it starts anew at each page. An invalid address does no harm.
MRCN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// The same for a line that is read for the last time: it goes into the first-level cache alone and evicts
// nothing from the others.
MRCN_INLINE void prefetch_last(const void* p) { __builtin_prefetch(p, 0, 0); }

// Bytes from what is read to what is prefetched. For the last reading, it is as much as the first-level cache
// holds of several maps.
constexpr int64_t ahead = 4096, ahead_of_last = 2048;

// Runs f(begin, end) for parts of [0, count) on the threads of torch's pool.
template <class Pool, class F>
inline void parallel(Pool pool, int64_t count, int64_t grain, const F& f) {
  pool(
      count, most<int64_t>(grain, 1),
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace mrcn::MRCN_ISA
