// How weights are stored, and how a panel's row of kPanel weights is read as two vectors of floats.
#pragma once

#include <type_traits>

#include "amx.h"
#include "kernels.h"

namespace XY_ISA {

using namespace xy;

// Rows of the tallest tile: with two vectors per row it fills the registers. Sums of quads take two
// registers each: one for the group in progress, one for the groups before.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kMaxHeight = kRegisters == 32 ? 12 : 6;
constexpr int kMaxQuadsHeight = kRegisters == 32 ? 6 : 4;

// What a step of a product takes of a row: one input feature, two rounded to bf16, as many of these
// as a row of AMX's tiles has, or four rounded to int8 with a scale per group.
enum class Inputs { kFloats, kPairs, kTiles, kQuads };

constexpr int max_height(Inputs inputs) {
  switch (inputs) {
    case Inputs::kTiles:
      return kTileRows;
    case Inputs::kQuads:
      return kMaxQuadsHeight;
    default:
      return kMaxHeight;
  }
}

// The columns of one panel before packing; zero past k and past the last output feature.
struct Columns {
  const float* data;  // [kPanel][depth]
  int k, depth;
  XY_INLINE float at(int column, int j) const { return data[int64_t{column} * depth + j]; }
};

XY_INLINE int quantum(float x, int low, int high) {
  return max(low, min(high, static_cast<int>(__builtin_rintf(x))));
}

// A format packs groups of kGroup input features. kTallest is the tallest tile that leaves it
// enough registers: for more rows, panels are expanded to floats first. kMostPanels is the max
// panels that a tile takes at once.
struct Fp32 {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4;
  static constexpr Inputs kInputs = Inputs::kFloats;
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
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4;
  static constexpr Inputs kInputs = Inputs::kFloats;
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
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4;
  static constexpr Inputs kInputs = Inputs::kFloats;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel; }
  static int quantum_of(const Columns& columns, int column, int j, const float* scales) {
    const float scale = scales[column] > 0 ? scales[column] : 1;
    return quantum(columns.at(column, j) / scale, -127, 127);
  }
  static void pack(const Columns& columns, int first, const float* scales, char* to) {
    for (int j = 0; j < kGroup; ++j)
      for (int c = 0; c < kPanel; ++c)
        *to++ = static_cast<char>(quantum_of(columns, c, first + j, scales));
  }

  const char* at;
  XY_INLINE void next_group() {}
  XY_INLINE void next(Vec& low, Vec& high) {
    low = __builtin_convertvector(widen_int8(at), Vec);
    high = __builtin_convertvector(widen_int8(at + kLanes), Vec);
    at += kPanel;
  }
};

// The scale and the least value of a group in int4, of both vectors of its columns.
struct Int4Header {
  Vec scale[2], minimum[2];
  XY_INLINE explicit Int4Header(const char* at) {
    Bf16 header{at};
    header.next(scale[0], scale[1]);
    header.next(minimum[0], minimum[1]);
  }
};

