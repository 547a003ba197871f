// Reading and writing whole cache lines, each as several vectors, and bands of rows.
//
// A constant<n> says how many vectors are handled at once; constant<0> stands for a single element.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace mrcn::MRCN_ISA {
namespace {

constexpr int line_bytes = 64;

// How many vectors of T fill a cache line. Streaming stores must write a whole line at once, or its parts go
// to memory one by one.
template <class T, int bytes = lanes<acc_t<T>> * int(sizeof(T))>
constexpr int line_vectors = can_stream<bytes> ? line_bytes / bytes : 1;
// How many vectors are summed at once: a whole line, where there are enough registers.
template <class T>
constexpr int summed_vectors = vector_bytes == line_bytes ? line_vectors<T> : 1;

template <class A, int vectors>
using one_or_vector = std::conditional_t<(vectors > 0), vec<A>, A>;
template <int vectors>
constexpr int parts_of = vectors > 0 ? vectors : 1;

// Calls f(at, constant<vectors>) for whole lines from `head` on, f(at, constant<1>) for whole vectors before
// and after them, and f(at, constant<0>) for the remaining elements at both ends. Vectors at the ends matter
// to streaming stores: a plane of bf16 often starts in the middle of the line in which the previous plane
// ended.
template <class T, int vectors = line_vectors<T>, class F>
MRCN_INLINE void over_lines(int64_t head, int64_t n, const F& f) {
  constexpr int64_t W = lanes<acc_t<T>>, line = vectors * W;
  const int64_t start = line > W ? head % W : head;
  int64_t at = start;
  for (; line > W && at < head; at += W) f(at, constant<1>{});
  for (; at + line <= n; at += line) f(at, constant<vectors>{});
  for (; line > W && at + W <= n; at += W) f(at, constant<1>{});
  for (int64_t l = start > 0 ? 0 : at; l < n; l = l + 1 == start ? at : l + 1) f(l, constant<0>{});
}

// Vectors of bf16 are read in pairs: one vector gets the even elements of the pair, the other the odd ones.
// That takes one instruction per vector instead of three. Values that are combined with them need the same
// order.
template <class T, int parts>
constexpr bool by_parity = std::is_same_v<T, bf16> && vector_bytes >= 32 && parts % 2 == 0;

#if defined(__AVX2__)
// Every second lane of two consecutive vectors, from lane `first` on.
template <int first>
MRCN_INLINE vec<float> every_second(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  alignas(64) static constexpr int index[16] = {first, first + 2, first + 4, first + 6, first + 8, first + 10,
      first + 12, first + 14, first + 16, first + 18, first + 20, first + 22, first + 24, first + 26,
      first + 28, first + 30};
  return (vec<float>)_mm512_permutex2var_ps((__m512)a, _mm512_load_si512(index), (__m512)b);
#else
  const __m256 pairs = _mm256_shuffle_ps((__m256)a, (__m256)b, first == 0 ? 0x88 : 0xdd);
  return (vec<float>)_mm256_permute4x64_pd((__m256d)pairs, 0xd8);
#endif
}
// Interleaves the lanes: a gets a[0], b[0], a[1], b[1], ... and b gets the second halves likewise.
MRCN_INLINE void alternate(vec<float>& a, vec<float>& b) {
#if defined(__AVX512F__)
  alignas(64) static constexpr int index[2][16] = {{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
      {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
  const __m512 even = (__m512)a, odd = (__m512)b;
  a = (vec<float>)_mm512_permutex2var_ps(even, _mm512_load_si512(index[0]), odd);
  b = (vec<float>)_mm512_permutex2var_ps(even, _mm512_load_si512(index[1]), odd);
#else
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b);
  const __m256 high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  a = (vec<float>)_mm256_permute2f128_ps(low, high, 0x20);
  b = (vec<float>)_mm256_permute2f128_ps(low, high, 0x31);
#endif
}

// Rounds to nearest, ties to even, into the upper half of each word. A NaN stays NaN only if its lower half
// is zero. That holds for NaNs that an instruction makes, for those of bf16 and for those of a block's
// coefficients (block/cpu/schedule.h).
MRCN_INLINE words rounded_to_bf16(vec<float> v) {
  const words bits = (words)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

MRCN_INLINE words both_to_bf16(vec<float> even, vec<float> odd) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t index[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (words)_mm512_maskz_permutexvar_epi16(~__mmask32(0), _mm512_load_si512(index), pair);
#else
  const words low = rounded_to_bf16(even) >> 16, high = rounded_to_bf16(odd);
#if defined(__AVX512F__)
  return low | (high & 0xffff0000u);
#else
  return (words)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#endif
#endif
}
#endif

// Distances of prefetches other than plain bytes: no prefetch, or a prefetch of data that is read for the
// last time.
struct Nowhere {};
struct Last {
  int64_t bytes;
};
MRCN_INLINE void ask(const void*, Nowhere) {}
MRCN_INLINE void ask(const void* p, int64_t bytes) { prefetch(static_cast<const char*>(p) + bytes); }
MRCN_INLINE void ask(const void* p, Last distance) {
  prefetch_last(static_cast<const char*>(p) + distance.bytes);
}

// A rectangle of rows and channels. It is read column by column, a line of each row after the other.
struct Band {
  int64_t row, rows, channel, width;
};

// The distance in bytes from the line that is read (channel c of a row of the band) to the line to prefetch
// in the next band, which begins `step` elements further. Up to `ordered_bytes` of each row are prefetched in
// the order of memory, which the CPU's own prefetcher can follow. With more, too many lines would be under
// way at once.
template <class T, int64_t rows>
class NextBand {
  static constexpr int64_t ordered_bytes = 2 << 10;
  static constexpr int64_t size = sizeof(T), line = line_vectors<T> * lanes<acc_t<T>> * size;

 public:
  // The most channels of a band.
  static constexpr int64_t most = ordered_bytes / size;

  MRCN_INLINE NextBand(int64_t step, int64_t pitch, int64_t width) : all_(step * size) {
    static_assert(ordered_bytes % (rows * line) == 0);
    const bool dense = pitch == width && width < most;
    if (!dense && width != most) return;
    a_channel_ = (rows - 1) * size;
    a_row_ = line - pitch * size;
    a_full_row_ = dense ? 0 : (pitch - most) * size;
  }
  MRCN_INLINE int64_t operator()(int64_t c, int64_t row) const {
    return all_ + c * a_channel_ + c / (most / rows) * a_full_row_ + row * a_row_;
  }

 private:
  int64_t all_, a_channel_ = 0, a_full_row_ = 0, a_row_ = 0;
};

// Calls f(band, NextBand) for bands of at most `most_rows` rows: down the rows first, then to the right.
template <class T, int64_t most_rows, class F>
MRCN_INLINE void each_band(int64_t rows, int64_t pitch, int64_t channels, const F& f) {
  using Next = NextBand<T, most_rows>;
  Band b;
  for (b.channel = 0; b.channel < channels; b.channel += b.width) {
    b.width = least(Next::most, channels - b.channel);
    for (b.row = 0; b.row < rows; b.row += b.rows) {
      b.rows = least(most_rows, rows - b.row);
      const bool below = b.row + b.rows < rows, beside = b.channel + b.width < channels;
      const int64_t step = below    ? most_rows * pitch
                           : beside ? b.width - b.row * pitch
                                    : (rows - b.row) * pitch - b.channel;
      f(b, Next(step, pitch, b.width));
    }
  }
}

// Brings values from the order of memory into the order in which vectors of T are read (by parity), and back.
template <class T, class V, int parts>
MRCN_INLINE void to_parts([[maybe_unused]] V (&v)[parts]) {
#if defined(__AVX2__)
  if constexpr (by_parity<T, parts>) {
    unroll<parts / 2>([&](auto pair) MRCN_BODY {
      V &a = v[2 * pair.v], &b = v[2 * pair.v + 1];
      const V even = every_second<0>(a, b);
      b = every_second<1>(a, b);
      a = even;
    });
  }
#endif
}
template <class T, class V, int parts>
MRCN_INLINE void to_order([[maybe_unused]] V (&v)[parts]) {
#if defined(__AVX2__)
  if constexpr (by_parity<T, parts>) {
    unroll<parts / 2>([&](auto pair) MRCN_BODY { alternate(v[2 * pair.v], v[2 * pair.v + 1]); });
  }
#endif
}

// Vector `part` of the `vectors` that are read at once.
template <int vectors, int part, class T>
MRCN_INLINE vec<acc_t<T>> one_of(const T* p) {
  if constexpr (by_parity<T, vectors>) {
    const words both = copy_in<words>(p + part / 2 * 2 * lanes<float>);
    return (vec<float>)(part % 2 == 0 ? both << 16 : both & 0xffff0000u);
  } else {
    return load(p + part * lanes<acc_t<T>>);
  }
}
template <int vectors, int part>
struct OneOf {};

// How many vectors (or elements) a tag stands for.
template <class Count>
constexpr int parts_in = 1;
template <int vectors>
constexpr int parts_in<constant<vectors>> = parts_of<vectors>;

template <class T, int vectors, class V, int parts>
MRCN_INLINE void read(const T* p, constant<vectors>, V (&out)[parts]) {
  if constexpr (vectors == 0) {
    out[0] = get(p);
  } else {
    unroll<parts>([&](auto part) MRCN_BODY { out[part.v] = one_of<parts, part.v>(p); });
  }
}
template <class T, int vectors, int part, class V>
MRCN_INLINE void read(const T* p, OneOf<vectors, part>, V (&out)[1]) {
  out[0] = one_of<vectors, part>(p);
}

// Reads an element, one or several vectors, or one vector of a line. Except for an element, it prefetches
// what lies `distance` bytes further.
template <class T, class Count, class V, int parts, class Distance = Nowhere>
MRCN_INLINE void fetch(const T* p, Count count, V (&out)[parts], [[maybe_unused]] Distance distance = {}) {
  static_assert(parts == parts_in<Count>);
  if constexpr (!std::is_same_v<Count, constant<0>>) ask(p, distance);
  read(p, count, out);
}

// Writes what `fetch` reads. Single elements are never streamed.
template <bool stream = false, class T, int vectors, class V, int parts>
MRCN_INLINE void keep(T* p, constant<vectors>, const V (&v)[parts]) {
  static_assert(parts == parts_of<vectors>);
  if constexpr (vectors == 0) {
    put(p, v[0]);
#if defined(__AVX2__)
  } else if constexpr (by_parity<T, parts>) {
    unroll<parts / 2>([&](auto pair) MRCN_BODY {
      copy_out<stream>(p + 2 * pair.v * lanes<float>, both_to_bf16(v[2 * pair.v], v[2 * pair.v + 1]));
    });
#endif
  } else {
    unroll<parts>([&](auto part) MRCN_BODY { store<stream>(p + part.v * lanes<acc_t<T>>, v[part.v]); });
  }
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
