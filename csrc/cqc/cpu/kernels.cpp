// The CQC loss on the CPU, compiled once per instruction set.
//
// Identities are independent of each other. For each one, the samples of the six sets are read once to make
// the six centers, and from them the eight distances of equations 8 and 9. The pulled distance of hinge h is
// D(center, original of the other modality), the pushed distance is D(center, original of the same modality).
// weights[2h] and weights[2h + 1] are ∂loss/∂D divided by D of these two: the backward only has to multiply
// them by differences of centers.
//
// A row that is normalized is read twice, the second time from the first-level cache: first for its length.

#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "cqc/hinges.h"
#include "cqc/params.h"

namespace mrcn::MRCN_ISA {
namespace {

template <class T>
MRCN_INLINE const T* row(const CqcFeatures& features, int set, int64_t sample) {
  return static_cast<const T*>(features.sets[set]) + sample * features.row_stride[set];
}

// Calls f(d, constant<1>) for whole vectors and f(d, constant<0>) for the remaining dimensions. Plain loops
// would not do, because at -O2 GCC vectorizes no loop whose trip count it does not know.
template <class A, class F>
MRCN_INLINE void over_dimensions(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + lanes<A> <= D; d += lanes<A>) f(d, constant<1>{});
  for (; d < D; ++d) f(d, constant<0>{});
}
template <class T>
MRCN_INLINE auto fetch(const T* p, constant<1>) {
  return load(p);
}
template <class T>
MRCN_INLINE auto fetch(const T* p, constant<0>) {
  return get(p);
}
template <class T, class V>
MRCN_INLINE void keep(T* p, V v, constant<1>) {
  store(p, v);
}
template <class T, class V>
MRCN_INLINE void keep(T* p, V v, constant<0>) {
  put(p, v);
}

// to[d] = from[d] / number
template <class T, class A>
inline void divide(const A* from, A number, int64_t D, T* to) {
  over_dimensions<A>(D, [&](int64_t d, auto w) { keep(to + d, fetch(from + d, w) / number, w); });
}

// Σ term(d, ...) over the dimensions; term(d, w) is called as `over_dimensions` calls its function.
template <class A, class F>
MRCN_INLINE A sum_of_terms(int64_t D, const F& term) {
  vec<A> s[4] = {};
  int64_t d = 0;
  for (; d + 4 * lanes<A> <= D; d += 4 * lanes<A>) {
    unroll<4>([&](auto u) { s[u.v] += term(d + u.v * lanes<A>, constant<1>{}); });
  }
  WideSum<A> wide;
  for (const vec<A>& part : s) wide.add(part);
  double total = wide.total();
  for (; d < D; ++d) total += double(term(d, constant<0>{}));
  return A(total);
}

template <class T>
inline RowScale<acc_t<T>> scale_of(const T* row, int64_t D) {
  using A = acc_t<T>;
  return RowScale<A>(sum_of_terms<A>(D, [&](int64_t d, auto w) MRCN_BODY {
    const auto x = fetch(row + d, w);
    return x * x;
  }));
}

// The center of one identity in one set, (D,).
template <class T>
inline void make_center(
    const CqcFeatures& features, const CqcGroups& groups, int set, int64_t identity, acc_t<T>* center) {
  using A = acc_t<T>;
  const int m = modality_of[set];
  const int64_t begin = groups.start[m][identity], end = groups.start[m][identity + 1];
  const int64_t* sample = groups.order[m];
  const A number = A(end - begin);
  over_dimensions<A>(features.dimensions, [&](int64_t d, auto w) {
    auto total = fetch(row<T>(features, set, sample[begin]) + d, w);
    for (int64_t i = begin + 1; i < end; ++i) total += fetch(row<T>(features, set, sample[i]) + d, w);
    keep(center + d, total / number, w);  // multiplying by 1 / number would round twice
  });
}

// The same with normalized rows.
template <class T>
inline void make_unit_center(
    const CqcFeatures& features, const CqcGroups& groups, int set, int64_t identity, acc_t<T>* center) {
  using A = acc_t<T>;
  const int64_t D = features.dimensions;
  const int m = modality_of[set];
  const int64_t begin = groups.start[m][identity], end = groups.start[m][identity + 1];
  const A number = A(end - begin);
  std::memset(center, 0, D * sizeof(A));
  for (int64_t i = begin; i < end; ++i) {
    const T* sample = row<T>(features, set, groups.order[m][i]);
    const A factor = scale_of(sample, D).factor;
    over_dimensions<A>(D, [&](int64_t d, auto w) {
      keep(center + d, fetch(center + d, w) + fetch(sample + d, w) * factor, w);
    });
  }
  divide(center, number, D, center);
}

// The six centers of one identity, (6, D).
template <class T>
inline void make_centers(
    const CqcFeatures& features, const CqcGroups& groups, int64_t identity, acc_t<T>* centers) {
  for (int set = 0; set < sets; ++set) {
    acc_t<T>* center = centers + set * features.dimensions;
    if (features.normalize) {
      make_unit_center<T>(features, groups, set, identity, center);
    } else {
      make_center<T>(features, groups, set, identity, center);
    }
  }
}

// Another thread is woken for at least this many identities.
inline int64_t identity_grain(int64_t dimensions, const CqcGroups& groups) {
  constexpr int64_t elements = 131072;
  const int64_t n = groups.identities;
  if (n == 0) return 1;
  const int64_t rows = 3 * (groups.start[0][n] + groups.start[1][n]) / n;
  return elements / most<int64_t>(1, rows * dimensions);
}

// Calls f(identity, centers) for each identity. `arrays` says for how many arrays of the centers' size there
// is memory at `centers`.
template <class T, class Direction, class F>
inline void each_identity(const Direction& call, int arrays, const F& f) {
  using A = acc_t<T>;
  const int64_t D = call.features.dimensions;
  const CqcGroups& groups = call.groups;
  parallel(call.parallel, groups.identities, identity_grain(D, groups), [&](int64_t begin, int64_t end) {
    Buffer<A> centers(arrays * sets * D);
    for (int64_t identity = begin; identity < end; ++identity) {
      make_centers<T>(call.features, groups, identity, centers.data);
      f(identity, centers.data);
    }
  });
}

template <class A>
inline A squared_distance(const A* a, const A* b, int64_t D) {
  return sum_of_terms<A>(D, [&](int64_t d, auto w) MRCN_BODY {
    const auto difference = fetch(a + d, w) - fetch(b + d, w);
    return difference * difference;
  });
}

template <class T>
void forward(const CqcForward& call) {
  using A = acc_t<T>;
  const int64_t D = call.features.dimensions;
  each_identity<T>(call, 1, [&](int64_t identity, const A* centers) {
    const auto center = [&](int set) { return centers + set * D; };
    A* weight = static_cast<A*>(call.weights) + identity * 2 * hinges;
    A loss(0);
    for (const Hinge& h : hinge) {
      const Distance<A> pulled(squared_distance(center(h.center), center(h.pulled), D));
      const Distance<A> pushed(squared_distance(center(h.center), center(h.pushed), D));
      const A value = A(call.margin) + pulled.value - pushed.value;
      const bool active = !(value <= A(0));  // a NaN passes, as in torch.relu
      loss += active ? value : A(0);
      *weight++ = active ? pulled.weight : A(0);
      *weight++ = active ? -pushed.weight : A(0);
    }
    static_cast<A*>(call.losses)[identity] = loss;
  });
}

// ∂a += k (a - b), ∂b -= k (a - b)
template <class A>
MRCN_INLINE void pull(A k, const A* a, const A* b, A* da, A* db, int64_t D) {
  over_dimensions<A>(D, [&](int64_t d, auto w) {
    const auto step = k * (fetch(a + d, w) - fetch(b + d, w));
    keep(da + d, fetch(da + d, w) + step, w);
    keep(db + d, fetch(db + d, w) - step, w);
  });
}

// The gradient of a row, given the gradient g of the normalized row u: (g - u (u·g)) / length.
template <class T>
inline void write_unit_gradient(const T* row, const acc_t<T>* g, int64_t D, T* out) {
  using A = acc_t<T>;
  const RowScale<A> scale = scale_of(row, D);
  const auto unit = [&](int64_t d, auto w) MRCN_BODY { return fetch(row + d, w) * scale.factor; };
  A along(0);
  if (!scale.constant) {
    along = sum_of_terms<A>(D, [&](int64_t d, auto w) MRCN_BODY { return unit(d, w) * fetch(g + d, w); });
  }
  over_dimensions<A>(
      D, [&](int64_t d, auto w) { keep(out + d, (fetch(g + d, w) - unit(d, w) * along) * scale.factor, w); });
}

// Writes the gradients of the rows of an identity's samples in a set, given the gradient of the set's center.
template <class T>
inline void write_rows(const CqcBackward& call, int set, int64_t identity, acc_t<T>* gradient) {
  const int64_t D = call.features.dimensions;
  const int m = modality_of[set];
  const int64_t first = call.groups.start[m][identity], last = call.groups.start[m][identity + 1];
  const acc_t<T> number = acc_t<T>(last - first);
  if (call.features.normalize) divide(gradient, number, D, gradient);
  for (int64_t i = first; i < last; ++i) {
    const int64_t sample = call.groups.order[m][i];
    T* out = static_cast<T*>(call.feature_gradients[set]) + sample * D;
    if (call.features.normalize) {
      write_unit_gradient<T>(row<T>(call.features, set, sample), gradient, D, out);
    } else {
      divide(gradient, number, D, out);
    }
  }
}

template <class T>
void backward(const CqcBackward& call) {
  using A = acc_t<T>;
  const int64_t D = call.features.dimensions;
  each_identity<T>(call, 2, [&](int64_t identity, A* centers) {
    A* gradients = centers + sets * D;
    const auto of = [=](A* array, int set) { return array + set * D; };
    const A* weights = static_cast<const A*>(call.weights) + identity * 2 * hinges;
    const A scale = static_cast<const A*>(call.gradient)[identity * call.gradient_stride];
    std::memset(gradients, 0, sets * D * sizeof(A));
    for (int n = 0; n < 2 * hinges; ++n) {
      if (n % 2 == 1 && call.detach_negative) continue;
      const int from = hinge[n / 2].center, to = n % 2 == 0 ? hinge[n / 2].pulled : hinge[n / 2].pushed;
      pull<A>(
          scale * weights[n], of(centers, from), of(centers, to), of(gradients, from), of(gradients, to), D);
    }
    for (int set = 0; set < sets; ++set) write_rows<T>(call, set, identity, of(gradients, set));
  });
}

}  // namespace

void cqc_forward(const CqcForward& call) {
  with_element(call.features.dtype, [&]<class T>(T) { forward<T>(call); });
}

void cqc_backward(const CqcBackward& call) {
  with_element(call.features.dtype, [&]<class T>(T) { backward<T>(call); });
}

}  // namespace mrcn::MRCN_ISA
