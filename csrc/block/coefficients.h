// From the table of sets to numbers: where the coefficients and sums of each mode stand, how coefficients are
// made from a plane's statistics and gates, and how pixels are made from coefficients.
#pragma once

#include "block/formulas.h"
#include "block/params.h"
#include "elements.h"

namespace mrcn::MRCN_ISA {
namespace {

// A mode's entry of the table as constants, and the places of its coefficients and sums.
template <Mode mode>
struct Pattern {
  static constexpr Sets entry = sets_of(mode);
  static constexpr int inputs = entry.inputs, sets = entry.made, gate_count = entry.gates;
  static constexpr bool concat = entry.concat;
  static constexpr int first = entry.first_made(), all = entry.all();
  using Made = Pattern<entry.made_as>;

  static constexpr Part part(int set, int input) { return entry.parts[set][input]; }
  static constexpr bool uses(int set, int input) { return part(set, input).term != Term::none; }

  // How many parts stand before this one.
  static constexpr int rank(int set, int input) {
    int n = 0;
    for (int k = 0; k < sets; ++k) {
      for (int j = 0; j < inputs; ++j) {
        if (k == set && j == input) return n;
        n += uses(k, j) ? 1 : 0;
      }
    }
    return n;
  }
  static constexpr int maps = rank(sets, 0);

  // Coefficients of the elementwise passes.
  static constexpr int mean(int j) { return j; }
  static constexpr int scale(int k, int j) { return inputs + rank(k, j); }
  static constexpr int shift(int k) { return inputs + maps + k; }
  static constexpr int forward_slots = inputs + maps + sets;
  static constexpr int k1(int j) { return inputs + maps + j; }
  static constexpr int k2(int j) { return k1(inputs) + j; }
  static constexpr int extreme(int j) { return k2(inputs) + j; }
  static constexpr int k3(int j) { return extreme(inputs) + j; }
  static constexpr int backward_slots = k3(inputs);

  // Sums of the reduction pass.
  static constexpr int S(int k) { return k; }
  static constexpr int T(int k, int j) { return sets + rank(k, j); }
  static constexpr int sums = sets + maps;
};

// f(Pattern) for a call's mode.
template <int number = 0, class F>
inline auto with_pattern(Mode mode, const F& f) {
  if constexpr (number + 1 < modes) {
    if (int(mode) != number) return with_pattern<number + 1>(mode, f);
  }
  return f(Pattern<Mode(number)>{});
}

// The made sets that have a gradient, and the gates and inputs that they depend on. All other gates and
// inputs get a gradient of exactly zero; multiplying by a gradient of zeros instead could make NaN of values
// not finite.
template <class P>
struct Given {
  bool sets[P::sets] = {}, gates[P::gate_count] = {}, inputs[P::inputs] = {};

  // has(set): whether the set has a gradient. For the host only, because a GPU cannot read the table.
  template <class F>
  explicit Given(const F& has) {
    for (int s = 0; s < P::sets; ++s) {
      sets[s] = has(s);
      for (int j = 0; j < P::inputs && sets[s]; ++j) {
        const Part part = P::part(s, j);
        inputs[j] = inputs[j] || part.term != Term::none;
        if (part.gate >= 0) gates[part.gate] = true;
      }
    }
  }
};

// --- one pixel, or a vector of them -------------------------------------------------------------------

// The pixel of the made set s.
template <class P, int s, class V>
MRCN_INLINE V made_set(const V* k, const V* x) {
  V value = k[P::shift(s)];
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    if constexpr (P::uses(s, j.v)) value += k[P::scale(s, j.v)] * (x[j.v] - k[P::mean(j.v)]);
  });
  return value;
}
template <class P, class V>
MRCN_INLINE void make_sets(const V* k, const V* x, V* y) {
  unroll<P::sets>([&](auto s) MRCN_BODY { y[s.v] = made_set<P, s.v>(k, x); });
}

// Adds the terms of set s to `sums`, which are numbers or (`Total`) numbers with more digits.
template <class P, int s, class V, class S>
MRCN_INLINE void add_sums_of(const V* mean, const V* x, V g, S* sums) {
  sums[P::S(s)] += g;
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    if constexpr (P::uses(s, j.v)) sums[P::T(s, j.v)] += g * (x[j.v] - mean[j.v]);
  });
}
template <class P, class V, class S>
MRCN_INLINE void add_sums(const V* mean, const V* x, const V* g, S* sums) {
  unroll<P::sets>([&](auto s) MRCN_BODY { add_sums_of<P, s.v>(mean, x, g[s.v], sums); });
}

