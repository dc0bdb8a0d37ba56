#include "cpu/score_tile.h"
#include "cpu/score_tile_kernels.h"

namespace citi {

void ScoresOfTaskAvx2(const ScoreTile& tile, int64_t task) { ScoresOfTaskHere(tile, task); }

}  // namespace citi
