// What the extended GEMM on Hopper is laid out by: pure arithmetic, also used where there is no
// GPU.
//
//   out (rows, columns) = left (rows, depth) · right + more_left (rows, more) · more_right (+ bias)
//
// A cluster of blocks makes a unit of the output at a time, each block the tile of its own rows.
// Tiles move by TMA with the 128-byte swizzle, 64 elements of depth a step; steps over `more`
// follow those over depth. Matrices `right` are (columns, depth), or (depth, columns) where
// transposed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.h"
#include "extended_gemm_arguments.h"
#include "whole_numbers.h"

namespace citi::gemm {

constexpr int kTileRows = 128;
constexpr int kTileDepth = 64;
// Columns of the right operand that one block of a cluster loads for all of them.
constexpr int kShareColumns = 128;
// One row of a swizzled box, 64 elements of 16 bits.
constexpr int kRowBytes = 128;
constexpr int kBoxColumns = 64;
// The swizzle repeats every 8 rows; where that begins is aligned.
constexpr int kSwizzleRows = 8;
constexpr int kAtomBytes = kSwizzleRows * kRowBytes;
constexpr int kChunkBytes = 16;

// A warp group multiplies 64 rows by all columns of the tile, 16 of depth an instruction.
constexpr int kMmaRows = 64;
constexpr int kMmaDepth = 16;
constexpr int kMmasPerStep = kTileDepth / kMmaDepth;

// Warp group 0 loads, two others multiply and store.
constexpr int kGroupThreads = 128;
constexpr int kWarp = 32;
constexpr int kConsumers = kTileRows / kMmaRows;
constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;

// What a consumer stages for a TMA store; two of them, so that one fills while one drains.
constexpr int kBufferBytes = kMmaRows * kRowBytes;
constexpr int kNumBuffers = 2;

// Units that go through all columns before the next rows, so that L2 serves.
constexpr uint32_t kGroupRows = 8;

// Cache policies of TMA, as createpolicy.fractional makes them for all of the lines.
constexpr uint64_t kEvictNormal = 0x1000000000000000;
constexpr uint64_t kEvictFirst = 0x12F0000000000000;
constexpr uint64_t kEvictLast = 0x14F0000000000000;

constexpr int kBarrierBytes = 8;
constexpr int kMaxSharedBytes = 227 * 1024;

// Shared memory of a block, as offsets from an address aligned to kAtomBytes.
template <int kWidth_, int kCluster_, int kStages_>
struct Tiles {
  static constexpr int kWidth = kWidth_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kStages = kStages_;
  static constexpr int kLeftBytes = kTileRows * kRowBytes;
  static constexpr int kRightBytes = kWidth * kRowBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kBuffersAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kBuffersAt + kConsumers * kNumBuffers * kBufferBytes;
  static constexpr int kUsedBytes = kBarriersAt + 2 * kStages * kBarrierBytes;
  // The launch asks for enough to align the start.
  static constexpr int kSharedBytes = kUsedBytes + kAtomBytes;
  // Of both barriers of a stage: the producer; every consuming warp of the cluster.
  static constexpr int kFullArrivals = 1;
  static constexpr int kEmptyArrivals = kCluster * kConsumers * kGroupThreads / kWarp;

  CITI_HOST_DEVICE static constexpr uint32_t Left(int stage) {
    return static_cast<uint32_t>(stage * kStageBytes);
  }
  CITI_HOST_DEVICE static constexpr uint32_t Right(int stage) { return Left(stage) + kLeftBytes; }
  CITI_HOST_DEVICE static constexpr uint32_t Buffer(int consumer, int number) {
    return static_cast<uint32_t>(kBuffersAt + (consumer * kNumBuffers + number) * kBufferBytes);
  }
  CITI_HOST_DEVICE static constexpr uint32_t Full(int stage) {
    return static_cast<uint32_t>(kBarriersAt + stage * kBarrierBytes);
  }
  CITI_HOST_DEVICE static constexpr uint32_t Empty(int stage) { return Full(kStages + stage); }

  static_assert(kWidth == kCluster * kShareColumns, "each block loads one share");
  static_assert(kStageBytes % kAtomBytes == 0 && kLeftBytes % kAtomBytes == 0, "swizzle");
  static_assert(kSharedBytes <= kMaxSharedBytes, "shared memory of sm_90");
};

// For many tiles: two blocks share the right operand, so that L2 is read for 32 bytes a cycle.
using WideTiles = Tiles<256, 2, 4>;
// For few tiles.
using NarrowTiles = Tiles<128, 1, 6>;

// Which stage of the ring comes next, and the parity of the phase that it is in.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  CITI_HOST_DEVICE constexpr void Advance() {
    if (++stage < kStages) return;
    stage = 0;
    phase ^= 1u;
  }
};

