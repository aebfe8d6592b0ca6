// The virtual-padding GEMM: y[m, n] = sum over k of x[m, k] w[n, k].
//
// Every output element is one chain of fused multiply-adds per chunk of k, and the chunks' sums are
// added in ascending order. Neither depends on the tile an element falls in, so a row has the same
// bits whatever rows are computed beside it.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "threads.h"

namespace XY_ISA {

using namespace xy;

// Rows of the tallest tile: with two vectors a row it fills the registers.
constexpr int kMaxHeight = kLanes == 16 ? 12 : 6;

// Most input features whose products are summed before they join the result. A panel's chunk stays
// in the first-level cache while every row tile passes over it.
constexpr int kMaxChunk = 384;

// Panels that a task reads side by side while it has one row tile only.
constexpr int kStreams = 4;

template <class T>
XY_INLINE T round_up(T x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---- Formats: how a panel's row of kPanel weights is read as two vectors of floats, and the largest
// tile that has registers left for it: above kTallest rows a panel is expanded to floats first. ----

struct Fp32 {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel * 4; }
  const char* at;
  XY_INLINE void next_group() {}
  XY_INLINE void next(Vec& low, Vec& high) {
    low = load(at), high = load(at + sizeof(Vec));
    at += 2 * sizeof(Vec);
  }
};

// Each 32-bit lane holds two columns: its lower half one of the first vector's, its upper half one
// of the second's. Both become floats by one exact operation.
struct Bf16 {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel * 2; }
  const char* at;
  XY_INLINE void next_group() {}
  XY_INLINE static void widen(UVec both, Vec& low, Vec& high) {
    low = (Vec)(both << 16), high = (Vec)(both & 0xFFFF0000u);
  }
  XY_INLINE void next(Vec& low, Vec& high) {
    widen(load<UVec>(at), low, high);
    at += sizeof(UVec);
  }
};

struct Int8 {
  static constexpr int kTallest = kMaxHeight, kMostPanels = 4;
  static constexpr int64_t bytes(int64_t k) { return k * kPanel; }
  const char* at;
  XY_INLINE void next_group() {}
  XY_INLINE void next(Vec& low, Vec& high) {
    low = __builtin_convertvector(widen_int8(at), Vec);
    high = __builtin_convertvector(widen_int8(at + kLanes), Vec);
    at += kPanel;
  }
};