// The gradients of the inputs are made in two steps: first the terms that come through the statistics, then
// the term of each set s.
template <class P, class V>
MRCN_INLINE void start_gradients(const V* k, const V* x, V* dx) {
  unroll<P::inputs>(
      [&](auto j) MRCN_BODY { dx[j.v] = k[P::k1(j.v)] + k[P::k2(j.v)] * (x[j.v] - k[P::mean(j.v)]); });
}
template <class P, int s, class V>
MRCN_INLINE void add_gradient(const V* k, V g, V* dx) {
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    if constexpr (P::uses(s, j.v)) dx[j.v] += k[P::scale(s, j.v)] * g;
  });
}
template <class P, class V>
MRCN_INLINE void make_gradients(const V* k, const V* x, const V* g, V* dx) {
  start_gradients<P>(k, x, dx);
  unroll<P::sets>([&](auto s) MRCN_BODY { add_gradient<P, s.v>(k, g[s.v], dx); });
}

// --- one plane, or a vector of them (V): coefficients from statistics and gates -------------------------

// Below, sets and inputs are compile-time constants: a GPU cannot read the host's table, and nvcc compiles an
// access whose place it does not know to a trap, without a warning.

// f(set, input) for each input that a made set is made of.
template <class P, class F>
MRCN_INLINE void over_parts(const F& f) {
  unroll<P::sets>([&](auto k) MRCN_BODY {
    unroll<P::inputs>([&](auto j) MRCN_BODY {
      if constexpr (P::uses(k.v, j.v)) f(k, j);
    });
  });
}

// The value of a part's gate. A part without a gate gets 0, which nothing reads.
template <int gate, class V>
MRCN_INLINE V gate_of([[maybe_unused]] const V* s) {
  if constexpr (gate >= 0) {
    return s[gate];
  } else {
    return V{};
  }
}

// The map of a term, s being the value of its gate.
template <Term term, class V>
MRCN_INLINE Affine<V> map_of(const Plane<V>& p, [[maybe_unused]] V s, [[maybe_unused]] bool to_input) {
  if constexpr (term == Term::normalized) {
    return normalized(p);
  } else if constexpr (term == Term::restituted) {
    return restituted(p, s, to_input);
  } else if constexpr (term == Term::contaminated) {
    return restituted<V>(p, 1 - s, false);
  } else {
    static_assert(term == Term::distilled);
    return distilled(p, s);
  }
}

// The affine maps of one (sample, channel). The backward needs no shifts.
template <class P, class V>
MRCN_INLINE void make_maps(const Plane<V>* p, const V* s, bool to_input, V* k, bool shifts) {
  unroll<P::inputs>([&](auto j) MRCN_BODY { k[P::mean(j.v)] = p[j.v].mean; });
  if (shifts) unroll<P::sets>([&](auto set) MRCN_BODY { k[P::shift(set.v)] = V{}; });
  over_parts<P>([&](auto set, auto j) MRCN_BODY {
    constexpr Part part = P::part(set.v, j.v);
    const Affine<V> map = map_of<part.term>(p[j.v], gate_of<part.gate>(s), to_input);
    k[P::scale(set.v, j.v)] = map.scale;
    if (shifts) k[P::shift(set.v)] += map.shift;
  });
}

// ∂s of every gate. Where s M and (1 - s) M go to two sets, s M comes first.
template <class P, class V>
MRCN_INLINE void make_gate_gradients(const Plane<V>* p, const V* sums, V* ds) {
  over_parts<P>([&](auto set, auto j) MRCN_BODY {
    constexpr Part part = P::part(set.v, j.v);
    if constexpr (part.gate >= 0) {
      constexpr int S = P::S(set.v), T = P::T(set.v, j.v);
      const V gradient = gate_gradient<V>(p[j.v], {sums[S], sums[T]});
      if constexpr (part.term == Term::contaminated) {
        ds[part.gate] -= gradient;
      } else {
        ds[part.gate] = gradient;
      }
    }
  });
}

// How much of the gradient of a set reaches F̃ through a term, s being the value of the term's gate.
template <Term term, class R>
MRCN_INLINE R share_of([[maybe_unused]] R s, [[maybe_unused]] bool to_input) {
  if constexpr (term == Term::normalized) {
    return R{} + 1;
  } else if constexpr (term == Term::restituted) {
    return share_of_normalized(s, to_input);
  } else if constexpr (term == Term::contaminated) {
    return s;
  } else {
    static_assert(term == Term::distilled);
    return -s;
  }
}

// U = Σ H c and V = Σ H of every input.
template <class P, class R>
MRCN_INLINE void make_moments(const R* s, bool to_input, const R* sums, R* U, R* V) {
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    U[j.v] = V[j.v] = R{};
    unroll<P::sets>([&](auto n) MRCN_BODY {
      // Either modality's own sets first: exchanged modalities give the same bits.
      constexpr int set = j.v == 0 ? n.v : P::sets - 1 - n.v;
      if constexpr (P::uses(set, j.v)) {
        constexpr Part part = P::part(set, j.v);
        constexpr int S = P::S(set), T = P::T(set, j.v);
        const R share = share_of<part.term>(gate_of<part.gate>(s), to_input);
        U[j.v] += share * sums[T];
        V[j.v] += share * sums[S];
      }
    });
  });
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
