// Chooses the kernels' instruction set once, by what this processor supports.
#include <stdexcept>

#include "cpu/table.h"

namespace fused_sam {
namespace {

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> all;  // best first
#if !defined(FUSED_SAM_ONLY_GENERIC)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    all.push_back(&kernels_avx512);
  if (avx2) all.push_back(&kernels_avx2);
#endif
  all.push_back(&kernels_generic);
  return all;
}

const Kernels*& current() {
  static const Kernels* kernels = usable().front();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current(); }

std::vector<std::string> usable_kernels() {
  std::vector<std::string> names;
  for (const Kernels* k : usable()) names.push_back(k->name);
  return names;
}

void use_kernels(const std::string& name) {
  for (const Kernels* k : usable())
    if (name == k->name || name == "auto") {
      current() = k;
      return;
    }
  throw std::invalid_argument("this processor has no kernels named " + name);
}

}  // namespace fused_sam
