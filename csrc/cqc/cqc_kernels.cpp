// The CQC loss on the CPU, compiled once an instruction set.
//
// Identities are independent: one reads its samples of the six sets once, makes the six centers, and from
// them the eight distances of equations 8 and 9. Per hinge h the pulled distance is D(center, other
// original), the pushed one D(center, own original); weights[2h] and weights[2h + 1] are their ∂loss/∂D
// divided by D, so that the backward multiplies differences of centers and nothing else.
#include <cmath>

#include "common/buffer.h"
#include "common/vec.h"
#include "cqc/cqc.h"

namespace mrcn::MRCN_ISA {
namespace {

// Sets in the paper's order: v, v+, v-, n-, n+, n.
constexpr int sets = 6;
constexpr int modality_of[sets] = {0, 0, 0, 1, 1, 1};

struct Hinge {
  int center, pulled, pushed;
};
// v+ and v- are pulled to n and pushed from v, n+ and n- the other way round (eq. 8, 9).
constexpr int hinges = 4;
constexpr Hinge hinge[hinges] = {{1, 5, 0}, {4, 0, 5}, {2, 5, 0}, {3, 0, 5}};

// Below it the root's gradient is not finite: the distance is clamped and its gradient zero.
constexpr double least_square = 1e-12;

template <class T>
MRCN_INLINE const T* row(const CqcFeatures& features, int set, int64_t sample) {
  return static_cast<const T*>(features.sets[set]) + sample * features.row_stride[set];
}

template <class A, class T>
MRCN_INLINE void add_row(A* total, const T* x, int64_t n) {
  int64_t d = 0;
  for (; d + lanes<A> <= n; d += lanes<A>) {
    prefetch(x + d + 512);
    store(total + d, load(total + d) + load(x + d));
  }
  for (; d < n; ++d) total[d] += get(x + d);
}

// The six centers of one identity, (6, D).
template <class T>
inline void make_centers(
    const CqcFeatures& features, const CqcGroups& groups, int64_t identity, acc_t<T>* centers) {
  using A = acc_t<T>;
  const int64_t D = features.dimensions;
  for (int set = 0; set < sets; ++set) {
    const int m = modality_of[set];
    const int64_t begin = groups.start[m][identity], end = groups.start[m][identity + 1];
    A* center = centers + set * D;
    for (int64_t d = 0; d < D; ++d) center[d] = A(0);
    for (int64_t i = begin; i < end; ++i) add_row(center, row<T>(features, set, groups.order[m][i]), D);
    const A share = A(1) / A(end - begin);
    for (int64_t d = 0; d < D; ++d) center[d] *= share;
  }
}

// Identities a thread should have to do before another one is woken: some 16,000 elements.
inline int64_t identity_grain(const CqcFeatures& features, const CqcGroups& groups) {
  const int64_t n = groups.identities;
  if (n == 0) return 1;
  const int64_t rows = 3 * (groups.start[0][n] + groups.start[1][n]) / n;
  return 16384 / most<int64_t>(1, rows * features.dimensions);
}

template <class A>
inline A squared_distance(const A* a, const A* b, int64_t n) {
  vec<A> s[2] = {};
  int64_t i = 0;
  for (; i + 2 * lanes<A> <= n; i += 2 * lanes<A>) {
    unroll<2>([&](auto u) {
      const vec<A> d = load(a + i + u.v * lanes<A>) - load(b + i + u.v * lanes<A>);
      s[u.v] += d * d;
    });
  }
  A total = sum<A>(s[0] + s[1]);
  for (; i < n; ++i) total += (a[i] - b[i]) * (a[i] - b[i]);
  return total;
}

template <class T>
void forward(const CqcForward& call) {
  using A = acc_t<T>;
  const int64_t D = call.features.dimensions;
  parallel(call.parallel, call.groups.identities, identity_grain(call.features, call.groups),
      [&](int64_t begin, int64_t end) {
        Buffer<A> centers(sets * D);
        const auto center = [&](int set) { return centers.data + set * D; };
        for (int64_t identity = begin; identity < end; ++identity) {
          make_centers<T>(call.features, call.groups, identity, centers.data);
          A* weights = static_cast<A*>(call.weights) + identity * 2 * hinges;
          A loss(0);
          for (int h = 0; h < hinges; ++h) {
            const A pulled_square = squared_distance(center(hinge[h].center), center(hinge[h].pulled), D);
            const A pushed_square = squared_distance(center(hinge[h].center), center(hinge[h].pushed), D);
            const A floor(least_square);
            const A pulled = std::sqrt(pulled_square < floor ? floor : pulled_square);
            const A pushed = std::sqrt(pushed_square < floor ? floor : pushed_square);
            const A value = A(call.margin) + pulled - pushed;
            const bool active = !(value <= A(0));  // a NaN passes, as in torch.relu
            loss += active ? value : A(0);
            weights[2 * h] = active && pulled_square >= floor ? A(1) / pulled : A(0);
            weights[2 * h + 1] = active && pushed_square >= floor ? A(-1) / pushed : A(0);
          }
          static_cast<A*>(call.losses)[identity] = loss;
        }
      });
}

template <class T>
void backward(const CqcBackward& call) {
  using A = acc_t<T>;
  const int64_t D = call.features.dimensions;
  parallel(call.parallel, call.groups.identities, identity_grain(call.features, call.groups),
      [&](int64_t begin, int64_t end) {
        Buffer<A> centers(sets * D), gradients(sets * D);
        for (int64_t identity = begin; identity < end; ++identity) {
          const A* weights = static_cast<const A*>(call.weights) + identity * 2 * hinges;
          const A scale = static_cast<const A*>(call.gradient)[identity * call.gradient_stride];
          make_centers<T>(call.features, call.groups, identity, centers.data);
          for (int64_t n = 0; n < sets * D; ++n) gradients.data[n] = A(0);
          for (int n = 0; n < 2 * hinges; ++n) {
            const int from = hinge[n / 2].center, to = n % 2 == 0 ? hinge[n / 2].pulled : hinge[n / 2].pushed;
            const A k = scale * weights[n];
            if (n % 2 == 1 && call.detach_negative) continue;
            const A *a = centers.data + from * D, *b = centers.data + to * D;
            A *da = gradients.data + from * D, *db = gradients.data + to * D;
            const auto add = [&](int64_t d, auto wide) {
              if constexpr (wide.v) {
                const vec<A> step = k * (load(a + d) - load(b + d));
                store(da + d, load(da + d) + step);
                store(db + d, load(db + d) - step);
              } else {
                const A step = k * (a[d] - b[d]);
                da[d] += step;
                db[d] -= step;
              }
            };
            int64_t d = 0;
            for (; d + lanes<A> <= D; d += lanes<A>) add(d, constant<1>{});
            for (; d < D; ++d) add(d, constant<0>{});
          }
          for (int set = 0; set < sets; ++set) {
            const int m = modality_of[set];
            const int64_t first = call.groups.start[m][identity], last = call.groups.start[m][identity + 1];
            const A share = A(1) / A(last - first);
            const A* gradient = gradients.data + set * D;
            for (int64_t i = first; i < last; ++i) {
              T* out = static_cast<T*>(call.feature_gradients[set]) + call.groups.order[m][i] * D;
              int64_t d = 0;
              for (; d + lanes<A> <= D; d += lanes<A>) store(out + d, load(gradient + d) * share);
              for (; d < D; ++d) put(out + d, gradient[d] * share);
            }
          }
        }
      });
}

}  // namespace

void cqc_forward(const CqcForward& call) {
  switch (call.features.dtype) {
    case Dtype::f32:
      return forward<float>(call);
    case Dtype::f64:
      return forward<double>(call);
    case Dtype::bf16:
      return forward<bf16>(call);
    case Dtype::f16:
      return forward<f16>(call);
  }
}

void cqc_backward(const CqcBackward& call) {
  switch (call.features.dtype) {
    case Dtype::f32:
      return backward<float>(call);
    case Dtype::f64:
      return backward<double>(call);
    case Dtype::bf16:
      return backward<bf16>(call);
    case Dtype::f16:
      return backward<f16>(call);
  }
}

}  // namespace mrcn::MRCN_ISA
