// The CQC loss on CUDA tensors: checks the arguments and allocates the results.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cqc/cuda/kernels.h"
#include "cuda/tensors.h"

namespace mrcn {
namespace {

using Tensors = std::vector<Tensor>;

// Memory cannot hold rows for so many samples, and 32 bits suffice for the number of blocks of the backward.
constexpr int64_t most_samples = int64_t(1) << 24;

Tensor readable_rows(const Tensor& f) {
  return (f.size(1) == 1 || f.stride(1) == 1) && is_aligned(f) ? f : dense(f);
}

// The arguments of the forward and of the backward. The tensors own the memory that the pointers refer to.
class Ready {
 public:
  CqcSamples samples{};

  Ready(const Tensors& features, const Tensor& labels, const Tensor& infrared_labels, bool normalize) {
    check(features.size() == 6 || features.size() == 1, "features: got ", features.size(),
        " tensors, expected six or one that stacks them");
    kept_.reserve(8);
    take_labels(0, labels, features[0]);
    take_labels(1, infrared_labels, features[0]);
    take_rows(features);
    samples.features.normalize = normalize;
    find_width(int64_t(features[0].element_size()));
  }

  int64_t visible() const { return samples.count[0]; }
  int64_t infrared() const { return samples.count[1]; }
  int64_t dimensions() const { return samples.features.dimensions; }
  ScalarType sums() const { return precise(samples.features.dtype); }
  int64_t saved() const {
    const int64_t scales = samples.features.normalize ? 3 * (visible() + infrared()) : 0;
    return 9 * visible() + infrared() + scales;
  }

  std::string shape() const {
    return std::to_string(visible()) + " visible and " + std::to_string(infrared()) +
           " infrared samples of " + std::to_string(dimensions()) + " features";
  }

 private:
  Tensors kept_;

  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }

  void take_labels(int m, const Tensor& labels, const Tensor& like) {
    check(labels.dim() == 1 && labels.scalar_type() == ScalarType::Long && is_cuda_tensor(labels) &&
              labels.get_device_index() == like.get_device_index(),
        "labels: expected an int64 tensor (B,) on the features' device");
    check(labels.numel() <= most_samples, "labels: got ", labels.numel(), " samples, expected at most ",
        most_samples);
    samples.labels[m] = keep(dense(labels)).const_data_ptr<int64_t>();
    samples.count[m] = int(labels.numel());
  }

  void take_rows(const Tensors& features) {
    const Tensor& like = features[0];
    CqcFeatures& taken = samples.features;
    taken.dtype = dtype_of(like, "features");
    taken.dimensions = like.dim() == 2 ? like.size(1) : 0;
    const bool stacked = features.size() == 1;
    const int64_t rows[2] = {visible(), infrared()};
    for (int i = 0; i < int(features.size()); ++i) {
      const Tensor& f = features[i];
      check(f.dim() == 2 && is_cuda_tensor(f) && f.get_device_index() == like.get_device_index() &&
                f.scalar_type() == like.scalar_type() && f.size(1) == dimensions(),
          "features: expected tensors (B, D) of one dtype on one CUDA device");
      check(f.size(0) == (stacked ? 3 * (rows[0] + rows[1]) : rows[i / 3]), "features: got ", f.size(0),
          " rows for ", rows[0], " visible and ", rows[1], " infrared labels");
      const Tensor& readable = keep(readable_rows(f));
      const char* data = static_cast<const char*>(readable.const_data_ptr());
      const int64_t stride = readable.stride(0);
      for (int set = i; set < (stacked ? 6 : i + 1); ++set) {
        taken.sets[set] = data;
        taken.row_stride[set] = stride;
        data += rows[set / 3] * stride * int64_t(f.element_size());
      }
    }
  }

  // The gradients' rows have no gaps, and what torch allocates starts at a multiple of 16 bytes.
  void find_width(int64_t element) {
    const CqcFeatures& taken = samples.features;
    samples.wide = taken.dimensions * element % 16 == 0;
    for (int set = 0; set < 6; ++set) {
      samples.wide = samples.wide && reinterpret_cast<uintptr_t>(taken.sets[set]) % 16 == 0 &&
                     taken.row_stride[set] * element % 16 == 0;
    }
  }
};

// The pushed distances' weights are left for the backward whether it detaches them or not.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cqc_forward(Tensors features, Tensor labels,
    Tensor infrared_labels, double margin, [[maybe_unused]] bool detach_negative, bool normalize) {
  const Ready ready(features, labels, infrared_labels, normalize);
  const Tensor& like = features[0];
  const OnDevice device(like);
  const int64_t slots = ready.visible();
  const Tensor total = cuda_empty({}, ready.sums(), like), losses = cuda_empty({slots}, ready.sums(), like),
               identities = cuda_empty({slots}, ScalarType::Long, like),
               number = cuda_empty({}, ScalarType::Long, like),
               saved = cuda_empty({ready.saved()}, ready.sums(), like);
  CqcCudaForward call{};
  call.samples = ready.samples;
  call.margin = margin;
  call.losses = losses.mutable_data_ptr();
  call.identities = identities.mutable_data_ptr<int64_t>();
  call.saved = saved.mutable_data_ptr();
  call.total = total.mutable_data_ptr();
  call.number = number.mutable_data_ptr<int64_t>();
  check_launch(cuda::cqc_forward(call, device.stream()), "cqc_forward", like, [&] { return ready.shape(); });
  return {total, losses, identities, number, saved};
}

Tensor cqc_backward(Tensor gradient, Tensors features, Tensor labels, Tensor infrared_labels, Tensor saved,
    bool detach_negative, bool normalize) {
  const Ready ready(features, labels, infrared_labels, normalize);
  const Tensor& like = features[0];
  const OnDevice device(like);
  check(saved.numel() == ready.saved() && saved.scalar_type() == ready.sums() && is_cuda_tensor(saved),
      "saved: expected what the forward gave for these labels");
  check(is_cuda_tensor(gradient) &&
            (gradient.dim() == 0 || (gradient.dim() == 1 && gradient.numel() == ready.visible())),
      "gradient: expected a scalar or one a slot, on the features' device");
  const bool fits = gradient.scalar_type() == ready.sums();
  const Tensor scale = fits ? gradient : torch::stable::to(gradient, ready.sums()), own = dense(saved);
  const Tensor result =
      cuda_empty({3 * (ready.visible() + ready.infrared()), ready.dimensions()}, like.scalar_type(), like);
  CqcCudaBackward call{};
  call.samples = ready.samples;
  call.gradient = scale.const_data_ptr();
  call.gradient_stride = scale.dim() == 0 ? 0 : scale.stride(0);
  call.saved = own.const_data_ptr();
  call.detach_negative = detach_negative;
  call.feature_gradients = result.mutable_data_ptr();
  check_launch(
      cuda::cqc_backward(call, device.stream()), "cqc_backward", like, [&] { return ready.shape(); });
  return result;
}

}  // namespace

MRCN_CUDA_LIBRARY(library) {
  library.impl("cqc_forward", TORCH_BOX(&cqc_forward));
  library.impl("cqc_backward", TORCH_BOX(&cqc_backward));
}

}  // namespace mrcn