// Per group of 32 input features: bf16 scales, bf16 minima, then the quanta, two to a byte. The
// value quantum * scale + minimum is rounded once, by the fused multiply-add. The upper quantum of a
// byte stays where it is, sixteen times its value, against a sixteenth of the scale: both exact.
struct Int4 {
  static constexpr int kTallest = kMaxHeight - 2, kMostPanels = 2;
  static constexpr int kGroupBytes = 2 * kPanel * 2 + kGroup * kLanes;
  static constexpr int64_t bytes(int64_t k) { return k / kGroup * kGroupBytes; }
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

// ---- Tiles. ----

// The left operand of a tile: rows side by side for each k (packed), or each row by itself.
struct PackedRows {
  const float* data;
  template <int kRows>
  XY_INLINE float at(int row, int k) const { return data[k * kRows + row]; }
};

struct StridedRows {
  const float* data;
  int64_t stride;
  template <int kRows>
  XY_INLINE float at(int row, int k) const { return data[row * stride + k]; }
};

// What a tile fetches into the second-level cache while it multiplies: a line at k and at each `step`
// input features from there, of each of its panels.
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
    for (int k = k0; k < end; ++k) {
      if (k == fetch.k) {
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(fetch.from + p * panel_stride, 0, 2);
        fetch.k += fetch.step, fetch.from += kLine;
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
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


// Panels that a tile of this height takes at once: enough sums in flight to cover the latency of a
// multiply-add, as far as the registers reach.
constexpr int panels_at_once(int height) { return height == 1 ? 4 : height == 2 ? 2 : 1; }

template <class Format, int kRows, class Rows>
void tile_row(Rows rows, const char* panels, int64_t panel_stride, int num_panels, int depth,
              Fetch fetch, float* out, int64_t out_stride, bool add) {
  constexpr int kAtOnce = min(Format::kMostPanels, panels_at_once(kRows));
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
  tile_row<Format, kRows>(rows, panels, panel_stride, num_panels, depth, fetch, out, out_stride, add);
}

// ---- Packing. ----

template <class Function>
XY_INLINE auto with_format(int32_t format, Function&& function) {
  switch (format) {
    case kBf16: return function(Bf16{});
    case kInt8: return function(Int8{});
    case kInt4: return function(Int4{});
    default: return function(Fp32{});
  }
}

// Input features of one chunk: k in as few equal parts as may be.
XY_INLINE int chunk_of(int k) {
  const int parts = (k + kMaxChunk - 1) / kMaxChunk;
  return round_up((k + parts - 1) / parts, kGroup);
}

XY_INLINE int panels_of(int n) { return (n + kPanel - 1) / kPanel; }

XY_INLINE int num_panels(const Weight& w) {
  return w.gated ? 2 * panels_of(w.n / 2) : panels_of(w.n);
}

// The rows a panel holds: the first, and how many; the rest of the panel is zero.
struct PanelRows {
  int first, count;
};

XY_INLINE PanelRows panel_rows(const Weight& w, int panel) {
  const int half = w.gated ? w.n / 2 : w.n;
  const int begin = (w.gated ? panel / 2 : panel) * kPanel;
  return {begin + (w.gated && panel % 2 ? half : 0), min(kPanel, half - begin)};
}

XY_INLINE int64_t panel_bytes(const Weight& w) {
  return with_format(w.format, [&](auto format) { return format.bytes(round_up(w.k, kGroup)); });
}

int64_t packed_bytes(int32_t n, int32_t k, int32_t format, int32_t gated) {
  const Weight w{n, k, format, gated, nullptr, nullptr};
  return num_panels(w) * panel_bytes(w);
}

XY_INLINE int clamp(float x, int low, int high) {
  return max(low, min(high, static_cast<int>(__builtin_rintf(x))));
}

// One panel's rows, [kPanel][depth] with zeros for what is missing and past k, in the panel's format.
XY_INLINE void pack_panel(int32_t format, const float* rows, int k, int depth, const float* scales,
                          char* to) {
  const auto at = [&](int column, int j) { return rows[int64_t{column} * depth + j]; };
  for (int first = 0; first < depth; first += kGroup) {
    float scale[kPanel], minimum[kPanel];
    if (format == kInt4) {
      auto* const header = reinterpret_cast<uint16_t*>(to);
      for (int c = 0; c < kPanel; ++c) {
        float low = at(c, first), high = low;
        for (int j = first; j < min(first + kGroup, k); ++j)
          low = min(low, at(c, j)), high = max(high, at(c, j));
        const int place = c % kLanes * 2 + c / kLanes;
        header[place] = bf16_of((high - low) / 15);
        header[kPanel + place] = bf16_of(low);
        scale[c] = float_of(header[place]), minimum[c] = float_of(header[kPanel + place]);
      }
      to += 2 * kPanel * 2;
    }
    for (int j = first; j < first + kGroup; ++j)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int half = 0; half < 2; ++half) {
          const int c = half * kLanes + lane;
          const float value = at(c, j);
          char* const row = to + (j - first) * kPanel * (format == kFp32 ? 4 : format == kBf16 ? 2 : 1);
          if (format == kFp32) {
            reinterpret_cast<float*>(row)[c] = value;
          } else if (format == kBf16) {
            reinterpret_cast<uint16_t*>(row)[2 * lane + half] = bf16_of(value);
          } else if (format == kInt8) {
            row[c] = static_cast<char>(scales[c] > 0 ? clamp(value / scales[c], -127, 127) : 0);
          } else {
            const int quantum = scale[c] > 0 ? clamp((value - minimum[c]) / scale[c], 0, 15) : 0;
            char& byte = to[(j - first) * kLanes + lane];
            byte = static_cast<char>(half ? byte | quantum << 4 : quantum);
          }
        }
    to += kGroup * (format == kFp32   ? kPanel * 4
                    : format == kBf16 ? kPanel * 2
                    : format == kInt8 ? kPanel
                                      : kLanes);
  }
}

void pack(const Weight* weight, const float* rows, float* scales) {
  struct Context {
    const Weight& w;
    const float* rows;
    float* scales;
  } context{*weight, rows, scales};
  parallel(num_panels(*weight), [](void* context, int panel) {
    const auto& [w, rows, scales] = *static_cast<Context*>(context);
    const int depth = round_up(w.k, kGroup);
    float* const padded = task_scratch(int64_t{kPanel} * depth);
    std::memset(padded, 0, sizeof(float) * kPanel * depth);
    const auto [first, count] = panel_rows(w, panel);
    for (int c = 0; c < count; ++c)
      std::memcpy(padded + int64_t{c} * depth, rows + int64_t{first + c} * w.k, sizeof(float) * w.k);
    if (w.format == kInt8)
      for (int c = 0; c < kPanel; ++c) {
        float most = 0;
        for (int k = 0; k < w.k; ++k) most = max(most, __builtin_fabsf(padded[int64_t{c} * depth + k]));
        scales[panel * kPanel + c] = most / 127;
      }
    pack_panel(w.format, padded, w.k, depth, scales + panel * kPanel,
               static_cast<char*>(w.panels) + panel * panel_bytes(w));
  }, &context);
}

// Expand `depth` input features of a panel to floats, exactly as a tile would read them.
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

void unpack(const Weight* weight, float* rows) {
  const Weight& w = *weight;
  const int depth = round_up(w.k, kGroup);
  float* const columns = task_scratch(int64_t{kPanel} * depth);
  for (int panel = 0; panel < num_panels(w); ++panel) {
    with_format(w.format, [&](auto format) {
      expand<decltype(format)>(static_cast<char*>(w.panels) + panel * panel_bytes(w), depth, columns);
    });
    const auto [first, count] = panel_rows(w, panel);
    for (int c = 0; c < count; ++c)
      for (int k = 0; k < w.k; ++k)
        rows[int64_t{first + c} * w.k + k] =
            columns[int64_t{k} * kPanel + c] * (w.format == kInt8 ? w.scales[panel * kPanel + c] : 1);
  }
}

// ---- The left operand: rows of one tile side by side. ----

// Of RMSNorm (B. Zhang and R. Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight.
struct Norm {
  const float* weight;
  float eps;
};

XY_INLINE float inverse_rms(const float* x, int size, float eps) {
  Vec squares = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + eps);
}

// v[i][j] becomes v[j][i].
XY_INLINE void transpose(Vec (&v)[kLanes]) {
  IVec low, high;  // of two vectors: their first halves interleaved, and their second halves
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int width = 1; width < kLanes; width *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], high);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// Write rows[height][k] to packed[depth][height], normalised if `norm` is given, zero past k.
template <int kRows = kMaxHeight>
XY_INLINE void pack_rows(const float* rows, int64_t stride, int height, int k, int depth,
                         const Norm* norm, float* packed) {
  if constexpr (kRows > 1)
    if (height != kRows) return pack_rows<kRows - 1>(rows, stride, height, k, depth, norm, packed);
  constexpr int kGroups = (kRows + kLanes - 1) / kLanes;
  float factor[kRows];
  for (int i = 0; norm && i < kRows; ++i) factor[i] = inverse_rms(rows + i * stride, k, norm->eps);
  int j = 0;
  // A store of a whole vector reaches into what comes next, so the end of the tile is left out.
  for (; kRows > 1 && j + kLanes < k; j += kLanes) {
    Vec v[kGroups][kLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = load(rows + i * stride + j);
      v[i / kLanes][i % kLanes] = norm ? x * factor[i] * load(norm->weight + j) : x;
    }
    for (int group = 0; group < kGroups; ++group) transpose(v[group]);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l)
      for (int group = 0; group < kGroups; ++group)
        store(packed + (j + l) * kRows + group * kLanes, v[group][l]);
  }
  for (; j < k; ++j)
    for (int i = 0; i < kRows; ++i) {
      const float x = rows[i * stride + j];
      packed[j * kRows + i] = norm ? x * factor[i] * norm->weight[j] : x;
    }
  std::memset(packed + k * kRows, 0, sizeof(float) * (depth - k) * kRows);
}

