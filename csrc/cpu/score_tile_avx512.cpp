#include "cpu/score_tile.h"
#include "cpu/score_tile_kernels.h"

namespace citi {

void ScoresOfTaskAvx512(const ScoreTile& tile, int64_t task) { ScoresOfTaskHere(tile, task); }

}  // namespace citi
