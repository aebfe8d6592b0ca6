// The virtual-padding GEMM: y[m, n] = sum over k of x[m, k] w[n, k].
//
// An output element is one chain of fused multiply-adds per chunk of k, and the chunks' sums are
// added in ascending order. Neither depends on the tile that computes it, so a row has the same
// bits whatever other rows are in the batch.
#pragma once

#include <type_traits>

#include "packing.h"
#include "tile.h"

namespace XY_ISA {

// Max input features of one chunk: in bf16 a panel's chunk (40 KiB with 512-bit vectors, 20 KiB
// with 256-bit ones) stays in the first-level cache while every row tile passes over it.
constexpr int kMaxChunk = 640;

// Input features of one chunk: k is split into as few equal parts as possible.
XY_INLINE int chunk_of(int k) {
  const int parts = (k + kMaxChunk - 1) / kMaxChunk;
  return round_up((k + parts - 1) / parts, kGroup);
}

// Panels that a task with a single row tile reads concurrently, if it has a row or two: more sums
// would wait for each other.
constexpr int kStreams = 4;

// ---- The left operand: rows of one tile side by side. ----

// RMSNorm (B. Zhang and R. Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight.
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
  IVec low, high;  // interleave the first halves of two vectors, and their second halves
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

// Round a row to int8, with one scale for each group of input features, and write it to column
// `row` of packed[...][height].
XY_INLINE void pack_quads_of_row(const float* x, int k, int depth, const Norm* norm, int row,
                                 int height, float* packed) {
  constexpr int kVecs = kGroup / kLanes;
  const float factor = norm ? inverse_rms(x, k, norm->eps) : 1;
  float* to = packed + row;
  const auto put = [&](auto value) {
    std::memcpy(to, &value, 4);
    to += height;
  };
  for (int j = 0; j < depth; j += kGroup) {
    Vec values[kVecs];
    if (j + kGroup <= k) {
      for (int i = 0; i < kVecs; ++i) {
        values[i] = load(x + j + i * kLanes);
        if (norm) values[i] *= factor * load(norm->weight + j + i * kLanes);
      }
    } else {
      float rest[kGroup] = {};
      for (int i = 0; i < k - j; ++i)
        rest[i] = norm ? x[j + i] * (factor * norm->weight[j + i]) : x[j + i];
      for (int i = 0; i < kVecs; ++i) values[i] = load(rest + i * kLanes);
    }
    // Compared as integers: of those a NaN is the largest, and makes the whole row NaN.
    IVec most = (IVec)vabs(values[0]);
    for (int i = 1; i < kVecs; ++i) most = vmax(most, (IVec)vabs(values[i]));
    const float scale = float_of_bits(largest(most)) * (1.0f / 127);
    const float inverse = scale > 1e-35f ? 1 / scale : 0;
    int8_t quanta[kGroup];
    IVec total = {};
    for (int i = 0; i < kVecs; ++i) {
      const IVec integers = rounded(values[i] * inverse);
      total += integers;
      store_bytes(quanta + i * kLanes, integers);
    }
    for (int quad = 0; quad < kGroup; quad += 4)
      for (int part = 0; part < kParts; ++part) put(part_of(quanta + quad, part));
    const int32_t all = sum(total);
    put(scale), put(-128 * all), put(scale * static_cast<float>(all));
  }
}

XY_INLINE void pack_quads(const float* rows, int64_t stride, int height, int k, int depth,
                          const Norm* norm, float* packed) {
  for (int row = 0; row < height; ++row)
    pack_quads_of_row(rows + row * stride, k, depth, norm, row, height, packed);
}

XY_INLINE void pack_tiles(const float* rows, int64_t stride, int height, int k, int depth,
                          const Norm* norm, float* packed) {
  constexpr int kWords = Packed<Inputs::kTiles>::kWords;
  for (int row = 0; row < height; ++row) {
    const float* const x = rows + row * stride;
    const float factor = norm ? inverse_rms(x, k, norm->eps) : 1;
    for (int j = 0; j < depth; j += kGroup) {
      float values[kGroup] = {};
      for (int i = 0; i < min(kGroup, k - j); ++i)
        values[i] = norm ? x[j + i] * factor * norm->weight[j + i] : x[j + i];
      float* const to = packed + (j / kGroup * height + row) * kWords;
      for (int i = 0; i < kGroup; i += 2 * kLanes)
        store(to + i / 2, bf16_pairs(load(values + i), load(values + i + kLanes)));
    }
  }
}

// Write rows[height][k] as Packed, `depth` input features long, normalised if `norm` is given, zero
// past k.
template <Inputs kInputs, int kRows = max_height(kInputs)>
XY_INLINE void pack_rows(const float* rows, int64_t stride, int height, int k, int depth,
                         const Norm* norm, float* packed) {
  if constexpr (kInputs == Inputs::kQuads)
    return pack_quads(rows, stride, height, k, depth, norm, packed);
  if constexpr (kInputs == Inputs::kTiles)
    return pack_tiles(rows, stride, height, k, depth, norm, packed);
  if constexpr (kRows > 1)
    if (height != kRows)
      return pack_rows<kInputs, kRows - 1>(rows, stride, height, k, depth, norm, packed);
  constexpr int kStep = kInputs == Inputs::kPairs ? 2 : 1;
  constexpr int kGroups = (kRows + kLanes - 1) / kLanes;
  float factor[kRows];
  for (int i = 0; norm && i < kRows; ++i) factor[i] = inverse_rms(rows + i * stride, k, norm->eps);
  const auto floats = [&](int i, int j) -> Vec {
    const Vec x = load(rows + i * stride + j);
    return norm ? x * factor[i] * load(norm->weight + j) : x;
  };
  const auto one = [&](int i, int j) -> float {
    if (j >= k) return 0;
    const float x = rows[i * stride + j];
    return norm ? x * factor[i] * norm->weight[j] : x;
  };
  int j = 0;
  // A store of a whole vector may reach past its row, so the end of the tile is written singly.
  for (; kRows > 1 && j + kStep * kLanes < k; j += kStep * kLanes) {
    Vec v[kGroups][kLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      Vec& to = v[i / kLanes][i % kLanes];
      if constexpr (kStep == 2)
        to = (Vec)bf16_pairs(floats(i, j), floats(i, j + kLanes));
      else
        to = floats(i, j);
    }
    for (int group = 0; group < kGroups; ++group) transpose(v[group]);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l)
      for (int group = 0; group < kGroups; ++group)
        store(packed + (j / kStep + l) * kRows + group * kLanes, v[group][l]);
  }
  for (; j < k; j += kStep)
    for (int i = 0; i < kRows; ++i) {
      float* const to = packed + j / kStep * kRows + i;
      if constexpr (kStep == 2)
        store(to, pair_of(one(i, j), one(i, j + 1)));
      else
        *to = one(i, j);
    }
  std::memset(packed + j / kStep * kRows, 0, sizeof(float) * (depth - j) / kStep * kRows);
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

// Copy sums, or for kSiluMul the product of two panels' sums, to the columns that exist.
template <int32_t kEpilogue>
void finish(const Product& p, const float* sums, int64_t sums_stride, int first_row, int num_rows,
            int first_panel, int end_panel) {
  constexpr int kStep = kEpilogue == kSiluMul ? 2 : 1;
  for (int row = 0; row < num_rows; ++row) {
    const float* from = sums + row * sums_stride;
    for (int panel = first_panel; panel < end_panel; panel += kStep, from += kStep * kPanel) {
      const auto [first, count] = panel_rows(p.weight, panel);
      float* const to = p.y + (first_row + row) * p.y_stride + first;
      for (int column = 0; column < count; column += kLanes) {
        Vec v = load(from + column);
        if constexpr (kEpilogue == kSiluMul) v = silu(v) * load(from + column + kPanel);
        if (column + kLanes <= count)
          store(to + column, v);
        else
          for (int i = column; i < count; ++i) to[i] = v[i - column];
      }
    }
  }
}

// One task: the tiles of one row block times the panels of one panel block.
template <class Format>
class Block {
  using Rows = Packed<Format::kInputs>;
  static constexpr bool kTiles = Format::kInputs == Inputs::kTiles;

