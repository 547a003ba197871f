// What the passes do with the pixels at one place of all maps: a pixel, or vectors of them.
#pragma once

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

// How many terms a `Total` sums; in double, all of them.
template <class A>
constexpr int64_t terms = sizeof(A) == sizeof(double) ? int64_t(1) << 40 : single_terms;

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

}  // namespace
}  // namespace mrcn::MRCN_ISA
