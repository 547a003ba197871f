// The passes over pixels: each made set, each sum and each gradient, for a plane or for rows of pixels.
//
// Only these functions know a dtype; what surrounds them (call.h) knows the accumulation type alone and
// reaches them through `Passes`, so that the code is not compiled once more for every dtype.
#pragma once

#include <type_traits>

#include "block/moments.h"
#include "block/pattern.h"
#include "common/vec.h"

namespace mrcn::MRCN_ISA {
namespace {

using Pointers = void* const*;

// Rows of pixels: where each map's first row stands and how far apart, in elements, rows lie.
struct Rows {
  Pointers start;
  const int64_t* pitch;
};

template <class A>
struct Passes {
  Moments (*plane_moments)(const void* x, int64_t n, Extremes<A>* extremes);
  void (*rows_moments)(const void* x, int64_t rows, int64_t pitch, int64_t channels, A* scratch,
      ChannelMoments<A> out, bool extremes);
  double (*plane_count)(const void* x, int64_t n, A value);
  void (*rows_count)(
      const void* x, int64_t rows, int64_t pitch, int64_t channels, const A* values, double* counts);

  void (*make_plane)(const A* k, Pointers x, Pointers y, int64_t n, bool stream);
  void (*make_rows)(const A* k, Rows x, Rows y, int64_t rows, int64_t channels, bool stream);
  void (*sum_plane)(const A* mean, Pointers x, Pointers g, int64_t n, double* sums);
  void (*sum_rows)(const A* mean, Rows x, Rows g, int64_t rows, int64_t channels, A* scratch, double* sums);
  void (*gradient_plane)(
      const A* k, Pointers x, Pointers g, Pointers dx, int64_t n, bool stream, bool extremes);
  void (*gradient_rows)(
      const A* k, Rows x, Rows g, Rows dx, int64_t rows, int64_t channels, bool stream, bool extremes);
};

// --- a pixel, or vectors of them ------------------------------------------------------------------------

// A tag's value says how many vectors are handled at once; 0 is one pixel.
template <int vectors>
constexpr constant<(vectors > 0)> width_of{};
template <class A, int vectors>
using one_or_vector = std::conditional_t<(vectors > 0), vec<A>, A>;
template <int vectors>
constexpr int parts_of = vectors > 0 ? vectors : 1;

// Vectors of T that fill a line of memory, where there are registers for so many: half a line that is
// streamed goes to memory by itself, unless its other half follows at once.
template <class T>
constexpr int line_vectors = vector_bytes == 64 && sizeof(T) == 2 ? 2 : 1;

template <class T, int wide>
MRCN_INLINE auto fetch_map(const void* map, int64_t at, constant<wide> w) {
  const T* p = static_cast<const T*>(map) + at;
  if constexpr (wide) prefetch_ahead(p);
  return fetch(p, w);
}

// One map's values of all parts.
template <class T, bool stream, int vectors, class F>
MRCN_INLINE void keep_map(void* map, int64_t at, constant<vectors>, const F& value) {
  unroll<parts_of<vectors>>([&](auto part) MRCN_BODY {
    T* p = static_cast<T*>(map) + at + part.v * lanes<acc_t<T>>;
    keep<stream>(p, value(part), width_of<vectors>);
  });
}

// k(part): the coefficients there, one pixel's or a vector's (V).
template <class P, class T, bool stream, class V, int vectors, class K>
MRCN_INLINE void make_at(const K& k, Pointers x, Pointers y, int64_t at, constant<vectors> n) {
  V in[parts_of<vectors>][P::inputs], out[parts_of<vectors>][P::sets];
  unroll<parts_of<vectors>>([&](auto part) MRCN_BODY {
    const int64_t here = at + part.v * lanes<acc_t<T>>;
    unroll<P::inputs>(
        [&](auto j) MRCN_BODY { in[part.v][j.v] = fetch_map<T>(x[j.v], here, width_of<vectors>); });
    make_sets<P, V>(k(part), in[part.v], out[part.v]);
  });
  unroll<P::sets>([&](auto s) MRCN_BODY {
    keep_map<T, stream>(y[s.v + P::first], at, n, [&](auto part) MRCN_BODY { return out[part.v][s.v]; });
  });
  if constexpr (P::passes) {
    keep_map<T, stream>(y[0], at, n, [&](auto part) MRCN_BODY { return in[part.v][0]; });
    keep_map<T, stream>(y[P::all - 1], at, n, [&](auto part) MRCN_BODY { return in[part.v][1]; });
  }
}

template <class P, class T, class V, int wide>
MRCN_INLINE void sum_at(const V* mean, Pointers x, Pointers g, int64_t at, V* sums, constant<wide> w) {
  V in[P::inputs], of[P::sets];
  unroll<P::inputs>([&](auto j) MRCN_BODY { in[j.v] = fetch_map<T>(x[j.v], at, w); });
  unroll<P::sets>([&](auto s) MRCN_BODY { of[s.v] = fetch_map<T>(g[s.v + P::first], at, w); });
  add_sums<P, V>(mean, in, of, sums);
}

template <class P, class T, bool stream, bool extremes, class V, int vectors, class K>
MRCN_INLINE void gradient_at(
    const K& k, Pointers x, Pointers g, Pointers dx, int64_t at, constant<vectors> n) {
  constexpr auto w = width_of<vectors>;
  V out[parts_of<vectors>][P::inputs];
  unroll<parts_of<vectors>>([&](auto part) MRCN_BODY {
    const int64_t here = at + part.v * lanes<acc_t<T>>;
    const V* kv = k(part);
    V in[P::inputs], of[P::sets];
    unroll<P::inputs>([&](auto j) MRCN_BODY { in[j.v] = fetch_map<T>(x[j.v], here, w); });
    unroll<P::sets>([&](auto s) MRCN_BODY { of[s.v] = fetch_map<T>(g[s.v + P::first], here, w); });
    make_gradients<P, V>(kv, in, of, out[part.v]);
    if constexpr (P::passes) {
      out[part.v][0] += fetch_map<T>(g[0], here, w);
      out[part.v][1] += fetch_map<T>(g[P::all - 1], here, w);
    }
    if constexpr (extremes) {
      unroll<P::inputs>([&](auto j) MRCN_BODY {
        const V more = out[part.v][j.v] + kv[P::k3(j.v)];
        out[part.v][j.v] = in[j.v] == kv[P::extreme(j.v)] ? more : out[part.v][j.v];
      });
    }
  });
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    keep_map<T, stream>(dx[j.v], at, n, [&](auto part) MRCN_BODY { return out[part.v][j.v]; });
  });
}

