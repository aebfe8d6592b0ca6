// Weights packed into panels, once, when a model is loaded.
#pragma once

#include "formats.h"
#include "threads.h"

namespace XY_ISA {

XY_INLINE int panels_of(int n) { return (n + kPanel - 1) / kPanel; }

XY_INLINE bool has_scales(const Weight& w) { return w.format == kInt8 || w.format == kInt8Quads; }

XY_INLINE int num_panels(const Weight& w) {
  return w.gated ? 2 * panels_of(w.n / 2) : panels_of(w.n);
}

// The rows of the weight that a panel holds; the rest of the panel is zero.
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

struct Packing {
  const Weight& weight;
  const float* rows;
  float* scales;
};

XY_INLINE float largest_size(const float* values, int count) {
  float most = 0;
  for (int i = 0; i < count; ++i) most = max(most, __builtin_fabsf(values[i]));
  return most;
}

void pack_panel(void* context, int panel) {
  const auto& [w, rows, scales] = *static_cast<Packing*>(context);
  const int depth = round_up(w.k, kGroup);
  float* const data = task_scratch(int64_t{kPanel} * depth);
  std::memset(data, 0, sizeof(float) * kPanel * depth);
  const auto [first, count] = panel_rows(w, panel);
  float* const panel_scales = scales + panel * kPanel;
  for (int c = 0; c < count; ++c) {
    const float* const row = rows + int64_t{first + c} * w.k;
    std::memcpy(data + int64_t{c} * depth, row, sizeof(float) * w.k);
    if (has_scales(w)) panel_scales[c] = largest_size(row, w.k) / 127;
  }
  with_format(w.format, [&](auto format) {
    char* const to = static_cast<char*>(w.panels) + panel * panel_bytes(w);
    for (int k = 0; k < depth; k += kGroup)
      format.pack({data, w.k, depth}, k, panel_scales, to + format.bytes(k));
  });
}

void pack(const Weight* weight, const float* rows, float* scales) {
  Packing packing{*weight, rows, scales};
  parallel(num_panels(*weight), pack_panel, &packing);
}

void unpack(const Weight* weight, float* rows) {
  const Weight& w = *weight;
  const int depth = round_up(w.k, kGroup);
  float* const columns = task_scratch(int64_t{kPanel} * depth);
  for (int panel = 0; panel < num_panels(w); ++panel) {
    with_format(w.format, [&](auto format) {
      expand<decltype(format)>(static_cast<char*>(w.panels) + panel * panel_bytes(w), depth,
                               columns);
    });
    const auto [first, count] = panel_rows(w, panel);
    for (int c = 0; c < count; ++c)
      for (int k = 0; k < w.k; ++k)
        rows[int64_t{first + c} * w.k + k] =
            columns[int64_t{k} * kPanel + c] * (has_scales(w) ? w.scales[panel * kPanel + c] : 1);
  }
}

}  // namespace XY_ISA
