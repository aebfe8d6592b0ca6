// Vectors of floats as wide as the instruction set of this translation unit.
//
// Sources that include this header are compiled once per instruction set, each time into a
// namespace of that name (XY_ISA). They use no templates of the standard library: the linker keeps
// one copy of such a template, which might be the one with instructions that this CPU lacks.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define XY_INLINE inline __attribute__((always_inline))

namespace XY_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

// Columns of one panel: a row of a tile is two vectors.
constexpr int kPanel = 2 * kLanes;

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IVec = int32_t __attribute__((vector_size(kLanes * 4)));
using UVec = uint32_t __attribute__((vector_size(kLanes * 4)));

template <class T>
constexpr XY_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr XY_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

template <class T>
XY_INLINE T round_up(T x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class V = Vec>
XY_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
XY_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

XY_INLINE Vec splat(float x) { return x - Vec{}; }
XY_INLINE UVec splat(uint32_t x) { return x - UVec{}; }

template <class V>
XY_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

// a * b + c, rounded once where the CPU can: the compiler fuses by itself, but not always alike.
XY_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// kLanes bytes as integers. By itself GCC would convert half a register byte by byte.
#if defined(__AVX512F__)
XY_INLINE IVec widen_int8(const void* from) {
  return (IVec)_mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)from));
}
XY_INLINE IVec widen_uint8(const void* from) {
  return (IVec)_mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)from));
}
#elif defined(__AVX2__)
XY_INLINE IVec widen_int8(const void* from) {
  return (IVec)_mm256_cvtepi8_epi32(_mm_loadu_si64(from));
}
XY_INLINE IVec widen_uint8(const void* from) {
  return (IVec)_mm256_cvtepu8_epi32(_mm_loadu_si64(from));
}
#else
using Int8s = int8_t __attribute__((vector_size(kLanes)));
using Uint8s = uint8_t __attribute__((vector_size(kLanes)));
XY_INLINE IVec widen_int8(const void* from) {
  return __builtin_convertvector(load<Int8s>(from), IVec);
}
XY_INLINE IVec widen_uint8(const void* from) {
  return __builtin_convertvector(load<Uint8s>(from), IVec);
}
#endif

// Of all lanes, in one fixed order.
template <int kDistance = kLanes / 2, class V, class Function>
XY_INLINE auto reduce(V v, Function&& function) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    IVec other;
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ kDistance;
    return reduce<kDistance / 2>(function(v, __builtin_shuffle(v, other)), function);
  }
}

template <class V>
XY_INLINE auto sum(V v) {
  return reduce(v, [](V a, V b) { return a + b; });
}

template <class V>
XY_INLINE auto largest(V v) {
  return reduce(v, [](V a, V b) { return vmax(a, b); });
}

XY_INLINE Vec vabs(Vec v) { return (Vec)((UVec)v & 0x7FFFFFFFu); }

// The nearest integers, the even one of two; for sizes below 2^31.
XY_INLINE IVec rounded(Vec v) {
#if defined(__AVX512F__)
  // Masked, as the plain form makes GCC warn of its own header.
  return (IVec)_mm512_maskz_cvtps_epi32(0xFFFF, (__m512)v);
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (IVec)_mm_cvtps_epi32((__m128)v);
#else
  IVec nearest;
  for (int i = 0; i < kLanes; ++i) nearest[i] = static_cast<int32_t>(__builtin_rintf(v[i]));
  return nearest;
#endif
}

// e^x to 2 units in the last place; exactly 0 below -87.3 (minus infinity too), where e^x would no
// longer be a normal number. The polynomial is that of Cephes' expf (S. Moshier, public domain).
XY_INLINE Vec exp(Vec x) {
  const Vec top = splat(88.37f), bottom = splat(-87.33f);
  const Vec clamped = vmax(bottom, x > top ? top : x);  // in this order a NaN stays NaN
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (clamped * 1.44269504f + shift) - shift;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
  return x < bottom ? Vec{} : p * (Vec)power;
}

