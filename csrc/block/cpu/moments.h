// The mean and the sum of squared deviations of each plane, from one reading of memory.
//
// A plane is processed in parts that fit the first-level cache. Each part is read twice: for its mean, and
// for the deviations from it. The moments of the parts are then joined (Chan et al.), in double precision
// where there are many. E[x²] - E[x]² would lose all digits on a plane far from zero; deviations from the
// first values would lose digits where these are unlike the others, which is common after a ReLU.
#pragma once

#include "cpu/buffer.h"
#include "cpu/cache_lines.h"
#include "cpu/simd.h"

namespace mrcn::MRCN_ISA {
namespace {

// The moments of one plane (R is double), or of as many planes as a vector has doubles. The mean is kept as
// the mean of the first part and the difference from it: far from zero, the share of each part would be
// rounded to the last place of the mean.
template <class R>
struct MomentsOf {
  double count = 0;
  R first{}, off{}, squares{};  // squares = Σ (x - mean)²

  MRCN_INLINE void join(double n, R other_mean, R other_squares) {
    const double total = count + n;
    if (count == 0) {
      first = other_mean;
      squares = other_squares;
    } else {
      const R delta = (other_mean - first) - off;
      off += delta * (n / total);
      squares += other_squares + delta * delta * (count * n / total);
    }
    count = total;
  }
  MRCN_INLINE R mean() const { return first + off; }
  // The mean minus `rounded`.
  MRCN_INLINE R beyond(R rounded) const { return (first - rounded) + off; }
};
using Moments = MomentsOf<double>;

template <class A>
struct Extremes {
  A maximum, minimum;
};

// How many values are summed in the accumulation type before the sum is added to another one; PyTorch's sums
// are as exact. It is also the number of rows for which the sums of a channel stay in registers.
constexpr int64_t single_terms = 16;

// Joins the moments of a part, which the first-level cache must hold, to `moments`.
template <class T>
MRCN_INLINE void part_moments(const T* x, int64_t n, Moments& moments) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>, line = line_vectors<T>;
  // The order of the terms is arbitrary, but it is fixed: it follows from the place of each vector.
  const auto each_line = [](int64_t i, int64_t end, const auto& step) MRCN_BODY {
    for (; i + 4 * W <= end; i += 4 * W) {
      unroll<4 / line>([&](auto u) MRCN_BODY { step(i + u.v * line * W, u.v * line, constant<line>{}); });
    }
    for (; i + W <= end; i += W) step(i, 0, constant<1>{});
    return i;
  };

  vec<A> s[4] = {};
  int64_t rest = each_line(0, n, [&]<int vectors>(int64_t at, int place, constant<vectors> count) MRCN_BODY {
    vec<A> v[vectors];
    fetch(x + at, count, v, ahead);
    unroll<vectors>([&](auto part) MRCN_BODY { s[place + part.v] += v[part.v]; });
  });
  A last(0);
  for (; rest < n; ++rest) last += get(x + rest);
  const A shift = (sum<A>((s[0] + s[1]) + (s[2] + s[3])) + last) / A(n);

