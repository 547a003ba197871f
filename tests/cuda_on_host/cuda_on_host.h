// The library's .cu files on the processor: every name of csrc/cuda/runtime.h, and the words of CUDA that the
// kernels use. A kernel's threads are fibers, each with a stack of its own, of the thread that launches: one
// runs until it comes to a barrier, an exchange or a counter, then the next one, in an order that is drawn.
//
// So what a barrier is missing for comes out wrong in most orders, ThreadSanitizer sees the races between the
// kernel's threads and AddressSanitizer what runs over a block's shared memory, and a wait that may never end
// on a GPU is an error of the launch here.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define MRCN_DEVICE inline
#define MRCN_KERNEL(blocks) void

// For a program that has the kernels linked in, or Python's ctypes.
extern "C" {
// `blocks` and `l2_bytes`: what a device says of itself. At most `resident` blocks of a launch run at the
// same time; if it is negative, each launch draws a number up to -resident, and blocks start late. Their
// order and that of their threads is drawn from `seed`.
__attribute__((visibility("default"))) void cuda_on_host_set(
    int blocks, int resident, unsigned seed, long long l2_bytes);
// Launches and `clear` do nothing from now on, and succeed: what remains is the host's time of a call.
__attribute__((visibility("default"))) void cuda_on_host_stub(int on);
// Of the blocks that the device claims to hold, so many have no place for a launch of blocks that must run at
// the same time. 0 at first.
__attribute__((visibility("default"))) void cuda_on_host_busy(int blocks);
// The next launch does nothing and returns `error`.
__attribute__((visibility("default"))) void cuda_on_host_fail(int error);
// How many launches have run or done nothing in `cuda_on_host_stub`'s way.
__attribute__((visibility("default"))) long long cuda_on_host_launches();
}

namespace cuda_on_host {

using Where = std::source_location;

// Few, for all of them take turns; the kernels are written for any. What is compiled with a GPU's sizes
// (CUDA_ON_HOST_SIZES) only asks how the kernels divide their work there.
#if defined(CUDA_ON_HOST_SIZES)
constexpr int warp_lanes = 32;
constexpr int block_warps = 8;
#else
constexpr int warp_lanes = 4;
constexpr int block_warps = 2;
#endif
constexpr int block_threads = warp_lanes * block_warps;
// What a block may have without asking for more, and what it can ask for, as on an H100.
constexpr int most_shared = 48 << 10;
constexpr int most_shared_asked = 227 << 10;
constexpr int reserved_shared = 1 << 10;

struct Index {
  unsigned x;
};

// These are called by a kernel's threads, and unwind them once the launch has failed.
char* shared_memory();
void pass_block_barrier(Where where);
void pass_warp_barrier(Where where);
uint64_t exchange(uint64_t value, int mask, Where where);
uint32_t ballot(bool yes, Where where);
// `progress`: what is about to happen can end another thread's wait.
void act(bool progress);
void poll(Where where);
// Copies of 16 bytes to shared memory. They arrive at random moments.
constexpr int copied_bytes = 16;
void begin_copy(void* to, const void* from, Where where);
void commit_copies();
void wait_for_copies(int groups);

// For the host.
using Kernel = void (*)(const void* arguments);
int device_of(int shared, std::atomic<int>& asked_shared, int* blocks, int64_t* l2_bytes);
int processors();
int clear(void* memory, int64_t bytes);
int launch(Kernel kernel, const void* arguments, int blocks, int shared, int allowed_shared);
// Blocks that all run at the same time.
int launch_together(Kernel kernel, const void* arguments, int blocks, int shared, int allowed_shared);
bool is_refused(int error);
const char* error_text(int error);

}  // namespace cuda_on_host

extern constinit thread_local cuda_on_host::Index threadIdx, blockIdx, gridDim;
inline constexpr cuda_on_host::Index blockDim{cuda_on_host::block_threads};

inline void __syncthreads(cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::pass_block_barrier(where);
}
inline void __syncwarp(cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::pass_warp_barrier(where);
}

