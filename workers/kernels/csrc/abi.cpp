// The C ABI: the functions of the instruction set in use, and what chooses it.
#include <cstring>

#ifdef XY_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef XY_HAVE_ARMV86
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "threads.h"

#define XY_EXPORT extern "C" __attribute__((visibility("default")))

#define XY_DECLARE(isa)             \
  namespace isa {                   \
  extern const xy::Kernels kernels; \
  }

XY_DECLARE(portable)
#ifdef XY_HAVE_AVX2
XY_DECLARE(avx2)
XY_DECLARE(avxvnni)
#endif
#ifdef XY_HAVE_AVX512
XY_DECLARE(avx512)
XY_DECLARE(avx512vnni)
XY_DECLARE(avx512bf16)
#endif
#ifdef XY_HAVE_AMX
XY_DECLARE(amx)
#endif
#ifdef XY_HAVE_ARMV86
XY_DECLARE(armv86)
#endif

namespace {

#ifdef XY_HAVE_AMX
// Whether the CPU has AMX, and Linux lets this process and all threads that it starts from now on
// use its tiles.
bool has_amx() {
#ifdef XY_AMX_TWIN
  return true;
#else
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

// The instruction sets that this CPU has, best first.
const xy::Kernels* const* available() {
  static const xy::Kernels* found[8] = {};
  if (found[0] == nullptr) {
    int n = 0;
#ifdef XY_HAVE_AMX
    if (has_amx()) found[n++] = &amx::kernels;
#endif
#ifdef XY_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512vnni")) {
        if (__builtin_cpu_supports("avx512bf16")) found[n++] = &avx512bf16::kernels;
        found[n++] = &avx512vnni::kernels;
      }
      found[n++] = &avx512::kernels;
    }
#endif
#ifdef XY_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      if (__builtin_cpu_supports("avxvnni")) found[n++] = &avxvnni::kernels;
      found[n++] = &avx2::kernels;
    }
#endif
#ifdef XY_HAVE_ARMV86
    const unsigned long has = getauxval(AT_HWCAP2);
    if (has & HWCAP2_BF16 && has & HWCAP2_I8MM) found[n++] = &armv86::kernels;
#endif
    found[n] = &portable::kernels;
  }
  return found;
}

const xy::Kernels* in_use = available()[0];

}  // namespace

// Name of the index-th instruction set that this CPU has, best first; null past the last.
XY_EXPORT const char* xy_available_isa(int32_t index) {
  for (int i = 0; i < index; ++i)
    if (available()[i] == nullptr) return nullptr;
  return available()[index] ? available()[index]->isa : nullptr;
}

// Switch to an instruction set; weights packed before belong to the previous one. Returns whether
// this CPU has it.
XY_EXPORT int32_t xy_use_isa(const char* name) {
  for (auto isa = available(); *isa; ++isa)
    if (std::strcmp((*isa)->isa, name) == 0) {
      in_use = *isa;
      return 1;
    }
  return 0;
}

// The sizes of the structures of kernels.h that native.py declares, in its order, and then -1.
XY_EXPORT const int32_t* xy_struct_sizes() {
  static const int32_t sizes[] = {
      sizeof(xy::Weight),         sizeof(xy::GemmPlan),
      sizeof(xy::AttentionShape), sizeof(xy::AttentionPlan),
      sizeof(xy::AttentionData),  sizeof(xy::Layer),
      sizeof(xy::Model),          sizeof(xy::Step),
      sizeof(xy::Kernels),        -1,
  };
  return sizes;
}

XY_EXPORT const xy::Kernels* xy_kernels() { return in_use; }
XY_EXPORT void xy_set_num_threads(int32_t n) { xy::set_num_threads(n); }
XY_EXPORT int32_t xy_num_threads() { return xy::num_threads(); }
