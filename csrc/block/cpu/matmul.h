// Products of the gates' small matrices. Several sums are kept in registers at once. The order of each sum is
// the same, whichever other sums are computed with it.
#pragma once

#include "cpu/cache_lines.h"

namespace mrcn::MRCN_ISA {
namespace {

// Element (row, column) is at[row * pitch + column].
template <class T>
struct Matrix {
  T* at;
  int64_t pitch;
};
// A matrix that is read one element at a time: (row, term) is at[row * row_pitch + term * term_pitch].
template <class A>
struct Factors {
  const A* at;
  int64_t row_pitch, term_pitch;

  MRCN_INLINE A operator()(int64_t row, int64_t term) const {
    return at[row * row_pitch + term * term_pitch];
  }
};

// Interleaves the first (half = 0) or second halves of two vectors: a0 b0 a1 b1 ...
template <class A, int half>
MRCN_INLINE vec<A> interleave(vec<A> a, vec<A> b) {
  constexpr int W = lanes<A>;
#if defined(__clang__)
  // Clang has no __builtin_shuffle, but it compiles this loop to a shuffle.
  vec<A> v{};
  unroll<W>([&](auto i) MRCN_BODY { v[i.v] = (i.v % 2 == 0 ? a : b)[half * W / 2 + i.v / 2]; });
  return v;
#else
  typename vector_of<A>::mask from{};
  unroll<W>([&](auto i) MRCN_BODY { from[i.v] = i.v % 2 * W + half * W / 2 + i.v / 2; });
  return __builtin_shuffle(a, b, from);
#endif
}

// Lane i of the result is the sum of vector i, added up in the same order as by `sum`.
template <class A, int count = lanes<A>>
MRCN_INLINE vec<A> sums_of(const vec<A>* of) {
  if constexpr (count == 1) {
    return of[0];
  } else {
    vec<A> halves[count / 2];
    unroll<count / 2>([&](auto i) MRCN_BODY {
      const vec<A> a = of[i.v], b = of[i.v + count / 2];
      halves[i.v] = interleave<A, 0>(a, b) + interleave<A, 1>(a, b);
    });
    return sums_of<A, count / 2>(halves);
  }
}

// How many terms are summed before they are added to the result: longer sums would be less exact. That many
// rows of x also stay in the cache while all rows of the result are computed.
constexpr int64_t product_terms = 256;

template <int rows, int vectors, class A>
MRCN_INLINE void add_block(Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out, bool fresh) {
  using V = one_or_vector<A, vectors>;
  constexpr int parts = parts_of<vectors>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  V sum[rows][parts] = {};
  for (int64_t t = 0; t < terms; ++t) {
    V v[parts];
    unroll<parts>([&](auto p) MRCN_BODY { v[p.v] = copy_in<V>(x.at + t * x.pitch + p.v * W); });
    unroll<rows>([&](auto r) MRCN_BODY {
      const A factor = k(r.v, t);
      unroll<parts>([&](auto p) MRCN_BODY { sum[r.v][p.v] += factor * v[p.v]; });
    });
  }
  unroll<rows>([&](auto r) MRCN_BODY {
    unroll<parts>([&](auto p) MRCN_BODY {
      A* to = out.at + r.v * out.pitch + p.v * W;
      copy_out<false>(to, fresh ? sum[r.v][p.v] : copy_in<V>(to) + sum[r.v][p.v]);
    });
  });
}

template <int rows, int vectors, class A>
MRCN_INLINE int64_t add_blocks(Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out, int64_t column,
    int64_t columns, bool fresh) {
  constexpr int64_t width = vectors > 0 ? vectors * lanes<A> : 1;
  for (; column + width <= columns; column += width) {
    add_block<rows, vectors, A>(k, {x.at + column, x.pitch}, terms, {out.at + column, out.pitch}, fresh);
  }
  return column;
}

template <int rows, class A>
__attribute__((noinline)) void add_rows(
    Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out, int64_t columns, bool fresh) {
  int64_t column = 0;
  if constexpr (rows == 1) column = add_blocks<rows, 8>(k, x, terms, out, column, columns, fresh);
  if constexpr (vector_registers == 32)
    column = add_blocks<rows, 4>(k, x, terms, out, column, columns, fresh);
  column = add_blocks<rows, 2>(k, x, terms, out, column, columns, fresh);
  column = add_blocks<rows, 1>(k, x, terms, out, column, columns, fresh);
  add_blocks<rows, 0>(k, x, terms, out, column, columns, fresh);
}

// out[row][column] = Σ_term k[row][term] x[term][column]; unless `fresh`, it is added to out.
template <class A>
void add_products(Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out, int64_t rows,
    int64_t columns, bool fresh) {
  constexpr int64_t many = 4;
  int64_t t = 0;
  do {  // without a term, too: the result is 0
    const int64_t some = least(product_terms, terms - t);
    const Matrix<const A> of = {x.at + t * x.pitch, x.pitch};
    const auto factors = [&](int64_t row) {
      return Factors<A>{k.at + row * k.row_pitch + t * k.term_pitch, k.row_pitch, k.term_pitch};
    };
    const auto to = [&](int64_t row) { return Matrix<A>{out.at + row * out.pitch, out.pitch}; };
    int64_t row = 0;
    for (; row + many <= rows; row += many) add_rows<many>(factors(row), of, some, to(row), columns, fresh);
    for (; row < rows; ++row) add_rows<1>(factors(row), of, some, to(row), columns, fresh);
    fresh = false;
    t += product_terms;
  } while (t < terms);
}

template <int rows, int columns, class A>
MRCN_INLINE void dot_block(Matrix<const A> a, Matrix<const A> b, int64_t n, Matrix<A> out) {
  constexpr int count = rows * columns;
  vec<A> sums[count] = {};
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) {
    vec<A> v[columns];
    unroll<columns>([&](auto c) MRCN_BODY { v[c.v] = load(b.at + c.v * b.pitch + i); });
    unroll<rows>([&](auto r) MRCN_BODY {
      const vec<A> w = load(a.at + r.v * a.pitch + i);
      unroll<columns>([&](auto c) MRCN_BODY { sums[c.v * rows + r.v] += w * v[c.v]; });
    });
  }
  A totals[count] = {};
  if constexpr (count == lanes<A>) {
    if (i > 0) store(totals, sums_of<A>(sums));
  } else {
    for (int k = 0; k < count; ++k) totals[k] = sum<A>(sums[k]);
  }
  for (; i < n; ++i) {
    for (int c = 0; c < columns; ++c) {
      for (int r = 0; r < rows; ++r) totals[c * rows + r] += a.at[r * a.pitch + i] * b.at[c * b.pitch + i];
    }
  }
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < rows; ++r) out.at[c * out.pitch + r] += totals[c * rows + r];
  }
}

