// What the emulator promises, by toy kernels: tests/test_cuda_on_host.py builds and runs it, as it is and
// with each sanitizer.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/runtime.h"

namespace mrcn::cuda {
namespace {

int failures = 0;

void check(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void check_error(int error, const std::vector<std::string>& parts) {
  check(error != 0, "no error, for one with " + parts[0]);
  if (error == 0) return;
  const std::string text = error_text(error);
  for (const std::string& part : parts) check(contains(text, part), "'" + part + "' in: " + text);
}

void check_runs(int error, const std::string& what) {
  check(error == 0, what + (error == 0 ? "" : std::string(": ") + error_text(error)));
}

void set(int resident, unsigned seed = 0) { cuda_on_host_set(8, resident, seed, 1 << 20); }

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

int thread_number() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

// --- barriers, exchange, ballot -----------------------------------------------------------------------

struct Sums {
  const float* x;
  float* sums;
};

template <int halves>
MRCN_KERNEL(2)
sum_by_barriers(Sums a) {
  float* part = reinterpret_cast<float*>(shared_memory());
  part[threadIdx.x] = a.x[thread_number()];
  for (unsigned step = halves; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
  }
  if (threadIdx.x == 0) a.sums[blockIdx.x] = part[0];
}

void test_barriers() {
  constexpr int blocks = 5;
  std::vector<float> x(blocks * block_threads), sums(blocks);
  std::iota(x.begin(), x.end(), 1.0f);
  set(2);
  const int error = launch<sum_by_barriers<block_threads / 2>>(
      Sums{x.data(), sums.data()}, blocks, block_threads * sizeof(float), nullptr);
  check_runs(error, "sums by barriers");
  for (int b = 0; b < blocks; ++b) {
    const auto first = x.begin() + b * block_threads;
    check(
        sums[b] == std::accumulate(first, first + block_threads, 0.0f), "sum of block " + std::to_string(b));
  }
}

struct Butterflies {
  double* sums;
  int* highest;
  uint32_t* odd;
};

template <int rounds>
MRCN_KERNEL(2)
exchange_and_vote(Butterflies a) {
  const int n = thread_number();
  for (int round = 0; round < rounds; ++round) {
    double sum = n + round;
    int highest = n * (round + 1);
    for (int mask = 1; mask < warp_lanes; mask *= 2) {
      sum += exchange(sum, mask);
      highest = std::max(highest, exchange(highest, mask));
    }
    const uint32_t odd = ballot((n + round) % 2 != 0);
    if (round % block_warps == n / warp_lanes % block_warps) pause();
    a.sums[n] = sum;
    a.highest[n] = highest;
    a.odd[n] = odd;
  }
}

void test_exchange() {
  constexpr int blocks = 3, rounds = 20, last = rounds - 1;
  std::vector<double> sums(blocks * block_threads);
  std::vector<int> highest(sums.size());
  std::vector<uint32_t> odd(sums.size());
  set(3);
  check_runs(launch<exchange_and_vote<rounds>>(
                 Butterflies{sums.data(), highest.data(), odd.data()}, blocks, 0, nullptr),
      "exchange and ballot");
  for (int n = 0; n < int(sums.size()); ++n) {
    double sum = 0;
    uint32_t bits = 0;
    const int first = n / warp_lanes * warp_lanes;
    for (int lane = 0; lane < warp_lanes; ++lane) {
      sum += first + lane + last;
      bits |= uint32_t((first + lane + last) % 2) << lane;
    }
    const std::string of = " of thread " + std::to_string(n);
    check(sums[n] == sum, "the sum" + of);
    check(highest[n] == (first + warp_lanes - 1) * rounds, "the highest" + of);
    check(odd[n] == bits && count_bits(odd[n]) == warp_lanes / 2, "the ballot" + of);
  }
}

// Each lane reads what its neighbour wrote before __syncwarp.
struct Neighbours {
  int* seen;
};

template <int rounds>
MRCN_KERNEL(2)
pass_to_neighbour(Neighbours a) {
  int* mine = reinterpret_cast<int*>(shared_memory());
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    mine[threadIdx.x] = round;
    __syncwarp();
    sum += mine[threadIdx.x ^ 1];
    __syncwarp();
  }
  a.seen[threadIdx.x] = sum;
}

void test_warp_barrier() {
  constexpr int rounds = 20;
  std::vector<int> seen(block_threads);
  set(1);
  check_runs(
      launch<pass_to_neighbour<rounds>>(Neighbours{seen.data()}, 1, block_threads * sizeof(int), nullptr),
      "__syncwarp");
  for (int sum : seen) check(sum == rounds * (rounds - 1) / 2, "what a lane saw of its neighbour");
}

// --- shared memory ------------------------------------------------------------------------------------

struct Poison {
  int bytes;
  int* wrong;
};

template <int unused>
MRCN_KERNEL(2)
look_for_poison(Poison a) {
  char* memory = shared_memory();
  int wrong = reinterpret_cast<uintptr_t>(memory) % 16 != 0;
  for (int at = int(threadIdx.x); at < a.bytes; at += block_threads) wrong += memory[at] != char(0xff);
  add_relaxed(a.wrong, wrong);
  __syncthreads();
  for (int at = int(threadIdx.x); at < a.bytes; at += block_threads) memory[at] = 0;
}

void test_shared_memory() {
  constexpr int blocks = 6, bytes = 1001;
  int wrong = 0;
  set(2);
  check_runs(launch<look_for_poison<0>>(Poison{bytes, &wrong}, blocks, bytes, nullptr), "shared memory");
  check(wrong == 0, "shared memory begins aligned and poisoned");
  check_error(launch<look_for_poison<0>>(Poison{}, 1, (48 << 10) + 1, nullptr), {"49153 bytes of shared"});
  Device device{};
  check_runs(device_of<look_for_poison<0>>(64, &device), "device_of");
  check(device.blocks == 8 && device.l2_bytes == 1 << 20, "what device_of tells");
  check_runs(device_of<look_for_poison<0>>(64, &device), "device_of once more");
  check_error(device_of<look_for_poison<0>>(65, &device), {"65 bytes of shared memory, before with 64"});
}

// --- order of the blocks ------------------------------------------------------------------------------

struct Starts {
  int* counters;  // the next turn, blocks running, the most that have run
  int* order;
};

template <int unused>
MRCN_KERNEL(2)
note_start(Starts a) {
  if (threadIdx.x == 0) {
    a.order[add_relaxed(a.counters, 1)] = int(blockIdx.x);
    const int running = add_relaxed(a.counters + 1, 1) + 1;
    int most = load_acquire(a.counters + 2);
    while (running > most && !std::atomic_ref(a.counters[2]).compare_exchange_weak(most, running)) {
    }
    for (int i = 0; i < 5; ++i) pause();
    add_relaxed(a.counters + 1, -1);
  }
}

std::vector<int> order_of(int resident, unsigned seed) {
  constexpr int blocks = 12;
  std::vector<int> counters(3, 1), order(blocks, -1);
  set(resident, seed);
  check_runs(clear(counters.data(), 3 * sizeof(int), nullptr), "clear");
  check_runs(launch<note_start<0>>(Starts{counters.data(), order.data()}, blocks, 0, nullptr), "starts");
  check(counters[0] == blocks && counters[1] == 0, "every block runs once");
  check(counters[2] == std::min(resident, blocks), "as many blocks run as are resident");
  std::vector<int> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (int b = 0; b < blocks; ++b) check(sorted[b] == b, "block " + std::to_string(b) + " runs");
  return order;
}

void test_order() {
  check(order_of(1, 3) == order_of(1, 3), "a seed gives an order");
  check(order_of(1, 3) != order_of(1, 4), "another seed gives another order");
  order_of(3, 1);
  order_of(20, 1);
}

// --- waits --------------------------------------------------------------------------------------------

// Block of ticket t adds to what the block of ticket t - 1 has left.
struct Chain {
  int* ticket;
  int* flags;
  int* sums;
};

template <int unused>
MRCN_KERNEL(2)
add_in_turn(Chain a) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *shared = add_relaxed(a.ticket, 1);
  __syncthreads();
  const int ticket = *shared;
  if (ticket > 0) {
    if (threadIdx.x == 0) {
      while (load_acquire(a.flags + ticket - 1) < 1) pause();
    }
    __syncthreads();
  }
  int* sums = a.sums + ticket * block_threads;
  const int before = ticket > 0 ? load_shared_by_blocks(sums - block_threads + (threadIdx.x ^ 1)) : 0;
  sums[threadIdx.x] = before + ticket;
  __syncthreads();
  if (threadIdx.x == 0) add_acquire_release(a.flags + ticket, 1);
}

void test_tickets() {
  constexpr int blocks = 9;
  for (int resident : {1, 2, 3, blocks}) {
    for (unsigned seed = 0; seed < 6; ++seed) {
      int ticket = 0;
      std::vector<int> flags(blocks), sums(blocks * block_threads);
      set(resident, seed);
      const std::string with =
          " with " + std::to_string(resident) + " resident, seed " + std::to_string(seed);
      check_runs(
          launch<add_in_turn<0>>(Chain{&ticket, flags.data(), sums.data()}, blocks, sizeof(int), nullptr),
          "tickets" + with);
      for (int t = 0; t < block_threads; ++t) {
        check(sums[(blocks - 1) * block_threads + t] == blocks * (blocks - 1) / 2, "the chain's sum" + with);
      }
    }
  }
}

struct Flag {
  int* flag;
};

template <bool pauses>
MRCN_KERNEL(2)
wait_for_last_block(Flag a) {
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) add_acquire_release(a.flag, 1);
  if (blockIdx.x > 0) return;
  if (threadIdx.x == 0) {
    while (load_acquire(a.flag) == 0) {
      if (pauses) pause();
      add_relaxed(a.flag, 0);
    }
  }
  __syncthreads();
}

