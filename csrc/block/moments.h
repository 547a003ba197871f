// Mean and squared deviations of planes, in one pass.
//
// Deviations are from a shift, the mean of a part's first k values; parts are joined in double precision
// (Chan et al.). E[x²] - E[x]² would lose everything on a plane far from zero. From the shift at most a
// factor n / k is lost, whatever the values are: with k of n values at the shift, the variance is at least k
// / n (shift - mean)². Parts are 64 k long, and on values in no special order nothing is lost.
#pragma once

#include "common/buffer.h"
#include "common/vec.h"

namespace mrcn::MRCN_ISA {
namespace {

// Of one plane (R is double) or of as many as a vector has doubles.
template <class R>
struct MomentsOf {
  double count = 0;
  R mean{}, squares{};  // squares = Σ (x - mean)²

  MRCN_INLINE void join(double n, R other_mean, R other_squares) {
    const R delta = other_mean - mean;
    const double total = count + n;
    if (count == 0) {
      mean = other_mean;
      squares = other_squares;
    } else {
      mean += delta * (n / total);
      squares += other_squares + delta * delta * (count * n / total);
    }
    count = total;
  }
};
using Moments = MomentsOf<double>;

template <class A>
struct Extremes {
  A maximum, minimum;
};

constexpr int64_t values_a_shift = 64;  // n / k

// In double the shift is the mean of all of a part, which then has to be in the first-level cache: there sums
// are no more exact than values, and the eager form's are that exact.
template <class A>
constexpr bool exact_shift = sizeof(A) == sizeof(double);

template <class T>
MRCN_INLINE void part_moments(const T* x, int64_t n, Moments& moments) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const int64_t seen = exact_shift<A> ? n : least<int64_t>(n, 4 * W);
  vec<A> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= seen; i += 4 * W) {
    unroll<4>([&](auto u) MRCN_BODY { s[u.v] += load(x + i + u.v * W); });
  }
  A total = sum<A>((s[0] + s[1]) + (s[2] + s[3]));
  for (; i < seen; ++i) total += get(x + i);
  const A shift = total / A(seen);

  vec<A> e[4] = {}, q[4] = {};
  const vec<A> shifts = all<A>(shift);
  const auto step = [&](int64_t at, auto u) MRCN_BODY {
    prefetch_ahead(x + at);
    const vec<A> d = load(x + at) - shifts;
    e[u.v] += d;
    q[u.v] += d * d;
  };
  i = 0;
  for (; i + 4 * W <= n; i += 4 * W) unroll<4>([&](auto u) MRCN_BODY { step(i + u.v * W, u); });
  for (; i + W <= n; i += W) step(i, constant<0>{});
  A deviation = sum<A>((e[0] + e[1]) + (e[2] + e[3]));
  A squares = sum<A>((q[0] + q[1]) + (q[2] + q[3]));
  for (; i < n; ++i) {
    const A d = get(x + i) - shift;
    deviation += d;
    squares += d * d;
  }
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

// Moments of one contiguous plane, and its extremes where asked for.
template <class T>
Moments plane_moments(const void* plane, int64_t n, Extremes<acc_t<T>>* extremes) {
  constexpr int64_t part = exact_shift<acc_t<T>> ? 4096 : values_a_shift * 4 * lanes<acc_t<T>>;
  const T* x = static_cast<const T*>(plane);
  Moments moments;
  if (extremes != nullptr) *extremes = {get(x), get(x)};
  for (int64_t i = 0; i < n; i += part) {
    part_moments(x + i, least(part, n - i), moments);
    if (extremes != nullptr) part_extremes(x + i, least(part, n - i), *extremes);
  }
  return moments;
}

// Moments of every channel over rows of pixels, held as arrays over the channels.
template <class A>
struct ChannelMoments {
  double* mean;
  double* squares;
  A* maximum;
  A* minimum;
};

// f(vector index, vector of A or one A) over the channels: `load(p + c)` or `get(p + c)` by the tag's width.
template <class A, class F>
MRCN_INLINE void over_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + lanes<A> <= channels; c += lanes<A>) f(c, constant<1>{});
  for (; c < channels; ++c) f(c, constant<0>{});
}
template <int wide, class T>
MRCN_INLINE auto fetch(const T* p, constant<wide>) {
  if constexpr (wide) {
    return load(p);
  } else {
    return get(p);
  }
}
template <bool stream = false, class T, class V, int wide>
MRCN_INLINE void keep(T* p, V v, constant<wide>) {
  if constexpr (wide) {
    store<stream>(p, v);
  } else {
    put(p, v);
  }
}

