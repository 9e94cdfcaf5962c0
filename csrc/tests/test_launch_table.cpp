// The plans of CUDA launches: slots of tensors and groups, empty tensors, and sizes beyond 32 bits.
#include <cstdlib>
#include <numeric>

#include "check_words.h"
#include "cuda/launch_table.h"
#include "cuda/tuning.h"

using namespace fused_sam;

namespace {

using Sizes = std::vector<int64_t>;
using Numbers = std::vector<int32_t>;

// Every tensor that is not empty is in one launch, in order, with its own group and its chunks.
void check_plan(const Sizes& sizes, const Numbers& groups, int64_t chunk, int max_tensors, int max_groups) {
  const std::vector<LaunchPlan> launches = plan_launches(sizes, groups, chunk, max_tensors, max_groups);
  int64_t chunks = 0;
  size_t next = 0;
  for (const LaunchPlan& launch : launches) {
    CHECK(!launch.tensors.empty());
    CHECK(int(launch.tensors.size()) <= max_tensors && int(launch.group_ids.size()) <= max_groups);
    CHECK(launch.prefix.size() == launch.tensors.size() + 1 && launch.group_of.size() == launch.tensors.size());
    CHECK(launch.first_chunk == chunks && launch.prefix.front() == 0);
    for (size_t i = 0; i < launch.tensors.size(); ++i) {
      while (next < sizes.size() && sizes[next] == 0) ++next;
      CHECK(size_t(launch.tensors[i]) == next);
      CHECK(launch.group_ids[launch.group_of[i]] == groups[next]);
      const int64_t own = launch.prefix[i + 1] - launch.prefix[i];
      CHECK(own > 0 && own == (sizes[next] - 1) / chunk + 1);
      CHECK(tensor_of_chunk<int32_t>(launch.prefix.data(), int32_t(launch.tensors.size()), launch.prefix[i]) == int(i));
      CHECK(tensor_of_chunk<int32_t>(launch.prefix.data(), int32_t(launch.tensors.size()), launch.prefix[i + 1] - 1) ==
            int(i));
      ++next;
    }
    chunks += launch.chunks();
  }
  while (next < sizes.size() && sizes[next] == 0) ++next;
  CHECK(next == sizes.size());
}

void test_slots_of_tensors() {
  for (int count : {1, MiddleTable::kTensors, LargeTable::kTensors - 1, LargeTable::kTensors, LargeTable::kTensors + 1, 1000}) {
    const Sizes sizes(size_t(count), 256);
    check_plan(sizes, Numbers(sizes.size(), 0), 4096, LargeTable::kTensors, LargeTable::kGroups);
    const Numbers groups(sizes.size(), 0);
    const auto launches = plan_launches(sizes, groups, 4096, LargeTable::kTensors, LargeTable::kGroups);
    CHECK(int(launches.size()) == (count - 1) / LargeTable::kTensors + 1);
  }
}

void test_empty_tensors_take_no_slot() {
  for (int empty_at = -1; empty_at <= SmallTable::kTensors; ++empty_at) {  // also in and after the last slot
    Sizes sizes(SmallTable::kTensors, 10);
    if (empty_at >= 0) sizes.insert(sizes.begin() + empty_at, 0);
    check_plan(sizes, Numbers(sizes.size(), 0), 4, SmallTable::kTensors, SmallTable::kGroups);
    CHECK(plan_launches(sizes, Numbers(sizes.size(), 0), 4, SmallTable::kTensors, SmallTable::kGroups).size() == 1);
  }
  check_plan({0, 0, 3, 0, 5, 0}, {0, 1, 2, 3, 4, 5}, 2, 8, 8);
  CHECK(plan_launches({}, {}, 4, 8, 8).empty());
  CHECK(plan_launches({0, 0}, {0, 0}, 4, 8, 8).empty());
}

void test_slots_of_groups() {
  for (int count : {1, 2, 50, LargeTable::kGroups - 1, LargeTable::kGroups, LargeTable::kGroups + 1, 400}) {
    Sizes sizes(400, 7);
    Numbers groups(sizes.size());
    for (size_t i = 0; i < groups.size(); ++i) groups[i] = int32_t(i) % count * 3 + 5;  // not consecutive, not sorted
    check_plan(sizes, groups, 4, LargeTable::kTensors, LargeTable::kGroups);
    if (count <= LargeTable::kGroups) CHECK(plan_launches(sizes, groups, 4, 600, LargeTable::kGroups).size() == 1);
  }
}

void test_sizes_beyond_32_bits() {
  const int64_t huge = (int64_t(1) << 31) + 555;
  for (int64_t chunk : {int64_t(333), int64_t(33333), kLongestChunk}) {
    check_plan({huge, 555, 5 * huge, 1}, {0, 1, 0, 1}, chunk, 64, 24);
  }
  check_plan({huge * 100, huge * 200, 3}, {0, 0, 0}, 333, 64, 24);  // more blocks than one grid holds take two launches
  CHECK(plan_launches({huge * 100, huge * 300, 3}, {0, 0, 0}, 333, 64, 24).size() == 2);
  CHECK_WORDS(plan_launches({huge * 1000}, {0}, 333, 64, 24), "too many for one launch");
  CHECK_WORDS(plan_launches({-1}, {0}, 333, 64, 24), "negative");
  CHECK_WORDS(plan_launches({1}, {0}, 0, 64, 24), "positive");
  CHECK_WORDS(plan_launches({1}, {0}, (int64_t(1) << 30) + 1, 64, 24), "2^30");
  CHECK_WORDS(plan_launches({1}, {}, 1, 64, 24), "group number");
}

void test_matrix() {
  const std::pair<int64_t, int64_t> pairs[] = {
      {7777 * 77, 555 * 555}, {2048 * 32 + 1, 555}, {33333, 555}, {1, 1}, {0, 1}};
  for (const auto& [a, b] : pairs)
    for (int64_t chunk : {int64_t(333), int64_t(33333), kTile})
      for (int repeat : {1, 39, 64, 65}) {
        Sizes sizes;
        for (int i = 0; i < repeat; ++i) sizes.insert(sizes.end(), {a, b, 0});
        check_plan(sizes, Numbers(sizes.size(), 3), chunk, SmallTable::kTensors, SmallTable::kGroups);
      }
}

void test_chunk_size() {
  const Tuning hopper = tuning_of(9);
  CHECK(chunk_for(0, 132, hopper) == kTile && chunk_for(1000, 132, hopper) == kTile);
  CHECK(chunk_for(25'600'000, 132, hopper) == kTile);
  CHECK(chunk_for(100'000'000, 132, hopper) == 2 * kTile);
  CHECK(chunk_for(120'000'000, 132, hopper) == 2 * kTile && chunk_for(140'000'000, 132, hopper) == 4 * kTile);
  CHECK(chunk_for(int64_t(1) << 40, 132, hopper) == kLongestChunk);
  for (int64_t elements = 1; elements < int64_t(1) << 40; elements *= 3)
    for (int major : {8, 9, 10, 12})
      for (int sm_count : {0, 1, 132}) {
        const int64_t chunk = chunk_for(elements, sm_count, tuning_of(major));
        CHECK(chunk % kTile == 0 && (chunk & (chunk - 1)) == 0 && chunk <= kLongestChunk);
      }
}

void test_blocks_of_a_reduction() {
  CHECK(reduction_blocks(0, 660) == 0 && reduction_blocks(1, 660) == 1 && reduction_blocks(660, 660) == 660);
  CHECK(reduction_blocks(661, 660) == 331);   // of two chunks each, one of one
  CHECK(reduction_blocks(6250, 660) == 625);  // of ten each
  CHECK(reduction_blocks(7, 0) == 1);
  CHECK(reduction_blocks(INT32_MAX, 660) <= 660);
}

void test_numbers_of_a_group() {
  const PerturbGroupOf<float> perturb = in_fp32({1, 2, 9, true});
  CHECK(perturb.rho == 1 && perturb.eta == 2 && perturb.mask_prob == 9 && perturb.adaptive);
  const auto sgd = group_as<float>(SgdGroupOf<double>{3, 4, 5, 6, 7, true});
  CHECK(sgd.lr == 3 && sgd.momentum == 4 && sgd.one_minus_dampening == 5 && sgd.weight_decay == 6 && sgd.factor == 7);
  CHECK(sgd.nesterov);
  const auto adam = group_as<float>(AdamGroupOf<double>{3, 10, 11, 12, 13, 14, 15, 6, 7, false, true});
  CHECK(adam.lr == 3 && adam.one_minus_beta1 == 10 && adam.one_minus_beta2 == 11 && adam.beta2 == 12);
  CHECK(adam.log_beta1 == 13 && adam.log_beta2 == 14 && adam.eps == 15 && adam.weight_decay == 6 && adam.factor == 7);
  CHECK(!adam.decoupled && adam.amsgrad);
  const auto lion = group_as<float>(LionGroupOf<double>{3, 10, 11, 6, 7});
  CHECK(lion.lr == 3 && lion.one_minus_beta1 == 10 && lion.one_minus_beta2 == 11 && lion.weight_decay == 6);
  CHECK(lion.factor == 7);
}

// Columns 0 to 3 are equal in Adam's tables and in the others. CudaTable relies on that.
void test_columns() {
  CHECK(kParam == 0 && kBackup == kMaster && kGrad < kColumns && kState0 < kColumns);
  CHECK(kState1 == kState0 + 1 && kState2 == kState0 + 2 && kState1 >= kColumns && kStep < kAdamColumns);
  CHECK(kX < kColumns && kY < kColumns && kOut < kColumns);
}

}  // namespace

int main() {
  test_slots_of_tensors();
  test_empty_tensors_take_no_slot();
  test_slots_of_groups();
  test_sizes_beyond_32_bits();
  test_matrix();
  test_chunk_size();
  test_blocks_of_a_reduction();
  test_numbers_of_a_group();
  test_columns();
  return fused_sam_test::result();
}