template <int rows, class A>
__attribute__((noinline)) void dot_rows(
    Matrix<const A> a, Matrix<const A> b, int64_t columns, int64_t n, Matrix<A> out) {
  int64_t column = 0;
  const auto right = [&] { return Matrix<const A>{b.at + column * b.pitch, b.pitch}; };
  const auto to = [&](int row) { return Matrix<A>{out.at + column * out.pitch + row, out.pitch}; };
  if constexpr (rows > 1) {
    constexpr int half = rows / 2;
    for (; column + 2 <= columns; column += 2) {
      dot_block<half, 2, A>(a, right(), n, to(0));
      dot_block<half, 2, A>({a.at + half * a.pitch, a.pitch}, right(), n, to(half));
    }
  }
  for (; column < columns; ++column) dot_block<rows, 1, A>(a, right(), n, to(0));
}

// out[column][row] += Σ_i a[row][i] b[column][i]
template <class A>
void add_dot_products(
    Matrix<const A> a, int64_t rows, Matrix<const A> b, int64_t columns, int64_t n, Matrix<A> out) {
  int64_t row = 0;
  const auto add = [&]<int count>(constant<count>) {
    for (; row + count <= rows; row += count)
      dot_rows<count, A>({a.at + row * a.pitch, a.pitch}, b, columns, n, {out.at + row, out.pitch});
  };
  add(constant<lanes<A>>{});
  add(constant<1>{});
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
