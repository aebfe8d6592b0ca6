// Products of each format on the CPU that runs this, against scalar twins: for
// CPUs without Python.
//
// Usage: other_cpu ISA. Prints what it compared and exits with 1 at the first
// difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "../../../workers/kernels/csrc/kernels.h"

extern "C" int32_t xy_use_isa(const char *name);
extern "C" const xy::Kernels *xy_kernels();

using Floats = std::vector<float>;

// A bf16 is a float whose lower half is zero.
static float bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Arm's sum of two floats in bfdot: what cannot be represented is cut off and
// leaves the last bit set.
static float sum_to_odd(float a, float b) {
  const long double exact = static_cast<long double>(a) + b;
  float sum = static_cast<float>(exact);
  if (sum == exact)
    return sum;
  if (fabsl(sum) > fabsl(exact))
    sum = std::nextafterf(sum, 0);
  uint32_t bits;
  std::memcpy(&bits, &sum, 4);
  bits |= 1;
  std::memcpy(&sum, &bits, 4);
  return sum;
}

static float random_float() {
  return static_cast<float>(std::rand() % 2001 - 1000) / 700;
}

struct Case {
  const xy::Kernels &kernels;
  int n, k, m;
  Floats x, w; // [m, k]; [n, k] as the packed weight has them

  // y [m, n], computed in tiles of these rows, or of as many as there may be.
  Floats multiply(xy::Format format, int height) {
    const bool is_int8 = format == xy::kInt8Quads || format == xy::kInt4Quads;
    height =
        std::min(height, is_int8                    ? kernels.max_int8_height
                         : format == xy::kBf16Pairs ? kernels.max_bf16_height
                                                    : kernels.max_height);
    std::vector<char> panels(kernels.packed_bytes(n, k, format, 0) + 64);
    Floats scales(n + 64);
    void *const at =
        panels.data() +
        (64 - reinterpret_cast<uintptr_t>(panels.data()) % 64) % 64;
    const bool scaled = format == xy::kInt8 || format == xy::kInt8Quads;
    const xy::Weight weight{n, k,  format,
                            0, at, scaled ? scales.data() : nullptr};
    kernels.pack(&weight, w.data(), scales.data());
    kernels.unpack(&weight, w.data());
    std::vector<int32_t> heights(m / height, height);
    if (m % height)
      heights.push_back(m % height);
    const xy::GemmPlan plan{m, static_cast<int32_t>(heights.size()),
                            heights.data(),
                            static_cast<int32_t>(heights.size()), 4};
    Floats y(m * n);
    kernels.linear(&weight, &plan, x.data(), k, nullptr, xy::kStore, y.data(),
                   n);
    return y;
  }

  // The inputs as a product with such weights takes them.
  Floats inputs(xy::Format format) const {
    Floats seen = x;
    if (format == xy::kBf16Pairs)
      for (float &value : seen)
        value = bf16(value);
    if (format == xy::kInt8Quads || format == xy::kInt4Quads)
      for (int row = 0; row < m; ++row)
        for (int first = 0; first < k; first += xy::kGroup) {
          float *const group = seen.data() + row * k + first;
          const int size = std::min(xy::kGroup, k - first);
          float most = 0;
          for (int i = 0; i < size; ++i)
            most = std::max(most, std::fabs(group[i]));
          const float scale = most * (1.0f / 127),
                      inverse = scale > 1e-35f ? 1 / scale : 0;
          for (int i = 0; i < size; ++i)
            group[i] = std::rint(group[i] * inverse) * scale;
        }
    return seen;
  }

  // The sum of products of bf16 as AMX makes it: over 32 input features the
  // even ones, and the odd ones, and then both.
  float sum_by_group(const float *a, const float *b) const {
    float sum = 0;
    for (int first = 0; first < k; first += xy::kGroup) {
      float of_group[2] = {};
      for (int j = first; j < std::min(first + xy::kGroup, k); ++j)
        of_group[j % 2] += a[j] * b[j];
      sum += of_group[0] + of_group[1];
    }
    return sum;
  }

  // As Arm's bfdot makes it.
  float sum_by_pair(const float *a, const float *b) const {
    float sum = 0;
    for (int j = 0; j < k; j += 2) {
      const float odd = j + 1 < k ? a[j + 1] * b[j + 1] : 0;
      sum = sum_to_odd(sum, sum_to_odd(a[j] * b[j], odd));
    }
    return sum;
  }

  // Whether an element is right: to the bit for products of bf16 by AMX or
  // Arm's bfdot, else within the rounding of its sum.
  bool is_right(xy::Format format, const Floats &seen, int row, int column,
                float y) const {
    const float *const a = seen.data() + row * k, *const b =
                                                      w.data() + column * k;
    if (format == xy::kBf16Pairs && std::strcmp(kernels.isa, "amx") == 0)
      return sum_by_group(a, b) == y;
    if (format == xy::kBf16Pairs && std::strcmp(kernels.isa, "armv86") == 0)
      return sum_by_pair(a, b) == y;
    double sum = 0, size = 0;
    for (int j = 0; j < k; ++j)
      sum += double{a[j]} * b[j], size += std::fabs(double{a[j]} * b[j]);
    return std::fabs(sum - y) <= 1e-6 * size;
  }
};

int main(int, char **arguments) {
  if (!xy_use_isa(arguments[1])) {
    std::printf("this CPU has no %s\n", arguments[1]);
    return 1;
  }
  const xy::Kernels &kernels = *xy_kernels();
  for (int format = xy::kFp32; format <= xy::kInt4Quads; ++format)
    for (const auto &[n, k] : {std::pair{1, 1}, {7, 33}, {37, 577}, {64, 96}})
      for (const int m : {1, 5, 23})
        for (const int height : {1, 3, 16}) {
          Case c{kernels, n, k, m, Floats(m * k), Floats(n * k)};
          for (float &value : c.x)
            value = random_float();
          for (float &value : c.w)
            value = bf16(random_float());
          const Floats y = c.multiply(static_cast<xy::Format>(format), height);
          const Floats seen = c.inputs(static_cast<xy::Format>(format));
          for (int i = 0; i < m * n; ++i)
            if (!c.is_right(static_cast<xy::Format>(format), seen, i / n, i % n,
                            y[i])) {
              std::printf(
                  "format %d, %d x %d x %d, height %d: y[%d, %d] is %g\n",
                  format, m, n, k, height, i / n, i % n, y[i]);
              return 1;
            }
        }
  std::printf("%s: %d formats, bf16 dot %d, int8 dot %d\n", kernels.isa,
              xy::kInt4Quads + 1, kernels.has_bf16_dot, kernels.has_int8_dot);
  return 0;
}
