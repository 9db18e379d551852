// Vectors of floats in GCC's and Clang's vector extension, as wide as the instruction set of the file that includes this.
// Everything has internal linkage: each instruction set compiles its own, and the linker must not mix them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "problem.h"

namespace optimize {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec splat(float x) { return x - Vec{}; }
INLINE Ints bits_of(Vec x) { return (Ints)x; }
INLINE Vec select(Ints mask, Vec yes, Vec no) { return mask ? yes : no; }
// a where it is larger, else b: b where one of them is NaN
#if defined(__AVX512F__)
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE Vec larger(Vec a, Vec b) { return select(a > b, a, b); }
#endif

typedef float Four __attribute__((vector_size(16)));

// Four rows become four columns
INLINE void transpose(Four rows[4]) {
#if defined(__clang__) || __GNUC__ >= 12
#define OPTIMIZE_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define OPTIMIZE_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (Ints4){i, j, k, l})
  typedef int32_t Ints4 __attribute__((vector_size(16)));
#endif
  const Four low = OPTIMIZE_PICK(rows[0], rows[1], 0, 4, 1, 5), low2 = OPTIMIZE_PICK(rows[2], rows[3], 0, 4, 1, 5);
  const Four high = OPTIMIZE_PICK(rows[0], rows[1], 2, 6, 3, 7), high2 = OPTIMIZE_PICK(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = OPTIMIZE_PICK(low, low2, 0, 1, 4, 5);
  rows[1] = OPTIMIZE_PICK(low, low2, 2, 3, 6, 7);
  rows[2] = OPTIMIZE_PICK(high, high2, 0, 1, 4, 5);
  rows[3] = OPTIMIZE_PICK(high, high2, 2, 3, 6, 7);
#undef OPTIMIZE_PICK
}

INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
INLINE Vec load(const Half* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store(Half* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
INLINE Vec load(const Half* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(Half* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
INLINE Vec load(const Half* p) { return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
INLINE void store(Half* p, Vec v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v))); }
#else
// Without conversion instructions. The exponents of the two formats differ by 112: multiplying by 2^112 (or 2^-112)
// moves a number between them, subnormal ones included, and the FPU rounds.
INLINE Vec load(const Half* p) {
  Ints h;
  for (int i = 0; i < WIDTH; ++i) h[i] = p[i].bits;
  Ints magnitude = (h & 0x7fff) << 13;
  Vec number = (Vec)magnitude * 0x1p112f;
  Ints special = magnitude >= (0x7c00 << 13);  // infinity and NaN keep an exponent of all ones
  Ints out = (bits_of(number) & ~special) | ((magnitude | 0x7f800000) & special);
  return (Vec)(out | ((h & 0x8000) << 16));
}
INLINE void store(Half* p, Vec v) {
  Ints all = bits_of(v), magnitude = all & 0x7fffffff;
  Ints sign = (all >> 16) & 0x8000;
  // normal: round to nearest even at bit 13; 65520 and above reach infinity by the carry
  Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // subnormal: adding 0.5 leaves the 24-bit sum's unit at 2^-24, that of half's subnormals
  Ints small = bits_of((Vec)magnitude + 0.5f) - 0x3f000000;
  Ints is_small = magnitude < (113 << 23);
  Ints is_large = magnitude >= (143 << 23);
  Ints is_nan = magnitude > 0x7f800000;
  Ints out = (small & is_small) | (normal & ~is_small);
  out = (out & ~is_large) | (0x7c00 & is_large);
  out = (out & ~is_nan) | (0x7e00 & is_nan);
  out |= sign;
  for (int i = 0; i < WIDTH; ++i) p[i].bits = (uint16_t)out[i];
}
#endif

// The first n of WIDTH elements, zeros after them
template <class T>
INLINE Vec load(const T* p, int64_t n) {
  if (n >= WIDTH) return load(p);
  T some[WIDTH] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}
template <class T>
INLINE void store(T* p, Vec v, int64_t n) {
  if (n >= WIDTH) return store(p, v);
  T some[WIDTH];
  store(some, v);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

INLINE float one(const float* p) { return *p; }
INLINE float one(const Half* p) { return load(p, 1)[0]; }

// x as it is after a round trip through T
template <class T>
INLINE Vec rounded(Vec x) {
  T some[WIDTH];
  store(some, x);
  return load(some);
}

// Halves until one is left
template <int N, class V>
INLINE float folded(V v, bool adding) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typedef float Part __attribute__((vector_size(N * 2)));
    Part low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, (const char*)&v + sizeof low, sizeof high);
    return folded<N / 2>(adding ? low + high : (low > high ? low : high), adding);
  }
}
INLINE float sum_of(Vec v) { return folded<WIDTH>(v, true); }
INLINE float largest_of(Vec v) { return folded<WIDTH>(v, false); }

// The sum of term(i, how many are left, WIDTH at most is taken) over i = 0, WIDTH, ...; four sums run side by side
template <class F>
INLINE float summed(int64_t n, F&& term) {
  Vec a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
    a += term(i, WIDTH);
    b += term(i + WIDTH, WIDTH);
    c += term(i + 2 * WIDTH, WIDTH);
    d += term(i + 3 * WIDTH, WIDTH);
  }
  for (; i < n; i += WIDTH) a += term(i, n - i);
  return sum_of((a + b) + (c + d));
}

// x in the first n lanes, other values after them
INLINE Vec upto(int64_t n, Vec x, Vec other) {
  if (n >= WIDTH) return x;
  Ints lane;
  for (int i = 0; i < WIDTH; ++i) lane[i] = i;
  return select(lane < (int32_t)n, x, other);
}

// 2^f for f in [-1/2, 1/2]: 1 + f times a polynomial of degree 5, fitted for the least largest relative error, 2e-9
INLINE Vec exp2_of_fraction(Vec f) {
  Vec p = f * 1.5353460504e-4f + 1.3398875017e-3f;
  p = f * p + 9.6184369177e-3f;
  p = f * p + 5.5503323674e-2f;
  p = f * p + 2.4022647738e-1f;
  p = f * p + 6.9314718246e-1f;
  return f * p + 1.0f;
}

// 2^x, to 1 ulp; 0 below -127, infinity from 128. x = n + f: the exponent takes n as an integer.
INLINE Vec exp2_of(Vec x) {
  x = select(x < -127.0f, splat(-127.0f), x);  // NaN passes both comparisons
  x = select(x > 128.0f, splat(128.0f), x);
  const Vec magic = splat(0x1.8p23f);  // adding it rounds to an integer, which is left in the low bits
  const Vec n = x + magic;
  return (Vec)(bits_of(exp2_of_fraction(x - (n - magic))) + (bits_of(n) << 23));
}
// The same for x that is not positive
#if defined(__AVX512F__)
// VREDUCEPS leaves x - floor(x) (0 for -infinity), VSCALEFPS multiplies by 2^floor(x). The polynomial's error is 2e-9.
INLINE Vec exp2_of_negative(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p = f * 2.1612919227e-4f + 1.2467844645e-3f;
  p = f * p + 9.6754515544e-3f;
  p = f * p + 5.5485282093e-2f;
  p = f * p + 2.4022930861e-1f;
  p = f * p + 6.9314706326e-1f;
  p = f * p + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
INLINE Vec exp2_of_negative(Vec x) {
  x = larger(splat(-127.0f), x);
  const Vec magic = splat(0x1.8p23f);
  const Vec n = x + magic;
  const Vec f = x - (n - magic);
  return (Vec)(bits_of(exp2_of_fraction(f)) + (bits_of(n) << 23));
}
#endif
constexpr float LOG2E = 1.44269504088896340736f;
INLINE Vec exp_of(Vec x) { return exp2_of(x * LOG2E); }
INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp_of(-x)); }
INLINE Vec silu(Vec x) { return x / (1.0f + exp_of(-x)); }

