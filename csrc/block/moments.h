// Mean and squared deviations of planes, in one pass over memory.
//
// A part small enough for the first-level cache is read twice, for its sum and for the deviations from its
// mean; parts are joined in double precision (Chan et al.). E[x²] - E[x]² would lose everything on a plane
// far from zero.
#pragma once

#include "common/buffer.h"
#include "common/vec.h"

namespace mrcn::MRCN_ISA {
namespace {

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares = Σ (x - mean)²

  MRCN_INLINE void join(double n, double other_mean, double other_squares) {
    const double delta = other_mean - mean, total = count + n;
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

template <class A>
struct Extremes {
  A maximum, minimum;
};

template <class T>
MRCN_INLINE void part_moments(const T* x, int64_t n, Moments& moments) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  vec<A> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) unroll<4>([&](auto u) { s[u.v] += load(x + i + u.v * W); });
  for (; i + W <= n; i += W) s[0] += load(x + i);
  A total = sum<A>((s[0] + s[1]) + (s[2] + s[3]));
  for (; i < n; ++i) total += get(x + i);
  const A shift = total / A(n);

  vec<A> e[4] = {}, q[4] = {};
  const vec<A> shifts = all<A>(shift);
  const auto step = [&](int64_t at, auto u) {
    // These reads hit the cache: meanwhile memory brings what follows, the next part or the next plane.
    prefetch(x + at + n);
    const vec<A> d = load(x + at) - shifts;
    e[u.v] += d;
    q[u.v] += d * d;
  };
  i = 0;
  for (; i + 4 * W <= n; i += 4 * W) unroll<4>([&](auto u) { step(i + u.v * W, u); });
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

// `scratch` holds 3 · channels values; rows lie `pitch` elements apart.
template <class T>
void rows_moments(const void* first_row, int64_t rows, int64_t pitch, int64_t channels, acc_t<T>* scratch,
    ChannelMoments<acc_t<T>> out, bool extremes) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(first_row);
  A* shift = scratch;
  A* deviation = scratch + channels;
  A* squares = scratch + 2 * channels;
  const int64_t part = most<int64_t>(16, least<int64_t>(256, 16384 / channels));
  if (extremes) {
    for (int64_t c = 0; c < channels; ++c) out.maximum[c] = out.minimum[c] = get(x + c);
  }
  for (int64_t first = 0; first < rows; first += part) {
    const int64_t n = least(part, rows - first);
    const T* top = x + first * pitch;
    // The rows come from memory here: in the order in which they lie, four at a time. After that they are
    // cached.
    for (int64_t c = 0; c < channels; ++c) shift[c] = A(0);
    for (int64_t row = 0; row < n; row += 4) {
      const T* at = top + row * pitch;
      over_channels<A>(channels, [&](int64_t c, auto w) {
        auto total = fetch(shift + c, w) + fetch(at + c, w);
        if (row + 3 < n) {
          total += fetch(at + pitch + c, w) + fetch(at + 2 * pitch + c, w) + fetch(at + 3 * pitch + c, w);
        } else {
          for (int64_t rest = 1; rest < n - row; ++rest) total += fetch(at + rest * pitch + c, w);
        }
        keep(shift + c, total, w);
      });
    }
    for (int64_t c = 0; c < channels; ++c) shift[c] /= A(n);
    over_channels<A>(channels, [&](int64_t c, auto w) {
      auto mean = fetch(shift + c, w);
      decltype(mean) e{}, q{};
      for (int64_t row = 0; row < n; ++row) {
        if constexpr (w.v) prefetch(top + (row + n) * pitch + c);  // as in part_moments
        const auto d = fetch(top + row * pitch + c, w) - mean;
        e += d;
        q += d * d;
      }
      keep(deviation + c, e, w);
      keep(squares + c, q, w);
    });
    if (extremes) {
      over_channels<A>(channels, [&](int64_t c, auto w) {
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