template <bool pauses>
void test_wait(int resident, int blocks, bool& ran, bool& stuck) {
  for (unsigned seed = 0; seed < 8; ++seed) {
    int flag = 0;
    set(resident, seed);
    const auto start = std::chrono::steady_clock::now();
    const int error = launch<wait_for_last_block<pauses>>(Flag{&flag}, blocks, 0, nullptr);
    (error == 0 ? ran : stuck) = true;
    if (error != 0) {
      check_error(error, {"deadlock: ", "block 0: thread 0 polling at ",
                             "test_cuda_on_host.cpp:", "threads 1-7 waiting in __syncthreads at "});
    }
    check(milliseconds_since(start) < 10e3, "a deadlock is found in time");
  }
}

void test_deadlock() {
  bool ran = false, stuck = false;
  test_wait<true>(1, 3, ran, stuck);
  check(ran && stuck, "one resident block: a deadlock in some orders");
  ran = stuck = false;
  test_wait<false>(1, 4, ran, stuck);
  check(ran && stuck, "without a pause: the same");
  ran = stuck = false;
  test_wait<true>(2, 4, ran, stuck);
  check(ran && !stuck, "with room for a block beside the one that waits: no deadlock");
}

// --- blocks that run at the same time, and copies ------------------------------------------------------