// What the kernel takes beside tensor maps.
struct Launch {
  uint32_t num_unit_rows;
  uint32_t num_unit_columns;
  int32_t num_rows;
  int32_t num_columns;
  int32_t depth;
  int32_t more;  // depth of the extension, or 0
  const uint16_t* bias;
  uint32_t group_rows;
  uint64_t right_policy, out_policy;

  CITI_HOST_DEVICE constexpr uint32_t NumUnits() const { return num_unit_rows * num_unit_columns; }
  CITI_HOST_DEVICE constexpr int32_t NumBaseSteps() const {
    return static_cast<int32_t>(CeilDiv(depth, kTileDepth));
  }
  CITI_HOST_DEVICE constexpr int32_t NumSteps() const {
    return NumBaseSteps() + static_cast<int32_t>(CeilDiv(more, kTileDepth));
  }
  // Instructions of a step that have anything to multiply.
  CITI_HOST_DEVICE constexpr int32_t NumMmas(int32_t step) const {
    const int32_t base = NumBaseSteps();
    const int32_t left =
        step < base ? depth - step * kTileDepth : more - (step - base) * kTileDepth;
    const int32_t mmas = (left + kMmaDepth - 1) / kMmaDepth;
    return mmas < kMmasPerStep ? mmas : kMmasPerStep;
  }
};

struct Place {
  uint32_t row;
  uint32_t column;
};

CITI_HOST_DEVICE constexpr Place PlaceOfUnit(const Launch& launch, uint32_t unit) {
  const uint32_t group_units = launch.group_rows * launch.num_unit_columns;
  const uint32_t first_row = unit / group_units * launch.group_rows;
  const uint32_t in_group = unit % group_units;
  const uint32_t rows_left = launch.num_unit_rows - first_row;
  const uint32_t rows = rows_left < launch.group_rows ? rows_left : launch.group_rows;
  return {first_row + in_group % rows, in_group / rows};
}

// PTX ISA, "Matrix-descriptor": a matrix in shared memory for wgmma. Byte addresses and offsets
// lose 4 bits; bit 62 is the 128-byte swizzle, whose pattern begins at an aligned address.
CITI_HOST_DEVICE constexpr uint64_t MatrixDescriptor(uint32_t address, uint32_t leading_bytes,
                                                     uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3ffffu) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffffu) >> 4) << 32 | uint64_t{1} << 62;
}

// Rows of 64 depth elements: 8 rows are an atom. Leading bytes are not used with a swizzle.
CITI_HOST_DEVICE constexpr uint64_t DepthMajorDescriptor(uint32_t address) {
  return MatrixDescriptor(address, kChunkBytes, kAtomBytes);
}

// Boxes of 64 columns with a row for each of 64 depth: 8 of depth are an atom.
CITI_HOST_DEVICE constexpr uint64_t ColumnMajorDescriptor(uint32_t address) {
  return MatrixDescriptor(address, kTileDepth * kRowBytes, kAtomBytes);
}

// To the operand of the next instruction of a step, in the descriptor's unit.
CITI_HOST_DEVICE constexpr uint64_t DescriptorAdvance(bool is_column_major) {
  return (is_column_major ? kMmaDepth * kRowBytes : kMmaDepth * 2) >> 4;
}

// Where 16 bytes of a row of a swizzled box are.
CITI_HOST_DEVICE constexpr uint32_t SwizzledOffset(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + (chunk ^ row % kSwizzleRows) * kChunkBytes);
}

