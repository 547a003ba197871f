// What the CQC loss is made of, for processors and GPUs alike: its distances (eq. 8, 9), and unit features.
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

// Below it the root's gradient is not finite: the distance is clamped and its gradient zero.
constexpr double least_square = 1e-12;

template <class A>
struct Distance {
  A value;
  A weight;  // 1 / value, or 0 where the clamp holds: for a NaN too, as in torch.clamp

  explicit MRCN_INLINE Distance(A square) {
    value = std::sqrt(square < A(least_square) ? A(least_square) : square);
    weight = square >= A(least_square) ? A(1) / value : A(0);
  }
};

// What a row of features is multiplied with to have length 1. The square of its length is clamped as a
// distance's is, so that a shorter row is divided by a constant.
constexpr double least_squared_length = 1e-24;

template <class A>
struct RowScale {
  A factor;
  bool constant;  // the clamp holds, and the length has no gradient

  explicit MRCN_INLINE RowScale(A square) {
    constant = square < A(least_squared_length);  // not for a NaN, as in torch.clamp
    factor = A(1) / std::sqrt(constant ? A(least_squared_length) : square);
  }
};

}  // namespace
}  // namespace mrcn::MRCN_ISA
