// How small matrices are packed on a GPU: a thread for each 16 bytes of the result.
#pragma once

#include "cuda/pack_kernels.h"
#include "cuda/skinny_plan.h"
#include "skinny_arguments.h"
#include "whole_numbers.h"

namespace citi {

struct PackPlan {
  int64_t num_blocks;
  PackLaunch launch;
};

inline PackPlan PlanPack(const PackArguments& s) {
  PackPlan plan{};
  PackLaunch& launch = plan.launch;
  for (const PackedMatrix& each : s.sources) {
    launch.sources[launch.num_sources++] = {
        each.matrix.data, each.matrix.dtype,      each.first_row,           each.num_rows,
        each.num_columns, each.matrix.row_stride, each.matrix.column_stride};
  }
  launch.out = static_cast<uint16_t*>(s.out.data);
  launch.num_rows = s.num_rows;
  launch.chunks_of_row = s.num_columns / kPackElements;
  launch.zeros = reinterpret_cast<uint32_t*>(const_cast<int32_t*>(s.zeros.data));
  launch.num_zeros = s.zeros.size;
  plan.num_blocks =
      CeilDiv(std::max(s.num_rows * launch.chunks_of_row, launch.num_zeros), kPackThreads);
  return plan;
}

}  // namespace citi
