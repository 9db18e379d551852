// The CUDA provider's kernels: Triton's, compiled ahead of time and embedded as cubins, launched through the driver.
#pragma once

#include "problem.h"

namespace optimize {

// One embedded cubin. `arguments` are "name:type" in order, types as Triton's ("*fp16", "i32", "i64", "fp32"), the two
// scratch pointers at the end; `constants` are the compile-time arguments, "HEAD=40 UNIT=8"; both separated by spaces.
struct Cubin {
  const char *kernel, *entry, *arguments, *constants;
  int sm, shared_bytes, warps;
  const unsigned char *begin, *end;
};
extern const Cubin CUBINS[];
extern const int CUBIN_COUNT;

// Each throws std::runtime_error where there is no driver, no cubin for the problem, or the driver says no. Pointers are
// of the device; what is launched runs on `stream`, in the current context.
void attention_on_cuda(const AttentionProblem&, bool half, void* stream);
void norm_on_cuda(const NormProblem&, bool half, void* stream);
void group_norm_on_cuda(const GroupNormProblem&, bool half, void* stream);
void rope_on_cuda(const RopeProblem&, bool half, void* stream);
void gated_on_cuda(const GatedProblem&, bool half, void* stream);

}  // namespace optimize
