// Every CPU kernel over odd shapes, without ONNX Runtime and without Python: what AddressSanitizer watches. Tensors have
// exactly their size, so that a byte too far is seen; outputs start as NaN. Attention is compared with plain loops in
// double, the rest with the narrowest instruction set's result (which tests/test_native.py compares with torch).
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "problem.h"

using namespace optimize;

namespace {

int failures = 0;

// Three threads that take tasks in turn
void parallel(void*, size_t tasks, void (*task)(void*, size_t), void* data) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next++) < tasks;) task(data, i);
  };
  std::thread one(work), two(work);
  work();
  one.join();
  two.join();
}
void* allocate(void*, size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }
void release(void*, void* memory) { std::free(memory); }
const Host HOST{nullptr, parallel, allocate, release};

float wide(float x) { return x; }
float wide(Half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float sign = h.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + (float)mantissa, exponent - 25) : std::ldexp((float)mantissa, -24));
}
template <class T>
T narrow(float x);
template <>
float narrow(float x) {
  return x;
}
template <>
Half narrow(float x) {  // drawn values are small multiples of 1/64: exact
  if (x == 0) return {0};
  int exponent;
  const float m = std::frexp(std::fabs(x), &exponent);
  return {(uint16_t)((x < 0) << 15 | (exponent + 14) << 10 | ((int)(m * 2048) & 1023))};
}

uint32_t state = 1;
template <class T>
std::vector<T> drawn(int64_t n) {
  std::vector<T> out((size_t)n);
  for (T& x : out) {
    state = state * 1664525u + 1013904223u;
    x = narrow<T>((float)((int)(state >> 24) - 128) / 64.0f);
  }
  out.shrink_to_fit();
  return out;
}
template <class T>
std::vector<T> poisoned(int64_t n) {
  std::vector<T> out((size_t)n);
  std::memset(out.data(), 0xff, (size_t)n * sizeof(T));  // NaN in both types
  return out;
}

template <class T, class U>
void compare(const char* what, const char* isa, const std::vector<T>& got, const std::vector<U>& truth, double tolerance) {
  double off = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = wide(got[i]), b = (double)truth[i];
    off += (a - b) * (a - b);
    norm += b * b;
  }
  const double error = std::sqrt(off / (norm > 0 ? norm : 1));
  if (error <= tolerance) return;  // NaN is not
  std::printf("FAILED %s %s: relative error %g, allowed %g\n", isa, what, error, tolerance);
  ++failures;
}

template <class T>
constexpr double TOLERANCE = sizeof(T) == 4 ? 2e-6 : 1e-3;

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> out{&kernels_base};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out.push_back(&kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    out.push_back(&kernels_avx512);
#endif
  return out;
}

// --- attention ---

template <class T>
std::vector<double> plain_attention(const AttentionProblem& p, const std::vector<T>& q, const std::vector<T>& k,
                                    const std::vector<T>& v, const std::vector<T>& bias) {
  std::vector<double> out(q.size());
  for (int64_t row = 0; row < p.batch * p.heads * p.queries; ++row) {
    const int64_t i = row % p.queries, h = row / p.queries % p.heads, b = row / p.queries / p.heads, d = p.head_dim;
    const int64_t kv = p.kv_strides.at(b, h / (p.heads / p.kv_heads)), step = p.kv_strides.token;
    const int64_t at = p.q_strides.at(b, h) + i * p.q_strides.token;
    std::vector<double> weight((size_t)p.keys);
    double sum = 0;
    for (int64_t j = 0; j < p.keys; ++j) {
      double score = 0;
      for (int64_t e = 0; e < d; ++e) score += (double)wide(q[at + e]) * (double)wide(k[kv + j * step + e]);
      score *= p.scale;
      const int64_t* s = p.bias_stride;
      if (p.bias) score += wide(bias[b * s[0] + h * s[1] + i * s[2] + j * s[3]]);
      weight[j] = p.causal && j > i + p.keys - p.queries ? 0 : std::exp(score);
      sum += weight[j];
    }
    for (int64_t j = 0; j < p.keys; ++j)
      for (int64_t e = 0; e < d; ++e) out[at + e] += weight[j] / sum * (double)wide(v[kv + j * step + e]);
  }
  return out;
}

template <class T>
void attention(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t d, bool causal,
               bool biased, bool packed = false) {
  const auto q = drawn<T>(batch * heads * queries * d), k = drawn<T>(batch * kv_heads * keys * d),
             v = drawn<T>(batch * kv_heads * keys * d), bias = drawn<T>(biased ? heads * keys : 1);
  AttentionProblem p{batch, heads, kv_heads, queries, keys, d, 0.1f, causal, strides_of(packed, heads, queries, d),
                     strides_of(packed, kv_heads, keys, d), q.data(), k.data(), v.data(),
                     biased ? BiasKind::added : BiasKind::none, biased ? bias.data() : nullptr, {0, keys, 0, 1}, nullptr};
  const auto truth = plain_attention(p, q, k, v, bias);
  char what[96];
  std::snprintf(what, sizeof what, "attention %d bytes %ldx%ld/%ld %ldx%ldx%ld %d%d%d", (int)sizeof(T), (long)batch,
                (long)heads, (long)kv_heads, (long)queries, (long)keys, (long)d, causal, biased, packed);
  for (const Kernels* table : tables()) {
    auto out = poisoned<T>(batch * heads * queries * d);
    p.out = out.data();
    if (!table->attention[sizeof(T) == 2](p, HOST)) std::printf("no memory\n"), ++failures;
    compare(what, table->name, out, truth, TOLERANCE<T>);
  }
}

