// What both launches of the CQC loss on a GPU share: the samples of an identity, rows of features, centers.
//
// Identities are neither copied to the host nor sorted. Instead, the earliest visible sample of an identity
// that both modalities have is its leader, and the leader's number is the identity's slot in every padded
// result. Each block searches the labels for the samples of its sample's identity; only the blocks of leaders
// read features.
//
// The weights are those of cqc/cpu/kernels.cpp: for the pulled and the pushed distance D of each hinge,
// ∂loss/∂D divided by D.
//
// Where rows are normalized, the leader's block computes the lengths of its identity's rows before the
// centers, and saves the scales for the backward.
#pragma once

#include "cqc/cuda/kernels.h"
#include "cqc/hinges.h"
#include "cuda/runtime.h"
#include "elements.h"

namespace mrcn::MRCN_ISA {
namespace {

constexpr int distances = 2 * hinges;

// The role of a sample. The forward saves it after the weights, so that the backward of a follower is a
// single load.
enum Role : int {
  lonely,    // only one modality has its identity
  leader,    // the earliest visible sample of an identity that both modalities have
  follower,  // another sample leads its identity, which both modalities have
};

MRCN_DEVICE int thread() { return int(threadIdx.x); }
MRCN_DEVICE int warp() { return thread() / warp_lanes; }
MRCN_DEVICE int lane() { return thread() % warp_lanes; }

// --- the samples of an identity -----------------------------------------------------------------------

// How many labels of each modality a thread reads before the block exchanges what it found.
constexpr int rounds = 4;
constexpr int tile = block_threads * rounds;

struct Members {
  int found[2][block_warps];
  int list[2][tile];
};

// The samples of an identity in ascending order, for one tile of labels at a time. The batch of a training
// step is a single tile, whose labels are searched once.
struct Search {
  const CqcSamples& samples;
  Members& members;
  int64_t identity;
  int begin = -1;          // where the tile whose samples are listed begins
  int number[2] = {0, 0};  // how many samples are listed

  MRCN_DEVICE int end() const { return most(samples.count[0], samples.count[1]); }

  MRCN_DEVICE void collect(int from) {
    if (from == begin) return;
    begin = from;
    // A warp's labels follow one another, so that where its samples go depends on other warps' sums alone.
    const int first = from + warp() * rounds * warp_lanes + lane();
    uint32_t same[2][rounds];
    compare(first, same);
    unroll<2>([&](auto m) {
      int own = 0;
      unroll<rounds>([&](auto r) { own += count_bits(same[m.v][r.v]); });
      if (lane() == 0) members.found[m.v][warp()] = own;
    });
    __syncthreads();
    unroll<2>([&](auto m) {
      int at = count_before(members.found[m.v], number[m.v]);
      unroll<rounds>([&](auto r) {
        const uint32_t bits = same[m.v][r.v], own = uint32_t(1) << lane();
        if (bits & own) members.list[m.v][at + count_bits(bits & (own - 1))] = first + r.v * warp_lanes;
        at += count_bits(bits);
      });
    });
    __syncthreads();
  }

 private:
  // All labels are on their way before the first one is compared.
  MRCN_DEVICE void compare(int first, uint32_t (&same)[2][rounds]) const {
    int64_t label[2][rounds];
    unroll<2>([&](auto m) {
      unroll<rounds>([&](auto r) {
        const int sample = first + r.v * warp_lanes;
        label[m.v][r.v] = sample < samples.count[m.v] ? samples.labels[m.v][sample] : ~identity;
      });
    });
    unroll<2>([&](auto m) {
      unroll<rounds>([&](auto r) { same[m.v][r.v] = ballot(label[m.v][r.v] == identity); });
    });
  }

