#include <cstdint>

#include "common/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mrcn {

namespace {

constexpr uintptr_t huge_page = uintptr_t(2) << 20;

// A hint: where the system has no huge pages to give, or the range is in use already, nothing happens.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / huge_page * huge_page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace

Tensor make_output(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor output = torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
  ask_for_huge_pages(output.mutable_data_ptr(), output.numel() * int64_t(output.element_size()));
  return output;
}

}  // namespace mrcn