// PTX ISA, register fragments of wgmma.m64nNk16: where accumulator i of a thread belongs.
CITI_HOST_DEVICE constexpr int FragmentRow(int thread, int i) {
  return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8;
}
CITI_HOST_DEVICE constexpr int FragmentColumn(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Of a box of 64 x 64: which 16 bytes a lane names to stmatrix.x4, which stores 16 x 16, for the
// 16 columns `sixteenth`. Lanes 0-7 name rows of the upper left 8 x 8, then lower left, upper
// right.
CITI_HOST_DEVICE constexpr uint32_t StoredOffset(int thread, int sixteenth) {
  const int lane = thread % kWarp;
  const int row = thread / kWarp * 16 + lane / 8 % 2 * 8 + lane % 8;
  return SwizzledOffset(row, sixteenth * 2 + lane / 16);
}

// A matrix of 16-bit elements as TMA sees it, and the box that moves at once.
struct MapShape {
  const void* data;
  int64_t columns;
  int64_t rows;
  int64_t row_bytes;
  int box_columns;
  int box_rows;
};

struct MapShapes {
  MapShape left[2];   // base, extension
  MapShape right[2];  // base, extension
  MapShape out;
};

inline MapShape ShapeOf(const Matrix& matrix, int64_t rows, int64_t columns, int box_rows) {
  // The stride of a single row may be anything; TMA wants one.
  const int64_t stride = rows > 1 ? matrix.row_stride : CeilDiv(columns, 8) * 8;
  return {matrix.data, columns, rows, stride * 2, kBoxColumns, box_rows};
}

inline MapShapes ShapesOf(const ExtendedGemm& gemm) {
  const bool is_transposed = gemm.is_input_gradient;
  const auto right = [&](const Matrix& matrix, int64_t depth) {
    return is_transposed ? ShapeOf(matrix, depth, gemm.num_columns, kTileDepth)
                         : ShapeOf(matrix, gemm.num_columns, depth, kShareColumns);
  };
  MapShapes shapes{};
  shapes.left[0] = ShapeOf(gemm.left, gemm.num_rows, gemm.depth, kTileRows);
  shapes.right[0] = right(gemm.right, gemm.depth);
  shapes.left[1] = shapes.left[0];
  shapes.right[1] = shapes.right[0];
  if (gemm.more > 0) {
    shapes.left[1] = ShapeOf(gemm.more_left, gemm.num_rows, gemm.more, kTileRows);
    shapes.right[1] = right(gemm.more_right, gemm.more);
  }
  shapes.out = ShapeOf(gemm.out, gemm.num_rows, gemm.num_columns, kMmaRows);
  return shapes;
}

template <class Tiles>
int64_t NumUnits(const ExtendedGemm& gemm) {
  return CeilDiv(gemm.num_rows, kTileRows * Tiles::kCluster) *
         CeilDiv(gemm.num_columns, Tiles::kWidth);
}

template <class Tiles>
Launch PlanLaunch(const ExtendedGemm& gemm) {
  return {static_cast<uint32_t>(CeilDiv(gemm.num_rows, kTileRows * Tiles::kCluster)),
          static_cast<uint32_t>(CeilDiv(gemm.num_columns, Tiles::kWidth)),
          static_cast<int32_t>(gemm.num_rows),
          static_cast<int32_t>(gemm.num_columns),
          static_cast<int32_t>(gemm.depth),
          static_cast<int32_t>(gemm.more),
          static_cast<const uint16_t*>(gemm.bias.data),
          gemm.order.group_rows > 0 ? static_cast<uint32_t>(gemm.order.group_rows) : kGroupRows,
          gemm.order.keeps_right ? kEvictLast : kEvictNormal,
          gemm.order.keeps_right ? kEvictFirst : kEvictNormal};
}

// As many clusters as the rounds of units need: what the last round would leave idle stays free for
// kernels of another stream.
template <class Tiles>
int64_t NumBlocks(const ExtendedGemm& gemm, int num_multiprocessors) {
  const int64_t clusters = std::max(num_multiprocessors / Tiles::kCluster, 1);
  const int64_t units = NumUnits<Tiles>(gemm);
  return Tiles::kCluster * CeilDiv(units, CeilDiv(units, clusters));
}

// Wide tiles read less of L2 and of shared memory for a product: taken to save 15 %. Not measured.
inline bool TakesWideTiles(const ExtendedGemm& gemm, int num_multiprocessors) {
  const auto rounds = [&](int64_t units, int64_t at_once) { return CeilDiv(units, at_once); };
  const int64_t clusters = num_multiprocessors / WideTiles::kCluster;
  if (clusters == 0) return false;
  const int64_t wide = rounds(NumUnits<WideTiles>(gemm), clusters) * WideTiles::kWidth;
  const int64_t narrow =
      rounds(NumUnits<NarrowTiles>(gemm), num_multiprocessors) * NarrowTiles::kWidth;
  return 100 * wide <= 115 * narrow;
}

}  // namespace citi::gemm
