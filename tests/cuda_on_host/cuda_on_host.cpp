#include "cuda_on_host.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

// This file itself is never instrumented (CMakeLists.txt): what it knows of a block's threads would order
// more of them than a GPU does, and so hide races. It tells the sanitizers what they have to know.
#if defined(SANITIZE_thread)
#include <sanitizer/tsan_interface.h>
#elif defined(SANITIZE_address)
#include <sanitizer/common_interface_defs.h>
#endif

constinit thread_local cuda_on_host::Index threadIdx{}, blockIdx{}, gridDim{};

namespace cuda_on_host {
namespace {

// Unwinds a kernel's thread after a failure.
struct Stopped {};

struct Settings {
  int blocks = 4;
  int resident = 4;
  unsigned seed = 0;
  long long l2_bytes = 1 << 20;
  int busy = 0;
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
constexpr int failed = -1, refused = -2;
thread_local std::string failure;

int fail(std::string text) {
  failure = std::move(text);
  return failed;
}

// --- one of a kernel's threads --------------------------------------------------------------------------

// What comes before a release comes before what follows an acquire of the same place.
void release([[maybe_unused]] void* place) {
#if defined(SANITIZE_thread)
  __tsan_release(place);
#endif
}
void acquire([[maybe_unused]] void* place) {
#if defined(SANITIZE_thread)
  __tsan_acquire(place);
#endif
}

// Runs on a stack of its own whenever it is resumed, until it yields. To ThreadSanitizer it is a thread, of
// which nothing comes before what another does unless an atomic or a barrier says so.
class Fiber {
 public:
  // When `run` has ended it yields once more, and is not to be resumed again.
  Fiber(void (*run)(void*), void* with)
      : run_(run), with_(with), stack_(std::make_unique_for_overwrite<char[]>(stack_bytes)) {
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack_.get();
    here_.uc_stack.ss_size = stack_bytes;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&here_, reinterpret_cast<void (*)()>(enter), 2, unsigned(self >> 32), unsigned(self));
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
#if defined(SANITIZE_thread)
  ~Fiber() { __tsan_destroy_fiber(thread_); }
#endif

  void resume() {
#if defined(SANITIZE_thread)
    caller_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#elif defined(SANITIZE_address)
    void* kept = nullptr;
    __sanitizer_start_switch_fiber(&kept, stack_.get(), stack_bytes);
#endif
    swapcontext(&caller_here_, &here_);
#if defined(SANITIZE_address)
    __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#endif
  }

  void yield() {
#if defined(SANITIZE_thread)
    __tsan_switch_to_fiber(caller_, __tsan_switch_to_fiber_no_sync);
#elif defined(SANITIZE_address)
    void* kept = nullptr;
    __sanitizer_start_switch_fiber(&kept, caller_stack_, caller_bytes_);
#endif
    swapcontext(&here_, &caller_here_);
#if defined(SANITIZE_address)
    __sanitizer_finish_switch_fiber(kept, &caller_stack_, &caller_bytes_);
#endif
  }

 private:
  static constexpr size_t stack_bytes = 64 << 10;  // of which 8 KB are used

  static void enter(unsigned high, unsigned low) {
    auto& self = *reinterpret_cast<Fiber*>(uintptr_t(high) << 32 | low);
#if defined(SANITIZE_address)
    __sanitizer_finish_switch_fiber(nullptr, &self.caller_stack_, &self.caller_bytes_);
#endif
    self.run_(self.with_);
    self.yield();
    std::abort();
  }

  void (*const run_)(void*);
  void* const with_;
  const std::unique_ptr<char[]> stack_;
  ucontext_t here_{}, caller_here_{};
#if defined(SANITIZE_thread)
  void* const thread_ = __tsan_create_fiber(0);
  void* caller_ = nullptr;
#elif defined(SANITIZE_address)
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
#endif
};

enum class At { running, block_barrier, warp_barrier, exchange, ballot, left };

struct Block;

// A copy to shared memory that has not arrived.
struct Copy {
  char* to;
  const char* from;
  int group;

  void arrive() const { std::memcpy(to, from, copied_bytes); }
};

struct Thread {
  Block* block = nullptr;
  std::unique_ptr<Fiber> fiber;
  bool begun = false, ended = false;