// All blocks wait for each other.
template <int unused>
MRCN_KERNEL(1)
meet_all(Flag a) {
  if (threadIdx.x == 0) {
    add_acquire_release(a.flag, 1);
    while (load_relaxed(a.flag) < int(gridDim.x)) pause();
    load_acquire(a.flag);
  }
  __syncthreads();
}

void test_meeting() {
  int arrived = 0;
  const auto meet = [&](int blocks) {
    return launch_together<meet_all<0>>(Flag{&arrived}, blocks, 0, nullptr);
  };
  for (unsigned seed = 0; seed < 6; ++seed) {
    set(1, seed);
    arrived = 0;
    check_runs(meet(7), "a meeting");
    check(arrived == 7, "all blocks meet");
    arrived = 0;
    check_error(launch<meet_all<0>>(Flag{&arrived}, 7, 0, nullptr), {"deadlock"});
  }
  arrived = 0;
  const long long before = cuda_on_host_launches();
  check(is_refused(meet(9)), "nine blocks on a device for eight");
  cuda_on_host_busy(3);
  check(is_refused(meet(6)), "six blocks where three of eight places are taken");
  check(cuda_on_host_launches() == before && arrived == 0, "a refused launch does nothing");
  check_runs(meet(5), "five blocks there");
  cuda_on_host_busy(0);
  cuda_on_host_fail(700);
  check(!is_refused(meet(5)), "another error is no refusal");
}

