// What benchmarks/gpu_probe.py asks a GPU besides the library's kernels: how many blocks and clusters fit it,
// how long maps take to be moved without anything else, and how long a barrier of some blocks takes.
//
// Each function returns a number of at least 0, or CUDA's error code as a negative number.
#include <cstdint>

#include <cuda_runtime.h>

namespace {

constexpr int threads = 256;
constexpr int most_maps = 8;

struct Maps {
  uint4* map[most_maps];
};

__global__ void __launch_bounds__(threads) hold_kernel(int* result) {
  extern __shared__ int memory[];
  memory[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (result != nullptr) result[threadIdx.x] = memory[threads - 1 - threadIdx.x];
}

// Reads `reads` maps and writes `writes` others, line by line: each written line depends on the lines read at
// its place alone.
template <int reads, int writes>
__global__ void __launch_bounds__(threads) move_kernel(Maps from, Maps to, int64_t lines) {
  const int64_t step = int64_t(gridDim.x) * threads;
  for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < lines; i += step) {
    uint4 sum = make_uint4(i, i, i, i);
#pragma unroll
    for (int m = 0; m < reads; ++m) {
      const uint4 line = __ldcs(from.map[m] + i);
      sum.x ^= line.x, sum.y ^= line.y, sum.z ^= line.z, sum.w ^= line.w;
    }
#pragma unroll
    for (int m = 0; m < writes; ++m) __stcs(to.map[m] + i, sum);
  }
}

// `rounds` barriers of groups of blocks, each a counter per group that only grows.
__global__ void __launch_bounds__(threads) barrier_kernel(int* counters, int group, int rounds) {
  int* counter = counters + 32 * (blockIdx.x / group);
  for (int round = 1; round <= rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      int seen;
      asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(seen) : "l"(counter) : "memory");
      do {
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < round * group);
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    }
    __syncthreads();
  }
}

int failed(cudaError_t error) { return -int(error); }

template <int reads, int writes>
int move(const Maps& from, const Maps& to, int64_t lines, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  move_kernel<reads, writes><<<8 * processors, threads, 0, stream>>>(from, to, lines);
  return failed(cudaGetLastError());
}

}  // namespace

extern "C" {

// How many clusters of `size` blocks with `bytes` of shared memory each run at once.
int gpu_probe_clusters(int size, int bytes) {
  cudaError_t error = cudaFuncSetAttribute(hold_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(hold_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return failed(error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int number = 0;
  error = cudaOccupancyMaxActiveClusters(&number, hold_kernel, &config);
  return error == cudaSuccess ? number : failed(error);
}

// How many blocks with `bytes` of shared memory each run at once, as a cooperative launch needs them.
int gpu_probe_blocks(int bytes) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaFuncSetAttribute(hold_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, hold_kernel, threads, bytes);
  }
  return error == cudaSuccess ? processors * each : failed(error);
}

// Moves maps of `lines` lines of 16 bytes: 2 to 4, 6 to 2 or none to 4.
int gpu_probe_move(
    const uint64_t* from, int reads, const uint64_t* to, int writes, int64_t lines, void* stream) {
  if (reads > most_maps || writes > most_maps) return failed(cudaErrorInvalidValue);
  Maps read{}, written{};
  for (int m = 0; m < reads; ++m) read.map[m] = reinterpret_cast<uint4*>(from[m]);
  for (int m = 0; m < writes; ++m) written.map[m] = reinterpret_cast<uint4*>(to[m]);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (reads == 2 && writes == 4) return move<2, 4>(read, written, lines, s);
  if (reads == 6 && writes == 2) return move<6, 2>(read, written, lines, s);
  if (reads == 0 && writes == 4) return move<0, 4>(read, written, lines, s);
  return failed(cudaErrorInvalidValue);
}

// Launches `blocks` blocks that wait for one another in groups, `rounds` times. `counters` are 32 integers
// per group, of the value 0.
int gpu_probe_barrier(int* counters, int blocks, int group, int rounds, void* stream) {
  void* arguments[] = {&counters, &group, &rounds};
  return failed(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(barrier_kernel), dim3(blocks),
      dim3(threads), arguments, 0, static_cast<cudaStream_t>(stream)));
}

}  // extern "C"
