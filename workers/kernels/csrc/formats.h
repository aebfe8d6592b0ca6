// How weights are stored, and how a panel's row of kPanel weights is read as two vectors of floats.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace XY_ISA {

using namespace xy;

// Rows of the tallest tile: with two vectors per row it fills the registers.
constexpr int kMaxHeight = kLanes == 16 ? 12 : 6;

// The columns of one panel before packing; zero past k and past the last output feature.
struct Columns {
  const float* data;  // [kPanel][depth]
  int k, depth;
  XY_INLINE float at(int column, int j) const { return data[int64_t{column} * depth + j]; }
};

XY_INLINE int quantum(float x, int low, int high) {
  return max(low, min(high, static_cast<int>(__builtin_rintf(x))));
}

// A format packs groups of kGroup input features and reads kStep of them after another. kTallest is
// the tallest tile that leaves it enough registers: for more rows, panels are expanded to floats
// first. kMostPanels is the max panels that a tile takes at once.
struct Fp32 {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4, kStep = 1;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel * 4; }
  static void pack(const Columns& columns, int first, const float*, char* to) {
    for (int j = 0; j < kGroup; ++j)
      for (int c = 0; c < kPanel; ++c, to += 4) store(to, columns.at(c, first + j));
  }

  const char* at;
  XY_INLINE void next_group() {}
  XY_INLINE void next(Vec& low, Vec& high) {
    low = load(at), high = load(at + sizeof(Vec));
    at += 2 * sizeof(Vec);
  }
};

// Each 32-bit lane holds two columns: the lower half is of the first vector, the upper half of the
// second. One exact operation turns each into a float.
struct Bf16 {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4, kStep = 1;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel * 2; }
  static constexpr int place(int column) { return column % kLanes * 2 + column / kLanes; }
  static void pack(const Columns& columns, int first, const float*, char* to) {
    for (int j = 0; j < kGroup; ++j, to += kPanel * 2)
      for (int c = 0; c < kPanel; ++c) store(to + 2 * place(c), bf16_of(columns.at(c, first + j)));
  }

  const char* at;
  XY_INLINE void next_group() {}
  XY_INLINE void next(Vec& low, Vec& high) {
    const UVec both = load<UVec>(at);
    low = (Vec)(both << 16), high = (Vec)(both & 0xFFFF0000u);
    at += sizeof(UVec);
  }
};

// The scales, one per column, are applied to the sums.
struct Int8 {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4, kStep = 1;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel; }
  static void pack(const Columns& columns, int first, const float* scales, char* to) {
    for (int j = 0; j < kGroup; ++j)
      for (int c = 0; c < kPanel; ++c) {
        const float scale = scales[c] > 0 ? scales[c] : 1;
        *to++ = static_cast<char>(quantum(columns.at(c, first + j) / scale, -127, 127));
      }
  }

  const char* at;
  XY_INLINE void next_group() {}
  XY_INLINE void next(Vec& low, Vec& high) {
    low = __builtin_convertvector(widen_int8(at), Vec);
    high = __builtin_convertvector(widen_int8(at + kLanes), Vec);
    at += kPanel;
  }
};

// Per group: bf16 scales, bf16 minima, then the quanta, two per byte. The value quantum * scale +
// minimum is rounded once, by the fused multiply-add. The upper quantum of a byte is not shifted
// down: it counts sixteen times its value, and its scale a sixteenth. Both are exact.
struct Int4 {
  static constexpr int kTallest = kMaxHeight - 2, kMostPanels = 2, kStep = 1;
  static constexpr int64_t bytes(int64_t k) {
    return k / kGroup * (2 * Bf16::bytes(1) + kGroup * kLanes);
  }
  static void pack(const Columns& columns, int first, const float*, char* to) {
    char* const quanta = to + 2 * Bf16::bytes(1);
    std::memset(quanta, 0, kGroup * kLanes);
    for (int c = 0; c < kPanel; ++c) {
      float low = columns.at(c, first), high = low;
      for (int j = first; j < min(first + kGroup, columns.k); ++j)
        low = min(low, columns.at(c, j)), high = max(high, columns.at(c, j));
      const uint16_t scale = bf16_of((high - low) / 15), minimum = bf16_of(low);
      store(to + 2 * Bf16::place(c), scale);
      store(to + 2 * Bf16::place(c) + Bf16::bytes(1), minimum);
      for (int j = 0; j < kGroup && float_of(scale) > 0; ++j) {
        const float steps = (columns.at(c, first + j) - float_of(minimum)) / float_of(scale);
        quanta[j * kLanes + c % kLanes] |=
            static_cast<char>(quantum(steps, 0, 15) << c / kLanes * 4);
      }
    }
  }

  const char* at;
  Vec low_scale, high_scale, low_minimum, high_minimum;
  XY_INLINE void next_group() {
    Bf16 header;
    header.at = at;
    header.next(low_scale, high_scale);
    high_scale *= 0.0625f;
    header.next(low_minimum, high_minimum);
    at = header.at;
  }
  XY_INLINE void next(Vec& low, Vec& high) {
    const IVec both = widen_uint8(at);
    low = __builtin_convertvector(both & 15, Vec) * low_scale + low_minimum;
    high = __builtin_convertvector(both & 0xF0, Vec) * high_scale + high_minimum;
    at += kLanes;
  }
};

// For products with activations that are rounded to bf16: each 32-bit lane holds two input features
// of a column.
struct Bf16Pairs {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4, kStep = 2;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel * 2; }
  static void pack(const Columns& columns, int first, const float*, char* to) {
    for (int j = 0; j < kGroup; j += 2)
      for (int c = 0; c < kPanel; ++c)
        for (int odd = 0; odd < 2; ++odd, to += 2)
          store(to, bf16_of(columns.at(c, first + j + odd)));
  }

  const char* at;
  bool is_odd = false;
  XY_INLINE void next_group() {}
  XY_INLINE void next_pair(UVec& low, UVec& high) {
    low = load<UVec>(at), high = load<UVec>(at + sizeof(UVec));
    at += 2 * sizeof(UVec);
  }
  // One input feature, for `expand`.
  XY_INLINE void next(Vec& low, Vec& high) {
    const UVec both[] = {load<UVec>(at), load<UVec>(at + sizeof(UVec))};
    low = (Vec)(is_odd ? both[0] & 0xFFFF0000u : both[0] << 16);
    high = (Vec)(is_odd ? both[1] & 0xFFFF0000u : both[1] << 16);
    at += is_odd ? 2 * sizeof(UVec) : 0;
    is_odd = !is_odd;
  }
};

template <class Function>
XY_INLINE auto with_format(int32_t format, Function&& function) {
  switch (format) {
    case kBf16:
      return function(Bf16{});
    case kInt8:
      return function(Int8{});
    case kInt4:
      return function(Int4{});
    case kBf16Pairs:
      return function(Bf16Pairs{});
    default:
      return function(Fp32{});
  }
}

// Expand `depth` input features of a panel to exactly the floats that a tile would read.
template <class Format>
void expand(const char* panel, int depth, float* to) {
  Format weights;
  weights.at = panel;
  for (int k0 = 0; k0 < depth; k0 += kGroup) {
    weights.next_group();
    for (int k = k0; k < min(k0 + kGroup, depth); ++k, to += kPanel) {
      Vec low, high;
      weights.next(low, high);
      store(to, low), store(to + kLanes, high);
    }
  }
}

}  // namespace XY_ISA
