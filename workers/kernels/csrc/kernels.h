// What the instruction sets have in common: the values that cross the C ABI, and the table of
// functions that each instruction set fills. `native.py` declares the same structures, and compares
// their sizes with `xy_struct_sizes` as it loads the library.
#pragma once

#include <cstdint>

namespace xy {

enum Format : int32_t { kFp32, kBf16, kInt8, kInt4, kBf16Pairs, kInt8Quads, kInt4Quads };

// Input features that share a scale and minimum in int4, and a scale in activations rounded to
// int8; rows are padded to a multiple of it.
constexpr int kGroup = 32;

// A matrix [n, k] packed into panels of output features, each panel input feature by input feature.
struct Weight {
  int32_t n, k;
  int32_t format;
  int32_t gated;        // panels alternate between the first n/2 rows (gate) and the rest (up)
  void* panels;         // `packed_bytes` long; owned by the caller
  const float* scales;  // [panel columns], int8 and int8_quads only
};

// How a GEMM over `num_rows` rows is cut: rows into tiles of heights that the kernel has, and the
// product into tasks of `row_block` tiles by `panel_block` panels.
struct GemmPlan {
  int32_t num_rows;
  int32_t num_tiles;
  const int32_t* heights;  // [num_tiles], adding up to num_rows
  int32_t row_block, panel_block;
};

enum Epilogue : int32_t {
  kStore,    // y = x w + b
  kAdd,      // y += x w + b
  kSiluMul,  // y = silu(gate) * up, the two halves of x w + b; gated weights only
};

struct AttentionShape {
  int32_t num_heads, num_kv_heads, head_size, block_size;
  float scale, soft_cap;              // soft_cap 0: no cap
  int32_t sliding_window;             // keys that a query sees, its own included; 0: all
  int32_t kv_format;                  // of the KV cache: kFp32 or kBf16Pairs
  int64_t block_stride, head_stride;  // in the KV cache, in keys' or values' elements
};

// One query tile of one KV head over a range of KV chunks.
struct AttentionTask {
  int32_t span, first_token, num_tokens, kv_head;
  int32_t first_chunk, end_chunk;
  int32_t partial;               // where the chunks' partial results go; -1: not split
  int32_t heights, num_heights;  // row tiles, in AttentionPlan::heights
};

// Partial results of one query tile, to be merged in the order of their chunks.
struct MergeTask {
  int32_t span, first_token, num_tokens, kv_head;
  int32_t partial, num_partials;
};

struct AttentionPlan {
  int32_t num_spans, num_tasks, num_merges, num_partials;
  int32_t max_rows;  // of the largest query tile: tokens times query heads per KV head
  const int32_t* query_start_loc;  // [num_spans + 1]
  const int32_t* seq_lens;         // [num_spans]
  const int32_t* mask_start;       // [num_spans] offset into masks, -1: causal; null: all causal
  const uint8_t* masks;            // per masked span [query_len, query_len]: 1 where a key is seen
  const int32_t* heights;
  const AttentionTask* tasks;
  const MergeTask* merges;
};

// What attention reads and writes besides the plan.
struct AttentionData {
  const float* query;  // [num_tokens, num_heads, head_size], rows query_stride apart
  int64_t query_stride;
  void* kv_cache;
  const int32_t* block_table;  // [num_spans, block_table_stride]
  int64_t block_table_stride;
  float* out;  // [num_tokens, num_heads, head_size], rows out_stride apart
  int64_t out_stride;
};

struct Layer {
  const float *input_norm, *post_attention_norm;
  const float *q_norm, *k_norm;  // null if the model has none
  const Weight *qkv, *o, *gate_up, *down;
  const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;  // null if there is none
  void* kv_cache;
};

struct Model {
  int32_t num_layers, hidden_size, intermediate_size, rotary_dim;
  float eps;
  int32_t max_position;  // rows of the rotary table
  const float* cos_sin;  // [max_position, rotary_dim]: cosines, then sines
  const float* final_norm;
  const Layer* layers;
  AttentionShape attention;
};

struct Step {
  int32_t num_tokens;
  const int64_t* positions;     // [num_tokens]
  const int64_t* slot_mapping;  // [num_tokens]
  const int32_t* block_table;
  int64_t block_table_stride;
  const AttentionPlan* attention;
  GemmPlan qkv, o, gate_up, down;
  float* hidden;  // [num_tokens, hidden_size]: embeddings in, normed final states out
};

struct Kernels {
  const char* isa;
  int32_t lanes, kv_chunk;
  int32_t max_height, max_bf16_height, max_int8_height;  // of a tile, by what inputs are rounded to
  int32_t has_bf16_dot, has_int8_dot;  // whether the CPU has an instruction for such products
  int64_t (*packed_bytes)(int32_t n, int32_t k, int32_t format, int32_t gated);
  // Fills weight->panels, and scales for int8, from rows [n, k].
  void (*pack)(const Weight* weight, const float* rows, float* scales);
  void (*unpack)(const Weight* weight, float* rows);
  void (*linear)(const Weight* weight, const GemmPlan* plan, const float* x, int64_t x_stride,
                 const float* bias, int32_t epilogue, float* y, int64_t y_stride);
  void (*write_kv)(const AttentionShape* shape, void* kv_cache, int32_t num_tokens,
                   const float* key, int64_t key_stride, const float* value, int64_t value_stride,
                   const int64_t* slot_mapping);
  void (*attend)(const AttentionShape* shape, const AttentionPlan* plan, const AttentionData* data);
  void (*forward)(const Model* model, const Step* step);
};

}  // namespace xy