// --- planes ---------------------------------------------------------------------------------------------

// Pixels until every one of the n maps stands at a whole vector's address; -1 where they never do together.
template <class T, int n>
MRCN_INLINE int64_t until_aligned(Pointers p, int64_t length) {
  constexpr uintptr_t size = lanes<acc_t<T>> * sizeof(T);
  const uintptr_t off = reinterpret_cast<uintptr_t>(p[0]) % size;
  for (int k = 1; k < n; ++k) {
    if (reinterpret_cast<uintptr_t>(p[k]) % size != off) return -1;
  }
  if (off % sizeof(T) != 0) return -1;
  const int64_t head = off == 0 ? 0 : int64_t((size - off) / sizeof(T));
  return head <= length ? head : -1;
}

// f(at, constant<vectors>) from `head` on over whole lines, then over whole vectors; f(at, constant<0>) over
// the pixels before and after.
template <class T, class F>
MRCN_INLINE void over_lines(int64_t head, int64_t n, const F& f) {
  constexpr int64_t W = lanes<acc_t<T>>, line = line_vectors<T> * W;
  int64_t at = head;
  for (; at + line <= n; at += line) f(at, constant<line_vectors<T>>{});
  for (; line > W && at + W <= n; at += W) f(at, constant<1>{});
  for (int64_t l = head > 0 ? 0 : at; l < n; l = l + 1 == head ? at : l + 1) f(l, constant<0>{});
}

