// Products of the gates' small matrices. Sums stay in registers, several of them side by side, and each has
// one order whatever stands beside it.
#pragma once

#include "common/lines.h"

namespace mrcn::MRCN_ISA {
namespace {

// Element (row, column) is at[row * pitch + column].
template <class T>
struct Matrix {
  T* at;
  int64_t pitch;
};
// One that is read an element at a time: (row, term) is at[row * row_pitch + term * term_pitch].
template <class A>
struct Factors {
  const A* at;
  int64_t row_pitch, term_pitch;

  MRCN_INLINE A operator()(int64_t row, int64_t term) const {
    return at[row * row_pitch + term * term_pitch];
  }
};

// Terms added up before they join what came before: long sums would be less exact.
constexpr int64_t product_terms = 256;

template <int rows, int vectors, class A>
MRCN_INLINE void add_block(Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out) {
  using V = one_or_vector<A, vectors>;
  constexpr int parts = parts_of<vectors>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  for (int64_t first = 0; first < terms; first += product_terms) {
    V sum[rows][parts] = {};
    for (int64_t t = first; t < least(first + product_terms, terms); ++t) {
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
        copy_out<false>(to, copy_in<V>(to) + sum[r.v][p.v]);
      });
    });
  }
}

template <int rows, int vectors, class A>
MRCN_INLINE int64_t add_blocks(
    Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out, int64_t column, int64_t columns) {
  constexpr int64_t width = vectors > 0 ? vectors * lanes<A> : 1;
  for (; column + width <= columns; column += width) {
    add_block<rows, vectors, A>(k, {x.at + column, x.pitch}, terms, {out.at + column, out.pitch});
  }
  return column;
}

template <int rows, class A>
__attribute__((noinline)) void add_rows(
    Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out, int64_t columns) {
  int64_t column = 0;
  if constexpr (rows == 1) column = add_blocks<rows, 8>(k, x, terms, out, column, columns);
  column = add_blocks<rows, 2>(k, x, terms, out, column, columns);
  column = add_blocks<rows, 1>(k, x, terms, out, column, columns);
  add_blocks<rows, 0>(k, x, terms, out, column, columns);
}

// out[row][column] += Σ_term k[row][term] x[term][column]
template <class A>
void add_products(
    Factors<A> k, Matrix<const A> x, int64_t terms, Matrix<A> out, int64_t rows, int64_t columns) {
  constexpr int64_t many = 4;
  int64_t row = 0;
  const auto factors = [&] { return Factors<A>{k.at + row * k.row_pitch, k.row_pitch, k.term_pitch}; };
  const auto to = [&] { return Matrix<A>{out.at + row * out.pitch, out.pitch}; };
  for (; row + many <= rows; row += many) add_rows<many>(factors(), x, terms, to(), columns);
  for (; row < rows; ++row) add_rows<1>(factors(), x, terms, to(), columns);
}

template <int rows, int columns, class A, class F>
MRCN_INLINE void dot_block(
    Matrix<const A> a, Matrix<const A> b, int64_t n, int64_t row, int64_t column, const F& f) {
  const auto left = [&](int r) { return a.at + (row + r) * a.pitch; };
  const auto right = [&](int c) { return b.at + (column + c) * b.pitch; };
  vec<A> sums[rows][columns] = {};
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) {
    vec<A> v[columns];
    unroll<columns>([&](auto c) MRCN_BODY { v[c.v] = load(right(c.v) + i); });
    unroll<rows>([&](auto r) MRCN_BODY {
      const vec<A> w = load(left(r.v) + i);
      unroll<columns>([&](auto c) MRCN_BODY { sums[r.v][c.v] += w * v[c.v]; });
    });
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      A total = sum<A>(sums[r][c]);
      for (int64_t k = i; k < n; ++k) total += left(r)[k] * right(c)[k];
      f(row + r, column + c, total);
    }
  }
}

// f(row, column, Σ_i a[row][i] b[column][i])
template <class A, class F>
MRCN_INLINE void dot_products(
    Matrix<const A> a, int64_t rows, Matrix<const A> b, int64_t columns, int64_t n, const F& f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    int64_t column = 0;
    for (; column + 2 <= columns; column += 2) dot_block<4, 2>(a, b, n, row, column, f);
    for (; column < columns; ++column) dot_block<4, 1>(a, b, n, row, column, f);
  }
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) dot_block<1, 1>(a, b, n, row, column, f);
  }
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
