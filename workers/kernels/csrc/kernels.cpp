// All kernels for one instruction set: compiled once per instruction set, named by XY_ISA.
#include "forward.h"

#define XY_TEXT(name) #name
#define XY_NAME(name) XY_TEXT(name)

namespace XY_ISA {

void linear(const Weight* weight, const GemmPlan* plan, const float* x, int64_t x_stride,
            const float* bias, int32_t epilogue, float* y, int64_t y_stride) {
  const int64_t packed = packed_floats(plan->num_rows, weight->k);
  float* const memory = caller_scratch(packed + plan->num_tiles + 1);
  Product product{*weight,  *plan, x,        x_stride, nullptr, bias,
                  epilogue, y,     y_stride, memory,   nullptr};
  multiply_all(product, reinterpret_cast<int*>(memory + packed));
}

extern const Kernels kernels;
const Kernels kernels = {
    XY_NAME(XY_ISA), kLanes,       kKvChunk,     kMaxHeight,   max_height(Bf16Product::kInputs),
    kMaxQuadsHeight, kHasPairsDot, kHasQuadsDot, packed_bytes, pack,
    unpack,          linear,       write_kv,     attend,       forward,
};

}  // namespace XY_ISA
