// Random numbers equal those of the Python specification, and stochastic rounding has the right probabilities.
#include "core/rng.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include "tests/check.h"

using namespace fused_sam;

namespace {

// Results of fused_sam/backends/rng.py: the two words of the key, and the stream's numbers 0, 1, 16384, 2^32 - 1, 2^32,
// 2^32 + 1 and 5 * 2^32 + 7.
struct Specified {
  uint64_t seed;
  uint32_t rng_offset, rng_stream, purpose, a, b;
  uint32_t words[7];
};
const int64_t kPlaces[7] = {0, 1, 16384, 0xffffffff, int64_t(1) << 32, (int64_t(1) << 32) + 1, (int64_t(5) << 32) + 7};
const Specified kSpecified[] = {
    {0x0ull, 0u, 0u, 0, 0x00000000u, 0xc7922d58u,
     {0x0153293bu, 0xa06b5636u, 0xa46b62bcu, 0x787eb3d3u, 0x35a82839u, 0x961be786u, 0xccc92c6cu}},
    {0x1ull, 2u, 3u, 1, 0xa1f039fau, 0x6a8041a1u,
     {0x8051aca0u, 0xea3f25ddu, 0x3e574615u, 0xb5551bfbu, 0x85333726u, 0xc9bc0845u, 0x21fe6c20u}},
    {0xf123456789abcdefull, 16777215u, 2147483647u, 2, 0x9caae86eu, 0x8ea9e910u,
     {0xf27b4bbcu, 0xf49396fbu, 0x182f8036u, 0x6ae29b32u, 0xa31be469u, 0x86041165u, 0xac736385u}},
    {0x8000000000000000ull, 1u, 0u, 0, 0xae6f80f1u, 0xf9df3828u,
     {0x477412f8u, 0x2811c7dcu, 0x77f2455bu, 0xab28b617u, 0xc1588d26u, 0x56717c08u, 0xb3223061u}},
};

void test_words_are_the_specification() {
  for (const Specified& s : kSpecified) {
    const StreamKey key = stream_key(s.seed, s.rng_offset, s.rng_stream, Draw(s.purpose));
    CHECK(key.a == s.a && key.b == s.b);
    for (int i = 0; i < 7; ++i) CHECK(word(key, kPlaces[i]) == s.words[i]);
  }
}

// Elements 0 to 11 of the stream (1, 2, 3, round_perturbed) are normal, subnormal, near fp16's largest, and beyond it.
void test_rounding_is_the_specification() {
  const uint32_t x[12] = {0x3f802000, 0xbf802000, 0x40490fdb, 0x3a83126f, 0x387ff8c0, 0x387bb082,
                          0x3300d959, 0xb356bf95, 0x477fdfe6, 0x477fef00, 0x7149f2ca, 0x7f7fc99e};
  const uint16_t brain[12] = {0x3f80, 0xbf80, 0x4049, 0x3a84, 0x3880, 0x387c,
                              0x3301, 0xb357, 0x4780, 0x4780, 0x714a, 0x7f7f};
  const uint16_t half[12] = {0x3c01, 0xbc01, 0x4248, 0x1419, 0x0400, 0x03ef,
                             0x0001, 0x8001, 0x7bff, 0x7bff, 0x7c00, 0x7c00};
  const StreamKey key = stream_key(1, 2, 3, Draw::round_perturbed);
  for (int i = 0; i < 12; ++i) {
    CHECK(AtRandom<bf16>::of(bits_float(x[i]), word(key, i)).bits == brain[i]);
    CHECK(AtRandom<f16>::of(bits_float(x[i]), word(key, i)).bits == half[i]);
  }
}

// Over all words that differ in the bits that rounding uses, x is rounded up in proportion to its distance.
template <class T>
void check_share_up(float x, uint16_t below, double share) {
  int up = 0, elsewhere = 0;
  for (uint32_t low = 0; low < 0x10000; ++low) {
    const uint16_t bits = AtRandom<T>::of(x, 0xabcd0000u | low).bits;
    up += bits == below + 1;
    elsewhere += bits != below && bits != below + 1;
    CHECK(AtRandom<T>::of(-x, 0xabcd0000u | low).bits == (bits | 0x8000));
  }
  CHECK(elsewhere == 0);
  CHECK(up == int(std::lround(share * 0x10000)));
}

void test_both_neighbours_in_their_share() {
  check_share_up<bf16>(1.0f, 0x3f80, 0);
  check_share_up<bf16>(bits_float(0x3f804000), 0x3f80, 0.25);
  check_share_up<bf16>(bits_float(0x00004000), 0x0000, 0.25);  // a subnormal
  check_share_up<bf16>(bits_float(0x7f7fc000), 0x7f7f, 0.75);  // the largest number, and infinity
  check_share_up<f16>(1.0f, 0x3c00, 0);
  check_share_up<f16>(bits_float(0x3f800800), 0x3c00, 0.25);
  check_share_up<f16>(0x1p-14f, 0x0400, 0);
  check_share_up<f16>(0x1p-14f - 0x1p-26f, 0x03ff, 0.75);
  check_share_up<f16>(0x1.8p-24f, 0x0001, 0.5);
  check_share_up<f16>(0x1p-26f, 0x0000, 0.25);
  check_share_up<f16>(0x1p-60f, 0x0000, 0);
  check_share_up<f16>(65503.0f, 0x7bfe, 31.0 / 32);
}

// Rounding keeps a representable number for every word, so that a param that does not move keeps its bits.
template <class T>
void test_representable_numbers_stay() {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = widen(T{uint16_t(bits)});
    if (std::isnan(x)) continue;
    for (uint32_t drawn : {0u, 0xffffffffu, 0x12345678u}) wrong += AtRandom<T>::of(x, drawn).bits != bits;
  }
  CHECK(wrong == 0);
}