  // These are sums of sums. If single values were added to a sum that a few values far from all others have
  // made large, each of them would be rounded to the last place of that sum.
  vec<A> all_e{}, all_q{};
  const vec<A> shifts = all<A>(shift);
  for (rest = 0; rest + W <= n;) {
    vec<A> e[4] = {}, q[4] = {};
    rest = each_line(rest, least(rest + single_terms * 4 * W, n),
        [&]<int vectors>(int64_t at, int place, constant<vectors> count) MRCN_BODY {
          vec<A> v[vectors];
          fetch(x + at, count, v);
          unroll<vectors>([&](auto part) MRCN_BODY {
            const vec<A> d = v[part.v] - shifts;
            e[place + part.v] += d;
            q[place + part.v] += d * d;
          });
        });
    all_e += (e[0] + e[1]) + (e[2] + e[3]);
    all_q += (q[0] + q[1]) + (q[2] + q[3]);
  }
  A last_e(0), last_q(0);
  for (; rest < n; ++rest) {
    const A d = get(x + rest) - shift;
    last_e += d;
    last_q += d * d;
  }
  const A deviation = sum<A>(all_e) + last_e, squares = sum<A>(all_q) + last_q;
  const double off = double(deviation) / double(n);
  moments.join(double(n), double(shift) + off, double(squares) - off * double(deviation));
}

template <class T>
MRCN_INLINE void part_extremes(const T* x, int64_t n, Extremes<acc_t<T>>& extremes) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  vec<A> high = all<A>(extremes.maximum), low = all<A>(extremes.minimum);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vec<A> v = load(x + i);
    high = v > high ? v : high;
    low = v < low ? v : low;
  }
  for (int lane = 0; lane < W; ++lane) {
    extremes.maximum = most<A>(extremes.maximum, high[lane]);
    extremes.minimum = least<A>(extremes.minimum, low[lane]);
  }
  for (; i < n; ++i) {
    extremes.maximum = most<A>(extremes.maximum, get(x + i));
    extremes.minimum = least<A>(extremes.minimum, get(x + i));
  }
}

// The moments of a contiguous plane and, unless the pointer is null, its extremes.
template <class T>
Moments plane_moments(const void* plane, int64_t n, Extremes<acc_t<T>>* extremes) {
  constexpr int64_t part = 4096;
  const T* x = static_cast<const T*>(plane);
  Moments moments;
  if (extremes != nullptr) *extremes = {get(x), get(x)};
  for (int64_t i = 0; i < n; i += part) {
    part_moments(x + i, least(part, n - i), moments);
    if (extremes != nullptr) part_extremes(x + i, least(part, n - i), *extremes);
  }
  return moments;
}

// The moments of every channel over rows of pixels, as arrays over the channels.
template <class A>
struct ChannelMoments {
  double* mean;
  double* squares;
  A* maximum;
  A* minimum;
};

// How many rows are joined in the accumulation type before the result is joined in double.
constexpr int64_t joined_rows = 256;

// Joins the moments of n more rows, with the mean `shift` + `offset` and `squares` = Σ (x - mean)², to those
// of the first `before` rows.
template <class T, int vectors, class V, int parts>
MRCN_INLINE void join_channels(const ChannelMoments<acc_t<T>>& out, int64_t c, double before, double n,
    V (&shift)[parts], V (&offset)[parts], V (&squares)[parts]) {
  using A = acc_t<T>;
  to_order<T>(shift);
  to_order<T>(offset);
  to_order<T>(squares);
  constexpr int64_t count = parts * (vectors > 0 ? lanes<A> : 1), W = vectors > 0 ? lanes<double> : 1;
  using R = std::conditional_t<(vectors > 0), vec<double>, double>;
  A values[3][count];
  std::memcpy(values[0], shift, sizeof(shift));
  std::memcpy(values[1], offset, sizeof(shift));
  std::memcpy(values[2], squares, sizeof(shift));
  for (int64_t k = 0; k < count; k += W) {
    MomentsOf<R> m;
    if (before > 0) m = {before, doubles<R>(out.mean + c + k), R{}, doubles<R>(out.squares + c + k)};
    m.join(n, doubles<R>(values[0] + k) + doubles<R>(values[1] + k), doubles<R>(values[2] + k));
    put_doubles(out.mean + c + k, m.mean());
    put_doubles(out.squares + c + k, m.squares);
  }
}

