// The inner loop: a few rows times a few panels, all sums in registers.
#pragma once

#include "formats.h"

namespace XY_ISA {

// The left operand of a tile: rows interleaved for each k (packed), or one row after the other.
struct PackedRows {
  const float* data;
  template <int kRows>
  XY_INLINE float at(int row, int k) const {
    return data[k * kRows + row];
  }
  // Two input features in bf16.
  template <int kRows>
  XY_INLINE uint32_t pair_at(int row, int k) const {
    uint32_t pair;
    std::memcpy(&pair, data + k / 2 * kRows + row, 4);
    return pair;
  }
};

struct StridedRows {
  const float* data;
  int64_t stride;
  template <int kRows>
  XY_INLINE float at(int row, int k) const {
    return data[row * stride + k];
  }
};

// What a tile fetches into the second-level cache while it multiplies: of each of its panels a line
// (as many as a step of the format has input features) at input feature k, and more every `step`
// input features, which is a multiple of the format's.
constexpr int kLine = 64;

struct Fetch {
  const char* from = nullptr;
  int k = -1, step = 0;  // -1: nothing
};

template <int kValue>
struct Constant {
  constexpr int operator()() const { return kValue; }
};

// out[kRows, kPanels * kPanel] (+)= rows x panels over `depth` input features.
template <class Format, int kRows, int kPanels, class Rows>
void tile(Rows rows, const char* panel, int64_t panel_stride, int depth, Fetch fetch, float* out,
          int64_t out_stride, bool add) {
  Vec acc[kRows][kPanels][2] = {};
  Format weights[kPanels];
  for (int p = 0; p < kPanels; ++p) weights[p].at = panel + p * panel_stride;
  for (int k0 = 0; k0 < depth; k0 += kGroup) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) weights[p].next_group();
    const int end = min(k0 + kGroup, depth);
    for (int k = k0; k < end; k += Format::kStep) {
      if (k == fetch.k) {
        for (int line = 0; line < Format::kStep; ++line, fetch.from += kLine)
          for (int p = 0; p < kPanels; ++p) __builtin_prefetch(fetch.from + p * panel_stride, 0, 2);
        fetch.k += fetch.step;
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        if constexpr (Format::kStep == 2) {
          UVec low, high;
          weights[p].next_pair(low, high);
#pragma GCC unroll 16
          for (int row = 0; row < kRows; ++row) {
            const UVec x = splat(rows.template pair_at<kRows>(row, k));
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
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* const to = out + row * out_stride + p * kPanel + half * kLanes;
        store(to, add ? load(to) + acc[row][p][half] : acc[row][p][half]);
      }
}

// Panels that a tile of this height takes at once: enough sums in flight to hide the latency of a
// multiply-add, or of a product of pairs, which is longer, as far as the registers suffice.
template <class Format>
constexpr int panels_at_once(int height) {
  if (Format::kStep == 2) return height <= 2 ? 4 : height <= 6 ? 2 : 1;
  return height == 1 ? 4 : height == 2 ? 2 : 1;
}

template <class Format, int kRows, class Rows>
void tile_row(Rows rows, const char* panels, int64_t panel_stride, int num_panels, int depth,
              Fetch fetch, float* out, int64_t out_stride, bool add) {
  constexpr int kAtOnce = min(Format::kMostPanels, panels_at_once<Format>(kRows));
  int p = 0;
  const auto next = [&](auto count) {
    tile<Format, kRows, count()>(rows, panels + p * panel_stride, panel_stride, depth, fetch,
                                 out + p * kPanel, out_stride, add);
    p += count(), fetch.from += count() * panel_stride;
  };
  while (p + kAtOnce <= num_panels) next(Constant<kAtOnce>{});
  while (p < num_panels) next(Constant<1>{});
}

// out[height, num_panels * kPanel] (+)= rows x panels over `depth` input features.
template <class Format, class Rows, int kRows = kMaxHeight>
XY_INLINE void multiply(int height, Rows rows, const char* panels, int64_t panel_stride,
                        int num_panels, int depth, Fetch fetch, float* out, int64_t out_stride,
                        bool add) {
  if constexpr (kRows > 1)
    if (height != kRows)
      return multiply<Format, Rows, kRows - 1>(height, rows, panels, panel_stride, num_panels,
                                               depth, fetch, out, out_stride, add);
  tile_row<Format, kRows>(rows, panels, panel_stride, num_panels, depth, fetch, out, out_stride,
                          add);
}

}  // namespace XY_ISA