// The same coefficients as one value and as a vector of it.
template <class A, int n>
struct Spread {
  A one[n];
  vec<A> wide[n];

  explicit MRCN_INLINE Spread(const A* k) {
    for (int s = 0; s < n; ++s) {
      one[s] = k[s];
      wide[s] = all<A>(k[s]);
    }
  }
  template <class V>
  MRCN_INLINE const V* get() const {
    if constexpr (sizeof(V) > sizeof(A)) {
      return wide;
    } else {
      return one;
    }
  }
};

template <class P, class T, bool stream>
__attribute__((noinline)) void make_plane_as(
    const acc_t<T>* k, Pointers x, Pointers y, int64_t head, int64_t n) {
  using A = acc_t<T>;
  const Spread<A, P::forward_slots> spread(k);
  over_lines<T>(head, n, [&]<int vectors>(int64_t at, constant<vectors> count) MRCN_BODY {
    using V = one_or_vector<A, vectors>;
    // Scalars are stored plainly whatever `stream` says: see `keep`.
    make_at<P, T, stream, V>([&](auto) MRCN_BODY { return spread.template get<V>(); }, x, y, at, count);
  });
}

template <class P, class T>
void make_plane(const acc_t<T>* k, Pointers x, Pointers y, int64_t n, bool stream) {
  const int64_t head = stream ? until_aligned<T, P::all>(y, n) : -1;
  if (head >= 0) {
    make_plane_as<P, T, true>(k, x, y, head, n);
  } else {
    make_plane_as<P, T, false>(k, x, y, 0, n);
  }
}

// How many values a sum takes in its own type before it is added to one in double: PyTorch's sums are as
// exact.
constexpr int64_t single_terms = 16;

template <class P, class T>
void sum_plane(const acc_t<T>* mean, Pointers x, Pointers g, int64_t n, double* sums) {
  using A = acc_t<T>;
  constexpr int64_t part = single_terms * lanes<A>;
  const Spread<A, P::inputs> means(mean);
  WideSum<A> wide[P::sums];
  A rest[P::sums] = {};
  int64_t at = 0;
  while (at + lanes<A> <= n) {
    vec<A> acc[P::sums] = {};
    for (const int64_t end = least(at + part, n - lanes<A> + 1); at < end; at += lanes<A>) {
      sum_at<P, T>(means.wide, x, g, at, acc, constant<1>{});
    }
    unroll<P::sums>([&](auto s) MRCN_BODY { wide[s.v].add(acc[s.v]); });
  }
  for (; at < n; ++at) sum_at<P, T>(means.one, x, g, at, rest, constant<0>{});
  unroll<P::sums>([&](auto s) MRCN_BODY { sums[s.v] = wide[s.v].total() + double(rest[s.v]); });
}

template <class P, class T, bool stream, bool extremes>
__attribute__((noinline)) void gradient_plane_as(
    const acc_t<T>* k, Pointers x, Pointers g, Pointers dx, int64_t head, int64_t n) {
  using A = acc_t<T>;
  const Spread<A, extremes ? P::backward_slots : P::extreme(0)> spread(k);
  over_lines<T>(head, n, [&]<int vectors>(int64_t at, constant<vectors> count) MRCN_BODY {
    using V = one_or_vector<A, vectors>;
    gradient_at<P, T, stream, extremes, V>(
        [&](auto) MRCN_BODY { return spread.template get<V>(); }, x, g, dx, at, count);
  });
}