  At at = At::running;
  Where where;
  int mask = 0;
  uint64_t brings = 0;  // to an exchange or ballot
  uint64_t gets = 0;    // what it brought when all had come: it may have come to the next by now
  int barriers = 0;     // passed, of the block and of the warp
  int warp_barriers = 0;
  Where polled;
  std::vector<Copy> copies{};
  int groups = 0;  // of copies, committed
};

std::string place(Where where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

bool same_place(Where a, Where b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string describe(const Thread& thread) {
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
  return thread.polled.line() == 0 ? "running" : "polling at " + place(thread.polled);
}

// Whether what two threads of the block wait for, or that one of them has left, lets both go on.
bool agree(const Thread& a, const Thread& b, bool same_warp) {
  if (a.at == At::running || b.at == At::running) return true;
  const auto of_block = [](At at) { return at == At::block_barrier || at == At::left; };
  if (!same_warp && !(of_block(a.at) && of_block(b.at))) return true;
  return a.at == b.at && (a.at == At::left || (same_place(a.where, b.where) && a.mask == b.mask));
}

// --- one launch ---------------------------------------------------------------------------------------

struct Launch {
  const Settings settings;
  const Kernel kernel;
  const void* const arguments;
  const int blocks, shared;
  const bool together = false;

  std::mt19937 draws{settings.seed};
  std::vector<std::unique_ptr<Block>> begun{};
  int64_t progress = 0;
  std::string error{};

  int run();
  std::vector<int> any_order(int count);
  int running() const;
  std::string waiting() const;
  bool draw(unsigned one_in) { return draws() % one_in == 0; }
  // The first failure counts, what follows it may be its effect.
  void report(std::string text) {
    if (error.empty()) error = std::move(text);
  }
};

// --- one block ----------------------------------------------------------------------------------------

// What ThreadSanitizer sees of a barrier. Two in turn: a thread that is late to leave one barrier does not
// learn what another did before it came to the next.
struct Clocks {
  char places[2];
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

struct Block {
  Launch& launch;
  const int number;
  const SharedMemory shared;
  const std::vector<int> order;  // of its threads, wherever several can go on
  Thread threads[block_threads];
  Clocks warps[block_warps];
  Clocks all;

  Block(Launch& owner, int which);

  void resume(Thread& thread);
  void let_copies_arrive(Thread& thread);
  void go_on();
  void unwind();
  void run(Thread& me);
  bool ended() const {
    return std::all_of(std::begin(threads), std::end(threads), [](const Thread& t) { return t.ended; });
  }

  Thread& me() { return threads[threadIdx.x]; }
  Thread* warp() { return threads + threadIdx.x / warp_lanes * warp_lanes; }
  void yield();
  void meet(Thread* first, int count, At at, Where where, int mask = 0, uint64_t brings = 0);
  void pass(Clocks& clocks, int& times, Thread* first, int count, At at, Where where);
  void arrive(At at, Where where, int mask, uint64_t brings);

  void stop_if_failed() const {
    if (!launch.error.empty()) throw Stopped();
  }
  void report(const std::string& text) { launch.report("block " + std::to_string(number) + ": " + text); }
  std::string waiting() const;
};

thread_local Block* my_block = nullptr;

Block::Block(Launch& owner, int which)
    : launch(owner), number(which), shared(owner.shared), order(owner.any_order(block_threads)) {
  for (Thread& thread : threads) {
    thread.block = this;
    thread.fiber = std::make_unique<Fiber>(
        [](void* given) {
          Thread& it = *static_cast<Thread*>(given);
          it.block->run(it);
        },
        &thread);
  }
}

void Block::run(Thread& me) {
  const std::string name = "thread " + std::to_string(&me - threads);
  try {
    launch.kernel(launch.arguments);
    if (!me.copies.empty()) report(name + " left the kernel before its copies had arrived");
    arrive(At::left, Where(), 0, 0);
    ++launch.progress;
  } catch (const Stopped&) {
  } catch (const std::exception& thrown) {
    report(name + " threw: " + thrown.what());
  } catch (...) {
    report(name + " threw");
  }
  me.ended = true;
  release(&launch);
}

void Block::resume(Thread& thread) {
  my_block = this;
  threadIdx.x = unsigned(&thread - threads);
  blockIdx.x = unsigned(number);
  thread.begun = true;
  let_copies_arrive(thread);
  thread.fiber->resume();
}

// Any of them, in any order.
void Block::let_copies_arrive(Thread& thread) {
  std::erase_if(thread.copies, [&](const Copy& copy) {
    if (!launch.draw(4)) return false;
    copy.arrive();
    return true;
  });
}

// Each thread that can, until it waits, polls or may have ended another's wait.
void Block::go_on() {
  for (int t : order) {
    if (threads[t].at == At::running && launch.error.empty()) resume(threads[t]);
  }
}

// After a failure.
void Block::unwind() {
  for (Thread& thread : threads) {
    if (thread.begun && !thread.ended) resume(thread);
  }
}

void Block::yield() {
  me().fiber->yield();
  stop_if_failed();
}

void Block::arrive(At at, Where where, int mask, uint64_t brings) {
  Thread& mine = me();
  mine.at = at;
  mine.where = where;
  mine.mask = mask;
  mine.brings = brings;
  const int self = int(threadIdx.x);
  for (int t = 0; t < block_threads; ++t) {
    if (agree(mine, threads[t], t / warp_lanes == self / warp_lanes)) continue;
    report("thread " + std::to_string(self) + ": " + describe(mine) + "; thread " + std::to_string(t) + ": " +
           describe(threads[t]));
    throw Stopped();
  }
}

// Who comes last lets all go on.
void Block::meet(Thread* first, int count, At at, Where where, int mask, uint64_t brings) {
  arrive(at, where, mask, brings);
  Thread* const last = first + count;
  if (std::any_of(first, last, [&](const Thread& other) { return other.at != at; })) return yield();
  for (Thread* thread = first; thread < last; ++thread) {
    thread->at = At::running;
    thread->gets = thread->brings;
  }
  ++launch.progress;
}

// A meeting that orders memory.
void Block::pass(Clocks& clocks, int& times, Thread* first, int count, At at, Where where) {
  char* const clock = clocks.places + times++ % 2;
  release(clock);
  meet(first, count, at, where);
  acquire(clock);
}

// Threads in a row that do the same are told of together.
std::string Block::waiting() const {
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

// --- the thread that launches --------------------------------------------------------------------------

std::vector<int> Launch::any_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), draws);
  return order;
}

int Launch::running() const {
  return int(std::count_if(begun.begin(), begun.end(), [](const auto& block) { return !block->ended(); }));
}

std::string Launch::waiting() const {
  std::string text =
      std::to_string(size_t(blocks) - begun.size()) + " of " + std::to_string(blocks) + " blocks not begun";
  for (const auto& block : begun) text += block->waiting();
  return text;
}

int Launch::run() {
  // A thread may find several counters as it wants them, one a round, before it makes progress.
  constexpr int most_quiet = 10000;
  // Before there are fibers: with the first of its thread's variables the library's others come to be, and
  // that comes before all that they do.
  gridDim.x = unsigned(blocks);
  const std::vector<int> order = any_order(blocks);
  const bool late = together || settings.resident < 0;
  const int resident = together                ? blocks
                       : settings.resident < 0 ? 1 + int(draws() % unsigned(-settings.resident))
                                               : std::max(settings.resident, 1);
  auto next = order.begin();
  int64_t before = -1;
  int quiet = 0;
  for (int now = 0; error.empty() && (now > 0 || next != order.end()); now = running()) {
    for (; now < resident && next != order.end() && !(late && now > 0 && draw(2)); ++now) {
      begun.push_back(std::make_unique<Block>(*this, *next++));
    }
    for (const auto& block : begun) block->go_on();
    quiet = progress == before ? quiet + 1 : 0;
    before = progress;
    if (quiet == most_quiet) report("deadlock: " + waiting());
  }
  for (const auto& block : begun) block->unwind();
  acquire(this);
  return error.empty() ? 0 : fail(error);
}

}  // namespace

// --- what a kernel's threads call -----------------------------------------------------------------------

char* shared_memory() { return my_block->shared.data; }

void pass_block_barrier(Where where) {
  Block& block = *my_block;
  block.pass(block.all, block.me().barriers, block.threads, block_threads, At::block_barrier, where);
}

void pass_warp_barrier(Where where) {
  Block& block = *my_block;
  block.pass(block.warps[threadIdx.x / warp_lanes], block.me().warp_barriers, block.warp(), warp_lanes,
      At::warp_barrier, where);
}

// CUDA promises no order of memory here.
uint64_t exchange(uint64_t value, int mask, Where where) {
  Block& block = *my_block;
  if (mask < 0 || mask >= warp_lanes) {
    block.report("exchange at " + place(where) + " with the mask " + std::to_string(mask));
    throw Stopped();
  }
  block.meet(block.warp(), warp_lanes, At::exchange, where, mask, value);
  return block.threads[int(threadIdx.x) ^ mask].gets;
}

uint32_t ballot(bool yes, Where where) {
  Block& block = *my_block;
  block.meet(block.warp(), warp_lanes, At::ballot, where, 0, yes);
  uint32_t bits = 0;
  for (int i = 0; i < warp_lanes; ++i) bits |= uint32_t(block.warp()[i].gets) << i;
  return bits;
}

// Others go on first: their order here is one of those that a GPU has.
void act(bool progress) {
  my_block->yield();
  my_block->launch.progress += progress;
}

void poll(Where where) {
  my_block->me().polled = where;
  my_block->yield();
}

void begin_copy(void* to, const void* from, Where where) {
  Block& block = *my_block;
  const auto offset = static_cast<char*>(to) - block.shared.data;
  const bool inside = offset >= 0 && offset + copied_bytes <= block.launch.shared;
  if (!inside || offset % copied_bytes != 0 || reinterpret_cast<uintptr_t>(from) % copied_bytes != 0) {
    block.report("a copy at " + place(where) + " to byte " + std::to_string(offset) + " of " +
                 std::to_string(block.launch.shared) + ", or from an address that is no multiple of 16");
    throw Stopped();
  }
  Thread& me = block.me();
  me.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), me.groups});
}

