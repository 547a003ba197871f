// The passes over pixels, for a plane or for rows of pixels: statistics, sets, sums of gradients, and
// gradients.
//
// Only these functions depend on the dtype. The code around them (schedule.h) depends on the accumulation
// type alone and calls them through `Passes`, so that it is not compiled again for every dtype.
#pragma once

#include "block/cpu/plane_passes.h"
#include "block/cpu/row_passes.h"

namespace mrcn::MRCN_ISA {
namespace {

template <class A>
struct Passes {
  Moments (*plane_moments)(const void* x, int64_t n, Extremes<A>* extremes);
  void (*rows_moments)(const void* x, int64_t rows, int64_t pitch, int64_t channels, A* scratch,
      ChannelMoments<A> out, bool extremes);
  double (*plane_count)(const void* x, int64_t n, A value);
  void (*rows_count)(
      const void* x, int64_t rows, int64_t pitch, int64_t channels, const A* values, double* counts);

  void (*make_plane)(const A* k, Pointers x, Pointers y, int64_t n, bool stream);
  void (*make_rows)(const A* k, Rows x, Rows y, int64_t rows, int64_t channels, bool stream);
  void (*sum_plane)(const A* mean, Pointers x, Pointers g, int64_t n, double* sums);
  void (*sum_rows)(const A* mean, Rows x, Rows g, int64_t rows, int64_t channels, double* sums);
  void (*gradient_plane)(
      const A* k, Pointers x, Pointers g, Pointers dx, int64_t n, bool stream, bool extremes);
  void (*gradient_rows)(
      const A* k, Rows x, Rows g, Rows dx, int64_t rows, int64_t channels, bool stream, bool extremes);
};

// The forward and the backward are separate files; each fills in the functions that it uses.
template <class P, class T>
Passes<acc_t<T>> forward_passes() {
  Passes<acc_t<T>> passes{};
  passes.plane_moments = plane_moments<T>;
  passes.rows_moments = rows_moments<T>;
  passes.make_plane = make_plane<P, T>;
  passes.make_rows = make_rows<P, T>;
  return passes;
}

template <class P, class T>
Passes<acc_t<T>> backward_passes() {
  // Inputs that are handed through take no part in the sums.
  using Sums = typename P::Made;
  Passes<acc_t<T>> passes{};
  passes.plane_moments = plane_moments<T>;
  passes.rows_moments = rows_moments<T>;
  passes.plane_count = plane_count<T>;
  passes.rows_count = rows_count<T>;
  passes.sum_plane = sum_plane<Sums, T>;
  passes.sum_rows = sum_rows<Sums, T>;
  passes.gradient_plane = gradient_plane<P, T>;
  passes.gradient_rows = gradient_rows<P, T>;
  return passes;
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
