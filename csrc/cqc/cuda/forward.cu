// The forward of the CQC loss on a GPU, in one kernel launch (see rows.cuh).
//
// The last block to finish sums the losses in the order of the slots. The result does not depend on which
// block that is: every run gives the same bits.
#include <limits>

#include "cqc/cuda/rows.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// The identity of an unused slot: the largest, so that it comes last in order.
constexpr int64_t no_identity = std::numeric_limits<int64_t>::max();

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

template <class A>
MRCN_DEVICE A packed(RowScale<A> scale) {
  return scale.constant ? -scale.factor : scale.factor;
}
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

template <class T>
int forward(const CqcCudaForward& call, void* stream) {
  if (int error = clear(call.number, sizeof(*call.number), stream)) return error;
  const int blocks = call.samples.count[0] + call.samples.count[1];
  if (blocks == 0) return clear(call.total, sizeof(acc_t<T>), stream);
  const int shared = int(sizeof(ForwardShared<acc_t<T>>));
  return call.samples.features.normalize ? launch<forward_kernel<T, true>>(call, blocks, shared, stream)
                                         : launch<forward_kernel<T, false>>(call, blocks, shared, stream);
}

}  // namespace

int cqc_forward(const CqcCudaForward& call, void* stream) {
  return with_element(
      call.samples.features.dtype, [&](auto element) { return forward<decltype(element)>(call, stream); });
}

}  // namespace mrcn::MRCN_ISA