void commit_copies() { ++my_block->me().groups; }

void wait_for_copies(int groups) {
  act(true);
  Thread& me = my_block->me();
  std::erase_if(me.copies, [&](const Copy& copy) {
    if (copy.group >= me.groups - groups) return false;
    copy.arrive();
    return true;
  });
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

namespace {

int start(Kernel kernel, const void* arguments, int blocks, int shared, int allowed_shared, bool together) {
  Settings settings;
  {
    State& now = state();
    const std::lock_guard lock(now.mutex);
    if (const int error = now.error; error != 0) {
      now.error = 0;
      return error;
    }
    if (blocks < 1) return fail("a launch of " + std::to_string(blocks) + " blocks");
    // A kernel that has not asked for more gets no more.
    if (shared < 0 || shared > allowed_shared) {
      return fail("a launch with " + std::to_string(shared) + " bytes of shared memory");
    }
    settings = now.settings;
    if (together && blocks > settings.blocks - settings.busy) return refused;
    ++now.launches;
    if (now.stub) return 0;
  }
  return Launch{settings, kernel, arguments, blocks, shared, together}.run();
}

}  // namespace

int launch(Kernel kernel, const void* arguments, int blocks, int shared, int allowed_shared) {
  return start(kernel, arguments, blocks, shared, allowed_shared, false);
}

int launch_together(Kernel kernel, const void* arguments, int blocks, int shared, int allowed_shared) {
  return start(kernel, arguments, blocks, shared, allowed_shared, true);
}

bool is_refused(int error) { return error == refused; }

int processors() {
  State& now = state();
  const std::lock_guard lock(now.mutex);
  return now.settings.blocks;
}

const char* error_text(int error) {
  if (error == failed) return failure.c_str();
  if (error == refused) return "more blocks than can run at the same time";
  thread_local std::string text;
  text = "error " + std::to_string(error);
  return text.c_str();
}

}  // namespace cuda_on_host

void cuda_on_host_set(int blocks, int resident, unsigned seed, long long l2_bytes) {
  auto& now = cuda_on_host::state();
  const std::lock_guard lock(now.mutex);
  now.settings = {blocks, resident, seed, l2_bytes, now.settings.busy};
}

void cuda_on_host_busy(int blocks) {
  auto& now = cuda_on_host::state();
  const std::lock_guard lock(now.mutex);
  now.settings.busy = blocks;
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