// ---- The whole product. ----

struct Product {
  const Weight& weight;
  const GemmPlan& plan;
  const float* x;
  int64_t x_stride;
  const Norm* norm;
  const float* bias;
  int32_t epilogue;
  float* y;
  int64_t y_stride;
  float* packed;      // the left operand, tile after tile
  const int* starts;  // first row of each tile
};

// What one half of a panel adds to its sums, once k is done.
struct Affine {
  Vec scale, bias;
  bool scaled;

  XY_INLINE Affine(const Product& p, int panel, int column) {
    const auto [first, count] = panel_rows(p.weight, panel);
    scaled = p.weight.scales != nullptr;
    scale = scaled ? load(p.weight.scales + panel * kPanel + column) : Vec{};
    bias = Vec{};
    for (int i = 0; p.bias && i < min(kLanes, count - column); ++i)
      bias[i] = p.bias[first + column + i];
  }
  XY_INLINE Vec operator()(const float* sums) const {
    return scaled ? load(sums) * scale + bias : load(sums) + bias;
  }
};

// Finish one panel's sums (two panels' if they are multiplied), and write the columns that exist.
template <int32_t kEpilogue>
void finish(const Product& p, const float* sums, int64_t sums_stride, int first_row,
                      int num_rows, int panel) {
  constexpr bool kPairs = kEpilogue == kSiluMul;
  const auto [first, count] = panel_rows(p.weight, panel);
  for (int column = 0; column < count; column += kLanes) {
    const Affine own(p, panel, column), other(p, kPairs ? panel + 1 : panel, column);
    const int valid = min(kLanes, count - column);
    float* to = p.y + first_row * p.y_stride + first + column;
    const float* from = sums + column;
    for (int row = 0; row < num_rows; ++row, from += sums_stride, to += p.y_stride) {
      const Vec v = kPairs ? silu(own(from)) * other(from + kPanel) : own(from);
      if (valid == kLanes) {
        store(to, kEpilogue == kAdd ? load(to) + v : v);
      } else {
        for (int i = 0; i < valid; ++i) to[i] = kEpilogue == kAdd ? to[i] + v[i] : v[i];
      }
    }
  }
}

