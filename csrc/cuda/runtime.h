// Everything that the kernels use of CUDA, under names of our own.
//
// The .cu files use CUDA's names for threads and barriers (threadIdx.x, blockIdx.x, __syncthreads).
// Everything else that depends on the machine is here: the sizes of warps and blocks, exchange within a warp,
// memory order, cache hints, and launches. tests/cuda_on_host/cuda_on_host.h provides all of it on the CPU,
// so that the same files run where there is no GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

#define MRCN_DEVICE __device__ __forceinline__
#define MRCN_KERNEL(blocks) __global__ void __launch_bounds__(mrcn::cuda::block_threads, blocks)

namespace mrcn::cuda {

constexpr int warp_lanes = 32;
constexpr int block_warps = 8;
constexpr int block_threads = warp_lanes * block_warps;

// 16 bytes, the most that a thread reads or writes at once.
using Line = uint4;

// --- on the device ------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 16 bytes.
MRCN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// The value of the lane whose number differs in the bits of `mask`. Every lane of the warp must call it.
// Neither `exchange` nor `ballot` orders memory: __syncwarp() does.
template <class V>
MRCN_DEVICE V exchange(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Every lane gets the bits of all lanes: bit i is `yes` of lane i. Every lane of the warp must call it.
MRCN_DEVICE uint32_t ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
MRCN_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

// Copies lines from global to shared memory while the thread goes on. The copies since the thread's last
// `commit_copies` are a group. After `wait_for_copies<n>`, all groups of the thread but the newest n have
// arrived. The thread itself then sees them, the other threads of the block see them after their next
// barrier. GPUs before sm_80 wait for each copy.
MRCN_DEVICE void copy_async(Line* to, const Line* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from)
      : "memory");
#else
  *to = __ldcg(from);
#endif
}
MRCN_DEVICE void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int groups>
MRCN_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// Counters that blocks share, and the memory order that they provide. Suppose that the threads of a block
// write, wait at a barrier, and one of them calls `add_acquire_release`. If a thread of another block sees
// the sum by `load_acquire` (or adds to it), then all threads of its block see these writes after their next
// barrier.
MRCN_DEVICE int add_relaxed(int* counter, int n) { return atomicAdd(counter, n); }
MRCN_DEVICE int add_acquire_release(int* counter, int n) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
      : "=r"(before)
      : "l"(counter), "r"(n)
      : "memory");
  return before;
}
MRCN_DEVICE int load_relaxed(const int* counter) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter));
  return value;
}
MRCN_DEVICE int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
MRCN_DEVICE void pause() { __nanosleep(64); }

// Reads what another block wrote during this launch: from L2, the first cache that all blocks share.
template <class V>
MRCN_DEVICE V load_shared_by_blocks(const V* p) {
  return __ldcg(p);
}
// Reads what another multiprocessor will soon read again: kept in L2.
MRCN_DEVICE Line load_first(const Line* p) { return __ldcg(p); }
// Reads or writes what no thread reads again.
MRCN_DEVICE Line load_last(const Line* p) { return __ldcs(p); }
MRCN_DEVICE void store_once(Line* p, Line value) { __stcs(p, value); }

// --- on the host --------------------------------------------------------------------------------------

// The most shared memory, in bytes, that a block may have without a special request.
constexpr int most_shared = 48 << 10;

struct Device {
  int blocks;  // how many blocks of a kernel run on the device at once
  int64_t l2_bytes;
};

// Asks CUDA once per kernel and device, because the calls take longer than a launch. `shared`, the bytes of
// shared memory, must be the same at every call for a kernel.
template <auto kernel>
inline int device_of(int shared, Device* device) {
  constexpr int devices = 64;
  static std::atomic<int> known_blocks[devices];
  static std::atomic<int64_t> known_bytes[devices];
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return int(error);
  const bool keeps = index < devices;
  if (keeps && known_blocks[index].load() > 0) {
    *device = {known_blocks[index].load(), known_bytes[index].load()};
    return 0;
  }
  int processors = 0, resident = 0, bytes = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, index);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, block_threads, shared);
  }
  if (error != cudaSuccess) return int(error);
  if (resident == 0) return int(cudaErrorLaunchOutOfResources);
  *device = {processors * resident, bytes};
  if (keeps) {
    known_bytes[index].store(bytes);
    known_blocks[index].store(device->blocks);
  }
  return 0;
}

// What a device has for a kernel whose blocks take different amounts of shared memory, and are launched to
// run at the same time.
struct Capacity {
  int processors;
  int blocks;            // per processor, as far as registers and threads go
  int shared;            // bytes of shared memory per processor
  int shared_per_block;  // the most that a block may have
  int reserved;          // what a block takes of its processor besides
};

// Asks CUDA once per kernel and device, and lets the kernel have all shared memory that a block may have.
// There are no processors where the device can't launch blocks that must run at the same time.
template <auto kernel>
inline int capacity_of(Capacity* capacity) {
  constexpr int devices = 64;
  static std::atomic<bool> known[devices];
  static Capacity kept[devices];
  static std::mutex asking;
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return int(error);
  const bool keeps = index < devices;
  if (keeps && known[index].load(std::memory_order_acquire)) {
    *capacity = kept[index];
    return 0;
  }
  int cooperative = 0;
  cudaError_t error = cudaSuccess;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  ask(&cooperative, cudaDevAttrCooperativeLaunch);
  ask(&capacity->processors, cudaDevAttrMultiProcessorCount);
  ask(&capacity->shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&capacity->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&capacity->reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&capacity->blocks, kernel, block_threads, 0);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
        cudaFuncAttributeMaxDynamicSharedMemorySize, capacity->shared_per_block);
  }
  if (error != cudaSuccess) return int(error);
  if (cooperative == 0) capacity->processors = 0;
  const std::lock_guard<std::mutex> lock(asking);
  if (keeps && !known[index].load()) {
    kept[index] = *capacity;
    known[index].store(true, std::memory_order_release);
  }
  return 0;
}

// Sets memory to zero on the stream.
inline int clear(void* memory, int64_t bytes, void* stream) {
  return int(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Launches `blocks` blocks of `block_threads` threads with `shared` (at most `most_shared`) bytes of shared
// memory. Returns 0 or CUDA's error code.
template <auto kernel, class Arguments>
inline int launch(const Arguments& arguments, int blocks, int shared, void* stream) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return int(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(block_threads),
      pointers, shared, static_cast<cudaStream_t>(stream)));
}

// Like `launch`, for a kernel whose capacity was asked for: all blocks run at the same time, or the launch is
// refused.
template <auto kernel, class Arguments>
inline int launch_together(const Arguments& arguments, int blocks, int shared, void* stream) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return int(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
      dim3(block_threads), pointers, shared, static_cast<cudaStream_t>(stream)));
}

// Whether the error of `launch_together` says that so many blocks can't run at the same time here, in which
// case nothing was launched. CUDA then keeps no error for a later call to find.
inline bool is_refused(int error) {
  const bool refused = error == int(cudaErrorCooperativeLaunchTooLarge) ||
                       error == int(cudaErrorNotSupported) || error == int(cudaErrorNotPermitted);
  if (refused) cudaGetLastError();
  return refused;
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace mrcn::cuda

#else
#include "cuda_on_host.h"
#endif
