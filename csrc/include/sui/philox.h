// Philox4x32-10 (Salmon et al. 2011): the same random numbers for the same counter on every backend, see
// sui_fast/ops/sketching/_random.py.
#pragma once

#include "scalar.h"

namespace sui {

struct Philox {
  unsigned x, y, z, w;
};

// Four words of counter (index low, index high, word, stream) under the key seed.
SUI_FN Philox philox(unsigned long long index, unsigned word, unsigned stream, unsigned long long seed) {
  Philox c{static_cast<unsigned>(index), static_cast<unsigned>(index >> 32), word, stream};
  unsigned low = static_cast<unsigned>(seed), high = static_cast<unsigned>(seed >> 32);
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#else
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const unsigned long long left = static_cast<unsigned long long>(c.x) * 0xD2511F53u;
    const unsigned long long right = static_cast<unsigned long long>(c.z) * 0xCD9E8D57u;
    c = {static_cast<unsigned>(right >> 32) ^ c.y ^ low, static_cast<unsigned>(right),
         static_cast<unsigned>(left >> 32) ^ c.w ^ high, static_cast<unsigned>(left)};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return c;
}

// Index e of a hash has word e % 4 of counter e / 4: its place is the high part of word * buckets, its sign the lowest bit.
SUI_FN unsigned hash_word(Philox four, unsigned long long e) {
  const unsigned part = static_cast<unsigned>(e) & 3u;
  return part == 0 ? four.x : part == 1 ? four.y : part == 2 ? four.z : four.w;
}
SUI_FN unsigned bucket(unsigned word, unsigned buckets) {
  return static_cast<unsigned>((static_cast<unsigned long long>(word) * buckets) >> 32);
}

// Index of the 128 signs that hold entry (i, j) of a dense table, and whether that entry is negative.
SUI_FN unsigned long long sign_index(unsigned long long i, unsigned long long j) { return i << 32 | j >> 7; }
SUI_FN bool negative(Philox words, unsigned long long j) {
  const unsigned part = static_cast<unsigned>(j >> 5) & 3u;
  const unsigned bits = part == 0 ? words.x : part == 1 ? words.y : part == 2 ? words.z : words.w;
  return (bits >> (j & 31)) & 1u;
}

}  // namespace sui
