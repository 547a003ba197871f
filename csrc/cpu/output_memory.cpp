#include "cpu/output_memory.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "cpu/no_memory.h"
#include "cpu/storage.h"

namespace mrcn {

namespace {

constexpr int64_t huge_page = int64_t(2) << 20, page = 4096, line = 64;

// Only a hint: where the system has no huge pages, or the range is already in use, it has no effect.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr auto size = uintptr_t(huge_page);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + size - 1) / size * size;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / size * size;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Whole pages of the system.
struct Pages {
  void* data;
  int64_t bytes;
};

// The memory of large outputs that were freed, for the next outputs. Outputs in use and kept pages together
// never exceed the most that outputs have used at once.
class Reserve {
 public:
  Pages take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The newest first: more of it may be in a cache.
    const auto fits = std::find_if(kept_.rbegin(), kept_.rend(),
        [bytes](const Pages& p) { return p.bytes >= bytes && p.bytes <= bytes + bytes / 8; });
    if (fits != kept_.rend()) {
      const Pages found = *fits;
      kept_.erase(std::next(fits).base());
      kept_bytes_ -= found.bytes;
      return count(found);
    }
    const int64_t wanted = (bytes + page - 1) / page * page;
    while (!kept_.empty() && live_bytes_ + kept_bytes_ + wanted > most_) free_oldest();
    void* data = get(wanted);
    if (data == nullptr) {
      while (!kept_.empty()) free_oldest();
      data = get(wanted);
    }
    if (data == nullptr) no_memory(wanted);
    ask_for_huge_pages(data, wanted);
    return count({data, wanted});
  }

  void give_back(const Pages& pages) {
    const std::lock_guard<std::mutex> lock(mutex_);
    live_bytes_ -= pages.bytes;
    kept_bytes_ += pages.bytes;
    kept_.push_back(pages);
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!kept_.empty()) free_oldest();
    most_ = live_bytes_;
  }

  MemoryInUse in_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {live_bytes_, kept_bytes_};
  }

  // Around a fork: the child has no thread that would unlock what another thread has locked.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void* get(int64_t bytes) {
    void* data = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  void free_oldest() {
    munmap(kept_.front().data, size_t(kept_.front().bytes));
    kept_bytes_ -= kept_.front().bytes;
    kept_.erase(kept_.begin());
  }
  const Pages& count(const Pages& taken) {
    live_bytes_ += taken.bytes;
    most_ = std::max(most_, live_bytes_);
    return taken;
  }

  std::mutex mutex_;
  std::vector<Pages> kept_;  // the oldest first
  int64_t live_bytes_ = 0, kept_bytes_ = 0, most_ = 0;
};

Reserve& reserve() {
  static Reserve& it = *new Reserve;  // tensors are freed even when a process ends
  static const auto unlock = [] { it.unlock(); };
  static const int registered = pthread_atfork([] { it.lock(); }, unlock, unlock);
  (void)registered;
  return it;
}

int64_t elements(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
}

// Memory that begins at a given cache line of a page.
Lent lend(int64_t bytes, int64_t at_line) {
  const Pages pages = reserve().take(bytes + page);
  return {static_cast<char*>(pages.data) + at_line * line, new Pages(pages)};
}

constexpr Lender lender{
    [](int64_t bytes) { return lend(bytes, 0); },
    [](void* owner) {
      const Pages* pages = static_cast<Pages*>(owner);
      reserve().give_back(*pages);
      delete pages;
    },
};

MakeTensor make_tensor = nullptr;  // of the library _storage, once it is connected

// The cache line of a page that is furthest from the lines of `taken`, in both directions.
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

Tensor make_large(int64_t at_line, int64_t bytes, const std::vector<int64_t>& sizes, const Tensor& like,
    bool channels_last) {
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  const std::vector<int64_t> strides = channels_last ? std::vector<int64_t>{H * W * C, 1, W * C, C}
                                                     : std::vector<int64_t>{C * H * W, H * W, W, 1};
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
  const NewTensor made{
      lend(bytes, at_line), bytes, sizes.data(), strides.data(), int64_t(sizes.size()), dtype};
  return Tensor(static_cast<AtenTensorHandle>(make_tensor(made)));
}

}  // namespace

void no_memory(int64_t bytes) {
  throw std::runtime_error("mrcn_fast can't allocate " + std::to_string(bytes) +
                           " bytes; use a smaller batch, smaller maps or a half dtype");
}

std::string connect_storage(const std::string& path, const std::string& torch_version) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  const auto compiled_for =
      reinterpret_cast<decltype(&mrcn_storage_torch)>(dlsym(library, "mrcn_storage_torch"));
  const auto connect =
      reinterpret_cast<decltype(&mrcn_connect_storage)>(dlsym(library, "mrcn_connect_storage"));
  if (compiled_for == nullptr || connect == nullptr) return path + " is not of this version of mrcn_fast";
  if (compiled_for() != torch_version) {
    return std::string("it was compiled for torch ") + compiled_for() + ", and this is " + torch_version;
  }
  make_tensor = connect(lender);
  return "";
}

void release_memory() { reserve().release(); }

MemoryInUse memory_in_use() { return reserve().in_use(); }

Tensor make_output(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  try {
    Tensor output = torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
    ask_for_huge_pages(output.mutable_data_ptr(), output.numel() * int64_t(output.element_size()));
    return output;
  } catch (const std::exception&) {
    // The error of the stable headers only says which of torch's functions failed.
    const Tensor one = torch::stable::empty({1}, dtype, std::nullopt, like.device());
    no_memory(elements(sizes) * int64_t(one.element_size()));
  }
}

// A CPU delays a read that has the same address within its page as a recent write, because it takes the read
// for one of the written value. Streaming stores with the same address within their pages hinder each other,
// too. The C library lets all large tensors begin at nearly the same place of a page, which costs up to twice
// the time of a pass.
std::vector<Tensor> make_maps(int count, const std::vector<int64_t>& sizes, const Tensor& like,
    bool channels_last, std::vector<const void*> beside) {
  const int64_t bytes = elements(sizes) * int64_t(like.element_size());
  std::vector<Tensor> maps;
  for (int k = 0; k < count; ++k) {
    maps.push_back(bytes < huge_page || make_tensor == nullptr
                       ? make_output(sizes, like.scalar_type(), like, channels_last)
                       : make_large(furthest_line(beside), bytes, sizes, like, channels_last));
    beside.push_back(maps.back().data_ptr());
  }
  return maps;
}

}  // namespace mrcn