 public:
  Block(const Product& p, int row_block, int panel_block)
      : p_(p),
        depth_(round_up(p.weight.k, kGroup)),
        chunk_(chunk_of(depth_)),
        first_tile_(row_block * p.plan.row_block),
        end_tile_(min(first_tile_ + p.plan.row_block, p.plan.num_tiles)),
        first_panel_(panel_block * p.plan.panel_block),
        end_panel_(min(first_panel_ + p.plan.panel_block, num_panels(p.weight))),
        first_row_(p.starts[first_tile_]),
        num_rows_(p.starts[end_tile_] - first_row_),
        begins_(p.epilogue == kAdd || p.bias),
        panel_bytes_(panel_bytes(p.weight)) {
    const int64_t width = int64_t{p.plan.panel_block} * kPanel;
    sums_ = task_scratch(num_rows_ * width + chunk_ * kPanel);
    expanded_ = sums_ + num_rows_ * width;
    sums_stride_ = width;
    // Each sum has its place in y, if panels of a gated weight do not take turns there.
    if (!p.weight.gated && panel_rows(p.weight, end_panel_ - 1).count == kPanel) {
      in_place_ = true;
      sums_ = p.y + first_row_ * p.y_stride + first_panel_ * kPanel;
      sums_stride_ = p.y_stride;
    }
  }