  // What the warps before this one have found; `all` is what all have.
  static MRCN_DEVICE int count_before(const int (&found)[block_warps], int& all) {
    int before = 0;
    all = 0;
    for (int w = 0; w < block_warps; ++w) {
      before += w < warp() ? found[w] : 0;
      all += found[w];
    }
    return before;
  }
};

// Infrared samples are numbered after the visible ones.
MRCN_DEVICE int64_t identity_of(const CqcSamples& samples, int sample) {
  const int visible = samples.count[0];
  return sample < visible ? samples.labels[0][sample] : samples.labels[1][sample - visible];
}

// The number of a sample's row of a set when all rows are stacked.
MRCN_DEVICE int64_t stacked_row(const CqcSamples& samples, int set, int sample) {
  const int64_t visible = samples.count[0], infrared = samples.count[1];
  return (set < 3 ? set * visible : 3 * visible + (set - 3) * infrared) + sample;
}

// --- what the forward leaves to the backward, behind the weights --------------------------------------

template <class A>
MRCN_DEVICE A* roles(const CqcSamples& samples, A* saved) {
  return saved + int64_t(samples.count[0]) * distances;
}

// The scales of the stacked rows, where rows are normalized: each is the row's factor, negative where the
// factor is a constant.
template <class A>
MRCN_DEVICE A* scales(const CqcSamples& samples, A* saved) {
  return roles(samples, saved) + samples.count[0] + samples.count[1];
}
template <class A>
MRCN_DEVICE A factor_of(A packed) {
  return packed < A(0) ? -packed : packed;
}

// --- sums over a block --------------------------------------------------------------------------------

// Writes the sums of each warp to shared memory. `sum_of_warps` adds them to the sums of the block, always in
// the same order.
template <class V, int n>
MRCN_DEVICE void add_up_warps(V (&values)[n], V (&sums)[block_warps][n]) {
  unroll<n>([&](auto i) {
    for (int mask = warp_lanes / 2; mask > 0; mask /= 2) values[i.v] += exchange(values[i.v], mask);
    if (lane() == 0) sums[warp()][i.v] = values[i.v];
  });
  __syncthreads();
}
template <class V, int n>
MRCN_DEVICE V sum_of_warps(const V (&sums)[block_warps][n], int i) {
  V result = sums[0][i];
  for (int w = 1; w < block_warps; ++w) result += sums[w][i];
  return result;
}

// --- rows ---------------------------------------------------------------------------------------------

// How the threads of a block share rows. Each thread reads the same 16 bytes of all rows. `groups` threads of
// a warp read the same bytes and take turns at the members. Each thread reads the rows of `rows` members
// before it adds them. `unit` says whether rows are normalized.
template <class T_, int groups_, int rows_, bool unit_>
struct Layout {
  using T = T_;
  using A = acc_t<T>;
  static constexpr int groups = groups_, rows = rows_;
  static constexpr bool unit = unit_;
  static constexpr int width = 16 / int(sizeof(T));
  static constexpr int lanes = warp_lanes / groups;
  static constexpr int columns = block_warps * lanes * width;  // per block
  using Columns = A[sets][width];