template <class P, class T>
void gradient_plane(
    const acc_t<T>* k, Pointers x, Pointers g, Pointers dx, int64_t n, bool stream, bool extremes) {
  const int64_t head = stream && !extremes ? until_aligned<T, P::inputs>(dx, n) : -1;
  if (extremes) {
    gradient_plane_as<P, T, false, true>(k, x, g, dx, 0, n);
  } else if (head >= 0) {
    gradient_plane_as<P, T, true, false>(k, x, g, dx, head, n);
  } else {
    gradient_plane_as<P, T, false, false>(k, x, g, dx, 0, n);
  }
}

template <class T>
double plane_count(const void* x, int64_t n, acc_t<T> value) {
  int64_t count = 0;
  for (int64_t l = 0; l < n; ++l) count += get(static_cast<const T*>(x) + l) == value ? 1 : 0;
  return double(count);
}

// --- rows of pixels: coefficients and sums are arrays over the channels --------------------------------------

// The pointers of `count` rows from `row` on, n maps each.
template <class T, int n, int count>
struct RowsAt {
  void* of[count][n];

  MRCN_INLINE RowsAt(Rows maps, int64_t row) {
    for (int r = 0; r < count; ++r) {
      for (int k = 0; k < n; ++k) of[r][k] = static_cast<T*>(maps.start[k]) + (row + r) * maps.pitch[k];
    }
  }
};

template <class V, int n, class A, int wide>
MRCN_INLINE void fetch_all(const A* k, int64_t channels, int64_t c, V* out, constant<wide> w) {
  unroll<n>([&](auto s) MRCN_BODY { out[s.v] = fetch(k + s.v * channels + c, w); });
}

// Each part's n coefficients from channel c on: `kv(part)`.
template <class A, int n, int vectors>
struct Coefficients {
  using V = one_or_vector<A, vectors>;
  V of[parts_of<vectors>][n];

  MRCN_INLINE Coefficients(const A* k, int64_t channels, int64_t c) {
    unroll<parts_of<vectors>>([&](auto part) MRCN_BODY {
      fetch_all<V, n>(k, channels, c + part.v * lanes<A>, of[part.v], width_of<vectors>);
    });
  }
  template <int part>
  MRCN_INLINE const V* operator()(constant<part>) const {
    return of[part];
  }
};

template <class P, class T, bool stream>
__attribute__((noinline)) void make_rows_as(
    const acc_t<T>* k, Rows x, Rows y, int64_t rows, int64_t channels) {
  using A = acc_t<T>;
  over_rows(rows, [&]<int count>(int64_t row, constant<count>) MRCN_BODY {
    const RowsAt<T, P::inputs, count> in(x, row);
    const RowsAt<T, P::all, count> out(y, row);
    over_lines<T>(0, channels, [&]<int vectors>(int64_t c, constant<vectors> n) MRCN_BODY {
      using K = Coefficients<A, P::forward_slots, vectors>;
      const K kv(k, channels, c);
      unroll<count>(
          [&](auto r) MRCN_BODY { make_at<P, T, stream, typename K::V>(kv, in.of[r.v], out.of[r.v], c, n); });
    });
  });
}

template <class P, class T>
void make_rows(const acc_t<T>* k, Rows x, Rows y, int64_t rows, int64_t channels, bool stream) {
  if (stream) {
    make_rows_as<P, T, true>(k, x, y, rows, channels);
  } else {
    make_rows_as<P, T, false>(k, x, y, rows, channels);
  }
}