void test_numbers_that_are_not_finite_are_rounded_to_nearest() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (uint32_t drawn : {0u, 0xffffffffu}) {
    CHECK(AtRandom<bf16>::of(infinity, drawn).bits == 0x7f80 && AtRandom<f16>::of(-infinity, drawn).bits == 0xfc00);
    for (uint32_t nan : {0x7fc00000u, 0x7f800001u, 0xffffffffu}) {
      CHECK(std::isnan(widen(AtRandom<bf16>::of(bits_float(nan), drawn))));
      CHECK(std::isnan(widen(AtRandom<f16>::of(bits_float(nan), drawn))));
    }
    // Numbers between fp16's largest one and infinity are rounded as in torch.
    CHECK(AtRandom<f16>::of(65519.0f, drawn).bits == 0x7bff && AtRandom<f16>::of(65520.0f, drawn).bits == 0x7c00);
  }
}

void test_wide_types_are_not_rounded() {
  CHECK(AtRandom<float>::of(0.1f, 0xffffffffu) == 0.1f && AtRandom<double>::of(0.1, 0xffffffffu) == 0.1);
}

void test_in_mask() {
  CHECK(in_mask(0, 0x1p-24f) && !in_mask(0x100, 0x1p-24f) && !in_mask(0, 0.0f));
  CHECK(in_mask(0xffffffffu, 1.0f) && !in_mask(0xffffffffu, 1.0f - 0x1p-24f));
  CHECK(in_mask(0x7fffffffu, 0.5f) && !in_mask(0x80000000u, 0.5f));
  for (float p : {1e-30f, 0x1p-25f, 0x1p-24f, 0.1f, 0.25f, 1.0f / 3, 0.5f, 0.999f, 1.0f - 0x1p-24f}) {
    const uint32_t limit = mask_limit(p);
    for (int64_t distance = -513; distance <= 513; ++distance) {
      const int64_t near = int64_t(limit) + distance;
      if (near < 0 || near > 0xffffffff) continue;
      CHECK(in_mask(uint32_t(near), p) == (uint32_t(near) < limit));
    }
    CHECK(in_mask(0, p) == (0 < limit) && in_mask(0xffffffffu, p) == (0xffffffffu < limit));
  }
}

}  // namespace

int main() {
  test_words_are_the_specification();
  test_rounding_is_the_specification();
  test_both_neighbours_in_their_share();
  test_representable_numbers_stay<bf16>();
  test_representable_numbers_stay<f16>();
  test_numbers_that_are_not_finite_are_rounded_to_nearest();
  test_wide_types_are_not_rounded();
  test_in_mask();
  return fused_sam_test::result();
}
