// The passes over pixels, for a plane or for rows of pixels: statistics, sets, sums of gradients, and
// gradients.
//
// Only these functions depend on the dtype. The code around them (schedule.h) depends on the accumulation
// type alone and calls them through `Passes`, so that it is not compiled again for every dtype.
#pragma once

#include <type_traits>

#include "block/coefficients.h"
#include "block/cpu/moments.h"
#include "cpu/simd.h"

namespace mrcn::MRCN_ISA {
namespace {

using Pointers = void* const*;

// Rows of pixels of several maps: where each map's first row starts, and the stride between its rows in
// elements.
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
  void (*sum_rows)(const A* mean, Rows x, Rows g, int64_t rows, int64_t channels, double* sums);
  void (*gradient_plane)(
      const A* k, Pointers x, Pointers g, Pointers dx, int64_t n, bool stream, bool extremes);
  void (*gradient_rows)(
      const A* k, Rows x, Rows g, Rows dx, int64_t rows, int64_t channels, bool stream, bool extremes);
};

// --- a pixel, or vectors of them ------------------------------------------------------------------------

// v[part][map]: the maps' values at `at`, as lines of T are read.
template <class T, int maps, class Count, class V, int parts, class Distance>
MRCN_INLINE void fetch_maps(Pointers map, int64_t at, Count n, V (&v)[parts][maps], Distance distance) {
  unroll<maps>([&](auto m) MRCN_BODY {
    V one[parts];
    fetch(static_cast<const T*>(map[m.v]) + at, n, one, distance);
    unroll<parts>([&](auto part) MRCN_BODY { v[part.v][m.v] = one[part.v]; });
  });
}
template <class T, bool stream, int maps, int vectors, class V, int parts>
MRCN_INLINE void keep_maps(Pointers map, int64_t at, constant<vectors> n, const V (&v)[parts][maps]) {
  unroll<maps>([&](auto m) MRCN_BODY {
    V one[parts];
    unroll<parts>([&](auto part) MRCN_BODY { one[part.v] = v[part.v][m.v]; });
    keep<stream>(static_cast<T*>(map[m.v]) + at, n, one);
  });
}

// Set s of all sets, including the inputs that are handed through.
template <class P, int s, class V>
MRCN_INLINE V set_of(const V* k, const V* x) {
  if constexpr (P::concat && s == 0) {
    return x[0];
  } else if constexpr (P::concat && s == P::all - 1) {
    return x[P::inputs - 1];
  } else {
    return made_set<P, s - P::first, V>(k, x);
  }
}

// Makes the sets [from, to). k(part) gives the coefficients of part of the vectors, in the type V. Each set
// is written as soon as it is made, because the registers cannot hold all sets.
template <class P, class T, bool stream, int from, int to, class V, int vectors, class K, class Distance>
MRCN_INLINE void make_at(
    const K& k, Pointers x, Pointers y, int64_t at, constant<vectors> n, Distance distance) {
  constexpr int parts = parts_of<vectors>;
  V in[parts][P::inputs];
  fetch_maps<T, P::inputs>(x, at, n, in, distance);
  unroll<to - from>([&](auto s) MRCN_BODY {
    constexpr int set = from + s.v;
    V out[parts];
    unroll<parts>([&](auto part) MRCN_BODY { out[part.v] = set_of<P, set, V>(k(part), in[part.v]); });
    keep<stream>(static_cast<T*>(y[set]) + at, n, out);
  });
}

// Sets that share a tensor usually begin at the same place of a page, where lines that are written in pieces
// hinder each other (cpu/output_memory.cpp). Therefore several lines of a set are written before those of the
// next set.
template <class P>
constexpr bool sets_in_turn = P::concat && vector_bytes < line_bytes;
constexpr int64_t lines_in_turn = 8;

// Calls f(constant<from>, constant<to>, begin, end, head, distance) for the sets of the pixels [begin, end):
// either once for all sets, or for each set in turn, `lines_in_turn` lines at a time after the first `head`
// elements.
template <class P, class T, class F>
MRCN_INLINE void each_turn(int64_t begin, int64_t end, int64_t head, Last distance, const F& f) {
  if constexpr (sets_in_turn<P>) {
    constexpr int64_t turn = lines_in_turn * line_vectors<T> * lanes<acc_t<T>>;
    for (int64_t next; begin < end; begin = next, head = 0) {
      next = least(begin + head + turn, end);
      f(constant<0>{}, constant<1>{}, begin, next, head, distance);
      unroll<P::all - 1>([&](auto s) MRCN_BODY {
        f(constant<s.v + 1>{}, constant<s.v + 2>{}, begin, next, head, Nowhere{});
      });
    }
  } else {
    f(constant<0>{}, constant<P::all>{}, begin, end, head, distance);
  }
}

// Adds the terms of the pixels at `at` to the sums. mean(part) and sums(part) point to those of a vector.
template <class P, class T, class V, class Count, class M, class S, class Distance>
MRCN_INLINE void sum_at(
    const M& mean, Pointers x, Pointers g, int64_t at, const S& sums, Count n, Distance distance) {
  constexpr int parts = parts_in<Count>;
  V in[parts][P::inputs];
  fetch_maps<T, P::inputs>(x, at, n, in, distance);
  unroll<P::sets>([&](auto s) MRCN_BODY {
    V of[parts];
    fetch(static_cast<const T*>(g[P::first + s.v]) + at, n, of, distance);
    unroll<parts>(
        [&](auto part) MRCN_BODY { add_sums_of<P, s.v, V>(mean(part), in[part.v], of[part.v], sums(part)); });
  });
}

template <class P, class T, bool stream, bool extremes, class V, int vectors, class K, class Distance>
MRCN_INLINE void gradient_at(
    const K& k, Pointers x, Pointers g, Pointers dx, int64_t at, constant<vectors> n, Distance distance) {
  constexpr int parts = parts_of<vectors>;
  V in[parts][P::inputs], out[parts][P::inputs];
  fetch_maps<T, P::inputs>(x, at, n, in, distance);
  unroll<parts>([&](auto part) MRCN_BODY { start_gradients<P, V>(k(part), in[part.v], out[part.v]); });
  unroll<P::sets>([&](auto s) MRCN_BODY {
    V of[parts];
    fetch(static_cast<const T*>(g[P::first + s.v]) + at, n, of, distance);
    unroll<parts>([&](auto part) MRCN_BODY { add_gradient<P, s.v, V>(k(part), of[part.v], out[part.v]); });
  });
  if constexpr (P::concat) {
    void* const ends[] = {g[0], g[P::all - 1]};
    V more[parts][P::inputs];
    fetch_maps<T, P::inputs>(ends, at, n, more, distance);
    unroll<parts>([&](auto part) MRCN_BODY {
      unroll<P::inputs>([&](auto j) MRCN_BODY { out[part.v][j.v] += more[part.v][j.v]; });
    });
  }
  if constexpr (extremes) {
    unroll<parts>([&](auto part) MRCN_BODY {
      const V* kv = k(part);
      unroll<P::inputs>([&](auto j) MRCN_BODY {
        const V more = out[part.v][j.v] + kv[P::k3(j.v)];
        out[part.v][j.v] = in[part.v][j.v] == kv[P::extreme(j.v)] ? more : out[part.v][j.v];
      });
    });
  }
  keep_maps<T, stream, P::inputs>(dx, at, n, out);
}

// --- planes ---------------------------------------------------------------------------------------------

// The number of pixels before all n maps reach the start of a cache line; -1 if they never do so together.
template <class T, int n>
MRCN_INLINE int64_t until_aligned(Pointers p, int64_t length) {
  constexpr uintptr_t size = line_vectors<T> * lanes<acc_t<T>> * sizeof(T);
  const uintptr_t off = reinterpret_cast<uintptr_t>(p[0]) % size;
  for (int k = 1; k < n; ++k) {
    if (reinterpret_cast<uintptr_t>(p[k]) % size != off) return -1;
  }
  if (off % sizeof(T) != 0) return -1;
  const int64_t head = off == 0 ? 0 : int64_t((size - off) / sizeof(T));
  return head <= length ? head : -1;
}

// Coefficients as numbers, and as vectors whose lanes are all equal.
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
  each_turn<P, T>(0, n, head, Last{ahead_of_last},
      [&]<int from, int to>(
          constant<from>, constant<to>, int64_t begin, int64_t end, int64_t before, auto distance) MRCN_BODY {
        over_lines<T>(before, end - begin, [&]<int vectors>(int64_t at, constant<vectors> count) MRCN_BODY {
          using V = one_or_vector<A, vectors>;
          make_at<P, T, stream, from, to, V>(
              [&](auto) MRCN_BODY { return spread.template get<V>(); }, x, y, begin + at, count, distance);
        });
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

// How many terms a `Total` sums; in double, all of them.
template <class A>
constexpr int64_t terms = sizeof(A) == sizeof(double) ? int64_t(1) << 40 : single_terms;

template <class P, class T>
void sum_plane(const acc_t<T>* mean, Pointers x, Pointers g, int64_t n, double* sums) {
  using A = acc_t<T>;
  constexpr int64_t W = lanes<A>, line = summed_vectors<T> * W;
  const Spread<A, P::inputs> means(mean);
  WideSum<A> wide[P::sums];
  Total<A> rest[P::sums];
  int64_t at = 0;
  while (at + W <= n) {
    Total<vec<A>> acc[P::sums];
    const auto add = [&](int64_t here, auto count) MRCN_BODY {
      sum_at<P, T, vec<A>>([&](auto) MRCN_BODY { return means.wide; }, x, g, here,
          [&](auto) MRCN_BODY { return acc; }, count, ahead);
    };
    const int64_t end = least(at + terms<A> * W, n);
    for (; at + line <= end; at += line) add(at, constant<summed_vectors<T>>{});
    for (; at + W <= end; at += W) add(at, constant<1>{});
    unroll<P::sums>([&](auto s) MRCN_BODY { wide[s.v].add(acc[s.v].get()); });
  }
  for (; at < n; ++at) {
    sum_at<P, T, A>([&](auto) MRCN_BODY { return means.one; }, x, g, at, [&](auto) MRCN_BODY { return rest; },
        constant<0>{}, Nowhere{});
  }
  unroll<P::sums>([&](auto s) MRCN_BODY { sums[s.v] = wide[s.v].total() + double(rest[s.v].get()); });
}

template <class P, class T, bool stream, bool extremes>
__attribute__((noinline)) void gradient_plane_as(
    const acc_t<T>* k, Pointers x, Pointers g, Pointers dx, int64_t head, int64_t n) {
  using A = acc_t<T>;
  const Spread<A, extremes ? P::backward_slots : P::extreme(0)> spread(k);
  over_lines<T>(head, n, [&]<int vectors>(int64_t at, constant<vectors> count) MRCN_BODY {
    using V = one_or_vector<A, vectors>;
    gradient_at<P, T, stream, extremes, V>(
        [&](auto) MRCN_BODY { return spread.template get<V>(); }, x, g, dx, at, count, Last{ahead_of_last});
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

// The pointers to `count` rows from `row` on, in each of n maps. They are unrolled by hand, because GCC 12
// would keep them in memory in order to add to several at once.
template <class T, int n, int count>
struct RowsAt {
  void* of[count][n];

  MRCN_INLINE RowsAt(Rows maps, int64_t row) {
    each([&](auto r, auto k)
             MRCN_BODY { of[r.v][k.v] = static_cast<T*>(maps.start[k.v]) + (row + r.v) * maps.pitch[k.v]; });
  }
  // Moves on by one row.
  MRCN_INLINE void step(Rows maps) {
    each([&](auto r, auto k) MRCN_BODY { of[r.v][k.v] = static_cast<T*>(of[r.v][k.v]) + maps.pitch[k.v]; });
  }

 private:
  template <class F>
  static MRCN_INLINE void each(const F& f) {
    unroll<count>([&](auto r) MRCN_BODY { unroll<n>([&](auto k) MRCN_BODY { f(r, k); }); });
  }
};

// The n coefficients of the vectors from channel c on, in the order in which lines of T are read: `kv(part)`.
template <class T, int n, int vectors>
struct Coefficients {
  using A = acc_t<T>;
  using V = one_or_vector<A, vectors>;
  V of[parts_of<vectors>][n];

  MRCN_INLINE Coefficients(const A* k, int64_t channels, int64_t c) {
    unroll<n>([&](auto s) MRCN_BODY {
      V one[parts_of<vectors>];
      fetch(k + s.v * channels + c, constant<vectors>{}, one);
      to_parts<T>(one);
      unroll<parts_of<vectors>>([&](auto part) MRCN_BODY { of[part.v][s.v] = one[part.v]; });
    });
  }
  template <int part>
  MRCN_INLINE const V* operator()(constant<part>) const {
    return of[part];
  }
};

// How many rows of sets are made at once, where the registers have room for the coefficients of a line.
// Otherwise, and for gradients, coefficients are read from memory, one row at a time: fewer rows at once mean
// longer runs of memory.
constexpr int rows_of_sets = vector_registers == 32 ? 4 : 1;
// How many bytes of coefficients the first-level cache can hold beside the maps.
constexpr int64_t near_bytes = 16 << 10;

// Rows of maps, `row_block` at a time, and the n coefficients of each channel. The coefficients of each line
// are stored side by side once, for all rows.
template <class T, int n, int row_block>
class RowsOfLines {
  static constexpr bool in_registers = row_block > 1;
  static constexpr int vectors = line_vectors<T>;
  static constexpr int64_t line = vectors * lanes<acc_t<T>>;
  static constexpr int64_t near =
      most<int64_t>(1, near_bytes / (n * line * int64_t(sizeof(acc_t<T>)))) * line;
  using Line = Coefficients<T, n, vectors>;
  using Held = std::conditional_t<in_registers, Line, const Line&>;

 public:
  RowsOfLines(const acc_t<T>* k, int64_t rows, int64_t channels)
      : k_(k),
        rows_(rows),
        channels_(channels),
        width_(in_registers ? channels : least(near, channels)),
        lines_(channels / line) {
    for (int64_t i = 0; i < channels / line; ++i) ::new (lines_.data + i) Line(k, channels, i * line);
  }

  // The distance from a row to what is prefetched: about `bytes` further, and at least `rows` rows.
  MRCN_INLINE int64_t distance(int64_t pitch, int64_t bytes, int64_t rows) const {
    constexpr int64_t size = sizeof(T);
    return most(rows, bytes / (width_ * size)) * pitch * size;
  }

  // Calls f(row, constant<rows at once>, first channel, end of the channels), with as many channels at a time
  // as have their coefficients in the first-level cache.
  template <class F>
  MRCN_INLINE void each(const F& f) const {
    for (int64_t first = 0; first < channels_; first += width_) {
      const int64_t end = least(first + width_, channels_);
      int64_t row = 0;
      for (; row + row_block <= rows_; row += row_block) f(row, constant<row_block>{}, first, end);
      for (; row < rows_; ++row) f(row, constant<1>{}, first, end);
    }
  }
  // Calls f(channel, constant<vectors>, coefficients) for the channels [first, end).
  template <class F>
  MRCN_INLINE void across(int64_t first, int64_t end, const F& f) const {
    over_lines<T>(
        0, end - first, [&](int64_t c, auto count) MRCN_BODY { f(first + c, count, at(first + c, count)); });
  }

 private:
  MRCN_INLINE Held at(int64_t c, constant<vectors>) const { return lines_.data[c / line]; }
  template <int fewer>
  MRCN_INLINE Coefficients<T, n, fewer> at(int64_t c, constant<fewer>) const {
    return {k_, channels_, c};
  }

  const acc_t<T>* k_;
  int64_t rows_, channels_, width_;
  Buffer<Line> lines_;
};

template <class P, class T, bool stream>
__attribute__((noinline)) void make_rows_as(
    const acc_t<T>* k, Rows x, Rows y, int64_t rows, int64_t channels) {
  const RowsOfLines<T, P::forward_slots, rows_of_sets> lines(k, rows, channels);
  const Last next{lines.distance(x.pitch[0], ahead_of_last, rows_of_sets)};
  lines.each([&]<int count>(int64_t row, constant<count>, int64_t first, int64_t end) MRCN_BODY {
    const RowsAt<T, P::inputs, count> in(x, row);
    const RowsAt<T, P::all, count> out(y, row);
    each_turn<P, T>(first, end, 0, next,
        [&]<int from, int to>(
            constant<from>, constant<to>, int64_t begin, int64_t till, int64_t, auto distance) MRCN_BODY {
          lines.across(
              begin, till, [&]<int vectors>(int64_t c, constant<vectors> n, const auto& kv) MRCN_BODY {
                unroll<count>([&](auto r) MRCN_BODY {
                  make_at<P, T, stream, from, to, one_or_vector<acc_t<T>, vectors>>(
                      kv, in.of[r.v], out.of[r.v], c, n, distance);
                });
              });
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

// Copies of lines of several rows, side by side. In their own places most of these lines share a few sets of
// the first-level cache and are evicted before they are read again.
template <class T, int maps>
class LinesNear {
  static constexpr int64_t size = lanes<acc_t<T>> * int64_t(sizeof(T)) * line_vectors<T>;

 public:
  // Copies the lines at p + at as maps `to`, `to` + 1, ..., without their first `before` bytes.
  template <int to, int count, int64_t before>
  MRCN_INLINE void bring(Pointers p, int64_t at, int64_t row) {
    unroll<count>([&](auto k) MRCN_BODY {
      const char* const from = reinterpret_cast<const char*>(static_cast<const T*>(p[k.v]) + at);
      unroll<(size - before) / vector_bytes>([&](auto part) MRCN_BODY {
        constexpr int64_t offset = before + part.v * vector_bytes;
        copy_out<false>(lines_[row][to + k.v] + offset, copy_in<words>(from + offset));
      });
    });
  }
  MRCN_INLINE void* at(int64_t row, int map) { return lines_[row][map]; }

 private:
  alignas(line_bytes) char lines_[single_terms][maps][size];
};

// The sums of several vectors of channels from c on.
template <class P, class T, int vectors>
class LineSums {
  using A = acc_t<T>;
  using V = one_or_vector<A, vectors>;
  static constexpr int parts = parts_of<vectors>;

 public:
  MRCN_INLINE LineSums(const A* mean, int64_t channels, int64_t c) : means_(mean, channels, c) {}

  // Computes the sums of the vectors from `first` on for which `count` stands. row_at(row, add) calls
  // add(x, g, at, distance).
  template <int first, class Count, class F>
  MRCN_INLINE void over(int64_t rows, Count count, const F& row_at) {
    Total<V> acc[parts_in<Count>][P::sums];
    for (int64_t row = 0; row < rows; ++row) {
      row_at(row, [&](Pointers x, Pointers g, int64_t at, auto distance) MRCN_BODY {
        sum_at<P, T, V>([&](auto part) MRCN_BODY { return means_.of[first + part.v]; }, x, g, at,
            [&](auto part) MRCN_BODY { return acc[part.v]; }, count, distance);
      });
    }
    unroll<parts_in<Count>>([&](auto part) MRCN_BODY {
      unroll<P::sums>([&](auto s) MRCN_BODY { found_[first + part.v][s.v] = acc[part.v][s.v].get(); });
    });
  }

  // Adds the sums to an array (sums, channels) at channel c.
  MRCN_INLINE void add_to(double* sums, int64_t channels) const {
    unroll<P::sums>([&](auto s) MRCN_BODY {
      V one[parts];
      unroll<parts>([&](auto part) MRCN_BODY { one[part.v] = found_[part.v][s.v]; });
      to_order<T>(one);
      double* to = sums + s.v * channels;
      unroll<parts>([&](auto part) MRCN_BODY { add_doubles(to + part.v * lanes<A>, one[part.v]); });
    });
  }

 private:
  Coefficients<T, P::inputs, vectors> means_;
  V found_[parts][P::sums];
};

// Adds the sums of several vectors of channels from c on over `count` rows: all vectors at once or, where the
// registers cannot hold so many sums, one vector after the other. next(row) is the distance to what is
// prefetched.
template <class P, class T, int vectors, class Near, class Next>
MRCN_INLINE void sum_line(const acc_t<T>* mean, Rows x, Rows g, int64_t first, int64_t count,
    int64_t channels, int64_t c, constant<vectors> n, Near& near, const Next& next, double* sums) {
  constexpr int parts = parts_of<vectors>;
  constexpr bool in_turn = parts > summed_vectors<T>;
  // What need not be copied of a line, because the first of its vectors has read it already.
  [[maybe_unused]] constexpr int64_t read = sizeof(T) == sizeof(acc_t<T>) ? vector_bytes : 0;
  LineSums<P, T, vectors> line(mean, channels, c);
  RowsAt<T, P::inputs, 1> in(x, first);
  RowsAt<T, P::sets, 1> of(g, first);
  const auto far = [&](int64_t row, const auto& add) MRCN_BODY {
    add(in.of[0], of.of[0], c, next(row));
    if constexpr (in_turn) {
      near.template bring<0, P::inputs, read>(in.of[0], c, row);
      near.template bring<P::inputs, P::sets, read>(of.of[0], c, row);
    }
    in.step(x);
    of.step(g);
  };
  if constexpr (in_turn) {
    line.template over<0>(count, OneOf<parts, 0>{}, far);
    unroll<parts - 1>([&](auto before) MRCN_BODY {
      constexpr int part = before.v + 1;
      line.template over<part>(count, OneOf<parts, part>{}, [&](int64_t row, const auto& add) MRCN_BODY {
        void *at[P::inputs], *of_sets[P::sets];
        unroll<P::inputs>([&](auto k) MRCN_BODY { at[k.v] = near.at(row, k.v); });
        unroll<P::sets>([&](auto k) MRCN_BODY { of_sets[k.v] = near.at(row, P::inputs + k.v); });
        add(at, of_sets, 0, Nowhere{});
      });
    });
  } else {
    line.template over<0>(count, n, far);
  }
  line.add_to(sums + c, channels);
}

// The sums over rows of pixels. The sums of a channel stay in registers for `single_terms` rows.
template <class P, class T>
void sum_rows(const acc_t<T>* mean, Rows x, Rows g, int64_t rows, int64_t channels, double* sums) {
  constexpr bool few = terms<acc_t<T>> == single_terms;
  const int64_t pitch = x.pitch[0];
  LinesNear<T, P::inputs + P::sets> near;
  const auto sum = [&](const Band& b, const auto& next) MRCN_BODY {
    over_lines<T, few ? line_vectors<T> : summed_vectors<T>>(0, b.width, [&](int64_t c, auto n) MRCN_BODY {
      sum_line<P, T>(
          mean, x, g, b.row, b.rows, channels, b.channel + c, n, near,
          [&](int64_t row) MRCN_BODY { return next(c, row); }, sums);
    });
  };
  if constexpr (few) {
    each_band<T, single_terms>(rows, pitch, channels, sum);
  } else {
    // In double, a line of every row is read in turn: too many to copy, or to prefetch in another order.
    sum(Band{0, rows, 0, channels},
        [&](int64_t, int64_t) MRCN_BODY { return single_terms * pitch * int64_t(sizeof(T)); });
  }
}

template <class P, class T, bool stream, bool extremes>
__attribute__((noinline)) void gradient_rows_as(
    const acc_t<T>* k, Rows x, Rows g, Rows dx, int64_t rows, int64_t channels) {
  const RowsOfLines<T, extremes ? P::backward_slots : P::extreme(0), 1> lines(k, rows, channels);
  // Not prefetched as data that is read for the last time: so many maps, usually at the same place of a page,
  // and their coefficients do not fit the first-level cache together.
  const int64_t next = lines.distance(x.pitch[0], ahead, 2);
  lines.each([&]<int count>(int64_t row, constant<count>, int64_t first, int64_t end) MRCN_BODY {
    const RowsAt<T, P::inputs, count> in(x, row), out(dx, row);
    const RowsAt<T, P::all, count> of(g, row);
    lines.across(first, end, [&]<int vectors>(int64_t c, constant<vectors> n, const auto& kv) MRCN_BODY {
      unroll<count>([&](auto r) MRCN_BODY {
        gradient_at<P, T, stream, extremes, one_or_vector<acc_t<T>, vectors>>(
            kv, in.of[r.v], of.of[r.v], out.of[r.v], c, n, next);
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

// The forward and the backward are separate files; each fills in the functions that it uses.
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
  // Inputs that are handed through take no part in the sums.
  using Sums = typename P::Made;
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
