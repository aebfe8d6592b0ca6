// The attention meta-kernel: matmul, softmax, matmul over one query tile and a range of keys, for
// prefill, decode and verify spans alike, over the paged KV cache.
//
// Keys are processed in chunks that begin at multiples of kKvChunk. A chunk's result (largest
// score, sum of weights, weighted values) is computed by itself and merged into the earlier ones in
// order, on one thread or several: neither the task split nor the rest of the batch changes a bit.
#pragma once

#include "gemm.h"

namespace XY_ISA {

// Keys of one chunk, which is processed block by block, whatever the block size. Larger chunks have
// fewer merges; smaller ones keep their scores in the cache and can be split over more threads.
constexpr int kKvChunk = 256;

// ---- The KV cache: per block and KV head, block_size keys, then block_size values. Keys are
// stored in panels of kPanel tokens, dimension by dimension; values in panels of kPanel dimensions,
// token by token; in bf16 two dimensions or two tokens after another. So both products read their
// right operand as the GEMM reads its weights. ----

// What a KV cache holds, as the format of its panels.
template <class Format>
struct Kv;

template <>
struct Kv<Fp32> {
  using Element = float;
  static XY_INLINE Element element(float x) { return x; }
  // One token's values of kLanes columns.
  static XY_INLINE void store(Element* panel, int column, const float* values) {
    XY_ISA::store(panel + column, load(values));
  }
};

template <>
struct Kv<Bf16Pairs> {
  using Element = uint16_t;
  static XY_INLINE Element element(float x) { return bf16_of(x); }
  // Its partner's may be written by another thread at the same time.
  static XY_INLINE void store(Element* panel, int column, const float* values) {
    store_upper_halves(panel + 2 * column, round_to_bf16(load(values)));
  }
};

template <class Function>
XY_INLINE void with_kv_format(const AttentionShape& s, Function&& function) {
  s.kv_format == kBf16Pairs ? function(Bf16Pairs{}) : function(Fp32{});
}

template <class Format>
XY_INLINE auto* keys_at(const AttentionShape& s, void* cache, int block, int head) {
  return static_cast<typename Kv<Format>::Element*>(cache) + block * s.block_stride +
         head * s.head_stride;
}

template <class Format>
XY_INLINE auto* values_at(const AttentionShape& s, void* cache, int block, int head) {
  return keys_at<Format>(s, cache, block, head) + int64_t{s.block_size} * s.head_size;
}

// Where feature k of a column is in a panel.
template <class Format>
XY_INLINE int64_t place(int k, int column) {
  constexpr int kStep = Packed<Format::kInputs>::kStep;
  return (int64_t{k / kStep} * kPanel + column) * kStep + k % kStep;
}

template <class Format>
XY_INLINE void write_token(const AttentionShape& s, void* cache, int64_t slot, int head,
                           const float* key, const float* value) {
  const int block = static_cast<int>(slot / s.block_size),
            token = static_cast<int>(slot % s.block_size);
  auto* const keys =
      keys_at<Format>(s, cache, block, head) + int64_t{token / kPanel * kPanel} * s.head_size;
  for (int d = 0; d < s.head_size; ++d)
    keys[place<Format>(d, token % kPanel)] = Kv<Format>::element(key[d]);
  for (int first = 0; first < s.head_size; first += kPanel) {
    auto* const values = values_at<Format>(s, cache, block, head) + int64_t{first} * s.block_size +
                         place<Format>(token, 0);
    for (int d = 0; d < kPanel; d += kLanes) Kv<Format>::store(values, d, value + first + d);
  }
}

struct KvWrite {
  const AttentionShape& shape;
  void* cache;
  const float* key;
  int64_t key_stride;
  const float* value;
  int64_t value_stride;
  const int64_t* slot_mapping;
};

void write_kv(const AttentionShape* shape, void* kv_cache, int32_t num_tokens, const float* key,
              int64_t key_stride, const float* value, int64_t value_stride,
              const int64_t* slot_mapping) {
  KvWrite context{*shape, kv_cache, key, key_stride, value, value_stride, slot_mapping};
  parallel(
      num_tokens,
      [](void* context, int token) {
        const auto& write = *static_cast<KvWrite*>(context);
        if (write.slot_mapping[token] < 0) return;  // a padding token
        with_kv_format(write.shape, [&](auto format) {
          for (int head = 0; head < write.shape.num_kv_heads; ++head)
            write_token<decltype(format)>(
                write.shape, write.cache, write.slot_mapping[token], head,
                write.key + token * write.key_stride + head * write.shape.head_size,
                write.value + token * write.value_stride + head * write.shape.head_size);
        });
      },
      &context);
}

// ---- One query tile. ----

struct Attention {
  const AttentionShape& shape;
  const AttentionPlan& plan;
  const AttentionData& data;
  float* partials;