template <class P, class T>
void sum_rows(
    const acc_t<T>* mean, Rows x, Rows g, int64_t rows, int64_t channels, acc_t<T>* scratch, double* sums) {
  using A = acc_t<T>;
  for (int64_t first = 0; first < rows; first += single_terms) {
    for (int64_t n = 0; n < P::sums * channels; ++n) scratch[n] = A(0);
    over_rows(least(single_terms, rows - first), [&]<int count>(int64_t row, constant<count>) MRCN_BODY {
      const RowsAt<T, P::inputs, count> in(x, first + row);
      const RowsAt<T, P::sets, count> of(g, first + row);
      over_channels<A>(channels, [&](int64_t c, auto w) MRCN_BODY {
        using V = decltype(fetch(mean, w));
        V mv[P::inputs], acc[P::sums];
        fetch_all<V, P::inputs>(mean, channels, c, mv, w);
        fetch_all<V, P::sums>(scratch, channels, c, acc, w);
        unroll<count>([&](auto r) MRCN_BODY { sum_at<P, T, V>(mv, in.of[r.v], of.of[r.v], c, acc, w); });
        unroll<P::sums>([&](auto s) MRCN_BODY { keep(scratch + s.v * channels + c, acc[s.v], w); });
      });
    });
    for (int64_t n = 0; n < P::sums * channels; ++n) sums[n] += double(scratch[n]);
  }
}

template <class P, class T, bool stream, bool extremes>
__attribute__((noinline)) void gradient_rows_as(
    const acc_t<T>* k, Rows x, Rows g, Rows dx, int64_t rows, int64_t channels) {
  using A = acc_t<T>;
  constexpr int slots = extremes ? P::backward_slots : P::extreme(0);
  over_rows(rows, [&]<int count>(int64_t row, constant<count>) MRCN_BODY {
    const RowsAt<T, P::inputs, count> in(x, row), out(dx, row);
    const RowsAt<T, P::all, count> of(g, row);
    over_lines<T>(0, channels, [&]<int vectors>(int64_t c, constant<vectors> n) MRCN_BODY {
      using K = Coefficients<A, slots, vectors>;
      const K kv(k, channels, c);
      unroll<count>([&](auto r) MRCN_BODY {
        gradient_at<P, T, stream, extremes, typename K::V>(kv, in.of[r.v], of.of[r.v], out.of[r.v], c, n);
      });
    });
  });
}

template <class P, class T>
void gradient_rows(
    const acc_t<T>* k, Rows x, Rows g, Rows dx, int64_t rows, int64_t channels, bool stream, bool extremes) {
  if (extremes) {
    gradient_rows_as<P, T, false, true>(k, x, g, dx, rows, channels);
  } else if (stream) {
    gradient_rows_as<P, T, true, false>(k, x, g, dx, rows, channels);
  } else {
    gradient_rows_as<P, T, false, false>(k, x, g, dx, rows, channels);
  }
}

template <class T>
void rows_count(
    const void* x, int64_t rows, int64_t pitch, int64_t channels, const acc_t<T>* values, double* counts) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* at = static_cast<const T*>(x) + row * pitch;
    for (int64_t c = 0; c < channels; ++c) counts[c] += get(at + c) == values[c] ? 1 : 0;
  }
}

// --- which dtype ------------------------------------------------------------------------------------------

// Forward and backward are separate files: each fills in what it uses.
template <class P, class T>
Passes<acc_t<T>> forward_passes() {
  Passes<acc_t<T>> passes{};
  passes.plane_moments = plane_moments<T>;
  passes.rows_moments = rows_moments<T>;
  passes.make_plane = make_plane<P, T>;
  passes.make_rows = make_rows<P, T>;
  return passes;
}

template <class P, class T>
Passes<acc_t<T>> backward_passes() {
  // What is handed through takes no part in the sums: those of concat are the pair's.
  using Sums = Pattern<P::mode == Mode::concat ? Mode::pair : P::mode>;
  Passes<acc_t<T>> passes{};
  passes.plane_moments = plane_moments<T>;
  passes.rows_moments = rows_moments<T>;
  passes.plane_count = plane_count<T>;
  passes.rows_count = rows_count<T>;
  passes.sum_plane = sum_plane<Sums, T>;
  passes.sum_rows = sum_rows<Sums, T>;
  passes.gradient_plane = gradient_plane<P, T>;
  passes.gradient_rows = gradient_rows<P, T>;
  return passes;
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
