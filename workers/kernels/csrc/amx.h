// AMX: products of sixteen rows of pairs of bf16 with sixteen columns, on tile registers.
//
// Compiled with XY_AMX_TWIN the same functions are plain C++, which has the instruction's bits, so
// that what is built on them can be tested on a CPU without it.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) && !defined(XY_AMX_TWIN)
#include <immintrin.h>
#endif

namespace XY_ISA {

#if defined(__AMX_BF16__) || defined(XY_AMX_TWIN)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif

constexpr int kTileRows = 16, kTileBytes = 64;  // of a row

#if defined(XY_AMX_TWIN)

struct Tile {
  UVec rows[kTileRows];
};
inline thread_local Tile tiles[5];

struct TilesInUse {};
template <int kTile>
XY_INLINE void zero_tile() {
  tiles[kTile] = {};
}
template <int kTile>
XY_INLINE void load_tile(const void* from, int64_t stride) {
  for (int i = 0; i < kTileRows; ++i)
    tiles[kTile].rows[i] = load<UVec>(static_cast<const char*>(from) + i * stride);
}
template <int kTile>
XY_INLINE void store_tile(void* to, int64_t stride) {
  for (int i = 0; i < kTileRows; ++i)
    store(static_cast<char*>(to) + i * stride, tiles[kTile].rows[i]);
}
// sums += x w: the even products of 32 input features are added up, and the odd ones, and then
// both.
template <int kSums, int kX, int kW>
XY_INLINE void dot_tiles() {
  const UVec odd_half = splat(0xFFFF0000u);
  for (int row = 0; row < kTileRows; ++row) {
    Vec even = {}, odd = {};
    for (int k = 0; k < kTileBytes / 4; ++k) {
      const UVec x = splat(tiles[kX].rows[row][k]), w = tiles[kW].rows[k];
      even = fused((Vec)(x << 16), (Vec)(w << 16), even);
      odd = fused((Vec)(x & odd_half), (Vec)(w & odd_half), odd);
    }
    UVec& sums = tiles[kSums].rows[row];
    sums = (UVec)((Vec)sums + (even + odd));
  }
}

#elif defined(__AMX_BF16__)

// All tiles are whole, whatever rows are in use. Without tiles in use a switch of threads is
// cheaper.
struct TilesInUse {
  XY_INLINE TilesInUse() {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config = {1, 0, {}, {}, {}};
    for (int i = 0; i < 5; ++i) config.bytes[i] = kTileBytes, config.rows[i] = kTileRows;
    _tile_loadconfig(&config);
  }
  XY_INLINE ~TilesInUse() { _tile_release(); }
};
// GCC's own functions are macros, which take the numbers of tiles as literals only.
template <int kTile>
XY_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
XY_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
XY_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kSums, int kX, int kW>
XY_INLINE void dot_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
}

#else

struct TilesInUse {};
template <int>
XY_INLINE void zero_tile() {}
template <int>
XY_INLINE void load_tile(const void*, int64_t) {}
template <int>
XY_INLINE void store_tile(void*, int64_t) {}
template <int, int, int>
XY_INLINE void dot_tiles() {}

#endif

}  // namespace XY_ISA