  int group() const { return shape.num_heads / shape.num_kv_heads; }
  // Size of one partial result: per row its largest score, sum of weights and weighted values.
  int64_t partial_floats() const { return int64_t{plan.max_rows} * (2 + shape.head_size); }
};

// Largest scores, sums of weights and weighted values of `rows` rows, one array after the other.
struct Result {
  float *largest, *sum, *values;
  Result(float* memory, int rows)
      : largest(memory), sum(memory + rows), values(memory + 2 * rows) {}
};

struct QueryTile {
  const Attention& a;
  int span, first_token, num_tokens, kv_head;

  int rows() const { return num_tokens * a.group(); }
  int query_len() const { return a.plan.query_start_loc[span + 1] - a.plan.query_start_loc[span]; }
  int context() const { return a.plan.seq_lens[span] - query_len(); }
  const uint8_t* mask() const {
    const bool masked = a.plan.mask_start && a.plan.mask_start[span] >= 0;
    return masked ? a.plan.masks + a.plan.mask_start[span] : nullptr;
  }
  // The range of keys that the token may see; a mask may narrow it.
  int first_key(int token) const {
    const int window = a.shape.sliding_window;
    return window ? max(0, context() + token + 1 - window) : 0;
  }
  int end_key(int token) const { return mask() ? a.plan.seq_lens[span] : context() + token + 1; }
  int token_of(int row) const { return first_token + row / a.group(); }
  int64_t head_of(int row) const { return kv_head * a.group() + row % a.group(); }
  const float* query(int row) const {
    return a.data.query + (a.plan.query_start_loc[span] + token_of(row)) * a.data.query_stride +
           head_of(row) * a.shape.head_size;
  }
  float* out(int row) const {
    return a.data.out + (a.plan.query_start_loc[span] + token_of(row)) * a.data.out_stride +
           head_of(row) * a.shape.head_size;
  }
  int block(int key) const {
    return a.data.block_table[span * a.data.block_table_stride + key / a.shape.block_size];
  }
};

// The scaled queries as the left operand; `rows` has room for them as they are.
template <Inputs kInputs>
XY_INLINE void pack_query(const QueryTile& tile, const int32_t* heights, int num_heights,
                          float* rows, float* packed) {
  const int size = tile.a.shape.head_size;
  const float scale = tile.a.shape.scale;
  for (int row = 0; row < tile.rows(); ++row) {
    const float* const from = tile.query(row);
    for (int d = 0; d < size; d += kLanes) store(rows + row * size + d, load(from + d) * scale);
  }
  for (int i = 0, row = 0; i < num_heights; row += heights[i++])
    pack_rows<kInputs>(rows + row * size, size, heights[i], size, size, nullptr,
                       packed + row * Packed<kInputs>::words(size));
}

XY_INLINE Vec capped(Vec score, float cap) {
  // cap * tanh(score / cap)
  return cap - 2 * cap / (exp(score * (2 / cap)) + 1.0f);
}

// Turn a row's scores [begin, end) into weights; keys that it may not see get 0.
XY_INLINE void softmax(const QueryTile& tile, int row, int chunk_key, int begin, int end,
                       float* scores, float* largest_score, float* weights_sum) {
  const int token = tile.token_of(row);
  const float never = -__builtin_inff();
  const int first = max(begin, min(end, tile.first_key(token) - chunk_key));
  const int last = max(first, min(end, tile.end_key(token) - chunk_key));
  const int padded_end = round_up(end, kLanes);
  if (const float cap = tile.a.shape.soft_cap; cap > 0)
    for (int j = begin; j < padded_end; j += kLanes)
      store(scores + j, capped(load(scores + j), cap));
  for (int j = first / kLanes * kLanes; j < first; ++j) scores[j] = never;
  for (int j = last; j < round_up(last, kLanes); ++j) scores[j] = never;
  if (const uint8_t* const mask = tile.mask()) {
    const uint8_t* const of_token = mask + token * tile.query_len();
    for (int j = max(first, tile.context() - chunk_key); j < last; ++j)
      if (!of_token[chunk_key + j - tile.context()]) scores[j] = never;
  }
  // What a row does not see needs no e^x.
  const int seen = first / kLanes * kLanes, seen_end = round_up(last, kLanes);
  Vec most = splat(never);
  for (int j = seen; j < seen_end; j += kLanes) most = vmax(most, load(scores + j));
  *largest_score = largest(most);
  const Vec shift = splat(*largest_score == never ? 0.0f : *largest_score);
  Vec total = {};
  for (int j = seen; j < seen_end; j += kLanes) {
    const Vec weight = exp(load(scores + j) - shift);
    store(scores + j, weight);
    total += weight;
  }
  for (int j = begin; j < seen; j += kLanes) store(scores + j, Vec{});
  for (int j = seen_end; j < padded_end; j += kLanes) store(scores + j, Vec{});
  *weights_sum = sum(total);
}

// result = merge(result, chunk), as in online softmax (M. Milakov and N. Gimelshein, 2018).
XY_INLINE void merge(int rows, int head_size, Result result, Result chunk) {
  for (int row = 0; row < rows; ++row) {
    const float most = max(result.largest[row], chunk.largest[row]);
    if (chunk.largest[row] == -__builtin_inff()) continue;  // the row sees no key of the chunk
    const float before = exp(result.largest[row] - most), now = exp(chunk.largest[row] - most);
    result.largest[row] = most;
    result.sum[row] = result.sum[row] * before + chunk.sum[row] * now;
    float* const to = result.values + row * head_size;
    const float* const from = chunk.values + row * head_size;
    for (int d = 0; d < head_size; d += kLanes)
      store(to + d, load(to + d) * before + load(from + d) * now);
  }
}

XY_INLINE void clear(int rows, int head_size, Result result) {
  for (int row = 0; row < rows; ++row) result.largest[row] = -__builtin_inff();
  std::memset(result.sum, 0, sizeof(float) * rows);
  std::memset(result.values, 0, sizeof(float) * rows * head_size);
}

XY_INLINE void write_out(const QueryTile& tile, Result result) {
  const int head_size = tile.a.shape.head_size;
  for (int row = 0; row < tile.rows(); ++row) {
    const float factor = result.sum[row] > 0 ? 1 / result.sum[row] : 0;
    float* const to = tile.out(row);
    for (int d = 0; d < head_size; d += kLanes)
      store(to + d, load(result.values + row * head_size + d) * factor);
  }
}

// The weights of keys [begin, end) of a row as pairs in bf16, in the place of the first ones.
XY_INLINE void pack_weights(float* weights, int begin, int end) {
  for (int j = begin; j < end; j += 2 * kLanes)
    store(weights + j / 2, bf16_pairs(load(weights + j), load(weights + j + kLanes)));
}

// A chunk's range of keys that lies in one block.
struct KeyRange {
  int first, count, in_block;  // first of the chunk's keys; its place in the block
};

template <class Function>
XY_INLINE void each_block(int block_size, int chunk_key, int begin, int end, Function&& function) {
  for (int key = begin; key < end;) {
    const int in_block = (chunk_key + key) % block_size;
    const int count = min(block_size - in_block, end - key);
    function(KeyRange{key, count, in_block});
    key += count;
  }
}

// The result of one chunk. At least one row of the tile sees keys in [begin, end).
template <class Format>
XY_INLINE void attend_chunk(const QueryTile& tile, const float* query, const int32_t* heights,
                            int num_heights, int chunk_key, int begin, int end, float* scores,
                            Result result) {
  using Element = typename Kv<Format>::Element;
  using Rows = Packed<Format::kInputs>;
  const AttentionShape& s = tile.a.shape;
  const int size = s.head_size, block_size = s.block_size;
  void* const cache = tile.a.data.kv_cache;
  begin = begin / kPanel * kPanel;
  // Panels stay in the first-level cache while every row tile passes over them; a single row tile
  // may take several at once.
  const int together = num_heights == 1 ? 4 : 1;
  each_block(block_size, chunk_key, begin, end, [&](KeyRange keys) {
    const Element* const panels =
        keys_at<Format>(s, cache, tile.block(chunk_key + keys.first), tile.kv_head) +
        int64_t{keys.in_block} * size;
    const int count = panels_of(keys.count);
    for (int panel = 0; panel < count; panel += together)
      for (int i = 0, row = 0; i < num_heights; row += heights[i++])
        multiply<Format>(heights[i], Rows{query + row * Rows::words(size)},
                         reinterpret_cast<const char*>(panels + int64_t{panel} * kPanel * size),
                         Format::bytes(size), min(together, count - panel), size, {},
                         {scores + row * kKvChunk + keys.first + panel * kPanel, kKvChunk, false});
  });
  for (int row = 0; row < tile.rows(); ++row) {
    float* const weights = scores + row * kKvChunk;
    softmax(tile, row, chunk_key, begin, end, weights, result.largest + row, result.sum + row);
    if (Format::kInputs == Inputs::kPairs) pack_weights(weights, begin, end);
  }
  each_block(block_size, chunk_key, begin, end, [&](KeyRange keys) {
    const Element* const values =
        values_at<Format>(s, cache, tile.block(chunk_key + keys.first), tile.kv_head);
    for (int panel = 0; panel < size / kPanel; panel += together)
      for (int i = 0, row = 0; i < num_heights; row += heights[i++])
        multiply<Format>(
            heights[i],
            Strided<Format::kInputs>{scores + row * kKvChunk + Rows::words(keys.first), kKvChunk},
            reinterpret_cast<const char*>(values + int64_t{panel} * kPanel * block_size +
                                          place<Format>(keys.in_block, 0)),
            Format::bytes(block_size), min(together, size / kPanel - panel), keys.count, {},
            {result.values + row * size + panel * kPanel, size, keys.first > begin});
  });
}

template <class Format>
XY_INLINE void attend_range(const Attention& a, const AttentionTask& task) {
  const QueryTile tile{a, task.span, task.first_token, task.num_tokens, task.kv_head};
  const int rows = tile.rows(), size = a.shape.head_size;
  const int32_t* const heights = a.plan.heights + task.heights;
  float* const scores = task_scratch(int64_t{rows} * (kKvChunk + 4 * size + 4));
  float* const query = scores + int64_t{rows} * kKvChunk;
  const Result chunk(query + rows * size, rows), total(query + rows * (2 * size + 2), rows);
  float* const queries = query + rows * (3 * size + 4);
  pack_query<Format::kInputs>(tile, heights, task.num_heights, queries, query);
  if (task.partial < 0) clear(rows, size, total);
  const int first_key = tile.first_key(task.first_token);
  const int end_key = tile.end_key(task.first_token + task.num_tokens - 1);
  for (int i = task.first_chunk; i < task.end_chunk; ++i) {
    const int chunk_key = i * kKvChunk;
    const int begin = max(0, first_key - chunk_key), end = min(kKvChunk, end_key - chunk_key);
    const int64_t partial = task.partial + i - task.first_chunk;
    const Result result =
        task.partial < 0 ? chunk : Result(a.partials + partial * a.partial_floats(), rows);
    attend_chunk<Format>(tile, query, heights, task.num_heights, chunk_key, begin, end, scores,
                         result);
    if (task.partial < 0) merge(rows, size, total, chunk);
  }
  if (task.partial < 0) write_out(tile, total);
}

void attend_task(void* context, int index) {
  const auto& a = *static_cast<Attention*>(context);
  with_kv_format(a.shape,
                 [&](auto format) { attend_range<decltype(format)>(a, a.plan.tasks[index]); });
}

void merge_task(void* context, int index) {
  const auto& a = *static_cast<Attention*>(context);
  const MergeTask& task = a.plan.merges[index];
  const QueryTile tile{a, task.span, task.first_token, task.num_tokens, task.kv_head};
  const int rows = tile.rows(), size = a.shape.head_size;
  const Result total(task_scratch(int64_t{rows} * (2 + size)), rows);
  clear(rows, size, total);
  for (int i = task.partial; i < task.partial + task.num_partials; ++i)
    merge(rows, size, total, Result(a.partials + i * a.partial_floats(), rows));
  write_out(tile, total);
}

// The caller provides memory for the plan's partial results, partial_floats() each.
XY_INLINE void attend_all(Attention& a) {
  parallel(a.plan.num_tasks, attend_task, &a);
  parallel(a.plan.num_merges, merge_task, &a);
}

void attend(const AttentionShape* shape, const AttentionPlan* plan, const AttentionData* data) {
  Attention a{*shape, *plan, *data, nullptr};
  a.partials = caller_scratch(plan->num_partials * a.partial_floats());
  attend_all(a);
}

}  // namespace XY_ISA
