// The passes over rows of pixels: sets, sums of gradients, and gradients. Coefficients and sums are arrays
// over the channels.
#pragma once

#include <type_traits>

#include "block/cpu/pixels.h"

namespace mrcn::MRCN_ISA {
namespace {

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

}  // namespace
}  // namespace mrcn::MRCN_ISA
