#include "cuda_on_host.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

constinit thread_local cuda_on_host::Index threadIdx{}, blockIdx{}, gridDim{};

namespace cuda_on_host {
namespace {

// While one lives, what its thread does is nothing to ThreadSanitizer. The locks in here order more of the
// kernel's threads than a GPU would, and so would hide races.
struct Unseen {
  Unseen() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
  ~Unseen() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
#endif
  }
};

// Unwinds a kernel's thread after a failure.
struct Stopped {};

struct Settings {
  int blocks = 4;
  int resident = 4;
  unsigned seed = 0;
  long long l2_bytes = 1 << 20;
  double patience = 20;
};

struct State {
  std::mutex mutex;
  Settings settings;
  bool stub = false;
  int error = 0;
  long long launches = 0;
};

State& state() {
  static State only;
  return only;
}

// CUDA's own numbers are positive.
constexpr int failed = -1;
thread_local std::string failure;

int fail(std::string text) {
  failure = std::move(text);
  return failed;
}

// --- one launch ---------------------------------------------------------------------------------------

struct Block;

struct Launch {
  const Settings settings;
  const Kernel kernel;
  const void* const arguments;
  const int blocks, shared;

  std::vector<std::unique_ptr<Block>> begun;
  std::vector<pthread_t> threads;

  std::mutex mutex;
  std::condition_variable changed;
  int running = 0;   // blocks
  size_t ended = 0;  // threads
  std::string error;
  std::atomic<bool> stopped{false};

  Launch(const Settings& how, Kernel what, const void* with, int blocks, int shared)
      : settings(how), kernel(what), arguments(with), blocks(blocks), shared(shared) {}

  int run();
  void begin(int number);
  void watch(int most_running);
  void let_end();
  std::string waiting() const;

  void report(std::string text);
  void thread_ended(Block& block);
};

// --- one block ----------------------------------------------------------------------------------------

enum class At { running, block_barrier, warp_barrier, exchange, ballot, left };

struct Thread {
  At at = At::running;
  Where where;
  int mask = 0;
  uint64_t brings = 0;  // to an exchange or ballot
  uint64_t gets = 0;    // what it brought when all had come: it may have come to the next by now
  int barriers = 0;     // passed, of the block and of the warp
  int warp_barriers = 0;
  std::atomic<Where> polled;
};

// Where the threads of a warp or of a block wait for one another.
struct Meeting {
  // That all came, or the launch failed. Not a condition variable: its mutex, which all that wake would take
  // one after the other, puts them to sleep again.
  std::atomic<int> times{0};
  // What ThreadSanitizer sees of a barrier. Two in turn: a thread that is late to leave one barrier does not
  // learn what another did before it came to the next.
  std::atomic<int> clocks[2] = {};
};

// Of the size that was asked for, to the byte; and what has not been written is seen in results.
struct SharedMemory {
  char* const data;

