// The whole decoder stack of a llama-like model in one call.
#pragma once

#include "attention.h"

namespace XY_ISA {

struct Forward {
  const Model& model;
  const Step& step;
  const Layer* layer;
  float *qkv, *attended, *gated, *packed, *partials;
  int* starts;

  int q_size() const { return model.attention.num_heads * model.attention.head_size; }
  int kv_size() const { return model.attention.num_kv_heads * model.attention.head_size; }
  int qkv_size() const { return q_size() + 2 * kv_size(); }
};

// Rotary embedding of one head, NeoX style: rotates elements i and i + rotary_dim / 2 as a pair
// (J. Su et al., 2021). `cos_sin` is the row of the token's position.
XY_INLINE void rotate(float* x, const float* cos_sin, int rotary_dim) {
  const int half = rotary_dim / 2;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(x + half + i);
    const Vec c = load(cos_sin + i), s = load(cos_sin + half + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i], c = cos_sin[i], s = cos_sin[half + i];
    x[i] = a * c - b * s;
    x[half + i] = b * c + a * s;
  }
}

XY_INLINE void normalize(float* x, int size, Norm norm) {
  const float factor = inverse_rms(x, size, norm.eps);
  for (int i = 0; i < size; ++i) x[i] = x[i] * factor * norm.weight[i];
}

// Norm and rotate one token's queries and keys, then write its keys and values to the cache.
void prepare_token(void* context, int token) {
  const auto& f = *static_cast<Forward*>(context);
  const AttentionShape& s = f.model.attention;
  float* const row = f.qkv + int64_t{token} * f.qkv_size();
  const int64_t position = f.step.positions[token], slot = f.step.slot_mapping[token];
  const float* const cos_sin = f.model.cos_sin + position * f.model.rotary_dim;
  for (int head = 0; head < s.num_heads + s.num_kv_heads; ++head) {
    float* const x = row + head * s.head_size;
    const float* const norm = head < s.num_heads ? f.layer->q_norm : f.layer->k_norm;
    if (norm) normalize(x, s.head_size, {norm, f.model.eps});
    rotate(x, cos_sin, f.model.rotary_dim);
  }
  if (slot < 0) return;  // a padding token
  const float* const key = row + f.q_size();
  with_kv_format(s, [&](auto format) {
    for (int head = 0; head < s.num_kv_heads; ++head)
      write_token<decltype(format)>(s, f.layer->kv_cache, slot, head, key + head * s.head_size,
                                    key + f.kv_size() + head * s.head_size);
  });
}

XY_INLINE void project(const Forward& f, const Weight& weight, const GemmPlan& plan, const float* x,
                       const float* norm, const float* bias, Epilogue epilogue, float* y,
                       int64_t y_stride) {
  const Norm of_rows{norm, f.model.eps};
  Product product{weight, plan,     x,        weight.k, norm ? &of_rows : nullptr, bias, epilogue,
                  y,      y_stride, f.packed, nullptr};
  multiply_all(product, f.starts);
}

XY_INLINE void run_layer(Forward& f) {
  const Model& m = f.model;
  const Layer& layer = *f.layer;
  float* const hidden = f.step.hidden;
  project(f, *layer.qkv, f.step.qkv, hidden, layer.input_norm, layer.qkv_bias, kStore, f.qkv,
          f.qkv_size());
  parallel(f.step.num_tokens, prepare_token, &f);
  const AttentionData data{
      f.qkv,      f.qkv_size(), layer.kv_cache, f.step.block_table, f.step.block_table_stride,
      f.attended, f.q_size()};
  Attention attention{m.attention, *f.step.attention, data, f.partials};
  attend_all(attention);
  project(f, *layer.o, f.step.o, f.attended, nullptr, layer.o_bias, kAdd, hidden, m.hidden_size);
  project(f, *layer.gate_up, f.step.gate_up, hidden, layer.post_attention_norm, layer.gate_up_bias,
          kSiluMul, f.gated, m.intermediate_size);
  project(f, *layer.down, f.step.down, f.gated, nullptr, layer.down_bias, kAdd, hidden,
          m.hidden_size);
}

void forward(const Model* model, const Step* step) {
  Forward f{*model, *step, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int64_t n = step->num_tokens;
  const int widest = max(max(model->hidden_size, model->intermediate_size), f.q_size());
  const Attention sizes{model->attention, *step->attention, {}, nullptr};
  const int64_t partials = step->attention->num_partials * sizes.partial_floats();
  f.qkv = caller_scratch(n * f.qkv_size() + n * f.q_size() + n * model->intermediate_size +
                         packed_floats(n, widest) + partials + n + 1);
  f.attended = f.qkv + n * f.qkv_size();
  f.gated = f.attended + n * f.q_size();
  f.packed = f.gated + n * model->intermediate_size;
  f.partials = f.packed + packed_floats(n, widest);
  f.starts = reinterpret_cast<int*>(f.partials + partials);
  for (int i = 0; i < model->num_layers; ++i) {
    f.layer = model->layers + i;
    run_layer(f);
  }
  for (int token = 0; token < n; ++token)
    normalize(step->hidden + token * model->hidden_size, model->hidden_size,
              {model->final_norm, model->eps});
}

}  // namespace XY_ISA
