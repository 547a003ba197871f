// The backward of the CQC loss on a GPU, in one kernel launch (see rows.cuh).
//
// The gradient of a normalized row depends on the whole row. Where rows are normalized, there is therefore
// one block per sample, which computes the sample's three rows and reads all rows of the identity twice.
#include "cqc/cuda/rows.cuh"

namespace mrcn::MRCN_ISA {
namespace {

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

template <class A>
MRCN_DEVICE A saved_role(const CqcCudaBackward& call, int sample) {
  return roles(call.samples, static_cast<const A*>(call.saved))[sample];
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
  const A role = saved_role<A>(call, sample);
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
  const int sample = int(blockIdx.x);
  if (saved_role<A>(call, sample) == A(lonely)) {
    for (int64_t column = L::column(); column < call.samples.features.dimensions; column += L::columns) {
      clear_rows<L>(call, sample, column);
    }
    return;
  }
  UnitShared<A>& shared = *reinterpret_cast<UnitShared<A>*>(shared_memory());
  Search search{call.samples, shared.members, identity_of(call.samples, sample)};
  A k[distances];
  take_weights(call, leader_of(search), k);
  write_own<L>(call, search, shared, sample, k);
}

// --- launch -------------------------------------------------------------------------------------------

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

int cqc_backward(const CqcCudaBackward& call, void* stream) {
  return with_element(
      call.samples.features.dtype, [&](auto element) { return backward<decltype(element)>(call, stream); });
}

}  // namespace mrcn::MRCN_ISA