void test_random_residents() {
  int deadlocks = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    int flag = 0;
    set(-4, seed);
    deadlocks += launch<wait_for_last_block<true>>(Flag{&flag}, 4, 0, nullptr) != 0;
  }
  check(deadlocks > 0 && deadlocks < 20, "the number of resident blocks is drawn");
}

// Each thread copies lines, in a group per line, and counts the numbers that it finds wrong.
struct Copies {
  const int* from;
  int* wrong;  // before it waits, of the groups that it has waited for, of the other group
};

enum class Forgotten { nothing, commit, wait };

template <Forgotten forgotten, int lines>
MRCN_KERNEL(1)
copy_lines_async(Copies a) {
  const int first = int(threadIdx.x) * lines;
  Line* to = reinterpret_cast<Line*>(shared_memory()) + first;
  const Line* from = reinterpret_cast<const Line*>(a.from) + first;
  const auto wrong = [&](int line) { return int(std::memcmp(to + line, from + line, sizeof(Line)) != 0); };
  for (int line = 0; line < lines; ++line) {
    copy_async(to + line, from + line);
    if (forgotten != Forgotten::commit) commit_copies();
  }
  int early = 0, waited = 0;
  for (int line = 0; line < lines; ++line) early += wrong(line);
  wait_for_copies<1>();
  for (int line = 0; line + 1 < lines; ++line) waited += wrong(line);
  add_relaxed(a.wrong, early);
  add_relaxed(a.wrong + 1, waited);
  add_relaxed(a.wrong + 2, wrong(lines - 1));
  if (forgotten != Forgotten::wait) {
    commit_copies();
    wait_for_copies<0>();
  }
}

void test_copies() {
  constexpr int lines = 5, bytes = lines * block_threads * int(sizeof(Line));
  alignas(16) int from[bytes / sizeof(int)];
  std::iota(from, from + bytes / sizeof(int), 0);
  int wrong[3] = {}, uncommitted[3] = {}, unwaited[3] = {}, errors = 0;
  for (unsigned seed = 0; seed < 8; ++seed) {
    set(2, seed);
    check_runs(launch<copy_lines_async<Forgotten::nothing, lines>>(Copies{from, wrong}, 3, bytes, nullptr),
        "copies");
    check_runs(
        launch<copy_lines_async<Forgotten::commit, lines>>(Copies{from, uncommitted}, 3, bytes, nullptr),
        "copies that are committed late");
    const int error =
        launch<copy_lines_async<Forgotten::wait, lines>>(Copies{from, unwaited}, 3, bytes, nullptr);
    if (error != 0) check_error(error, {"left the kernel before its copies had arrived"});
    errors += error != 0;
  }
  check(wrong[0] > 0, "before a wait some copies have not arrived");
  check(wrong[1] == 0, "after it those of the older groups have");
  check(wrong[2] > 0 && wrong[2] < 8 * 3 * block_threads, "and of the last group some");
  check(uncommitted[1] > 0, "a wait does not wait for what was not committed");
  check(errors > 0, "a kernel must wait before it ends");
  check_error(
      launch<copy_lines_async<Forgotten::nothing, lines>>(Copies{from, wrong}, 1, bytes - 16, nullptr),
      {"a copy at ", "test_cuda_on_host.cpp:", "of 624"});
  check_error(launch<copy_lines_async<Forgotten::nothing, lines>>(Copies{from + 1, wrong}, 1, bytes, nullptr),
      {"an address that is no multiple of 16"});
}

void test_capacity() {
  constexpr int most = 232448;
  int wrong = 0;
  set(2);
  check_error(launch<look_for_poison<1>>(Poison{}, 1, most, nullptr), {"232448 bytes of shared"});
  Capacity capacity{};
  check_runs(capacity_of<look_for_poison<1>>(&capacity), "capacity_of");
  check(capacity.processors == 8 && capacity.shared_per_block == most, "what capacity_of tells");
  check_runs(launch<look_for_poison<1>>(Poison{most, &wrong}, 2, most, nullptr), "227 KB of shared memory");
  check(wrong == 0, "all of it is poisoned");
  check_error(launch<look_for_poison<1>>(Poison{}, 1, most + 1, nullptr), {"232449 bytes of shared"});
}