namespace mrcn::cuda {

using cuda_on_host::block_threads;
using cuda_on_host::block_warps;
using cuda_on_host::most_shared;
using cuda_on_host::warp_lanes;

// To the GPU's compiler any memory may be read as lines.
struct alignas(16) [[gnu::may_alias]] Line {
  uint32_t x, y, z, w;
};

// --- on the device ------------------------------------------------------------------------------------

inline char* shared_memory() { return cuda_on_host::shared_memory(); }

template <class V>
inline V exchange(V value, int mask, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  static_assert(std::is_arithmetic_v<V> && sizeof(V) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = cuda_on_host::exchange(bits, mask, where);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}
inline uint32_t ballot(bool yes, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  return cuda_on_host::ballot(yes, where);
}
inline int count_bits(uint32_t bits) { return std::popcount(bits); }

// Until it arrives, the destination is poison. The instrumented accesses here are what the sanitizers see of
// the copy.
inline void copy_async(
    Line* to, const Line* from, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  static_assert(sizeof(Line) == cuda_on_host::copied_bytes);
  [[maybe_unused]] const volatile uint32_t read = *reinterpret_cast<const volatile uint32_t*>(from);
  cuda_on_host::begin_copy(to, from, where);
  *to = {~0u, ~0u, ~0u, ~0u};
}
inline void commit_copies() { cuda_on_host::commit_copies(); }
template <int groups>
inline void wait_for_copies() {
  cuda_on_host::wait_for_copies(groups);
}

// An addition of 0 is a way to look.
inline int add_relaxed(int* counter, int n) {
  cuda_on_host::act(n != 0);
  return std::atomic_ref(*counter).fetch_add(n, std::memory_order_relaxed);
}
inline int add_acquire_release(int* counter, int n) {
  cuda_on_host::act(n != 0);
  return std::atomic_ref(*counter).fetch_add(n, std::memory_order_acq_rel);
}
inline int load_relaxed(const int* counter, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::poll(where);
  return std::atomic_ref(const_cast<int&>(*counter)).load(std::memory_order_relaxed);
}
inline int load_acquire(const int* counter, cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::poll(where);
  return std::atomic_ref(const_cast<int&>(*counter)).load(std::memory_order_acquire);
}
inline void pause() { cuda_on_host::act(false); }

template <class V>
inline V load_shared_by_blocks(const V* p) {
  return *p;
}
inline Line load_first(const Line* p) { return *p; }
inline Line load_last(const Line* p) { return *p; }
inline void store_once(Line* p, Line value) { *p = value; }

// --- on the host --------------------------------------------------------------------------------------

struct Device {
  int blocks;
  int64_t l2_bytes;
};

template <auto kernel>
inline int device_of(int shared, Device* device) {
  static std::atomic<int> asked_shared{-1};
  return cuda_on_host::device_of(shared, asked_shared, &device->blocks, &device->l2_bytes);
}

struct Capacity {
  int processors, blocks, shared, shared_per_block, reserved;
};

// How much shared memory a block of the kernel may have.
template <auto kernel>
inline std::atomic<int> allowed_shared{most_shared};

// A device that says it holds n blocks has n processors, for one block each.
template <auto kernel>
inline int capacity_of(Capacity* capacity) {
  using namespace cuda_on_host;
  allowed_shared<kernel> = most_shared_asked;
  *capacity = {processors(), 1, most_shared_asked + reserved_shared, most_shared_asked, reserved_shared};
  return 0;
}

inline int clear(void* memory, int64_t bytes, [[maybe_unused]] void* stream) {
  return cuda_on_host::clear(memory, bytes);
}

// Calls the kernel with the arguments at the address that it is given.
template <auto kernel, class Arguments>
inline void call_kernel(const void* given) {
  static_assert(std::is_same_v<decltype(kernel), void (*)(Arguments)>);
  // What CUDA can copy to a kernel.
  static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) <= 4096);
  kernel(*static_cast<const Arguments*>(given));
}

template <auto kernel, class Arguments>
inline int launch(const Arguments& arguments, int blocks, int shared, [[maybe_unused]] void* stream) {
  return cuda_on_host::launch(
      call_kernel<kernel, Arguments>, &arguments, blocks, shared, allowed_shared<kernel>);
}

template <auto kernel, class Arguments>
inline int launch_together(
    const Arguments& arguments, int blocks, int shared, [[maybe_unused]] void* stream) {
  return cuda_on_host::launch_together(
      call_kernel<kernel, Arguments>, &arguments, blocks, shared, allowed_shared<kernel>);
}

inline bool is_refused(int error) { return cuda_on_host::is_refused(error); }

inline const char* error_text(int error) { return cuda_on_host::error_text(error); }

}  // namespace mrcn::cuda