  void run() {
    [[maybe_unused]] const std::conditional_t<kTiles, TilesInUse, int> tiles{};
    if (begins_) begin();
    if (end_tile_ - first_tile_ == 1 && num_rows_ <= Format::kTallest)
      one_tile();
    else
      many_tiles();
    if (in_place_) return;
    const auto function = p_.epilogue == kSiluMul ? finish<kSiluMul> : finish<kStore>;
    function(p_, sums_, sums_stride_, first_row_, num_rows_, first_panel_, end_panel_);
  }

 private:
  // A panel that several tiles read is expanded once, unless expanding is only a shift.
  static constexpr bool kExpand = __is_same(Format, Int8) || __is_same(Format, Int4);

  // The sums begin with what the product is added to, and the bias.
  void begin() {
    if (in_place_ && !p_.bias) return;
    for (int row = 0; row < num_rows_; ++row) {
      const float* const y = p_.y + (first_row_ + row) * p_.y_stride;
      float* to = sums_ + row * sums_stride_;
      for (int panel = first_panel_; panel < end_panel_; ++panel, to += kPanel) {
        const auto [first, count] = panel_rows(p_.weight, panel);
        for (int i = 0; i < count; ++i)
          to[i] = (p_.epilogue == kAdd ? y[first + i] : 0) + (p_.bias ? p_.bias[first + i] : 0);
      }
    }
  }

  // Each panel is read once. The tile fetches what is read next: the hardware prefetcher would need
  // several lines of each short stream before it follows. Tiles that do little but read, with
  // vectors of whole lines, are faster with the hardware's alone.
  void one_tile() {
    const int little = kExpand ? 0 : Format::kInputs == Inputs::kFloats ? 1 : 2;
    const bool fetches = kLanes < 16 || num_rows_ > little;
    const int step = max<int64_t>(Rows::kStep, kLine * kGroup / Format::bytes(kGroup));
    const int lines = static_cast<int>((Format::bytes(kGroup) * step / kGroup + kLine - 1) / kLine);
    const int streams = num_rows_ <= 2 ? kStreams : 1;
    for (int panel = first_panel_; panel < end_panel_; panel += streams)
      for (int k = 0; k < depth_; k += chunk_) {
        const bool last = k + chunk_ >= depth_;
        const char* const next = last ? panel_at(panel + streams, 0) : panel_at(panel, k + chunk_);
        multiply<Format>(num_rows_, rows_at(first_tile_, k), panel_at(panel, k), panel_bytes_,
                         min(streams, end_panel_ - panel), min(chunk_, depth_ - k),
                         fetches ? Fetch{next, 0, step, lines} : Fetch{},
                         sums_at(first_tile_, panel, k));
      }
  }