// --- errors of a block --------------------------------------------------------------------------------

enum class Mistake {
  leave_before_barrier,
  leave_before_exchange,
  barrier_and_exchange,
  ballot_and_exchange,
  different_exchanges,
  different_masks,
  different_barriers,
  wide_mask,
  exception,
  unknown_exception,
};

struct Victim {
  int block;
};

template <Mistake mistake>
MRCN_KERNEL(2)
err(Victim a) {
  __syncthreads();
  const bool one = int(blockIdx.x) == a.block && threadIdx.x == 5;
  if constexpr (mistake == Mistake::leave_before_barrier) {
    if (one) return;
  } else if constexpr (mistake == Mistake::leave_before_exchange) {
    if (one) return;
    exchange(1, 1);
  } else if constexpr (mistake == Mistake::barrier_and_exchange) {
    if (!one) exchange(1, 1);
  } else if constexpr (mistake == Mistake::ballot_and_exchange) {
    if (one) {
      ballot(true);
    } else {
      exchange(1, 1);
    }
  } else if constexpr (mistake == Mistake::different_exchanges) {
    if (one) {
      exchange(1, 1);
    } else {
      exchange(1, 1);
    }
  } else if constexpr (mistake == Mistake::different_masks) {
    exchange(1, one ? 2 : 1);
  } else if constexpr (mistake == Mistake::different_barriers) {
    if (one) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (mistake == Mistake::wide_mask) {
    exchange(1, one ? 16 : 1);
  } else if constexpr (mistake == Mistake::exception) {
    if (one) throw std::runtime_error("out of toys");
  } else {
    if (one) throw 5;
  }
  __syncthreads();
}

template <Mistake mistake>
void test_mistake(const std::vector<std::string>& parts) {
  set(2);
  check_error(launch<err<mistake>>(Victim{2}, 4, 0, nullptr), parts);
  check_runs(launch<err<mistake>>(Victim{4}, 4, 0, nullptr), "the launch after");
}

void test_mistakes() {
  const std::string block = "block 2: ", left = "thread 5: left the kernel";
  const std::string barrier = "waiting in __syncthreads at ", exchanges = "waiting in exchange at ";
  test_mistake<Mistake::leave_before_barrier>({block, left, barrier, "test_cuda_on_host.cpp:"});
  test_mistake<Mistake::leave_before_exchange>({block, left, "waiting in "});
  test_mistake<Mistake::barrier_and_exchange>({block, "thread 5: " + barrier, exchanges});
  test_mistake<Mistake::ballot_and_exchange>({block, "thread 5: waiting in ballot at ", exchanges});
  test_mistake<Mistake::different_exchanges>({block, "thread 5: " + exchanges});
  test_mistake<Mistake::different_masks>({block, "thread 5: " + exchanges});
  test_mistake<Mistake::different_barriers>({block, "thread 5: " + barrier});
  test_mistake<Mistake::wide_mask>({block, "with the mask 16"});
  test_mistake<Mistake::exception>({block, "thread 5 threw: out of toys"});
  test_mistake<Mistake::unknown_exception>({block, "thread 5 threw"});
  check_error(launch<err<Mistake::wide_mask>>(Victim{0}, 0, 0, nullptr), {"a launch of 0 blocks"});
}

// --- what the host sets -------------------------------------------------------------------------------

void test_settings() {
  int counters[3] = {}, order[2] = {-1, -1};
  const auto run = [&] { return launch<note_start<0>>(Starts{counters, order}, 2, 0, nullptr); };
  const long long before = cuda_on_host_launches();
  check_runs(run(), "a launch");
  check(cuda_on_host_launches() == before + 1 && counters[0] == 2, "a launch is counted");

  cuda_on_host_stub(1);
  check_runs(run(), "a launch that does nothing");
  check_runs(clear(counters, sizeof(counters), nullptr), "clear that does nothing");
  check(cuda_on_host_launches() == before + 2 && counters[0] == 2, "it is counted and does nothing");
  cuda_on_host_stub(0);

  cuda_on_host_fail(700);
  const int error = run();
  check(error == 700 && std::string(error_text(error)) == "error 700", "the error asked for");
  check(cuda_on_host_launches() == before + 2 && counters[0] == 2, "a launch that failed is not counted");
  check_runs(clear(counters, sizeof(counters), nullptr), "clear");
  check(counters[0] == 0, "clear gives zeros");
  check_runs(run(), "the launch after");
}

// --- lines and time -----------------------------------------------------------------------------------

struct Lines {
  const float* from;
  float* to;
};

template <int unused>
MRCN_KERNEL(2)
copy_lines(Lines a) {
  const int at = 4 * thread_number();
  const Line line = load_first(reinterpret_cast<const Line*>(a.from + at));
  const Line again = load_last(reinterpret_cast<const Line*>(a.from + at));
  store_once(reinterpret_cast<Line*>(a.to + at), Line{line.x, again.y, line.z, again.w});
}

void test_lines() {
  constexpr int blocks = 2, n = 4 * blocks * block_threads;
  alignas(16) float from[n], to[n] = {};
  std::iota(from, from + n, 0.5f);
  check_runs(launch<copy_lines<0>>(Lines{from, to}, blocks, 0, nullptr), "lines");
  check(std::equal(from, from + n, to), "lines are copied");
}

template <int rounds>
MRCN_KERNEL(2)
meet_often(Flag a) {
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    exchange(round, 1);
  }
  add_relaxed(a.flag, 1);
}