XY_INLINE void finish_block(const Product& p, const float* sums, int64_t sums_stride, int first_row,
                            int num_rows, int first_panel, int end_panel) {
  const auto each = [&](int step, auto finish_panel) {
    for (int panel = first_panel; panel < end_panel; panel += step)
      finish_panel(p, sums + (panel - first_panel) * kPanel, sums_stride, first_row, num_rows, panel);
  };
  switch (p.epilogue) {
    case kAdd: return each(1, finish<kAdd>);
    case kSiluMul: return each(2, finish<kSiluMul>);
    default: return each(1, finish<kStore>);
  }
}

// One task: the tiles of one row block times the panels of one panel block.
template <class Format>
void multiply_block(const Product& p, int row_block, int panel_block) {
  const int depth = round_up(p.weight.k, kGroup);
  const int first_tile = row_block * p.plan.row_block;
  const int end_tile = min(first_tile + p.plan.row_block, p.plan.num_tiles);
  const int first_panel = panel_block * p.plan.panel_block;
  const int end_panel = min(first_panel + p.plan.panel_block, num_panels(p.weight));
  const int first_row = p.starts[first_tile];
  const int num_rows = p.starts[end_tile] - first_row;
  const int64_t width = int64_t{p.plan.panel_block} * kPanel, bytes = panel_bytes(p.weight);
  // A panel that several tiles read is expanded once, if expanding takes more than a shift.
  constexpr bool kExpand = !__is_same(Format, Fp32) && !__is_same(Format, Bf16);

  const int chunk_size = chunk_of(depth);
  float* const sums = task_scratch(num_rows * width + (kExpand ? chunk_size * kPanel : 0));
  float* const expanded = sums + num_rows * width;
  const auto panel_at = [&](int panel, int k) {
    return static_cast<const char*>(p.weight.panels) + panel * bytes + Format::bytes(k);
  };
  const auto sums_at = [&](int tile, int panel) {
    return sums + (p.starts[tile] - first_row) * width + (panel - first_panel) * kPanel;
  };
  const auto rows_at = [&](int tile, int k) {
    const int start = p.starts[tile];
    return PackedRows{p.packed + int64_t{start} * depth + int64_t{k} * (p.starts[tile + 1] - start)};
  };
  const int num_tiles = end_tile - first_tile;
  if (num_tiles == 1 && num_rows <= Format::kTallest) {
    // Each panel is read once. What is read next is fetched meanwhile: the prefetcher of the machine
    // needs some lines of each short stream before it follows.
    const int step = max<int64_t>(1, kLine * kGroup / Format::bytes(kGroup));
    for (int panel = first_panel; panel < end_panel; panel += kStreams)
      for (int k = 0; k < depth; k += chunk_size) {
        const char* const next = k + chunk_size < depth ? panel_at(panel, k + chunk_size)
                                                        : panel_at(panel + kStreams, 0);
        multiply<Format>(num_rows, rows_at(first_tile, k), panel_at(panel, k), bytes,
                         min(kStreams, end_panel - panel), min(chunk_size, depth - k),
                         {next, 0, step}, sums_at(first_tile, panel), width, k > 0);
      }
  } else {
    for (int k = 0; k < depth; k += chunk_size) {
      const int chunk = min(chunk_size, depth - k);
      // While the tiles use a panel the next one comes, each tile fetching its part of the lines.
      const int lines = static_cast<int>(Format::bytes(chunk) / kLine) / num_tiles + 1;
      for (int panel = first_panel; panel < end_panel; ++panel) {
        const char* const from = panel_at(panel, k);
        if (kExpand) expand<Format>(from, chunk, expanded);
        Fetch fetch{panel + 1 < end_panel ? panel_at(panel + 1, k) : panel_at(first_panel, k + chunk),
                    0, max(1, chunk / lines)};
        for (int tile = first_tile; tile < end_tile; ++tile, fetch.from += lines * kLine) {
          const int height = p.starts[tile + 1] - p.starts[tile];
          if (kExpand)
            multiply<Fp32>(height, rows_at(tile, k), reinterpret_cast<const char*>(expanded), 0, 1,
                           chunk, fetch, sums_at(tile, panel), width, k > 0);
          else
            multiply<Format>(height, rows_at(tile, k), from, bytes, 1, chunk, fetch,
                             sums_at(tile, panel), width, k > 0);
        }
      }
    }
  }
  finish_block(p, sums, width, first_row, num_rows, first_panel, end_panel);
}