// Per group: bf16 scales, bf16 minima, then the quanta, two per byte. The value quantum * scale +
// minimum is rounded once, by the fused multiply-add. The upper quantum of a byte is not shifted
// down: it counts sixteen times its value, and its scale a sixteenth. Both are exact.
struct Int4 {
  static constexpr int kTallest = kMaxHeight - 2, kMostPanels = 2;
  static constexpr Inputs kInputs = Inputs::kFloats;
  static constexpr int64_t bytes(int64_t k) {
    return k / kGroup * (2 * Bf16::bytes(1) + kGroup * kLanes);
  }
  static void pack(const Columns& columns, int first, const float*, char* to) {
    pack_group(columns, first, to, [](char* quanta, int column, int j, int quantum) {
      quanta[j * kLanes + column % kLanes] |= static_cast<char>(quantum << column / kLanes * 4);
    });
  }
  template <class Put>
  static void pack_group(const Columns& columns, int first, char* to, Put&& put) {
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
        put(quanta, c, j, quantum(steps, 0, 15));
      }
    }
  }

  const char* at;
  Vec low_scale, high_scale, low_minimum, high_minimum;
  XY_INLINE void next_group() {
    const Int4Header header(at);
    low_scale = header.scale[0], high_scale = header.scale[1] * 0.0625f;
    low_minimum = header.minimum[0], high_minimum = header.minimum[1];
    at += 2 * Bf16::bytes(1);
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
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4;
  static constexpr Inputs kInputs = Inputs::kPairs;
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

// The same panels for AMX, whose tiles of weights are half a group of a panel: its rows are pairs
// of input features, of sixteen columns.
struct Bf16Tiles : Bf16Pairs {
  static constexpr int kTallest = kTileRows;
  static constexpr Inputs kInputs = Inputs::kTiles;
};

using Bf16Product = std::conditional_t<kHasAmx, Bf16Tiles, Bf16Pairs>;

// For products with inputs rounded to int8: each 32-bit lane holds four input features of a column,
// as bytes that are 128 too large. `offset` takes that back.
struct Int8Quads {
  static constexpr int kTallest = kMaxQuadsHeight;
  static constexpr Inputs kInputs = Inputs::kQuads;
  static constexpr int64_t bytes(int64_t k) { return Int8::bytes(k); }
  static void pack(const Columns& columns, int first, const float* scales, char* to) {
    for (int j = 0; j < kGroup; j += 4)
      for (int c = 0; c < kPanel; ++c)
        for (int i = j; i < j + 4; ++i)
          *to++ = static_cast<char>(Int8::quantum_of(columns, c, first + i, scales) + 128);
  }

  struct Group {
    const char* bytes;
    XY_INLINE explicit Group(const char* at) : bytes(at) {}
    XY_INLINE UVec quad(int index, int half) const {
      return load<UVec>(bytes + (2 * index + half) * sizeof(UVec));
    }
    XY_INLINE IVec first_sums(int32_t offset) const { return offset - IVec{}; }
    XY_INLINE Vec add(Vec sums, Vec of_group, int, float scale, float) const {
      return sums + of_group * scale;
    }
    XY_INLINE float at(int column, int j) const {
      const auto byte = static_cast<uint8_t>(bytes[(j / 4 * kPanel + column) * 4 + j % 4]);
      return static_cast<float>(byte - 128);
    }
  };
};

// The header of Int4, then bytes of two quanta: input features 8i to 8i + 3 of a column in the
// lower halves of a lane, the next four in the upper ones.
struct Int4Quads {
  static constexpr int kTallest = kMaxQuadsHeight;
  static constexpr Inputs kInputs = Inputs::kQuads;
  static constexpr int64_t bytes(int64_t k) { return Int4::bytes(k); }
  static constexpr int place(int column, int j) { return (j / 8 * kPanel + column) * 4 + j % 4; }
  static void pack(const Columns& columns, int first, const float*, char* to) {
    Int4::pack_group(columns, first, to, [](char* quanta, int column, int j, int quantum) {
      quanta[place(column, j)] |= static_cast<char>(quantum << j / 4 % 2 * 4);
    });
  }

  struct Group {
    Int4Header header;
    const char* quanta;
    XY_INLINE explicit Group(const char* at) : header(at), quanta(at + 2 * Bf16::bytes(1)) {}
    XY_INLINE UVec quad(int index, int half) const {
      const UVec both = load<UVec>(quanta + (index / 2 * 2 + half) * sizeof(UVec));
      return (index % 2 == 0 ? both : both >> 4) & 0x0F0F0F0Fu;
    }
    XY_INLINE IVec first_sums(int32_t) const { return IVec{}; }
    XY_INLINE Vec add(Vec sums, Vec of_group, int half, float scale, float total) const {
      sums += of_group * scale * header.scale[half];
      return sums + header.minimum[half] * total;
    }
    XY_INLINE float at(int column, int j) const {
      const int quantum = quanta[place(column, j)] >> j / 4 % 2 * 4 & 15;
      const int half = column / kLanes, lane = column % kLanes;
      return static_cast<float>(quantum) * header.scale[half][lane] + header.minimum[half][lane];
    }
  };
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
      return function(Bf16Product{});
    case kInt8Quads:
      return function(Int8Quads{});
    case kInt4Quads:
      return function(Int4Quads{});
    default:
      return function(Fp32{});
  }
}

template <class Format>
XY_INLINE void expand_floats(const char* panel, int depth, float* to) {
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

// Expand `depth` input features of a panel to exactly the floats that a tile would read.
template <class Format>
void expand(const char* panel, int depth, float* to) {
  if constexpr (Format::kInputs == Inputs::kQuads) {
    for (int k0 = 0; k0 < depth; k0 += kGroup) {
      const typename Format::Group group(panel + Format::bytes(k0));
      for (int k = 0; k < kGroup; ++k)
        for (int column = 0; column < kPanel; ++column) *to++ = group.at(column, k);
    }
  } else {
    expand_floats<Format>(panel, depth, to);
  }
}

}  // namespace XY_ISA