// So many rows at once share what is read for their channels.
constexpr int row_block = 4;

// f(row, constant<row_block>) for blocks of rows, f(row, constant<1>) for the last ones.
template <class F>
MRCN_INLINE void over_rows(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + row_block <= rows; row += row_block) f(row, constant<row_block>{});
  for (; row < rows; ++row) f(row, constant<1>{});
}

// `scratch` holds 3 · channels values; rows lie `pitch` elements apart.
template <class T>
void rows_moments(const void* first_row, int64_t rows, int64_t pitch, int64_t channels, acc_t<T>* scratch,
    ChannelMoments<acc_t<T>> out, bool extremes) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(first_row);
  A* shift = scratch;
  A* deviation = scratch + channels;
  A* squares = scratch + 2 * channels;
  const int64_t part = values_a_shift * row_block;
  if (extremes) {
    for (int64_t c = 0; c < channels; ++c) out.maximum[c] = out.minimum[c] = get(x + c);
  }
  for (int64_t first = 0; first < rows; first += part) {
    const int64_t n = least(part, rows - first), shifted = exact_shift<A> ? n : least<int64_t>(n, row_block);
    const T* top = x + first * pitch;
    over_channels<A>(channels, [&](int64_t c, auto w) MRCN_BODY {
      auto total = fetch(top + c, w);
      for (int64_t row = 1; row < shifted; ++row) total += fetch(top + row * pitch + c, w);
      keep(shift + c, total / A(shifted), w);
      keep(deviation + c, decltype(total){}, w);
      keep(squares + c, decltype(total){}, w);
    });
    over_rows(n, [&]<int count>(int64_t row, constant<count>) MRCN_BODY {
      const T* at = top + row * pitch;
      over_channels<A>(channels, [&](int64_t c, auto w) MRCN_BODY {
        const auto mean = fetch(shift + c, w);
        auto e = fetch(deviation + c, w), q = fetch(squares + c, w);
        unroll<count>([&](auto r) MRCN_BODY {
          const T* p = at + r.v * pitch + c;
          if constexpr (w.v) prefetch_ahead(p);
          const auto d = fetch(p, w) - mean;
          e += d;
          q += d * d;
        });
        keep(deviation + c, e, w);
        keep(squares + c, q, w);
      });
    });
    if (extremes) {
      over_channels<A>(channels, [&](int64_t c, auto w) MRCN_BODY {
        auto high = fetch(out.maximum + c, w), low = fetch(out.minimum + c, w);
        for (int64_t row = 0; row < n; ++row) {
          const auto v = fetch(top + row * pitch + c, w);
          high = v > high ? v : high;
          low = v < low ? v : low;
        }
        keep(out.maximum + c, high, w);
        keep(out.minimum + c, low, w);
      });
    }
    const double here = double(n), before = double(first), total = here + before;
    const double share = here / total, cross = before * here / total;
    for (int64_t c = 0; c < channels; ++c) {
      const double off = double(deviation[c]) / here;
      const double mean = double(shift[c]) + off;
      const double square = double(squares[c]) - off * double(deviation[c]);
      if (first == 0) {
        out.mean[c] = mean;
        out.squares[c] = square;
      } else {
        const double delta = mean - out.mean[c];
        out.mean[c] += delta * share;
        out.squares[c] += square + delta * delta * cross;
      }
    }
  }
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
