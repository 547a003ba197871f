// The CQC loss on CPU tensors: groups the samples by identity and allocates the results.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/output_memory.h"

namespace mrcn {
namespace {

using Tensors = std::vector<Tensor>;

// The samples of the identities that both modalities have, in the order of the identities.
struct Groups {
  std::vector<int64_t> identities, order[2], start[2];

  CqcGroups view() const {
    return {
        int64_t(identities.size()), {order[0].data(), order[1].data()}, {start[0].data(), start[1].data()}};
  }
};

std::vector<int64_t> sorted_by_label(const int64_t* labels, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto before = [=](int64_t a, int64_t b) { return labels[a] < labels[b]; };
  if (!std::is_sorted(order.begin(), order.end(), before))
    std::stable_sort(order.begin(), order.end(), before);
  return order;
}

Groups group(const Tensor& labels, const Tensor& infrared_labels) {
  const Tensor* given[2] = {&labels, &infrared_labels};
  Tensors kept;
  const int64_t* values[2];
  std::vector<int64_t> order[2];
  for (int m = 0; m < 2; ++m) {
    check(given[m]->dim() == 1 && given[m]->scalar_type() == ScalarType::Long && given[m]->is_cpu(),
        "labels: expected an int64 CPU tensor (B,)");
    kept.push_back(dense(*given[m]));
    values[m] = kept.back().const_data_ptr<int64_t>();
    order[m] = sorted_by_label(values[m], kept.back().numel());
  }
  Groups groups;
  size_t at[2] = {0, 0};
  const auto label = [&](int m) { return values[m][order[m][at[m]]]; };
  while (at[0] < order[0].size() && at[1] < order[1].size()) {
    const int64_t identity = std::min(label(0), label(1));
    const bool shared = label(0) == label(1);
    if (shared) groups.identities.push_back(identity);
    for (int m = 0; m < 2; ++m) {
      if (shared) groups.start[m].push_back(groups.order[m].size());
      for (; at[m] < order[m].size() && label(m) == identity; ++at[m]) {
        if (shared) groups.order[m].push_back(order[m][at[m]]);
      }
    }
  }
  for (int m = 0; m < 2; ++m) groups.start[m].push_back(groups.order[m].size());
  return groups;
}

// Six sets, or all of them stacked in one tensor; `kept` owns rows that had to be copied.
CqcFeatures view(const Tensors& features, int64_t visible, int64_t infrared, bool normalize, Tensors& kept) {
  check(features.size() == 6 || features.size() == 1, "features: got ", features.size(),
      " tensors, expected six or one that stacks them");
  CqcFeatures result{};
  result.normalize = normalize;
  result.dtype = dtype_of(features[0], "features");
  result.dimensions = features[0].dim() == 2 ? features[0].size(1) : 0;
  int64_t first = 0;
  for (int set = 0; set < 6; ++set) {
    const Tensor& f = features[features.size() == 1 ? 0 : set];
    const int64_t rows = set < 3 ? visible : infrared;
    check(f.dim() == 2 && f.is_cpu() && f.scalar_type() == features[0].scalar_type() &&
              f.size(1) == result.dimensions,
        "features: expected CPU tensors (B, D) of one dtype");
    check(f.size(0) == (features.size() == 1 ? 3 * (visible + infrared) : rows), "features: got ", f.size(0),
        " rows for ", visible, " visible and ", infrared, " infrared labels");
    if (features.size() == 6 || set == 0) {
      kept.push_back((f.size(1) == 1 || f.stride(1) == 1) && is_aligned(f) ? f : dense(f));
    }
    const Tensor& readable = kept.back();
    result.row_stride[set] = readable.stride(0);
    result.sets[set] = static_cast<const char*>(readable.data_ptr()) +
                       first * readable.stride(0) * int64_t(readable.element_size());
    first = features.size() == 1 ? first + rows : 0;
  }
  return result;
}

Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  Tensor t = make_output(sizes, dtype, like, false);
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

template <class A>
void add_up(const Tensor& losses, int64_t count, const Tensor& total) {
  const A* values = losses.const_data_ptr<A>();
  *total.mutable_data_ptr<A>() = std::accumulate(values, values + count, A(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cqc_forward(Tensors features, Tensor labels,
    Tensor infrared_labels, double margin, bool detach_negative, bool normalize) {
  const Groups groups = group(labels, infrared_labels);
  Tensors kept;
  CqcForward call{};
  call.groups = groups.view();
  call.features = view(features, labels.numel(), infrared_labels.numel(), normalize, kept);
  call.margin = margin;
  call.detach_negative = detach_negative;
  call.parallel = pool;
  const ScalarType sums = precise(call.features.dtype);
  const int64_t capacity = labels.numel(), count = call.groups.identities;
  const Tensor total = make_output({}, sums, labels, false), losses = zeros({capacity}, sums, labels);
  const Tensor identities = make_output({capacity}, ScalarType::Long, labels, false),
               number = make_output({}, ScalarType::Long, labels, false),
               weights = zeros({capacity, 8}, sums, labels);
  int64_t* slot = identities.mutable_data_ptr<int64_t>();
  std::copy(groups.identities.begin(), groups.identities.end(), slot);
  std::fill(slot + count, slot + capacity, std::numeric_limits<int64_t>::max());
  *number.mutable_data_ptr<int64_t>() = count;
  call.losses = losses.data_ptr();
  call.weights = weights.data_ptr();
  kernels(call.features.dtype).cqc_forward(call);
  if (sums == ScalarType::Double) {
    add_up<double>(losses, count, total);
  } else {
    add_up<float>(losses, count, total);
  }
  return {total, losses, identities, number, weights};
}

Tensor cqc_backward(Tensor gradient, Tensors features, Tensor labels, Tensor infrared_labels, Tensor weights,
    bool detach_negative, bool normalize) {
  const Groups groups = group(labels, infrared_labels);
  const int64_t visible = labels.numel(), infrared = infrared_labels.numel();
  Tensors kept;
  CqcBackward call{};
  call.groups = groups.view();
  call.features = view(features, visible, infrared, normalize, kept);
  call.parallel = pool;
  const ScalarType sums = precise(call.features.dtype);
  check(weights.numel() == 8 * visible && weights.scalar_type() == sums,
      "weights: expected what the forward gave for these labels");
  check(gradient.dim() == 0 || gradient.numel() == visible, "gradient: expected a scalar or one a slot");
  const Tensor scale = converted(gradient, sums), own = dense(weights);
  call.detach_negative = detach_negative;
  call.gradient = scale.data_ptr();
  call.gradient_stride = gradient.dim() == 0 ? 0 : 1;
  call.weights = own.data_ptr();
  // The kernels write every row, except those of identities that only one modality has.
  const bool whole =
      int64_t(groups.order[0].size()) == visible && int64_t(groups.order[1].size()) == infrared;
  const std::vector<int64_t> sizes{3 * (visible + infrared), call.features.dimensions};
  const Tensor& like = features[0];
  const Tensor result =
      whole ? make_output(sizes, like.scalar_type(), like, false) : zeros(sizes, like.scalar_type(), like);
  const int64_t row = call.features.dimensions * int64_t(result.element_size());
  for (int set = 0; set < 6; ++set) {
    const int64_t first = set < 3 ? set * visible : 3 * visible + (set - 3) * infrared;
    call.feature_gradients[set] = static_cast<char*>(result.data_ptr()) + first * row;
  }
  kernels(call.features.dtype).cqc_backward(call);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mrcn_fast, CPU, library) {
  library.impl("cqc_forward", TORCH_BOX(&cqc_forward));
  library.impl("cqc_backward", TORCH_BOX(&cqc_backward));
}

}  // namespace mrcn