// --- the rest: `call` runs one table's kernel into the outputs it is given ---

template <class T, class F>
void across(const char* what, std::vector<int64_t> sizes, F&& call) {
  std::vector<std::vector<float>> first;
  for (const Kernels* table : tables()) {
    std::vector<std::vector<T>> outputs;
    for (int64_t n : sizes) outputs.push_back(poisoned<T>(n));
    if (!call(*table, outputs)) std::printf("no memory\n"), ++failures;
    for (size_t i = 0; i < outputs.size(); ++i) {
      std::vector<float> now;
      for (T x : outputs[i]) now.push_back(wide(x));
      if (first.size() <= i) first.push_back(now);
      compare(what, table->name, outputs[i], first[i], TOLERANCE<T>);
    }
  }
}

template <class T>
void norm(int64_t batch, int64_t tokens, int64_t n, bool rms) {
  const int64_t all = batch * tokens * n;
  const auto x = drawn<T>(all), residual = drawn<T>(all), gate = drawn<T>(batch * n), weight = drawn<T>(n),
             bias = drawn<T>(n), scale = drawn<T>(all), shift = drawn<T>(n);
  across<T>(rms ? "rms_norm" : "layer_norm", {all, all}, [&](const Kernels& k, std::vector<std::vector<T>>& out) {
    return k.norm[sizeof(T) == 2]({batch * tokens, tokens, n, rms, 1e-5f, x.data(), residual.data(), weight.data(),
                                   rms ? nullptr : bias.data(), {gate.data(), n, 0}, {scale.data(), tokens * n, n},
                                   {shift.data(), 0, 0}, out[0].data(), out[1].data()}, HOST);
  });
}

template <class T>
void group_norm(int64_t batch, int64_t channels, int64_t spatial, int64_t groups) {
  const auto x = drawn<T>(batch * channels * spatial), weight = drawn<T>(channels), bias = drawn<T>(channels);
  across<T>("group_norm", {batch * channels * spatial}, [&](const Kernels& k, std::vector<std::vector<T>>& out) {
    return k.group_norm[sizeof(T) == 2]({batch, channels, spatial, groups, true, 1e-5f, x.data(), weight.data(),
                                         bias.data(), out[0].data()}, HOST);
  });
}

template <class T>
void rope(int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t d, bool interleaved) {
  const int64_t q_size = batch * heads * tokens * d, k_size = batch * kv_heads * tokens * d;
  const auto q = drawn<T>(q_size), k = drawn<T>(k_size), weight = drawn<T>(d);
  const auto cos = drawn<float>(tokens * (d / 2)), sin = drawn<float>(tokens * (d / 2));
  across<T>("rope", {q_size, k_size}, [&](const Kernels& table, std::vector<std::vector<T>>& out) {
    RopeProblem p{batch, tokens, d, {{heads, q.data(), weight.data(), out[0].data()},
                                     {kv_heads, k.data(), weight.data(), out[1].data()}},
                  cos.data(), sin.data(), 0, interleaved, 1e-6f};
    return table.rope[sizeof(T) == 2](p, HOST);
  });
}

template <class T>
void gated(int64_t n, Gate kind) {
  const auto value = drawn<T>(n), gate = drawn<T>(n);
  across<T>("gated", {n}, [&](const Kernels& k, std::vector<std::vector<T>>& out) {
    return k.gated[sizeof(T) == 2]({n, kind, value.data(), gate.data(), out[0].data()}, HOST);
  });
}

template <class T>
void all() {
  for (int64_t d : {1, 37, 40, 72, 80, 160, 512})
    for (int64_t queries : {1, 3, 7, 63})
      for (int64_t keys : {63, 77, 199, 400}) attention<T>(1, 2, 1, queries, keys, d, queries == 63, keys == 77);
  attention<T>(2, 4, 2, 199, 199, 40, true, true);
  attention<T>(1, 1, 1, 1, 1, 40, false, false);
  for (int64_t queries : {1, 3, 63}) attention<T>(2, 6, 2, queries, 77, 37, queries == 63, queries == 3, true);
  for (bool rms : {false, true})
    for (int64_t n : {1, 7, 63, 199, 1280, 9001}) norm<T>(2, 3, n, rms);
  group_norm<T>(2, 6, 63, 3);
  group_norm<T>(1, 5, 1, 5);
  group_norm<T>(1, 4, 40000, 2);
  for (bool interleaved : {false, true})
    for (int64_t d : {2, 40, 72, 128}) rope<T>(2, 3, 1, 7, d, interleaved);
  for (Gate kind : {Gate::gelu, Gate::gelu_tanh, Gate::silu})
    for (int64_t n : {1, 63, 40001}) gated<T>(n, kind);
}

}  // namespace

int main() {
  all<float>();
  all<Half>();
  for (const Kernels* table : tables()) std::printf("%s ", table->name);
  std::printf("%s\n", failures ? "FAILED" : "passed");
  return failures != 0;
}
