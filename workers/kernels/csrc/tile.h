// The inner loop: a few rows times a few panels, all sums in registers.
#pragma once

#include "formats.h"

namespace XY_ISA {

// The left operand of a tile, rows interleaved (packed): all rows' word i, then their word i + 1.
template <Inputs kInputs>
struct Packed;

// A word is an input feature.
template <>
struct Packed<Inputs::kFloats> {
  static constexpr int kStep = 1;  // input features that a tile takes at once
  static constexpr int64_t words(int64_t k) { return k; }
  const float* data;
  template <int kRows>
  XY_INLINE float at(int row, int k) const {
    return data[k * kRows + row];
  }
};

// A word is two input features in bf16, the even one in its lower half.
template <>
struct Packed<Inputs::kPairs> {
  static constexpr int kStep = 2;
  static constexpr int64_t words(int64_t k) { return k / 2; }
  const float* data;
  template <int kRows>
  XY_INLINE uint32_t at(int row, int k) const {
    uint32_t pair;
    std::memcpy(&pair, data + k / 2 * kRows + row, 4);
    return pair;
  }
};

// For each group of input features, row after row, all of its pairs.
template <>
struct Packed<Inputs::kTiles> {
  static constexpr int kStep = kGroup, kWords = kGroup / 2;
  static constexpr int64_t words(int64_t k) { return k / 2; }
  const float* data;
};

// For each group of input features the parts of its quads, then what rounding has left to know: the
// scale, the sum of the integers times -128, and that sum times the scale.
template <>
struct Packed<Inputs::kQuads> {
  static constexpr int kStep = kGroup, kQuads = kGroup / 4 * kParts, kWords = kQuads + 3;
  static constexpr int64_t words(int64_t k) { return k / kGroup * kWords; }
  const float* data;
  template <class Word, int kRows>
  XY_INLINE Word at(int row, int word) const {
    Word value;
    std::memcpy(&value, data + word * kRows + row, 4);
    return value;
  }
};

// The same words of each row one after the other, rows `stride` apart.
template <Inputs kInputs>
struct Strided {
  const float* data;
  int64_t stride;
  template <int kRows>
  XY_INLINE auto at(int row, int k) const {
    return Packed<kInputs>{data + row * stride}.template at<1>(0, k);
  }
};

// What a tile fetches into the second-level cache while it multiplies: of each of its panels
// `lines` lines at input feature k, and more every `step` input features, a multiple of those that
// it takes at once.
constexpr int kLine = 64;

struct Fetch {
  const char* from = nullptr;
  int k = -1, step = 0, lines = 0;  // -1: nothing

  XY_INLINE void at(int now, int panels, int64_t panel_stride) {
    if (now != k) return;
    for (int line = 0; line < lines; ++line, from += kLine)
      for (int p = 0; p < panels; ++p) __builtin_prefetch(from + p * panel_stride, 0, 2);
    k += step;
  }
};

template <int kValue>
struct Constant {
  constexpr int operator()() const { return kValue; }
};

// Where a tile's sums go: stored or added, multiplied by the scale of their column if there are
// scales.
struct Sums {
  float* at;
  int64_t stride;
  bool add;
  const float* scales = nullptr;

  XY_INLINE Sums from_panel(int panel) const {
    return {at + panel * kPanel, stride, add, scales ? scales + panel * kPanel : nullptr};
  }
  XY_INLINE void put_row(int row, const float* sums) const {
    for (int column = 0; column < kPanel; column += kLanes) {
      float* const to = at + row * stride + column;
      store(to, add ? load(to) + load(sums + column) : load(sums + column));
    }
  }
  template <int kRows, int kPanels>
  XY_INLINE void put(const Vec (&sums)[kRows][kPanels][2]) const {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int column = p * kPanel + half * kLanes;
        const Vec scale = scales ? load(scales + column) : splat(1.0f);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
          float* const to = at + row * stride + column;
          const Vec v = sums[row][p][half];
          store(to, add ? fused(v, scale, load(to)) : v * scale);
        }
      }
  }
};

// sums [kRows, kPanels * kPanel] of rows x panels over `depth` input features.
template <class Format, int kRows, int kPanels, class Rows>
void tile(Rows rows, const char* panel, int64_t panel_stride, int depth, Fetch fetch, Sums sums) {
  constexpr int kStep = Packed<Format::kInputs>::kStep;
  Vec acc[kRows][kPanels][2] = {};
  Format weights[kPanels];
  for (int p = 0; p < kPanels; ++p) weights[p].at = panel + p * panel_stride;
  const auto step = [&](int p, int k, auto is_last) __attribute__((always_inline)) {
    if constexpr (Format::kInputs == Inputs::kPairs) {
      UVec low, high;
      weights[p].next_pair(low, high);
      if (is_last()) low &= 0xFFFFu, high &= 0xFFFFu;  // without a partner
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const UVec x = splat(rows.template at<kRows>(row, k));
        acc[row][p][0] = dot(acc[row][p][0], x, low);
        acc[row][p][1] = dot(acc[row][p][1], x, high);
      }
    } else {
      Vec low, high;
      weights[p].next(low, high);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const Vec x = splat(rows.template at<kRows>(row, k));
        acc[row][p][0] += x * low;
        acc[row][p][1] += x * high;
      }
    }
  };
  for (int k0 = 0; k0 < depth; k0 += kGroup) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) weights[p].next_group();
    const int end = min(k0 + kGroup, depth);
    for (int k = k0; k + kStep <= end; k += kStep) {
      fetch.at(k, kPanels, panel_stride);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) step(p, k, Constant<false>{});
    }
  }
  if (depth % kStep != 0)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) step(p, depth - 1, Constant<true>{});
  sums.put(acc);
}