// x Phi(x), Phi(-|x|) = erfc(z) / 2 with z = |x| / sqrt 2. erfc(z) = u exp(-z^2 + P(u)), u = 1 / (1 + z / 2), P of
// degree 9 fitted on [0, 10.4] (largest error 5e-8; the form is that of Numerical Recipes, 6.2, the coefficients not).
INLINE Vec gelu(Vec x) {
  const Vec magnitude = (Vec)(bits_of(x) & 0x7fffffff);
  const Vec z = magnitude * 0.70710678118654752440f;
  const Vec u = 1.0f / (1.0f + 0.5f * z);
  Vec p = u * 0.1450791209936142f - 0.6818777322769165f;
  p = u * p + 1.1598796844482422f;
  p = u * p - 0.7015063166618347f;
  p = u * p - 0.07489001750946045f;
  p = u * p - 0.002247416879981756f;
  p = u * p + 0.03605491295456886f;
  p = u * p + 0.3862755000591278f;
  p = u * p + 0.9986831545829773f;
  p = u * p - 1.2654508352279663f;
  const Vec half_erfc = 0.5f * u * exp_of(p - z * z);
  return x * select(x < 0.0f, half_erfc, 1.0f - half_erfc);
}
// x / 2 (1 + tanh(k (x + 0.044715 x^3))), k = sqrt(2 / pi); (1 + tanh a) / 2 is the logistic function of 2a
INLINE Vec gelu_tanh(Vec x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }

}  // namespace
}  // namespace optimize
