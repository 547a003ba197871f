// The passes over the pixels of a plane: sets, sums of gradients, and gradients.
#pragma once

#include "block/cpu/pixels.h"

namespace mrcn::MRCN_ISA {
namespace {

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

}  // namespace
}  // namespace mrcn::MRCN_ISA
