// How the update of the input gradient with dropout is laid out on a GPU.
//
// Bytes, T tokens, K in-features, Z rows of the stack, elements of 2 bytes:
//   read     2 T K, once; from L2 2 Z K for each 64 tokens and 2 T Z for each 128 inputs
//   written  2 T K
// At 8192 x 4096 and 40 rows: 67 MB read, 67 MB written, 63 MB from L2.
#pragma once

#include "cuda/input_update_kernels.h"
#include "cuda/skinny_plan.h"
#include "skinny_arguments.h"
#include "whole_numbers.h"

namespace citi {

struct InputPlan {
  int64_t num_blocks, shared_bytes;
  InputLaunch launch;
};

inline InputPlan PlanInputUpdate(const InputUpdateArguments& s) {
  InputPlan plan{};
  InputLaunch& launch = plan.launch;
  launch.dx = static_cast<uint16_t*>(const_cast<void*>(s.dx.data));
  launch.dz = static_cast<const uint16_t*>(s.dz.data);
  launch.stack = static_cast<const uint16_t*>(s.stack.data);
  launch.num_tokens = s.shape.num_tokens, launch.num_inputs = s.num_inputs;
  launch.dx_stride = s.dx.row_stride;
  launch.num_tiles = CeilDiv(s.num_inputs, kInputColumns);
  launch.padded_ranks = static_cast<int>(s.shape.padded_ranks());
  launch.num_rows = static_cast<int>(s.shape.num_rows());
  launch.has_base = s.has_base;
  launch.dropout = s.dropout;
  plan.num_blocks = CeilDiv(s.shape.num_tokens, kInputTokens) * launch.num_tiles;
  plan.shared_bytes = InputSharedBytes(launch.padded_ranks, launch.num_rows);
  return plan;
}

}  // namespace citi