  static MRCN_DEVICE int group() { return lane() / lanes; }
  static MRCN_DEVICE int column() { return (warp() * lanes + lane() % lanes) * width; }
};

// Reads 16 bytes at `p`; unless `wide`, element by element, with zeros after the first `left` elements.
template <class L, bool wide>
MRCN_DEVICE Line fetch(const typename L::T* p, int64_t left) {
  if constexpr (wide) {
    return load_first(reinterpret_cast<const Line*>(p));
  } else {
    using T = typename L::T;
    T elements[L::width];
    unroll<L::width>([&](auto i) { elements[i.v] = i.v < left ? p[i.v] : T{}; });
    Line line;
    std::memcpy(&line, elements, sizeof(line));
    return line;
  }
}

template <class L>
MRCN_DEVICE void keep(typename L::T* p, const Line& line, int64_t left, bool wide) {
  if (wide) {
    *reinterpret_cast<Line*>(p) = line;
    return;
  }
  typename L::T elements[L::width];
  std::memcpy(elements, &line, sizeof(line));
  unroll<L::width>([&](auto i) {
    if (i.v < left) p[i.v] = elements[i.v];
  });
}

// Of the listed members from number `from` on, the `r`th that this thread reads, or -1.
template <class L>
MRCN_DEVICE int member_at(const Search& search, int m, int from, int r) {
  const int i = from + r * L::groups, number = m == 0 ? search.number[0] : search.number[1];
  return i < number ? search.members.list[m][i] : -1;
}

// Reads the rows of all sets of the listed members from number `from` on; zeros where there are no more
// members.
template <class L, bool wide>
MRCN_DEVICE void fetch_members(const Search& search, int from, int64_t column, Line (&lines)[sets][L::rows]) {
  const CqcFeatures& features = search.samples.features;
  const int64_t left = features.dimensions - column;
  int member[2][L::rows];
  unroll<2>([&](auto m) {
    unroll<L::rows>([&](auto r) { member[m.v][r.v] = member_at<L>(search, m.v, from, r.v); });
  });
  unroll<sets>([&](auto set) {
    constexpr int m = modality_of[set.v];
    const auto* rows = static_cast<const typename L::T*>(features.sets[set.v]) + column;
    unroll<L::rows>([&](auto r) {
      Line& line = lines[set.v][r.v];
      line = Line{};
      if (member[m][r.v] < 0) return;
      line = fetch<L, wide>(rows + member[m][r.v] * features.row_stride[set.v], left);
    });
  });
}
template <class L>
MRCN_DEVICE void fetch_members(const Search& search, int from, int64_t column, Line (&lines)[sets][L::rows]) {
  if (search.samples.wide) {
    fetch_members<L, true>(search, from, column, lines);
  } else {
    fetch_members<L, false>(search, from, column, lines);
  }
}

// Calls f(i, value) for each element of a line.
template <class L, class F>
MRCN_DEVICE void for_elements(const Line& line, const F& f) {
  typename L::T elements[L::width];
  std::memcpy(elements, &line, sizeof(elements));
  unroll<L::width>([&](auto i) { f(i, get(elements + i.v)); });
}

template <class L>
MRCN_DEVICE void add_members(
    const Search& search, const typename L::A* scales, int64_t column, typename L::Columns& sums) {
  using A = typename L::A;
  const int last = most(search.number[0], search.number[1]);
  for (int from = L::group(); from < last; from += L::groups * L::rows) {
    Line lines[sets][L::rows];
    fetch_members<L>(search, from, column, lines);
    unroll<sets>([&](auto set) {
      unroll<L::rows>([&](auto r) {
        if constexpr (L::unit) {
          const int member = member_at<L>(search, modality_of[set.v], from, r.v);
          const A factor = member < 0 ? A(0) : factor_of(scales[stacked_row(search.samples, set.v, member)]);
          for_elements<L>(lines[set.v][r.v], [&](auto i, A x) { sums[set.v][i.v] += x * factor; });
        } else {
          for_elements<L>(lines[set.v][r.v], [&](auto i, A x) { sums[set.v][i.v] += x; });
        }
      });
    });
  }
}

// A thread's columns of the six centers, and a sample's share in those of each modality. Every mean is a sum
// times that share and every product is rounded on its own (the file is compiled without fused operations):
// centers that coincide do so to the last bit, and are at a distance of exactly zero.
template <class L>
MRCN_DEVICE void make_centers(Search& search, const typename L::A* scales, int64_t column,
    typename L::Columns& center, typename L::A (&share)[2]) {
  using A = typename L::A;
  int number[2] = {0, 0};
  unroll<sets>([&](auto set) { unroll<L::width>([&](auto i) { center[set.v][i.v] = A(0); }); });
  for (int begin = 0; begin < search.end(); begin += tile) {
    search.collect(begin);
    unroll<2>([&](auto m) { number[m.v] += search.number[m.v]; });
    if (column < search.samples.features.dimensions) add_members<L>(search, scales, column, center);
  }
  unroll<2>([&](auto m) { share[m.v] = A(1) / A(number[m.v]); });
  unroll<sets>([&](auto set) {
    constexpr int m = modality_of[set.v];
    unroll<L::width>([&](auto i) {
      A& sum = center[set.v][i.v];
      for (int mask = L::lanes; mask < warp_lanes; mask *= 2) sum += exchange(sum, mask);
      sum *= share[m];
    });
  });
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
