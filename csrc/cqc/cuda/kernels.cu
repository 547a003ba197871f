// The CQC loss on a GPU: one kernel launch for the forward, one for the backward.
//
// Identities are neither copied to the host nor sorted. Instead, the earliest visible sample of an identity
// that both modalities have is its leader, and the leader's number is the identity's slot in every padded
// result. Each block searches the labels for the samples of its sample's identity; only the blocks of leaders
// read features.
//
// The weights are those of cqc/cpu/kernels.cpp: for the pulled and the pushed distance D of each hinge,
// ∂loss/∂D divided by D. The last block to finish sums the losses in the order of the slots. The result does
// not depend on which block that is: every run gives the same bits.
//
// Where rows are normalized, the leader's block computes the lengths of its identity's rows before the
// centers, and saves the scales for the backward. The backward then needs whole rows: it has one block per
// sample, which computes the sample's three rows and reads all rows of the identity twice.
#include <limits>

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

// The identity of an unused slot: the largest, so that it comes last in order.
constexpr int64_t no_identity = std::numeric_limits<int64_t>::max();

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

MRCN_DEVICE Role role_of(Search& search, int sample) {
  int first = -1;
  bool infrared = false;
  for (int begin = 0; begin < search.end() && !(first >= 0 && infrared); begin += tile) {
    search.collect(begin);
    if (first < 0 && search.number[0] > 0) first = search.members.list[0][0];
    infrared = infrared || search.number[1] > 0;
  }
  if (first < 0 || !infrared) return lonely;
  return first == sample ? leader : follower;
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
MRCN_DEVICE A packed(RowScale<A> scale) {
  return scale.constant ? -scale.factor : scale.factor;
}
template <class A>
MRCN_DEVICE A factor_of(A packed) {
  return packed < A(0) ? -packed : packed;
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

// --- forward ------------------------------------------------------------------------------------------

template <class T, bool unit>
using ForwardLayout = Layout<T, 1, 4, unit>;

template <class A>
struct ForwardShared {
  Members members;
  A lengths[block_warps][sets * ForwardLayout<A, true>::rows];  // squared
  A squares[block_warps][distances];
  A losses[block_warps][1];
  int leaders[block_warps][1];
  bool last;
};

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

template <class L>
MRCN_DEVICE void add_squared_lengths(
    const Search& search, int from, typename L::A (&squares)[sets * L::rows]) {
  static_assert(L::groups == 1);
  for (int64_t column = L::column(); column < search.samples.features.dimensions; column += L::columns) {
    Line lines[sets][L::rows];
    fetch_members<L>(search, from, column, lines);
    unroll<sets>([&](auto set) {
      unroll<L::rows>([&](auto r) {
        for_elements<L>(lines[set.v][r.v], [&](auto, auto x) { squares[set.v * L::rows + r.v] += x * x; });
      });
    });
  }
}

// Computes the scales of all rows of the identity. Afterwards all threads of the block may read them.
template <class L>
MRCN_DEVICE void measure_rows(
    Search& search, typename L::A (&lengths)[block_warps][sets * L::rows], typename L::A* scales) {
  using A = typename L::A;
  constexpr int rows = sets * L::rows;
  for (int begin = 0; begin < search.end(); begin += tile) {
    search.collect(begin);
    const int last = most(search.number[0], search.number[1]);
    for (int from = 0; from < last; from += L::rows) {
      A squares[rows] = {};
      add_squared_lengths<L>(search, from, squares);
      add_up_warps(squares, lengths);
      for (int i = thread(); i < rows; i += block_threads) {
        const int set = i / L::rows, member = member_at<L>(search, set / 3, from, i % L::rows);
        if (member < 0) continue;
        scales[stacked_row(search.samples, set, member)] = packed(RowScale<A>(sum_of_warps(lengths, i)));
      }
      __syncthreads();
    }
  }
}

template <class L>
MRCN_DEVICE void add_squares(const typename L::Columns& center, typename L::A (&squares)[distances]) {
  unroll<hinges>([&](auto n) {
    constexpr Hinge h = hinge[n.v];
    unroll<L::width>([&](auto i) {
      const auto pulled = center[h.center][i.v] - center[h.pulled][i.v];
      const auto pushed = center[h.center][i.v] - center[h.pushed][i.v];
      squares[2 * n.v] += pulled * pulled;
      squares[2 * n.v + 1] += pushed * pushed;
    });
  });
}

// The loss of an identity, by one warp: a lane has a hinge, and so has every `hinges`th one after it.
template <class A>
MRCN_DEVICE A add_hinges(const A (&squares)[block_warps][distances], A margin, A* weights) {
  static_assert(warp_lanes % hinges == 0);
  const int n = lane() % hinges;
  const Distance<A> pulled(sum_of_warps(squares, 2 * n)), pushed(sum_of_warps(squares, 2 * n + 1));
  const A value = margin + pulled.value - pushed.value;
  const bool active = !(value <= A(0));  // a NaN passes, as in torch.relu
  if (lane() < hinges) {
    weights[2 * n] = active ? pulled.weight : A(0);
    weights[2 * n + 1] = active ? -pushed.weight : A(0);
  }
  A loss = active ? value : A(0);
  for (int mask = 1; mask < hinges; mask *= 2) loss += exchange(loss, mask);
  return loss;
}

template <class L>
MRCN_DEVICE void lead(
    const CqcCudaForward& call, Search& search, ForwardShared<typename L::A>& shared, int slot) {
  using A = typename L::A;
  A squares[distances] = {};
  A* own_scales = scales(call.samples, static_cast<A*>(call.saved));
  if constexpr (L::unit) measure_rows<L>(search, shared.lengths, own_scales);
  for (int64_t begin = 0; begin < call.samples.features.dimensions; begin += L::columns) {
    typename L::Columns center;
    A share[2];
    make_centers<L>(search, own_scales, begin + L::column(), center, share);
    add_squares<L>(center, squares);
  }
  add_up_warps(squares, shared.squares);
  if (warp() != 0) return;
  A* weights = static_cast<A*>(call.saved) + int64_t(slot) * distances;
  const A loss = add_hinges(shared.squares, A(call.margin), weights);
  if (lane() == 0) {
    static_cast<A*>(call.losses)[slot] = loss;
    call.identities[slot] = search.identity;
  }
}

template <class A>
MRCN_DEVICE void leave_empty(const CqcCudaForward& call, int slot) {
  A* weights = static_cast<A*>(call.saved) + int64_t(slot) * distances;
  static_assert(distances <= block_threads);
  if (thread() < distances) weights[thread()] = A(0);
  if (thread() == 0) {
    static_cast<A*>(call.losses)[slot] = A(0);
    call.identities[slot] = no_identity;
  }
}

// Clears the scales of a sample whose rows no block measures.
template <class A>
MRCN_DEVICE void clear_scales(const CqcCudaForward& call, int sample) {
  const int visible = call.samples.count[0], m = sample < visible ? 0 : 1;
  static_assert(block_threads >= 3);
  if (thread() >= 3) return;
  const int64_t row = stacked_row(call.samples, 3 * m + thread(), sample - m * visible);
  scales(call.samples, static_cast<A*>(call.saved))[row] = A(0);
}

// Whether this block is the last to arrive. It may then read what all others have written.
MRCN_DEVICE bool arrive(int64_t* counter, bool& last) {
  __syncthreads();
  if (thread() == 0) {
    last = add_acquire_release(reinterpret_cast<int*>(counter), 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  return last;
}

template <class A>
MRCN_DEVICE void add_up_losses(const CqcCudaForward& call, ForwardShared<A>& shared) {
  const A* losses = static_cast<const A*>(call.losses);
  const A* role = roles(call.samples, static_cast<const A*>(call.saved));
  A sum[1] = {};
  int leaders[1] = {};
  for (int slot = thread(); slot < call.samples.count[0]; slot += block_threads) {
    sum[0] += load_shared_by_blocks(losses + slot);
    leaders[0] += load_shared_by_blocks(role + slot) == A(leader);
  }
  add_up_warps(sum, shared.losses);
  add_up_warps(leaders, shared.leaders);
  if (thread() != 0) return;
  *static_cast<A*>(call.total) = sum_of_warps(shared.losses, 0);
  *call.number = sum_of_warps(shared.leaders, 0);
}

// There is one block per sample. A leader's block reads all rows of its identity; it may use all registers of
// a multiprocessor, so that it can request many rows at once.
template <class T, bool unit>
MRCN_KERNEL(1)
forward_kernel(const CqcCudaForward call) {
  using A = acc_t<T>;
  ForwardShared<A>& shared = *reinterpret_cast<ForwardShared<A>*>(shared_memory());
  const int sample = int(blockIdx.x);
  Search search{call.samples, shared.members, identity_of(call.samples, sample)};
  const Role role = role_of(search, sample);
  if (role == leader) {
    lead<ForwardLayout<T, unit>>(call, search, shared, sample);
  } else if (sample < call.samples.count[0]) {
    leave_empty<A>(call, sample);
  }
  if constexpr (unit) {
    if (role == lonely) clear_scales<A>(call, sample);
  }
  if (thread() == 0) roles(call.samples, static_cast<A*>(call.saved))[sample] = A(role);
  if (arrive(call.number, shared.last)) add_up_losses<A>(call, shared);
}

// --- backward -----------------------------------------------------------------------------------------

// Few columns per block, so that many blocks work on an identity.
template <class T>
using BackwardLayout = Layout<T, 4, 2, false>;

// The most blocks per sample; each computes every `parts`th of its columns. They are enough for any GPU, and
// the blocks of the most samples fit one launch.
constexpr int64_t most_parts = 64;

// Computes a thread's columns of the six gradients that each sample of the identity gets. k are the weights
// times the gradient of the loss.
template <class L>
MRCN_DEVICE void make_gradients(const typename L::Columns& center, const typename L::A (&k)[distances],
    const typename L::A (&share)[2], bool detach_negative, typename L::Columns& gradients) {
  using A = typename L::A;
  unroll<L::width>([&](auto i) {
    A gradient[sets] = {};
    unroll<hinges>([&](auto n) {
      constexpr Hinge h = hinge[n.v];
      const A pull = k[2 * n.v] * (center[h.center][i.v] - center[h.pulled][i.v]);
      // Not multiplied by zero, because what is detached may be infinite.
      const A push =
          detach_negative ? A(0) : k[2 * n.v + 1] * (center[h.center][i.v] - center[h.pushed][i.v]);
      gradient[h.center] = pull + push;
      gradient[h.pulled] -= pull;
      gradient[h.pushed] -= push;
    });
    unroll<sets>([&](auto set) {
      constexpr int m = modality_of[set.v];
      gradients[set.v][i.v] = gradient[set.v] * share[m];
    });
  });
}

template <class L>
MRCN_DEVICE Line rounded(const typename L::A (&values)[L::width]) {
  typename L::T elements[L::width];
  unroll<L::width>([&](auto i) { put(elements + i.v, values[i.v]); });
  Line line;
  std::memcpy(&line, elements, sizeof(line));
  return line;
}

// The gradient of a sample in a set: the sets are stacked, rows have no gaps.
template <class L>
MRCN_DEVICE typename L::T* gradient_row(const CqcCudaBackward& call, int set, int sample) {
  return static_cast<typename L::T*>(call.feature_gradients) +
         stacked_row(call.samples, set, sample) * call.samples.features.dimensions;
}

template <class L>
MRCN_DEVICE void write_members(
    const CqcCudaBackward& call, Search& search, int64_t column, const typename L::Columns& gradients) {
  const int64_t left = call.samples.features.dimensions - column;
  Line lines[sets];
  unroll<sets>([&](auto set) { lines[set.v] = rounded<L>(gradients[set.v]); });
  for (int begin = 0; begin < search.end(); begin += tile) {
    search.collect(begin);
    if (left <= 0) continue;
    unroll<sets>([&](auto set) {
      constexpr int m = modality_of[set.v];
      for (int i = L::group(); i < search.number[m]; i += L::groups) {
        typename L::T* row = gradient_row<L>(call, set.v, search.members.list[m][i]);
        keep<L>(row + column, lines[set.v], left, call.samples.wide);
      }
    });
  }
}

template <class L>
MRCN_DEVICE void clear_rows(const CqcCudaBackward& call, int sample, int64_t column) {
  const int64_t left = call.samples.features.dimensions - column;
  if (left <= 0) return;
  const int visible = call.samples.count[0], m = sample < visible ? 0 : 1;
  for (int set = 3 * m + L::group(); set < 3 * m + 3; set += L::groups) {
    keep<L>(gradient_row<L>(call, set, sample - m * visible) + column, Line{}, left, call.samples.wide);
  }
}

// The weights of a slot's distances times the gradient of its loss.
template <class A>
MRCN_DEVICE void take_weights(const CqcCudaBackward& call, int slot, A (&k)[distances]) {
  const A scale = static_cast<const A*>(call.gradient)[slot * call.gradient_stride];
  const A* weights = static_cast<const A*>(call.saved) + int64_t(slot) * distances;
  unroll<distances>([&](auto n) { k[n.v] = scale * weights[n.v]; });
}

// There are `parts` blocks per sample. Those of a leader write the rows of all samples of its identity.
template <class T>
MRCN_KERNEL(2)
backward_kernel(const CqcCudaBackward call) {
  using L = BackwardLayout<T>;
  using A = acc_t<T>;
  const CqcSamples& samples = call.samples;
  const int parts = int(gridDim.x) / (samples.count[0] + samples.count[1]);
  const int sample = int(blockIdx.x) / parts;
  const A* saved = static_cast<const A*>(call.saved);
  const A role = roles(samples, saved)[sample];
  if (role == A(follower)) return;
  Search search{samples, *reinterpret_cast<Members*>(shared_memory()), identity_of(samples, sample)};
  A k[distances] = {};
  if (role == A(leader)) take_weights(call, sample, k);
  const int64_t step = int64_t(parts) * L::columns, first = int64_t(int(blockIdx.x) % parts) * L::columns;
  for (int64_t begin = first; begin < samples.features.dimensions; begin += step) {
    const int64_t column = begin + L::column();
    if (role == A(lonely)) {
      clear_rows<L>(call, sample, column);
      continue;
    }
    typename L::Columns center, gradients;
    A share[2];
    make_centers<L>(search, nullptr, column, center, share);
    make_gradients<L>(center, k, share, call.detach_negative, gradients);
    write_members<L>(call, search, column, gradients);
  }
}

// --- backward of normalized rows ----------------------------------------------------------------------

// A block computes all columns of a sample. Besides what it computes, there are registers for few rows.
template <class T>
using UnitLayout = Layout<T, 1, 2, true>;

template <class A>
struct UnitShared {
  Members members;
  A along[block_warps][3];
};

// A sample's row of each set of its modality.
template <class L>
struct OwnRows {
  using T = typename L::T;
  using A = typename L::A;

  const CqcCudaBackward& call;
  bool visible;
  const T* values[3];
  T* gradients[3];
  A scale[3];  // as `scales` has them

  MRCN_DEVICE OwnRows(const CqcCudaBackward& call, int sample)
      : call(call), visible(sample < call.samples.count[0]) {
    const CqcFeatures& features = call.samples.features;
    const A* all = scales(call.samples, static_cast<const A*>(call.saved));
    const int own = visible ? sample : sample - call.samples.count[0];
    unroll<3>([&](auto i) {
      const int set = visible ? i.v : 3 + i.v;
      const void* first = visible ? features.sets[i.v] : features.sets[3 + i.v];
      const int64_t stride = visible ? features.row_stride[i.v] : features.row_stride[3 + i.v];
      values[i.v] = static_cast<const T*>(first) + own * stride;
      gradients[i.v] = gradient_row<L>(call, set, own);
      scale[i.v] = all[stacked_row(call.samples, set, own)];
    });
  }

  // Whether the length of row i has no gradient. (A length of NaN has one.)
  MRCN_DEVICE bool constant(int i) const { return scale[i] < A(0); }

  MRCN_DEVICE void add_products(int64_t column, const typename L::Columns& g, A (&along)[3]) const {
    for_units(column, g, [&](auto i, auto, A u, A of_u) { along[i.v] += u * of_u; });
  }

  MRCN_DEVICE void write(int64_t column, const typename L::Columns& g, const A (&along)[3]) const {
    A result[3][L::width];
    for_units(column, g, [&](auto i, auto d, A u, A of_u) {
      result[i.v][d.v] = (of_u - u * along[i.v]) * factor_of(scale[i.v]);
    });
    const int64_t left = call.samples.features.dimensions - column;
    unroll<3>(
        [&](auto i) { keep<L>(gradients[i.v] + column, rounded<L>(result[i.v]), left, call.samples.wide); });
  }

 private:
  // Calls f(i, d, u, g) for each element d of the line at `column` of row i: u is the normalized element, g
  // its gradient.
  template <class F>
  MRCN_DEVICE void for_units(int64_t column, const typename L::Columns& g, const F& f) const {
    const int64_t left = call.samples.features.dimensions - column;
    Line lines[3];
    unroll<3>([&](auto i) {
      const T* p = values[i.v] + column;
      lines[i.v] = call.samples.wide ? fetch<L, true>(p, left) : fetch<L, false>(p, left);
    });
    unroll<3>([&](auto i) {
      const A factor = factor_of(scale[i.v]);
      for_elements<L>(
          lines[i.v], [&](auto d, A x) { f(i, d, x * factor, visible ? g[i.v][d.v] : g[3 + i.v][d.v]); });
    });
  }
};

// Writes the gradients of a sample's rows, given the gradients g of the normalized rows u: (g - u (u·g)) /
// length. It processes all columns twice, first for the products u·g.
template <class L>
MRCN_DEVICE void write_own(const CqcCudaBackward& call, Search& search, UnitShared<typename L::A>& shared,
    int sample, const typename L::A (&k)[distances]) {
  using A = typename L::A;
  const OwnRows<L> own(call, sample);
  const A* all = scales(call.samples, static_cast<const A*>(call.saved));
  const int64_t columns = call.samples.features.dimensions;
  A along[3] = {};
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t begin = 0; begin < columns; begin += L::columns) {
      const int64_t column = begin + L::column();
      typename L::Columns center, gradients;
      A share[2];
      make_centers<L>(search, all, column, center, share);
      if (column >= columns) continue;
      make_gradients<L>(center, k, share, call.detach_negative, gradients);
      if (pass == 0) {
        own.add_products(column, gradients, along);
      } else {
        own.write(column, gradients, along);
      }
    }
    if (pass == 0) {
      add_up_warps(along, shared.along);
      unroll<3>([&](auto i) { along[i.v] = own.constant(i.v) ? A(0) : sum_of_warps(shared.along, i.v); });
    }
  }
}

// The slot of the identity, which both modalities have.
MRCN_DEVICE int leader_of(Search& search) {
  int begin = 0;
  for (search.collect(0); search.number[0] == 0; search.collect(begin)) begin += tile;
  return search.members.list[0][0];
}

// There is one block per sample.
template <class T>
MRCN_KERNEL(1)
unit_backward_kernel(const CqcCudaBackward call) {
  using L = UnitLayout<T>;
  using A = acc_t<T>;
  const CqcSamples& samples = call.samples;
  const int sample = int(blockIdx.x);
  if (roles(samples, static_cast<const A*>(call.saved))[sample] == A(lonely)) {
    for (int64_t column = L::column(); column < samples.features.dimensions; column += L::columns) {
      clear_rows<L>(call, sample, column);
    }
    return;
  }
  UnitShared<A>& shared = *reinterpret_cast<UnitShared<A>*>(shared_memory());
  Search search{samples, shared.members, identity_of(samples, sample)};
  A k[distances];
  take_weights(call, leader_of(search), k);
  write_own<L>(call, search, shared, sample, k);
}

// --- launchers ----------------------------------------------------------------------------------------

template <class T>
int forward(const CqcCudaForward& call, void* stream) {
  if (int error = clear(call.number, sizeof(*call.number), stream)) return error;
  const int blocks = call.samples.count[0] + call.samples.count[1];
  if (blocks == 0) return clear(call.total, sizeof(acc_t<T>), stream);
  const int shared = int(sizeof(ForwardShared<acc_t<T>>));
  return call.samples.features.normalize ? launch<forward_kernel<T, true>>(call, blocks, shared, stream)
                                         : launch<forward_kernel<T, false>>(call, blocks, shared, stream);
}

template <class T>
int backward(const CqcCudaBackward& call, void* stream) {
  constexpr int64_t columns = BackwardLayout<T>::columns;
  const int samples = call.samples.count[0] + call.samples.count[1];
  if (call.samples.features.normalize && samples > 0) {
    return launch<unit_backward_kernel<T>>(call, samples, int(sizeof(UnitShared<acc_t<T>>)), stream);
  }
  const int64_t parts =
      least<int64_t>((call.samples.features.dimensions + columns - 1) / columns, most_parts);
  const int64_t blocks = parts * samples;
  if (blocks == 0) return 0;
  return launch<backward_kernel<T>>(call, int(blocks), int(sizeof(Members)), stream);
}

}  // namespace

int cqc_forward(const CqcCudaForward& call, void* stream) {
  return with_element(
      call.samples.features.dtype, [&](auto element) { return forward<decltype(element)>(call, stream); });
}

int cqc_backward(const CqcCudaBackward& call, void* stream) {
  return with_element(
      call.samples.features.dtype, [&](auto element) { return backward<decltype(element)>(call, stream); });
}

}  // namespace mrcn::MRCN_ISA