// Memory that `product` needs for the left operand, in floats.
XY_INLINE int64_t packed_floats(int num_rows, int k) { return int64_t{num_rows} * round_up(k, kGroup); }

XY_INLINE void multiply_all(Product& p, int* starts) {
  const GemmPlan& plan = p.plan;
  starts[0] = 0;
  for (int tile = 0; tile < plan.num_tiles; ++tile) starts[tile + 1] = starts[tile] + plan.heights[tile];
  p.starts = starts;
  parallel(plan.num_tiles, [](void* context, int tile) {
    const auto& p = *static_cast<Product*>(context);
    const int start = p.starts[tile], depth = round_up(p.weight.k, kGroup);
    pack_rows(p.x + start * p.x_stride, p.x_stride, p.plan.heights[tile], p.weight.k, depth, p.norm,
              p.packed + int64_t{start} * depth);
  }, &p);
  const int row_blocks = (plan.num_tiles + plan.row_block - 1) / plan.row_block;
  const int panel_blocks = (num_panels(p.weight) + plan.panel_block - 1) / plan.panel_block;
  // Row blocks of one panel block follow each other, while its weights are still in a cache.
  parallel(row_blocks * panel_blocks, [](void* context, int task) {
    const auto& p = *static_cast<Product*>(context);
    const int row_blocks = (p.plan.num_tiles + p.plan.row_block - 1) / p.plan.row_block;
    with_format(p.weight.format, [&](auto format) {
      multiply_block<decltype(format)>(p, task % row_blocks, task / row_blocks);
    });
  }, &p);
}

}  // namespace XY_ISA
