// Which instruction set's kernels run here.
#include <stdlib.h>
#include <string.h>

#include "problem.h"

namespace optimize {
namespace {

// From the best to the one that always runs
const Kernels* found() {
  const char* asked = getenv("OPTIMIZE_NATIVE_ISA");
  const auto wanted = [asked](const char* name) { return !asked || !*asked || strcmp(asked, name) == 0; };
#if defined(__x86_64__)
  if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return &kernels_avx512;
  if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2;
#endif
  (void)wanted;
  return &kernels_base;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = found();
  return *chosen;
}

}  // namespace optimize
