#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "common/tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mrcn {

namespace {

constexpr uintptr_t huge_page = uintptr_t(2) << 20;
constexpr int64_t page = 4096, line = 64;

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

// What large tensors leave when they are freed, for the next ones: the system zeroes each page that it gives,
// which takes longer than the block. Tensors and what lies here are never more together than the tensors were
// at once.
class Reserve {
 public:
  Tensor take(int64_t bytes, const Tensor& like) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The newest first: more of it may be in a cache.
    const auto fits = std::find_if(free_.rbegin(), free_.rend(),
        [bytes](const Tensor& t) { return t.numel() >= bytes && t.numel() <= bytes + bytes / 8; });
    if (fits != free_.rend()) {
      const Tensor found = *fits;
      free_.erase(std::next(fits).base());
      return count(found);
    }
    while (!free_.empty() && used_ + bytes + lying() > most_) free_.erase(free_.begin());
    const Tensor made = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, like.device());
    ask_for_huge_pages(made.mutable_data_ptr(), bytes);
    return count(made);
  }

  void give_back(const Tensor& memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= memory.numel();
    free_.push_back(memory);
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.clear();
    most_ = used_;
  }

 private:
  const Tensor& count(const Tensor& taken) {
    used_ += taken.numel();
    most_ = std::max(most_, used_);
    return taken;
  }

  int64_t lying() const {
    int64_t bytes = 0;
    for (const Tensor& t : free_) bytes += t.numel();
    return bytes;
  }

  std::mutex mutex_;
  std::vector<Tensor> free_;  // the oldest first
  int64_t used_ = 0, most_ = 0;
};

Reserve& reserve() {
  static Reserve& it = *new Reserve;  // tensors are freed even when a process ends
  return it;
}

// The line of a page that lies furthest from those of `taken`, to either side.
int64_t furthest_line(const std::vector<const void*>& taken) {
  constexpr int64_t lines = page / line;
  int64_t best = 0, most = -1;
  for (int64_t at = 0; at < lines; ++at) {
    int64_t nearest = lines;
    for (const void* p : taken) {
      const int64_t away = std::abs(at - int64_t(reinterpret_cast<uintptr_t>(p) % page) / line);
      nearest = std::min({nearest, away, lines - away});
    }
    if (nearest > most) best = at, most = nearest;
  }
  return best;
}

// A tensor that begins at a line of a page, in memory of the reserve. As a view of that one it would begin
// `storage_offset` elements into it, where compiled code expects none. Its storage can't be resized.
Tensor make_at_line(int64_t at, const std::vector<int64_t>& sizes, const Tensor& like, bool channels_last) {
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  const std::vector<int64_t> strides = channels_last ? std::vector<int64_t>{H * W * C, 1, W * C, C}
                                                     : std::vector<int64_t>{C * H * W, H * W, W, 1};
  const int64_t bytes = sizes[0] * C * H * W * int64_t(like.element_size());
  const Tensor memory = reserve().take(bytes + page, like);
  char* data = static_cast<char*>(memory.mutable_data_ptr());
  data += (at * line + page - int64_t(reinterpret_cast<uintptr_t>(data) % page)) % page;
  return torch::stable::from_blob(data, sizes, strides, like.device(), like.scalar_type(),
      [memory](void*) { reserve().give_back(memory); });
}

}  // namespace

void release_memory() { reserve().release(); }

Tensor make_output(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor output = torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
  ask_for_huge_pages(output.mutable_data_ptr(), output.numel() * int64_t(output.element_size()));
  return output;
}

// A processor takes a read for one of what was written last, and waits, where both have the same address
// within their pages; and lines written past the caches hinder each other there. Large tensors all begin at
// one place of a page, or a line or two apart, as the C library gives them memory: up to twice the time of a
// pass.
std::vector<Tensor> make_maps(int count, const std::vector<int64_t>& sizes, const Tensor& like,
    bool channels_last, std::vector<const void*> beside) {
  const int64_t bytes = sizes[0] * sizes[1] * sizes[2] * sizes[3] * int64_t(like.element_size());
  std::vector<Tensor> maps;
  for (int k = 0; k < count; ++k) {
    maps.push_back(bytes < int64_t(huge_page)
                       ? make_output(sizes, like.scalar_type(), like, channels_last)
                       : make_at_line(furthest_line(beside), sizes, like, channels_last));
    beside.push_back(maps.back().data_ptr());
  }
  return maps;
}

}  // namespace mrcn