// The largest and the smallest value of every channel.
template <class T>
void rows_extremes(const T* x, int64_t rows, int64_t pitch, int64_t channels, ChannelMoments<acc_t<T>> out) {
  using A = acc_t<T>;
  over_lines<A, summed_vectors<A>>(
      0, channels, [&]<int vectors>(int64_t c, constant<vectors> count) MRCN_BODY {
        constexpr int parts = parts_of<vectors>;
        one_or_vector<A, vectors> high[parts], low[parts], v[parts];
        fetch(x + c, count, high);
        fetch(x + c, count, low);
        for (int64_t row = 1; row < rows; ++row) {
          fetch(x + row * pitch + c, count, v);
          unroll<parts>([&](auto k) MRCN_BODY {
            high[k.v] = v[k.v] > high[k.v] ? v[k.v] : high[k.v];
            low[k.v] = v[k.v] < low[k.v] ? v[k.v] : low[k.v];
          });
        }
        keep(out.maximum + c, count, high);
        keep(out.minimum + c, count, low);
      });
}

// The moments of every channel and, with `extremes`, its extremes. `scratch` has room for 3 · channels
// values; `pitch` is the stride between rows, in elements.
template <class T>
void rows_moments(const void* first_row, int64_t rows, int64_t pitch, int64_t channels, acc_t<T>* scratch,
    ChannelMoments<acc_t<T>> out, bool extremes) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(first_row);
  A* shift = scratch;
  A* offset = scratch + channels;
  A* squares = scratch + 2 * channels;
  static_assert(joined_rows % single_terms == 0);
  each_band<T, single_terms>(rows, pitch, channels, [&](const Band& b, const auto& next) MRCN_BODY {
    // Of the n rows that are joined here, the band has those from begin to end.
    const int64_t first = b.row / joined_rows * joined_rows, begin = b.row - first, end = begin + b.rows;
    const int64_t n = least(joined_rows, rows - first);
    const A share = A(1) / A(b.rows), share_of_all = A(b.rows) / A(end),
            weight = A(begin) * A(b.rows) / A(end);
    const T* top = x + b.row * pitch + b.channel;
    over_lines<T>(0, b.width, [&]<int vectors>(int64_t at, constant<vectors> count) MRCN_BODY {
      using V = one_or_vector<A, vectors>;
      constexpr int parts = parts_of<vectors>;
      const int64_t c = b.channel + at;
      V base[parts] = {}, mean[parts] = {}, off[parts] = {}, q[parts] = {}, v[parts];
      if (begin > 0) fetch(shift + c, count, base);
      for (int64_t row = 0; row < b.rows; ++row) {
        fetch(top + row * pitch + at, count, v, next(at, row));
        unroll<parts>([&](auto k) MRCN_BODY { mean[k.v] += v[k.v] - base[k.v]; });
      }
      unroll<parts>([&](auto k) MRCN_BODY { mean[k.v] = base[k.v] + mean[k.v] * share; });
      for (int64_t row = 0; row < b.rows; ++row) {
        fetch(top + row * pitch + at, count, v);
        unroll<parts>([&](auto k) MRCN_BODY {
          const V d = v[k.v] - mean[k.v];
          off[k.v] += d;
          q[k.v] += d * d;
        });
      }
      unroll<parts>([&](auto k) MRCN_BODY {
        const V less = q[k.v] - off[k.v] * (off[k.v] * share);
        q[k.v] = less == less ? less : q[k.v];  // squares beyond all numbers are infinite, not NaN
        off[k.v] *= share;
      });
      if (begin == 0) {
        unroll<parts>([&](auto k) MRCN_BODY { base[k.v] = mean[k.v]; });
      } else {
        V off_before[parts], q_before[parts];
        fetch(offset + c, count, off_before);
        fetch(squares + c, count, q_before);
        unroll<parts>([&](auto k) MRCN_BODY {
          const V apart = (mean[k.v] - base[k.v]) + off[k.v] - off_before[k.v];
          off[k.v] = off_before[k.v] + apart * share_of_all;
          q[k.v] += q_before[k.v] + apart * apart * weight;
        });
      }
      if (end < n) {
        keep(shift + c, count, base);
        keep(offset + c, count, off);
        keep(squares + c, count, q);
      } else {
        join_channels<T, vectors>(out, c, double(first), double(n), base, off, q);
      }
    });
  });
  if (extremes) rows_extremes(x, rows, pitch, channels, out);
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
