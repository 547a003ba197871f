// What the kernels take from CUDA, by a few names of their own.
//
// The .cu files use CUDA's words for threads and barriers (threadIdx.x, blockIdx.x, __syncthreads) and, from
// here, what depends on the machine: the widths of warps and blocks, warp exchange, memory order, cache hints
// and the launch. tests/cuda_on_host/cuda_on_host.h gives all of it on the processor, so that the same
// files run where no GPU is.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <atomic>

#define MRCN_DEVICE __device__ __forceinline__
#define MRCN_KERNEL(blocks) __global__ void __launch_bounds__(mrcn::cuda::block_threads, blocks)

namespace mrcn::cuda {

constexpr int warp_lanes = 32;
constexpr int block_warps = 8;
constexpr int block_threads = warp_lanes * block_warps;

// 16 bytes, what a thread reads or writes at once.
using Line = uint4;

// --- on the device ------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 16 bytes.
MRCN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// The value of the lane whose number differs by `mask`; every lane of the warp has to call it. Neither this
// nor `ballot` orders memory: __syncwarp() does.
template <class V>
MRCN_DEVICE V exchange(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// In every lane, bit i tells whether lane i said yes; every lane of the warp has to call it.
MRCN_DEVICE uint32_t ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
MRCN_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

// Counters that blocks share. The order of memory is what `add_release` and `load_acquire` make: what a
// block's threads wrote before a barrier and one thread's `add_acquire_release` after it is seen by the
// threads of whoever saw the sum by `load_acquire` (or added to it) before a barrier.
MRCN_DEVICE int add_relaxed(int* counter, int n) { return atomicAdd(counter, n); }
MRCN_DEVICE int add_acquire_release(int* counter, int n) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
      : "=r"(before)
      : "l"(counter), "r"(n)
      : "memory");
  return before;
}
MRCN_DEVICE int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
MRCN_DEVICE void pause() { __nanosleep(64); }

// What another block wrote during this launch: from L2, the first cache that all blocks share.
template <class V>
MRCN_DEVICE V load_shared_by_blocks(const V* p) {
  return __ldcg(p);
}
// What will be read again soon, by another multiprocessor: kept in L2.
MRCN_DEVICE Line load_first(const Line* p) { return __ldcg(p); }
// What nobody reads again.
MRCN_DEVICE Line load_last(const Line* p) { return __ldcs(p); }
MRCN_DEVICE void store_once(Line* p, Line value) { __stcs(p, value); }

// --- on the host --------------------------------------------------------------------------------------

// What a block may have without asking for more.
constexpr int most_shared = 48 << 10;

struct Device {
  int blocks;  // of a kernel that the device holds at once
  int64_t l2_bytes;
};

// Asked for once a kernel and device: the calls take longer than a launch. `shared` may not change between.
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

// Zeros on the stream, before what follows there.
inline int clear(void* memory, int64_t bytes, void* stream) {
  return int(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// `blocks` blocks of `block_threads` with `shared` bytes, `most_shared` at most; 0 or CUDA's number of what
// went wrong.
template <auto kernel, class Arguments>
inline int launch(const Arguments& arguments, int blocks, int shared, void* stream) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return int(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(block_threads),
      pointers, shared, static_cast<cudaStream_t>(stream)));
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace mrcn::cuda

#else
#include "cuda_on_host.h"
#endif