void tell_time() {
  constexpr int rounds = 100, blocks = 5, times = 10;
  int flag = 0;
  set(blocks);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < times; ++i) {
    check_runs(launch<meet_often<rounds>>(Flag{&flag}, blocks, 0, nullptr), "many meetings");
  }
  std::printf("%d blocks of %d threads, %d barriers and as many exchanges: %.1f ms a launch\n", blocks,
      block_threads, rounds, milliseconds_since(start) / times);
  check(flag == times * blocks * block_threads, "all threads end");
}

// --- what a sanitizer has to see ------------------------------------------------------------------------

template <int unused>
MRCN_KERNEL(2)
read_without_barrier(Chain a) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = 1;
  a.sums[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// What one block writes before a counter that orders nothing, another one reads.
template <int unused>
MRCN_KERNEL(2)
read_without_order(Chain a) {
  if (threadIdx.x > 0) return;
  if (blockIdx.x == 0) {
    a.sums[0] = 1;
    add_relaxed(a.ticket, 1);
  } else {
    while (add_relaxed(a.ticket, 0) == 0) pause();
    a.sums[1] = a.sums[0];
  }
}

template <int unused>
MRCN_KERNEL(2)
write_past_shared_memory(Chain) {
  reinterpret_cast<int*>(shared_memory())[block_threads] = 1;
}

int provoke(const std::string& fault) {
  constexpr int bytes = block_threads * sizeof(int);
  int ticket = 0, sums[block_threads] = {};
  const Chain chain{&ticket, nullptr, sums};
  set(2);
  if (fault == "barrier") return launch<read_without_barrier<0>>(chain, 1, bytes, nullptr);
  if (fault == "order") return launch<read_without_order<0>>(chain, 2, bytes, nullptr);
  if (fault == "bounds") return launch<write_past_shared_memory<0>>(chain, 1, bytes, nullptr);
  std::printf("no such fault: %s\n", fault.c_str());
  return 2;
}

int test() {
  test_barriers();
  test_exchange();
  test_warp_barrier();
  test_shared_memory();
  test_order();
  test_tickets();
  test_deadlock();
  test_meeting();
  test_random_residents();
  test_copies();
  test_capacity();
  test_mistakes();
  test_settings();
  test_lines();
  tell_time();
  if (failures > 0) std::printf("%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace mrcn::cuda

int main(int count, char** arguments) {
  return count > 1 ? mrcn::cuda::provoke(arguments[1]) : mrcn::cuda::test();
}