  // While the tiles use a panel they fetch the next one, each tile a part of its lines.
  void many_tiles() {
    const int num_tiles = end_tile_ - first_tile_;
    for (int k = 0; k < depth_; k += chunk_) {
      const int chunk = min(chunk_, depth_ - k);
      const int lines = static_cast<int>(Format::bytes(chunk) / kLine) / num_tiles + 1;
      // In as many steps as there are lines, or in all steps several.
      const int step = max(1, chunk / Rows::kStep / lines) * Rows::kStep;
      const int at_once = (lines * step + chunk - 1) / chunk;
      for (int panel = first_panel_; panel < end_panel_; ++panel) {
        const bool last = panel + 1 == end_panel_;
        const char* next = last ? panel_at(first_panel_, k + chunk) : panel_at(panel + 1, k);
        if (kExpand) expand<Format>(panel_at(panel, k), chunk, expanded_);
        for (int tile = first_tile_; tile < end_tile_; ++tile, next += lines * kLine)
          multiply_panel(tile, panel, k, chunk, {next, 0, step, at_once});
      }
    }
  }

  XY_INLINE void multiply_panel(int tile, int panel, int k, int chunk, Fetch fetch) {
    using Read = std::conditional_t<kExpand, Fp32, Format>;
    const char* const from =
        kExpand ? reinterpret_cast<const char*>(expanded_) : panel_at(panel, k);
    multiply<Read>(p_.starts[tile + 1] - p_.starts[tile], rows_at(tile, k), from, 0, 1, chunk,
                   fetch, sums_at(tile, panel, k));
  }

  XY_INLINE const char* panel_at(int panel, int k) const {
    return static_cast<const char*>(p_.weight.panels) + panel * panel_bytes_ + Format::bytes(k);
  }
  XY_INLINE Sums sums_at(int tile, int panel, int k) const {
    const float* const scales = p_.weight.scales;
    const int64_t row = p_.starts[tile] - first_row_;
    return {sums_ + row * sums_stride_ + (panel - first_panel_) * kPanel, sums_stride_,
            begins_ || k > 0, scales ? scales + panel * kPanel : nullptr};
  }
  XY_INLINE Rows rows_at(int tile, int k) const {
    const int64_t start = p_.starts[tile], height = p_.starts[tile + 1] - start;
    return {p_.packed + start * depth_ + Rows::words(k) * height};
  }

  const Product& p_;
  const int depth_, chunk_, first_tile_, end_tile_, first_panel_, end_panel_, first_row_, num_rows_;
  const bool begins_;  // not with zero
  const int64_t panel_bytes_;
  float *sums_, *expanded_;
  int64_t sums_stride_;
  bool in_place_ = false;
};

// Memory for the packed left operand, in floats. Behind it is what a last tile of few rows reads.
XY_INLINE int64_t packed_floats(int num_rows, int k) {
  return int64_t{num_rows} * round_up(k, kGroup) + kTileRows * kTileBytes / 4;
}

XY_INLINE void multiply_all(Product& p, int* starts) {
  const GemmPlan& plan = p.plan;
  starts[0] = 0;
  for (int tile = 0; tile < plan.num_tiles; ++tile)
    starts[tile + 1] = starts[tile] + plan.heights[tile];
  p.starts = starts;
  parallel(
      plan.num_tiles,
      [](void* context, int tile) {
        const auto& p = *static_cast<Product*>(context);
        const int start = p.starts[tile], depth = round_up(p.weight.k, kGroup);
        with_format(p.weight.format, [&](auto format) {
          pack_rows<format.kInputs>(p.x + start * p.x_stride, p.x_stride, p.plan.heights[tile],
                                    p.weight.k, depth, p.norm, p.packed + int64_t{start} * depth);
        });
      },
      &p);
  const int row_blocks = (plan.num_tiles + plan.row_block - 1) / plan.row_block;
  const int panel_blocks = (num_panels(p.weight) + plan.panel_block - 1) / plan.panel_block;
  // The row blocks of a panel block follow each other, while its weights are still in a cache.
  parallel(
      row_blocks * panel_blocks,
      [](void* context, int task) {
        const auto& p = *static_cast<Product*>(context);
        const int row_blocks = (p.plan.num_tiles + p.plan.row_block - 1) / p.plan.row_block;
        with_format(p.weight.format, [&](auto format) {
          Block<decltype(format)>(p, task % row_blocks, task / row_blocks).run();
        });
      },
      &p);
}

}  // namespace XY_ISA
