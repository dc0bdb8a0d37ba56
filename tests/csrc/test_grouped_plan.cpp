// The scheduler of grouped products: every slot in one tile, whatever the offsets.

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/grouped_plan.h"

namespace citi {
namespace {

// The tile of a number, as the threads of a block find it together.
SlotTile Find(const SlotGroups& groups, int64_t tile) {
  int64_t before = 0;
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    const int64_t mine = CountTiles(groups, thread);
    if (tile < before + mine) return TileOfThread(groups, thread, tile - before);
    before += mine;
  }
  return {0, 0, 0};
}

// Whether tiles 0 to MaxTiles - 1 hold every slot of the choices once, with its expert.
bool IsCovered(const std::vector<int32_t>& offsets, int64_t num_experts, int64_t top_k,
               int64_t first_choice, int64_t end_choice) {
  const int64_t num_slots = offsets.back();
  const SlotGroups groups{offsets.data(), num_experts, top_k, first_choice, end_choice, num_slots};
  std::vector<int64_t> expert_of(static_cast<size_t>(num_slots), -1);
  int64_t num_in_choices = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int32_t* pairs = offsets.data() + e * top_k;
    for (int64_t s = pairs[first_choice]; s < pairs[end_choice]; ++s, ++num_in_choices) {
      expert_of[static_cast<size_t>(s)] = e;
    }
  }
  const int64_t num_tiles = MaxTiles(num_in_choices, num_experts);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const SlotTile found = Find(groups, tile);
    if (found.end - found.first > kTileRows) return false;
    for (int64_t s = found.first; s < found.end; ++s) {
      int64_t& expert = expert_of[static_cast<size_t>(s)];
      if (expert != found.group) return false;
      expert = -1;  // taken
    }
  }
  return std::all_of(expert_of.begin(), expert_of.end(), [](int64_t e) { return e == -1; }) &&
         Find(groups, num_tiles).end == 0;
}

void CheckEveryRange(const std::vector<int64_t>& counts, int64_t num_experts, int64_t top_k,
                     const std::string& what) {
  std::vector<int32_t> offsets{0};
  for (const int64_t count : counts) {
    offsets.push_back(offsets.back() + static_cast<int32_t>(count));
  }
  for (int64_t first = 0; first < top_k; ++first) {
    for (int64_t end = first + 1; end <= top_k; ++end) {
      CHECK(IsCovered(offsets, num_experts, top_k, first, end),
            what + ", experts " + std::to_string(num_experts) + ", choices " +
                std::to_string(first) + " to " + std::to_string(end));
    }
  }
}

void CheckCover() {
  std::mt19937 random(1);
  for (const int64_t num_experts : {1, 2, 3, 64, 127, 128, 129, 300}) {
    for (const int64_t top_k : {1, 2, 8}) {
      const auto num_pairs = static_cast<size_t>(num_experts * top_k);
      CheckEveryRange(std::vector<int64_t>(num_pairs, 0), num_experts, top_k, "no slot");
      for (const int64_t most : {1, 3, 64, 65, 200}) {
        std::vector<int64_t> counts(num_pairs);
        std::uniform_int_distribution<int64_t> draw(0, most);
        for (int64_t& count : counts) count = draw(random) * (random() % 3 != 0);
        CheckEveryRange(counts, num_experts, top_k, "up to " + std::to_string(most));
        CheckEveryRange(std::vector<int64_t>(num_pairs, most), num_experts, top_k, "equal");
      }
      for (const size_t all : {size_t{0}, num_pairs / 2, num_pairs - 1}) {
        std::vector<int64_t> counts(num_pairs, 0);
        counts[all] = 1000;
        CheckEveryRange(counts, num_experts, top_k, "one pair with all");
      }
    }
  }
}

// Offsets that are wrong name no slot that is not there.
void CheckWrongOffsets() {
  std::mt19937 random(2);
  constexpr int64_t kExperts = 9, kTopK = 2, kSlots = 150;
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::vector<int32_t> offsets(kExperts * kTopK + 1);
    for (int32_t& offset : offsets) {
      offset = random() % 2 ? static_cast<int32_t>(random()) : static_cast<int32_t>(random() % 300);
    }
    const SlotGroups groups{offsets.data(), kExperts, kTopK, 0, kTopK, kSlots};
    for (int64_t tile = 0; tile < 40; ++tile) {
      const SlotTile found = Find(groups, tile);
      CHECK(found.first >= 0 && found.first <= found.end && found.end <= kSlots &&
                found.group >= 0 && found.group < kExperts,
            "a wrong offset leads beyond the slots");
    }
  }
}

void CheckBound() {
  CHECK(MaxTiles(0, 8) == 0, "no slot, no tile");
  CHECK(MaxTiles(3, 64) == 3, "a tile has a slot");
  CHECK(MaxTiles(8192, 64) == 128 + 63, "the bound is that of full tiles and one more a group");
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckCover();
  citi::CheckWrongOffsets();
  citi::CheckBound();
  return citi::Report();
}