// The same for inputs in quads, one panel. The sums of a group are integers, and exact.
template <class Format, int kRows>
void quads_tile(Packed<Inputs::kQuads> rows, const char* panel, int depth, Fetch fetch, Sums sums) {
  using Rows = Packed<Inputs::kQuads>;
  constexpr int kAtOnce = kRegisters == 32 ? 2 : 1;  // halves of the panel, as registers suffice
  Vec acc[kRows][1][2] = {};
  for (int k = 0; k < depth; k += kGroup) {
    fetch.at(k, 1, 0);
    const typename Format::Group group(panel + Format::bytes(k));
#pragma GCC unroll 2
    for (int first = 0; first < 2; first += kAtOnce) {
      IVec integers[kRows][kAtOnce];
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row)
        for (int half = 0; half < kAtOnce; ++half)
          integers[row][half] =
              group.first_sums(rows.template at<int32_t, kRows>(row, Rows::kQuads + 1));
#pragma GCC unroll 8
      for (int quad = 0; quad < kGroup / 4; ++quad)
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          UVec w[kAtOnce];
          for (int half = 0; half < kAtOnce; ++half)
            w[half] = part_of(group.quad(quad, first + half), part);
#pragma GCC unroll 16
          for (int row = 0; row < kRows; ++row) {
            const UVec x = splat(rows.template at<uint32_t, kRows>(row, quad * kParts + part));
            for (int half = 0; half < kAtOnce; ++half)
              integers[row][half] = dot(integers[row][half], w[half], x);
          }
        }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < kAtOnce; ++half) {
          Vec& sum = acc[row][0][first + half];
          sum = group.add(sum, __builtin_convertvector(integers[row][half], Vec), first + half,
                          rows.template at<float, kRows>(row, Rows::kQuads),
                          rows.template at<float, kRows>(row, Rows::kQuads + 2));
        }
    }
    rows.data += Rows::kWords * kRows;
  }
  sums.put(acc);
}

// The same on AMX's tiles, which must be in use and whose rows past `height` hold what lies behind,
// and are dropped.
inline void amx_tile(int height, Packed<Inputs::kTiles> rows, const char* panel, int depth,
                     Fetch fetch, Sums sums) {
  zero_tile<0>(), zero_tile<1>();
  for (int k = 0; k < depth; k += kGroup) {
    fetch.at(k, 1, 0);
    load_tile<2>(rows.data + rows.words(k) * height, kTileBytes);
    load_tile<3>(panel + Bf16Tiles::bytes(k), 2 * kTileBytes);
    load_tile<4>(panel + Bf16Tiles::bytes(k) + kTileBytes, 2 * kTileBytes);
    dot_tiles<0, 2, 3>(), dot_tiles<1, 2, 4>();
  }
  float found[kTileRows][2 * kTileRows];
  store_tile<0>(found[0], sizeof found[0]), store_tile<1>(found[0] + kTileRows, sizeof found[0]);
  for (int row = 0; row < height; ++row) sums.put_row(row, found[row]);
}

// Panels that a tile of this height takes at once: enough sums in flight to hide the latency of a
// multiply-add, or of a product of pairs, which is longer, as far as the registers suffice.
template <class Format>
constexpr int panels_at_once(int height) {
  if (Format::kInputs == Inputs::kQuads) return 1;
  if (Format::kInputs == Inputs::kPairs) return height <= 2 ? 4 : height <= 6 ? 2 : 1;
  return min(Format::kMostPanels, height == 1 ? 4 : height == 2 ? 2 : 1);
}

template <class Format, int kRows, class Rows>
void tile_row(Rows rows, const char* panels, int64_t panel_stride, int num_panels, int depth,
              Fetch fetch, Sums sums) {
  if constexpr (Format::kInputs == Inputs::kQuads) {
    for (int p = 0; p < num_panels; ++p, fetch.from += panel_stride)
      quads_tile<Format, kRows>(rows, panels + p * panel_stride, depth, fetch, sums.from_panel(p));
  } else {
    constexpr int kAtOnce = panels_at_once<Format>(kRows);
    int p = 0;
    const auto next = [&](auto count) {
      tile<Format, kRows, count()>(rows, panels + p * panel_stride, panel_stride, depth, fetch,
                                   sums.from_panel(p));
      p += count(), fetch.from += count() * panel_stride;
    };
    while (p + kAtOnce <= num_panels) next(Constant<kAtOnce>{});
    while (p < num_panels) next(Constant<1>{});
  }
}

// sums [height, num_panels * kPanel] of rows x panels over `depth` input features.
template <class Format, class Rows, int kRows = max_height(Format::kInputs)>
XY_INLINE void multiply(int height, Rows rows, const char* panels, int64_t panel_stride,
                        int num_panels, int depth, Fetch fetch, Sums sums) {
  if constexpr (Format::kInputs == Inputs::kTiles) {
    for (int p = 0; p < num_panels; ++p, fetch.from += panel_stride)
      amx_tile(height, rows, panels + p * panel_stride, depth, fetch, sums.from_panel(p));
    return;
  } else if constexpr (kRows > 1)
    if (height != kRows)
      return multiply<Format, Rows, kRows - 1>(height, rows, panels, panel_stride, num_panels,
                                               depth, fetch, sums);
  if constexpr (Format::kInputs != Inputs::kTiles)
    tile_row<Format, kRows>(rows, panels, panel_stride, num_panels, depth, fetch, sums);
}

}  // namespace XY_ISA
