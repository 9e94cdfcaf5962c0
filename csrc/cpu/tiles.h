// Moves tiles of elements: copies around the cache, and conversions from and to storage types.
//
// Only for files that are compiled once for each instruction set. Everything has internal linkage (see core/formulas.h
// for why).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/rng.h"
#include "core/storage.h"

namespace fused_sam {
namespace {

constexpr int64_t kTile = 1024;  // elements; three float tiles are 12 KB of a 32 KB first-level cache

// Copies around the cache, for arrays that would leave it before they are read again.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
#if defined(__AVX512F__)
  constexpr int64_t kVector = 64;
#elif defined(__AVX__)
  constexpr int64_t kVector = 32;
#else
  constexpr int64_t kVector = 16;
#endif
#if defined(__x86_64__)
  int64_t head = int64_t(-reinterpret_cast<uintptr_t>(out)) & (kVector - 1);
  if (head > bytes) head = bytes;
  memcpy(out, in, size_t(head));
  out += head, in += head, bytes -= head;
  for (; bytes >= kVector; bytes -= kVector, out += kVector, in += kVector) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#endif
  }
#endif
  memcpy(out, in, size_t(bytes));
}

inline void copy(void* to, const void* from, int64_t bytes, bool stream) {
  if (stream)
    stream_copy(to, from, bytes);
  else
    memmove(to, from, size_t(bytes));
}

// Returns a tile as numbers of the arithmetic's type: the array itself where it has that type, else a widened copy.
template <class T, class R>
inline const R* widened(const T* from, R* tile, int64_t n) {
  if constexpr (std::is_same_v<T, R>) {
    return from;
  } else {
    int64_t i = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<T, f16>) {
      for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
#endif
#pragma omp simd
    for (int64_t j = i; j < n; ++j) tile[j] = R(widen(from[j]));
    return tile;
  }
}

// Rounds a tile to nearest.
template <class T, class R>
inline void narrowed(const R* from, T* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, f16>) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) to[j] = Narrow<T, R>::of(from[j]);
}

// Writes words first .. first + n - 1 of a stream. A tile begins at a multiple of kTile, so that the numbers of all its
// elements have one upper half.
inline void draw(StreamKey key, int64_t first, uint32_t* words, int64_t n) {
  const StreamKey from = {key.a + uint32_t(first), key.b + uint32_t(uint64_t(first) >> 32) * 0x9e3779b9u};
#pragma omp simd
  for (uint32_t j = 0; j < uint32_t(n); ++j) words[j] = word(from, int64_t(j));
}

// Rounds a tile at random, see core/rng.h.
template <class T, class R>
inline void narrowed_at_random(const R* from, T* to, StreamKey key, int64_t first, int64_t n) {
  uint32_t words[kTile];
  draw(key, first, words, n);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = AtRandom<T>::of(from[j], words[j]);
}

}  // namespace
}  // namespace fused_sam
