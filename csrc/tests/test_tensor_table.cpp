// Chunks hold every element once, with empty tensors, with sizes beyond 32 bits, and in equal shares for threads.
#include "core/tensor_table.h"

#include <algorithm>
#include <numeric>

#include "tests/check.h"

using namespace fused_sam;

namespace {

using Sizes = std::vector<int64_t>;

std::vector<Chunk> all_chunks(const Sizes& sizes, int64_t chunk) {
  const std::vector<int64_t> prefix = chunk_prefix(sizes, chunk);
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < prefix.back(); ++i) chunks.push_back(chunk_at(prefix, sizes, chunk, i));
  return chunks;
}

void test_every_element_once() {
  const std::vector<Sizes> tables = {
      {1}, {7, 0, 33}, {0}, {}, {0, 0, 0}, {5, 0}, {0, 5}, {0, 5, 0, 0, 3, 0}, {16, 17, 15, 32, 1}, {1000},
  };
  for (const Sizes& sizes : tables)
    for (int64_t chunk : {1, 2, 16, 1000}) {
      std::vector<int64_t> next(sizes.size(), 0);  // where the tensor's next chunk must begin
      int32_t last = 0;
      for (const Chunk& c : all_chunks(sizes, chunk)) {
        CHECK(c.tensor >= last && size_t(c.tensor) < sizes.size());
        CHECK(c.begin == next[size_t(c.tensor)]);
        CHECK(c.length > 0 && c.length <= chunk);
        last = c.tensor;
        next[size_t(c.tensor)] += c.length;
        // Only a tensor's last chunk is short.
        CHECK(c.length == chunk || next[size_t(c.tensor)] == sizes[size_t(c.tensor)]);
      }
      CHECK(next == sizes);
    }
}

void test_sizes_beyond_32_bits() {
  const int64_t big = (int64_t(1) << 40) + 3;
  const Sizes sizes = {5, big, 0, 7};
  const int64_t chunk = 16384;
  const std::vector<int64_t> prefix = chunk_prefix(sizes, chunk);
  CHECK(prefix.back() == 1 + (big / chunk + 1) + 1);
  const Chunk last_of_big = chunk_at(prefix, sizes, chunk, prefix[2] - 1);
  CHECK(last_of_big.tensor == 1 && last_of_big.begin + last_of_big.length == big && last_of_big.length == 3);
  const Chunk after = chunk_at(prefix, sizes, chunk, prefix[2]);
  CHECK(after.tensor == 3 && after.begin == 0 && after.length == 7);
  // This is the largest size.
  const Sizes largest = {INT64_MAX};
  CHECK(chunk_prefix(largest, 2).back() == INT64_MAX / 2 + 1);
}

void test_owner_of_a_chunk() {
  // Tensors 1, 2 and 4 are empty. The chunk at their prefix belongs to the tensor after them.
  const int64_t prefix[] = {0, 2, 2, 2, 5, 5};
  CHECK(tensor_of_chunk<int64_t>(prefix, 5, 0) == 0);
  CHECK(tensor_of_chunk<int64_t>(prefix, 5, 1) == 0);
  CHECK(tensor_of_chunk<int64_t>(prefix, 5, 2) == 3);
  CHECK(tensor_of_chunk<int64_t>(prefix, 5, 4) == 3);
  const int32_t narrow[] = {0, 1, 2};
  CHECK(tensor_of_chunk<int32_t>(narrow, 2, 1) == 1);
}

void check_split(const Sizes& sizes, int64_t chunk, int64_t workers) {
  const std::vector<Chunk> chunks = all_chunks(sizes, chunk);
  const std::vector<int64_t> bounds = split_chunks(chunks, workers);
  CHECK(int64_t(bounds.size()) == workers + 1);
  CHECK(bounds.front() == 0 && bounds.back() == int64_t(chunks.size()));
  CHECK(std::is_sorted(bounds.begin(), bounds.end()));
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
  for (int64_t k = 0; k < workers; ++k) {
    int64_t share = 0;
    for (int64_t i = bounds[size_t(k)]; i < bounds[size_t(k) + 1]; ++i) share += chunks[size_t(i)].length;
    CHECK(share <= total / workers + 1 + chunk);
  }
}

void test_split_among_workers() {
  for (int64_t workers : {1, 2, 3, 7, 64})
    for (const Sizes& sizes : {Sizes{}, Sizes{1}, Sizes{100000}, Sizes{1, 1, 1, 50000, 0, 3}, Sizes(1000, 7)})
      for (int64_t chunk : {1024, 16384}) check_split(sizes, chunk, workers);
  // With a few huge tensors, the number of elements times the number of workers exceeds 64 bits.
  const std::vector<Chunk> huge(4, Chunk{0, INT64_MAX / 4, 0});
  const std::vector<int64_t> bounds = split_chunks(huge, 4);
  CHECK(bounds == std::vector<int64_t>({0, 1, 2, 3, 4}));
}

void test_bad_sizes_throw() {
  CHECK_THROWS(chunk_prefix({1}, 0), std::invalid_argument);
  CHECK_THROWS(chunk_prefix({1}, -4), std::invalid_argument);
  CHECK_THROWS(chunk_prefix({3, -1}, 4), std::invalid_argument);
}

}  // namespace

int main() {
  test_every_element_once();
  test_sizes_beyond_32_bits();
  test_owner_of_a_chunk();
  test_split_among_workers();
  test_bad_sizes_throw();
  return fused_sam_test::result();
}
