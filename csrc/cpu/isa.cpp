#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mrcn {

#define X(isa)                               \
  namespace isa {                            \
  void block_forward(const BlockForward&);   \
  void block_backward(const BlockBackward&); \
  void cqc_forward(const CqcForward&);       \
  void cqc_backward(const CqcBackward&);     \
  }
MRCN_ISAS
#undef X

namespace {

#define X(isa) {#isa, isa::block_forward, isa::block_backward, isa::cqc_forward, isa::cqc_backward},
constexpr Kernels carried[] = {MRCN_ISAS};
#undef X

#if defined(__x86_64__)
// Features that not every compiler knows in __builtin_cpu_supports (clang before 18 does not know f16c).
// CPUID leaf 7, subleaf 1, EAX bit 5.
bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}
// Leaf 1, ECX bit 29.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}
#endif

bool runs_here(const std::string& isa) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma") && has_f16c();
  if (isa == "avx512") return avx512;
  // A library has these kernels only if its compiler knew the name.
  if (isa == "avx512bf16") return avx512 && has_avx512bf16();
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  (void)isa;
  return true;
}

const Kernels& named(const std::string& isa) {
  for (const Kernels& k : carried) {
    if (isa == k.isa) return k;
  }
  throw std::logic_error("the library carries no " + isa);
}

const Kernels& choose() {
  if (const char* wanted = std::getenv("MRCN_FAST_ISA"); wanted != nullptr && *wanted != '\0') {
    std::string known;
    for (const Kernels& k : carried) {
      if (!runs_here(k.isa)) continue;
      if (std::string(wanted) == k.isa) return k;
      known += std::string(known.empty() ? "" : ", ") + k.isa;
    }
    throw std::runtime_error("MRCN_FAST_ISA: got '" + std::string(wanted) + "', expected one of " + known);
  }
  const Kernels* best = nullptr;
  for (const Kernels& k : carried) {
    if (runs_here(k.isa)) best = &k;
  }
  if (best == nullptr) {
    throw std::runtime_error("the library was compiled for another processor, with " +
                             std::string(carried[0].isa) +
                             ", which this one doesn't have; compile it here (make install), or for every "
                             "processor (MRCN_FAST_ISAS=all make install)");
  }
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels& kernels(Dtype dtype) {
  // CMakeLists.txt compiles avx512bf16 for bf16 alone.
  static const Kernels& others = std::string(kernels().isa) == "avx512bf16" ? named("avx512") : kernels();
  return dtype == Dtype::bf16 ? kernels() : others;
}

std::vector<std::string> carried_isas() {
  std::vector<std::string> names;
  for (const Kernels& k : carried) names.emplace_back(k.isa);
  return names;
}

}  // namespace mrcn