  explicit SharedMemory(int bytes) : data(static_cast<char*>(::operator new(bytes, std::align_val_t(16)))) {
    std::memset(data, 0xff, bytes);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { ::operator delete(data, std::align_val_t(16)); }
};

std::string place(Where where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

bool same_place(Where a, Where b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string describe(const Thread& thread) {
  const Where polled = thread.polled.load(std::memory_order_relaxed);
  switch (thread.at) {
    case At::left:
      return "left the kernel";
    case At::block_barrier:
      return "waiting in __syncthreads at " + place(thread.where);
    case At::warp_barrier:
      return "waiting in __syncwarp at " + place(thread.where);
    case At::exchange:
      return "waiting in exchange at " + place(thread.where);
    case At::ballot:
      return "waiting in ballot at " + place(thread.where);
    case At::running:
      break;
  }
  return polled.line() == 0 ? "running" : "polling at " + place(polled);
}

// Whether what two threads of the block wait for, or that one of them has left, lets both go on.
bool agree(const Thread& a, const Thread& b, bool same_warp) {
  if (a.at == At::running || b.at == At::running) return true;
  const auto of_block = [](At at) { return at == At::block_barrier || at == At::left; };
  if (!same_warp && !(of_block(a.at) && of_block(b.at))) return true;
  return a.at == b.at && (a.at == At::left || (same_place(a.where, b.where) && a.mask == b.mask));
}

struct Block {
  // What a thread of the system is told.
  struct Place {
    Block* block;
    int thread;
  };

  Launch& launch;
  const int number;
  const SharedMemory shared;
  std::atomic<int64_t> progress{0};

  std::mutex mutex;
  Thread threads[block_threads];
  Place places[block_threads];
  Meeting warps[block_warps];
  Meeting all;
  int ended = 0;  // threads; with Launch::mutex

  Block(Launch& owner, int which) : launch(owner), number(which), shared(owner.shared) {}

  static void* begin(void* place);
  void run(int self);
  void leave(int self);

  void meet(Meeting& meeting, int self, At at, Where where, int mask = 0, uint64_t brings = 0);
  void pass(Meeting& meeting, int& times, int self, At at, Where where);
  void arrive(int self, At at, Where where, int mask, uint64_t brings);

  // And not std::atomic's wait, which yields before it sleeps: to another process, for milliseconds.
  static void futex(Meeting& meeting, int operation, int value) {
    syscall(SYS_futex, &meeting.times, operation, value, nullptr);
  }
  static void wake(Meeting& meeting) {
    meeting.times.fetch_add(1, std::memory_order_release);
    futex(meeting, FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  void stop_if_failed() const {
    if (launch.stopped.load(std::memory_order_relaxed)) throw Stopped();
  }
  void count_progress() { progress.fetch_add(1, std::memory_order_relaxed); }
  void report(const std::string& text) { launch.report("block " + std::to_string(number) + ": " + text); }
  std::string waiting();
};

thread_local Block* my_block = nullptr;

void Block::arrive(int self, At at, Where where, int mask, uint64_t brings) {
  stop_if_failed();
  Thread& me = threads[self];
  me.at = at;
  me.where = where;
  me.mask = mask;
  me.brings = brings;
  for (int t = 0; t < block_threads; ++t) {
    if (agree(me, threads[t], t / warp_lanes == self / warp_lanes)) continue;
    report("thread " + std::to_string(self) + ": " + describe(me) + "; thread " + std::to_string(t) + ": " +
           describe(threads[t]));
    throw Stopped();
  }
}

void Block::meet(Meeting& meeting, int self, At at, Where where, int mask, uint64_t brings) {
  std::unique_lock lock(mutex);
  arrive(self, at, where, mask, brings);
  const bool whole = &meeting == &all;
  Thread* const first = threads + (whole ? 0 : self / warp_lanes * warp_lanes);
  Thread* const last = first + (whole ? block_threads : warp_lanes);
  if (std::any_of(first, last, [&](const Thread& other) { return other.at != at; })) {
    const int times = meeting.times.load(std::memory_order_relaxed);
    lock.unlock();
    while (meeting.times.load(std::memory_order_acquire) == times) futex(meeting, FUTEX_WAIT_PRIVATE, times);
    return stop_if_failed();
  }
  for (Thread* thread = first; thread < last; ++thread) {
    thread->at = At::running;
    thread->gets = thread->brings;
  }
  count_progress();
  lock.unlock();
  wake(meeting);
}

// A meeting that orders memory, as ThreadSanitizer sees too.
void Block::pass(Meeting& meeting, int& times, int self, At at, Where where) {
  std::atomic<int>& clock = meeting.clocks[times++ % 2];
  clock.fetch_add(1, std::memory_order_release);
  {
    const Unseen unseen;
    meet(meeting, self, at, where);
  }
  clock.load(std::memory_order_acquire);
}

void Block::leave(int self) {
  const Unseen unseen;
  const std::lock_guard lock(mutex);
  arrive(self, At::left, Where(), 0, 0);
  count_progress();
}

void* Block::begin(void* given) {
  const Place& place = *static_cast<const Place*>(given);
  place.block->run(place.thread);
  return nullptr;
}

void Block::run(int self) {
  my_block = this;
  threadIdx.x = unsigned(self);
  blockIdx.x = unsigned(number);
  gridDim.x = unsigned(launch.blocks);
  const std::string name = "thread " + std::to_string(self);
  try {
    launch.kernel(launch.arguments);
    leave(self);
  } catch (const Stopped&) {
  } catch (const std::exception& thrown) {
    report(name + " threw: " + thrown.what());
  } catch (...) {
    report(name + " threw");
  }
  launch.thread_ended(*this);
}

// Threads in a row that do the same are told of together.
std::string Block::waiting() {
  const std::lock_guard lock(mutex);
  std::string text;
  for (int first = 0, last; first < block_threads; first = last + 1) {
    const std::string what = describe(threads[first]);
    last = first;
    while (last + 1 < block_threads && describe(threads[last + 1]) == what) ++last;
    text += (first == 0 ? "; block " + std::to_string(number) + ": " : ", ");
    text += first == last ? "thread " : "threads ";
    text += std::to_string(first) + (first == last ? "" : "-" + std::to_string(last)) + " " + what;
  }
  return text;
}

// --- one launch: the block's threads ------------------------------------------------------------------

// The first failure counts, what follows it may be its effect.
void Launch::report(std::string text) {
  const Unseen unseen;
  const std::lock_guard lock(mutex);
  if (error.empty()) error = std::move(text);
  stopped.store(true, std::memory_order_relaxed);
  changed.notify_all();
}

void Launch::thread_ended(Block& block) {
  const Unseen unseen;
  const std::lock_guard lock(mutex);
  ++ended;
  if (++block.ended == block_threads) --running;
  if (block.ended == block_threads || stopped.load(std::memory_order_relaxed)) changed.notify_all();
}

// --- one launch: the thread that launches --------------------------------------------------------------

std::string Launch::waiting() const {
  std::string text =
      std::to_string(size_t(blocks) - begun.size()) + " of " + std::to_string(blocks) + " blocks not begun";
  for (const auto& block : begun) text += block->waiting();
  return text;
}

// Until no more than so many blocks run, or the launch has failed.
void Launch::watch(int most_running) {
  const Unseen unseen;
  // Counted in looks and not by the clock: a process that was halted meanwhile has not been waiting.
  constexpr int looks = 16;
  const std::chrono::duration<double> between(settings.patience / looks);
  int64_t before = -1;
  int quiet = 0;
  std::unique_lock lock(mutex);
  while (!changed.wait_for(lock, between, [&] { return running <= most_running || stopped.load(); })) {
    lock.unlock();
    int64_t progress = 0;
    for (const auto& block : begun) progress += block->progress.load(std::memory_order_relaxed);
    quiet = progress == before ? quiet + 1 : 0;
    before = progress;
    if (quiet == looks) report("deadlock: " + waiting());
    lock.lock();
  }
}

// New threads for each block: nothing that one has done comes before what another does.
void Launch::begin(int number) {
  begun.push_back(std::make_unique<Block>(*this, number));
  {
    const Unseen unseen;
    const std::lock_guard lock(mutex);
    ++running;
  }
  // With stacks so small that the system's library keeps them for the next block.
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 512 << 10);
  Block& block = *begun.back();
  for (int t = 0; t < block_threads; ++t) {
    block.places[t] = {&block, t};
    pthread_t thread;
    const int refused = pthread_create(&thread, &attributes, Block::begin, &block.places[t]);
    if (refused != 0) {
      report("the system gives no more threads: " + std::string(std::strerror(refused)));
      break;
    }
    threads.push_back(thread);
  }
  pthread_attr_destroy(&attributes);
}

// A thread that neither waits nor polls can't be stopped: as it may write to the caller's memory at any time,
// the process ends.
void Launch::let_end() {
  const Unseen unseen;
  for (const auto& block : begun) {
    const std::lock_guard lock(block->mutex);
    Block::wake(block->all);
    for (Meeting& warp : block->warps) Block::wake(warp);
  }
  std::unique_lock lock(mutex);
  const std::chrono::duration<double> limit(std::max(settings.patience, 20.0));
  if (changed.wait_for(lock, limit, [&] { return ended == threads.size(); })) return;
  std::fprintf(stderr, "cuda_on_host: a kernel does not end after: %s\n", error.c_str());
  std::abort();
}

// On one processor, where those that meet are woken for a third less. Sanitizers see more on all of them.
struct OneProcessor {
  cpu_set_t before;

  OneProcessor() {
    sched_getaffinity(0, sizeof before, &before);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
  }
  OneProcessor(const OneProcessor&) = delete;
  OneProcessor& operator=(const OneProcessor&) = delete;
  ~OneProcessor() { sched_setaffinity(0, sizeof before, &before); }
};

int Launch::run() {
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  const OneProcessor here;
#endif
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(settings.seed));
  const int resident = std::max(settings.resident, 1);
  for (int number : order) {
    watch(resident - 1);
    if (stopped.load()) break;
    begin(number);
  }
  watch(0);
  let_end();
  for (const pthread_t thread : threads) pthread_join(thread, nullptr);
  return stopped.load() ? fail(error) : 0;
}

}  // namespace

// --- a kernel's threads -------------------------------------------------------------------------------

char* shared_memory() { return my_block->shared.data; }

void pass_block_barrier(Where where) {
  const int self = int(threadIdx.x);
  my_block->pass(my_block->all, my_block->threads[self].barriers, self, At::block_barrier, where);
}

void pass_warp_barrier(Where where) {
  const int self = int(threadIdx.x);
  my_block->pass(my_block->warps[self / warp_lanes], my_block->threads[self].warp_barriers, self,
      At::warp_barrier, where);
}

// CUDA promises no order of memory here.
uint64_t exchange(uint64_t value, int mask, Where where) {
  const Unseen unseen;
  const int self = int(threadIdx.x);
  if (mask < 0 || mask >= warp_lanes) {
    my_block->report("exchange at " + place(where) + " with the mask " + std::to_string(mask));
    throw Stopped();
  }
  my_block->meet(my_block->warps[self / warp_lanes], self, At::exchange, where, mask, value);
  return my_block->threads[self ^ mask].gets;
}

uint32_t ballot(bool yes, Where where) {
  const Unseen unseen;
  const int self = int(threadIdx.x), warp = self / warp_lanes;
  my_block->meet(my_block->warps[warp], self, At::ballot, where, 0, yes);
  uint32_t bits = 0;
  for (int i = 0; i < warp_lanes; ++i) bits |= uint32_t(my_block->threads[warp * warp_lanes + i].gets) << i;
  return bits;
}

void act(bool progress) {
  my_block->stop_if_failed();
  if (progress) my_block->count_progress();
}

void poll(Where where) {
  my_block->stop_if_failed();
  my_block->threads[threadIdx.x].polled.store(where, std::memory_order_relaxed);
}

// --- the host -----------------------------------------------------------------------------------------

// The library keeps a kernel's answer: it must not depend on anything but the kernel.
int device_of(int shared, std::atomic<int>& asked_shared, int* blocks, int64_t* l2_bytes) {
  int before = -1;
  if (!asked_shared.compare_exchange_strong(before, shared) && before != shared) {
    return fail("device_of a kernel with " + std::to_string(shared) +
                " bytes of shared memory, before with " + std::to_string(before));
  }
  State& now = state();
  const std::lock_guard lock(now.mutex);
  *blocks = now.settings.blocks;
  *l2_bytes = now.settings.l2_bytes;
  return 0;
}

int clear(void* memory, int64_t bytes) {
  State& now = state();
  const std::lock_guard lock(now.mutex);
  if (!now.stub) std::memset(memory, 0, size_t(bytes));
  return 0;
}

int launch(Kernel kernel, const void* arguments, int blocks, int shared) {
  // A kernel that has not asked for more gets no more.
  Settings settings;
  {
    State& now = state();
    const std::lock_guard lock(now.mutex);
    if (const int error = now.error; error != 0) {
      now.error = 0;
      return error;
    }
    if (blocks < 1) return fail("a launch of " + std::to_string(blocks) + " blocks");
    if (shared < 0 || shared > most_shared) {
      return fail("a launch with " + std::to_string(shared) + " bytes of shared memory");
    }
    ++now.launches;
    if (now.stub) return 0;
    settings = now.settings;
  }
  return Launch{settings, kernel, arguments, blocks, shared}.run();
}

const char* error_text(int error) {
  if (error == failed) return failure.c_str();
  thread_local std::string text;
  text = "error " + std::to_string(error);
  return text.c_str();
}

}  // namespace cuda_on_host

void cuda_on_host_set(int blocks, int resident, unsigned seed, long long l2_bytes, double patience) {
  auto& now = cuda_on_host::state();
  const std::lock_guard lock(now.mutex);
  now.settings = {blocks, resident, seed, l2_bytes, patience};
}

void cuda_on_host_stub(int on) {
  auto& now = cuda_on_host::state();
  const std::lock_guard lock(now.mutex);
  now.stub = on != 0;
}

void cuda_on_host_fail(int error) {
  auto& now = cuda_on_host::state();
  const std::lock_guard lock(now.mutex);
  now.error = error;
}

long long cuda_on_host_launches() {
  auto& now = cuda_on_host::state();
  const std::lock_guard lock(now.mutex);
  return now.launches;
}