XY_INLINE float exp(float x) { return exp(splat(x))[0]; }

XY_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// A bf16 is the upper half of a float.
XY_INLINE uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Two of them, the first in the lower half.
XY_INLINE uint32_t pair_of(float first, float second) {
  return bf16_of(first) | uint32_t{bf16_of(second)} << 16;
}

// The bf16 of x in the upper half of each lane; the lower half is zero.
XY_INLINE UVec round_to_bf16(Vec x) {
  const UVec bits = (UVec)x;
  return (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
}

// Store the upper half of each lane to every second place, and nothing to those between.
XY_INLINE void store_upper_halves(uint16_t* to, UVec halves) {
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi16(to, 0x55555555, (__m512i)(halves >> 16));
#else
  for (int i = 0; i < kLanes; ++i) to[2 * i] = static_cast<uint16_t>(halves[i] >> 16);
#endif
}

// The bf16 of x[0], x[1] and so on in pairs, the even one in the lower half of a lane.
XY_INLINE UVec bf16_pairs(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  return (UVec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  IVec even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  return round_to_bf16(__builtin_shuffle(first, second, even)) >> 16 |
         round_to_bf16(__builtin_shuffle(first, second, even + 1));
#endif
}

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kHasPairsDot = true;
#else
constexpr bool kHasPairsDot = false;
#endif

// sums + x[odd] * w[odd], and then + x[even] * w[even]. Products of two bf16 are exact, so that it
// makes no difference whether they are fused with the addition, as the instruction does. Arm's adds
// the two products first, and rounds both sums to odd.
XY_INLINE Vec dot(Vec sums, UVec x, UVec w) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)w);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (Vec)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)x, (bfloat16x8_t)w);
#else
  sums += (Vec)(x & 0xFFFF0000u) * (Vec)(w & 0xFFFF0000u);
  return sums + (Vec)(x << 16) * (Vec)(w << 16);
#endif
}

// Products of four unsigned bytes with four signed ones in each lane. CPUs without an instruction
// for it take the even bytes and the odd ones as 16-bit integers, kParts in all; sums are exact
// either way.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kHasQuadsDot = true;
#else
constexpr bool kHasQuadsDot = false;
#endif
constexpr int kParts = kHasQuadsDot ? 1 : 2;

// Part `part` of the unsigned bytes in each lane.
XY_INLINE UVec part_of(UVec bytes, int part) {
  if (kParts == 1) return bytes;
  return (part == 0 ? bytes : bytes >> 8) & 0x00FF00FFu;
}

// Integers from -128 to 127 as bytes.
XY_INLINE void store_bytes(int8_t* to, IVec integers) {
  using Int8s = int8_t __attribute__((vector_size(kLanes)));
  store(to, __builtin_convertvector(integers, Int8s));
}

// The same part of four signed bytes, in the order of memory.
XY_INLINE uint32_t part_of(const int8_t* bytes, int part) {
  uint32_t all;
  std::memcpy(&all, bytes, 4);
  if (kParts == 1) return all;
  const auto word = [&](int i) { return static_cast<uint16_t>(int16_t{bytes[i]}); };
  return word(part) | static_cast<uint32_t>(word(part + 2)) << 16;
}

XY_INLINE IVec dot(IVec sums, UVec w, UVec x) {
#if defined(__AVX512VNNI__)
  return (IVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (IVec)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#elif defined(__AVX512F__)
  return sums + (IVec)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  return sums + (IVec)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
  return sums + (IVec)_mm_madd_epi16((__m128i)w, (__m128i)x);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (IVec)vusdotq_s32((int32x4_t)sums, (uint8x16_t)w, (int8x16_t)x);
#else
  const IVec a = (IVec)w, b = (IVec)x;
  return sums + (a & 0xFFFF) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

XY_INLINE float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

XY_INLINE float float_of(uint16_t bf16) { return float_of_bits(uint32_t{bf16} << 16); }

}  // namespace XY_ISA
