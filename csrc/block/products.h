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

// a0 b0 a1 b1 ..., the vectors' first or second halves.
template <class A, int half>
MRCN_INLINE vec<A> interleave(vec<A> a, vec<A> b) {
  constexpr int W = lanes<A>;
  typename vector_of<A>::mask from{};
  unroll<W>([&](auto lane) MRCN_BODY { from[lane.v] = lane.v % 2 * W + half * W / 2 + lane.v / 2; });
  return __builtin_shuffle(a, b, from);
}

// The square of a vector's width: to[column][row] = from[row][column].
template <class A>
MRCN_INLINE void transpose_square(Matrix<const A> from, Matrix<A> to) {
  constexpr int W = lanes<A>, rounds = __builtin_ctz(W);
  vec<A> rows[W], next[W];
  unroll<W>([&](auto i) MRCN_BODY { rows[i.v] = load(from.at + i.v * from.pitch); });
  const auto shuffle = [&](const vec<A>* a, vec<A>* b) MRCN_BODY {
    unroll<W / 2>([&](auto i) MRCN_BODY {
      b[2 * i.v] = interleave<A, 0>(a[i.v], a[i.v + W / 2]);
      b[2 * i.v + 1] = interleave<A, 1>(a[i.v], a[i.v + W / 2]);
    });
  };
  // Each round moves a row's number one bit on into the place's: as many as the width has.
  unroll<rounds>([&](auto round) MRCN_BODY {
    if constexpr (round.v % 2 == 0) {
      shuffle(rows, next);
    } else {
      shuffle(next, rows);
    }
  });
  const vec<A>* done = rounds % 2 == 0 ? rows : next;
  unroll<W>([&](auto i) MRCN_BODY { store(to.at + i.v * to.pitch, done[i.v]); });
}

// to[column][row] = from[row][column]
template <class A>
void transpose(Matrix<const A> from, int64_t rows, int64_t columns, Matrix<A> to) {
  constexpr int64_t W = lanes<A>;
  for (int64_t row = 0; row < rows; row += W) {
    for (int64_t column = 0; column < columns; column += W) {
      const Matrix<const A> square = {from.at + row * from.pitch + column, from.pitch};
      const Matrix<A> out = {to.at + column * to.pitch + row, to.pitch};
      if (row + W <= rows && column + W <= columns) {
        transpose_square<A>(square, out);
      } else {
        for (int64_t c = 0; c < least(W, columns - column); ++c) {
          for (int64_t r = 0; r < least(W, rows - row); ++r)
            out.at[c * out.pitch + r] = square.at[r * square.pitch + c];
        }
      }
    }
  }
}

// Terms added up before they join what came before: long sums would be less exact. So many rows of x are also
// what stays in cache while every row of the result has its turn.
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

// out[row][column] = Σ_term k[row][term] x[term][column], or added to it unless it is `fresh`.
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
