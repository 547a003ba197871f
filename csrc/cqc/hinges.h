// The formulas of the CQC loss, for CPUs and GPUs: its distances (eq. 8, 9), and the lengths of features.
#pragma once

#include <cmath>

#include "elements.h"

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

// A smaller squared distance is clamped and has the gradient zero: near 0 the gradient of the root is not
// finite.
constexpr double least_square = 1e-12;

template <class A>
struct Distance {
  A value;
  A weight;  // 1 / value; 0 where the square is clamped or NaN, as in torch.clamp

  explicit MRCN_INLINE Distance(A square) {
    value = std::sqrt(square < A(least_square) ? A(least_square) : square);
    weight = square >= A(least_square) ? A(1) / value : A(0);
  }
};

// The factor by which a row of features is multiplied to have length 1. The squared length is clamped like a
// squared distance: a shorter row is divided by a constant.
constexpr double least_squared_length = 1e-24;

template <class A>
struct RowScale {
  A factor;
  bool constant;  // the squared length is clamped, and has no gradient

  explicit MRCN_INLINE RowScale(A square) {
    constant = square < A(least_squared_length);  // false for NaN, as in torch.clamp
    factor = A(1) / std::sqrt(constant ? A(least_squared_length) : square);
  }
};

}  // namespace
}  // namespace mrcn::MRCN_ISA
