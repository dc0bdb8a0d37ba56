// Which slots a block owns in a grouped product: pure arithmetic, for device and host.
//
// A group is one expert: its slots of a range of choices, which lie side by side. Every group is
// cut into tiles of kTileRows slots, numbered group after group. How many there are is known on the
// device alone; a grid is an upper bound, and a block beyond the last tile ends.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "whole_numbers.h"

namespace citi {

constexpr int kTileRows = 64;
constexpr int kGroupThreads = 128;

struct SlotGroups {
  const int32_t* offsets;
  int64_t num_groups;
  int64_t top_k;
  int64_t first_choice, end_choice;
  int64_t num_slots;
};

// Slots first to end - 1 of one group; none: first == end.
struct SlotTile {
  int64_t group, first, end;
};

// The offsets may hold anything: what they name stays within the slots.
CITI_HOST_DEVICE inline SlotTile SlotsOf(const SlotGroups& groups, int64_t group) {
  const int32_t* pairs = groups.offsets + group * groups.top_k;
  int64_t first = pairs[groups.first_choice], end = pairs[groups.end_choice];
  first = first < 0 ? 0 : first > groups.num_slots ? groups.num_slots : first;
  end = end < first ? first : end > groups.num_slots ? groups.num_slots : end;
  return {group, first, end};
}

// Thread i of kGroupThreads counts, and is asked for, the tiles of the groups
// [i * share, (i + 1) * share).
CITI_HOST_DEVICE inline int64_t GroupsPerThread(int64_t num_groups) {
  return CeilDiv(num_groups, kGroupThreads);
}

CITI_HOST_DEVICE inline int64_t CountTiles(const SlotGroups& groups, int thread) {
  const int64_t share = GroupsPerThread(groups.num_groups);
  int64_t count = 0;
  for (int64_t g = thread * share; g < (thread + 1) * share && g < groups.num_groups; ++g) {
    const SlotTile slots = SlotsOf(groups, g);
    count += CeilDiv(slots.end - slots.first, kTileRows);
  }
  return count;
}

// The tile-th tile of this thread's groups, which have more than that.
CITI_HOST_DEVICE inline SlotTile TileOfThread(const SlotGroups& groups, int thread, int64_t tile) {
  for (int64_t g = thread * GroupsPerThread(groups.num_groups); g < groups.num_groups; ++g) {
    const SlotTile slots = SlotsOf(groups, g);
    const int64_t count = CeilDiv(slots.end - slots.first, kTileRows);
    if (tile < count) {
      const int64_t first = slots.first + tile * kTileRows;
      return {g, first, first + kTileRows < slots.end ? first + kTileRows : slots.end};
    }
    tile -= count;
  }
  return {0, 0, 0};
}

// At least the number of tiles, however the slots spread over the groups.
inline int64_t MaxTiles(int64_t num_slots, int64_t num_groups) {
  const int64_t spread = (num_slots + num_groups * (kTileRows - 1)) / kTileRows;
  return spread < num_slots ? spread : num_slots;
}

}  // namespace citi
