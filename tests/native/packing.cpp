// Launches one problem of each kind through whatever libcuda.so.1 is found: the tests give it fakecuda.c.
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "cuda.h"

using namespace optimize;

namespace {

const void* at(long n) { return (const void*)(n * 0x10000); }
void* out(long n) { return (void*)(n * 0x10000); }
void* const STREAM = (void*)0x77;

void attention(bool half, bool biased, bool packed = false) {
  AttentionProblem p{};
  p.batch = 2, p.heads = 8, p.kv_heads = 8, p.queries = 300, p.keys = 77, p.head_dim = 40;
  p.q_strides = strides_of(packed, 8, 300, 40), p.kv_strides = strides_of(packed, 8, 77, 40);
  p.scale = 0.5f, p.q = at(1), p.k = at(2), p.v = at(3), p.out = out(4);
  if (biased) {
    p.bias_kind = BiasKind::added, p.bias = at(5);
    p.bias_stride[0] = 77, p.bias_stride[3] = 1;
  }
  attention_on_cuda(p, half, STREAM);
}

// Heads of 64, each key head shared by four query heads
void grouped(int64_t queries) {
  AttentionProblem p{};
  p.batch = 2, p.heads = 8, p.kv_heads = 2, p.queries = queries, p.keys = 300, p.head_dim = 64;
  p.q_strides = strides_of(false, 8, queries, 64), p.kv_strides = strides_of(false, 2, 300, 64);
  p.scale = 0.5f, p.q = at(1), p.k = at(2), p.v = at(3), p.out = out(4);
  attention_on_cuda(p, true, STREAM);
}

void norm() {
  NormProblem p{};
  p.rows = 6, p.tokens = 3, p.channels = 640, p.epsilon = 0.25f;
  p.x = at(1), p.residual = at(2), p.weight = at(4), p.bias = at(5), p.y = out(8), p.total = out(9);
  p.gate = {at(3), 640, 0}, p.scale = {at(6), 640, 0}, p.shift = {at(7), 0, 0};
  norm_on_cuda(p, true, STREAM);
}

void group_norm(int64_t spatial) {
  group_norm_on_cuda({2, 320, spatial, 32, true, 0.25f, at(1), at(2), at(3), out(4)}, true, STREAM);
}

void rope(bool by_batch) {
  const int64_t stride = by_batch ? 10 * 64 : 0;
  rope_on_cuda({2, 10, 128, {{4, at(1), at(5), out(3)}, {2, at(2), at(6), out(4)}}, (const float*)at(7), (const float*)at(8), stride, true, 0.25f}, true,
               STREAM);
}

void run(const char* what) {
  if (!strcmp(what, "attention")) return attention(true, false);
  if (!strcmp(what, "bias")) return attention(true, true);
  if (!strcmp(what, "packed")) return attention(true, false, true);
  if (!strcmp(what, "grouped")) return grouped(300);
  if (!strcmp(what, "one_token")) return grouped(1);
  if (!strcmp(what, "norm")) return norm();
  if (!strcmp(what, "group_norm")) return group_norm(64);
  if (!strcmp(what, "group_norm_in_chunks")) return group_norm(70000);
  if (!strcmp(what, "rope")) return rope(false);
  if (!strcmp(what, "rope_by_batch")) return rope(true);
  if (!strcmp(what, "gated")) return gated_on_cuda({5000, Gate::silu, at(1), at(2), out(3)}, true, STREAM);
  if (!strcmp(what, "misaligned")) return gated_on_cuda({5000, Gate::silu, (void*)0x10002, at(2), out(3)}, true, STREAM);
  throw std::runtime_error("no such problem");
}

}  // namespace

int main(int count, char** words) {
  try {
    for (int i = 1; i < count; ++i) run(words[i]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
