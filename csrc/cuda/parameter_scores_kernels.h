// Device code of the parameter scores. Also compiled as plain C++ by a test, which runs the threads
// of a block as threads of the host; hence no header of CUDA's but those that dtype.h needs.
//
// A block owns a tile of the weight and passes over all tokens: the absolute value needs the whole
// sum. g and x arrive tile by tile, a few steps ahead, as they lie in memory: token by token. Their
// product stays in registers, is multiplied by the weight there and reduced: each thread its own
// elements, a warp by shuffles, the warps through shared memory, the tiles by AddScoreSums; in an
// order that is always the same.
//
// Shapes: T tokens, N out-features (down a tile), K in-features (across it), P, Q segments of them.
// Lanes: g = lane / 4 and c = lane % 4, as in tensor_core.h.
#pragma once

#include <cstdint>

#include "counter_hash.h"
#include "cuda/tensor_core.h"
#include "dtype.h"
#include "parameter_scores_arguments.h"

namespace citi {

// A step takes so many tokens that one feature of them has this size.
constexpr int kStepBytes = 64;
constexpr int kChunkBytes = 16;
constexpr int kStages = 4;
// Tiles that go down the weight before those beside them: their g and x stay in L2.
constexpr uint32_t kTilesOfGroup = 8;
constexpr int kSumThreads = 256;

// kSize x kSize elements of the weight; a warp owns kBlocksDown x kBlocksAcross blocks of 16 x 8.
template <int kSize_, int kWarpsDown_, int kWarpsAcross_>
struct Tile {
  static constexpr int kSize = kSize_;
  static constexpr int kWarpsDown = kWarpsDown_, kWarpsAcross = kWarpsAcross_;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  // On a multiprocessor, by registers: 128 for each thread.
  static constexpr int kMinBlocks = 512 / kThreads;
  static constexpr int kRows = kSize / kWarpsDown, kColumns = kSize / kWarpsAcross;
  static constexpr int kBlocksDown = kRows / 16, kBlocksAcross = kColumns / 8;
};
using LargeTile = Tile<128, 2, 4>;
using SmallTile = Tile<64, 2, 2>;

// A matrix (T, features).
struct Operand {
  const void* data;
  int64_t stride_t, stride_f;
  int64_t num_features;
  DType dtype;
};

struct ParameterScoresLaunch {
  Operand g, x;
  const uint8_t* valid;
  int64_t num_tokens;
  const void* weight;
  int64_t weight_stride_n, weight_stride_k;
  DType weight_dtype;
  bool is_per_token;
  float scale;
  Granularity granularity;
  DType scores_dtype;
  void* scores;  // of elements; else the sums go to parts
  float* parts;  // (tiles across, N), (tiles down, K) or (tiles,)
  uint64_t seed;
  uint32_t tiles_down, tiles_across;
};

// One step's tokens of one operand in shared memory.
template <class Element, class Tile>
struct StepTile {
  static constexpr int kTokens = kStepBytes / sizeof(Element);
  static constexpr int kWidth = kChunkBytes / sizeof(Element);
  static constexpr int kChunks = Tile::kSize / kWidth;
  static constexpr int kBytes = kTokens * Tile::kSize * static_cast<int>(sizeof(Element));

  // Eight tokens' chunks of the same features lie in different banks.
  __device__ static Element* At(unsigned char* tile, int token, int feature) {
    const int chunk = feature / kWidth ^ token % 8;
    return reinterpret_cast<Element*>(tile + (token * kChunks + chunk) * kChunkBytes) +
           feature % kWidth;
  }
};

// Two blocks fit on sm_80 and on sm_90 or later, one on sm_89.
template <class Element, class Tile>
constexpr int kSharedBytes = kStages * 2 * StepTile<Element, Tile>::kBytes;
static_assert(kSharedBytes<float, LargeTile> == 64 * 1024);

// Where a block's tile begins, and how much of it lies within the weight.
struct TilePlace {
  uint32_t down, across;
  int64_t n, k;
  int num_rows, num_columns;
};

template <class Tile>
__device__ inline TilePlace PlaceOf(const ParameterScoresLaunch& p, uint32_t tile) {
  const uint32_t in_group = tile % (p.tiles_across * kTilesOfGroup);
  const uint32_t first_row = tile / (p.tiles_across * kTilesOfGroup) * kTilesOfGroup;
  const uint32_t rows_left = p.tiles_down - first_row;
  const uint32_t rows = rows_left < kTilesOfGroup ? rows_left : kTilesOfGroup;
  const uint32_t down = first_row + in_group % rows, across = in_group / rows;
  const int64_t n = int64_t{down} * Tile::kSize, k = int64_t{across} * Tile::kSize;
  const auto within = [](int64_t left) {
    return static_cast<int>(left < Tile::kSize ? left : Tile::kSize);
  };
  return {down, across, n, k, within(p.g.num_features - n), within(p.x.num_features - k)};
}

__device__ inline float ReadFloat(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[at];
  if (dtype == DType::kBFloat16) return ToFloat(static_cast<const BFloat16*>(data)[at]);
  return ToFloat(static_cast<const Float16*>(data)[at]);
}

// A thread's chunks of an operand: features from f on of every kTokenStep-th token from t on.
// Elements of one dtype, contiguous in the features, rows aligned to 16 bytes, which they fill.
template <class Element>
class AlignedRows {
 public:
  static constexpr bool kIsAsynchronous = true;

  __device__ AlignedRows(const Operand& from, int64_t t, int64_t f)
      : from_(from),
        at_(static_cast<const Element*>(from.data) + t * from.stride_t + f),
        is_inside_(f < from.num_features) {}
  // Of the token that comes `tokens` later; zeros if it does not count.
  __device__ void CopyChunk(Element* to, int tokens, bool counts) const {
    CopyAsync(to, at_ + tokens * from_.stride_t, counts && is_inside_);
  }
  __device__ void Advance(int tokens) { at_ += tokens * from_.stride_t; }

 private:
  const Operand& from_;
  const Element* at_;
  bool is_inside_;
};

// The same of elements of any dtype and strides, one by one.
template <class Element>
class AnyRows {
 public:
  static constexpr bool kIsAsynchronous = false;

  __device__ AnyRows(const Operand& from, int64_t t, int64_t f)
      : from_(from), at_(t * from.stride_t + f * from.stride_f), f_(f) {}
  __device__ void CopyChunk(Element* to, int tokens, bool counts) const {
#pragma unroll
    for (int i = 0; i < kChunkBytes / static_cast<int>(sizeof(Element)); ++i) {
      const bool is_read = counts && f_ + i < from_.num_features;
      const int64_t at = at_ + tokens * from_.stride_t + i * from_.stride_f;
      to[i] = Rounded<Element>(is_read ? ReadFloat(from_.data, from_.dtype, at) : 0.0f);
    }
  }
  __device__ void Advance(int tokens) { at_ += tokens * from_.stride_t; }

 private:
  const Operand& from_;
  int64_t at_, f_;
};

// Brings steps of g and x to shared memory, in turn. Tokens that do not count are zeros, whatever
// they hold.
template <class Element, class Tile, class Rows>
class Copier {
 public:
  using Step = StepTile<Element, Tile>;

  __device__ Copier(const ParameterScoresLaunch& p, const TilePlace& place)
      : p_(p),
        token_(Token()),
        g_(p.g, token_, place.n + Feature()),
        x_(p.x, token_, place.k + Feature()) {
    LookUp();
  }

  // The next step. Beyond the last an empty group of copies, since waits count groups.
  __device__ void Copy(unsigned char* stage) {
    if (token_ - Token() < p_.num_tokens) {
      Element* const g = Step::At(stage, Token(), Feature());
      Element* const x = Step::At(stage + Step::kBytes, Token(), Feature());
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        g_.CopyChunk(g + i * kTokenStep * Tile::kSize, i * kTokenStep, counts_[i] != 0);
        x_.CopyChunk(x + i * kTokenStep * Tile::kSize, i * kTokenStep, counts_[i] != 0);
      }
      token_ += Step::kTokens;
      g_.Advance(Step::kTokens);
      x_.Advance(Step::kTokens);
      LookUp();
    }
    CommitCopies();
  }

 private:
  static constexpr int kCopies = Step::kTokens * Step::kChunks / Tile::kThreads;
  static constexpr int kTokenStep = Tile::kThreads / Step::kChunks;
  static_assert(kTokenStep % 8 == 0, "a thread's chunks lie in the same banks");

  // Of this thread's first chunk in a step.
  __device__ static int Token() { return static_cast<int>(threadIdx.x) / Step::kChunks; }
  __device__ static int Feature() {
    return static_cast<int>(threadIdx.x) % Step::kChunks * Step::kWidth;
  }

  // A step ahead, so that no copy waits for it.
  __device__ void LookUp() {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t t = token_ + i * kTokenStep;
      counts_[i] = t < p_.num_tokens;
      if (counts_[i] && p_.valid != nullptr) counts_[i] = p_.valid[t];
    }
  }

  const ParameterScoresLaunch& p_;
  int64_t token_;
  Rows g_, x_;
  uint8_t counts_[kCopies];
};

// A thread's elements of the tile: block (i, j), its element e at row g + 8 (e / 2), column
// 2 c + e % 2.
template <class Tile>
using Elements = float[Tile::kBlocksDown][Tile::kBlocksAcross][4];

// Of this thread in its tile.
template <class Tile>
struct ThreadPlace {
  int warp_down, warp_across, g, c;

  __device__ ThreadPlace() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    warp_down = warp / Tile::kWarpsAcross, warp_across = warp % Tile::kWarpsAcross;
    g = lane / 4, c = lane % 4;
  }
  __device__ int first_row() const { return warp_down * Tile::kRows; }
  __device__ int first_column() const { return warp_across * Tile::kColumns; }
  // Of element 0 of block (i, 0).
  __device__ int row(int i) const { return first_row() + 16 * i + g; }
  __device__ int column() const { return first_column() + 2 * c; }
};

// A step's gᵀx, or |g|ᵀ|x|, added to the sums.
template <class Element, class Tile, bool kIsPerToken>
__device__ __forceinline__ void MultiplyOnTensorCores(unsigned char* stage, Elements<Tile>& sums) {
  using Step = StepTile<Element, Tile>;
  const ThreadPlace<Tile> thread;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr uint32_t kKept = kIsPerToken ? 0x7fff7fffu : 0xffffffffu;
#pragma unroll
  for (int t = 0; t < Step::kTokens; t += 16) {
    uint32_t x[Tile::kBlocksAcross / 2][4];
#pragma unroll
    for (int j = 0; j < Tile::kBlocksAcross / 2; ++j) {
      const int column = thread.first_column() + 16 * j + lane / 16 * 8;
      LoadMatricesTransposed(x[j], Step::At(stage + Step::kBytes, t + lane % 16, column));
#pragma unroll
      for (uint32_t& word : x[j]) word &= kKept;
    }
#pragma unroll
    for (int i = 0; i < Tile::kBlocksDown; ++i) {
      uint32_t g[4];
      const int row = thread.first_row() + 16 * i + lane / 8 % 2 * 8;
      LoadMatricesTransposed(g, Step::At(stage, t + lane % 8 + lane / 16 * 8, row));
#pragma unroll
      for (uint32_t& word : g) word &= kKept;
#pragma unroll
      for (int j = 0; j < Tile::kBlocksAcross; ++j) {
        MultiplyAdd<Element>(sums[i][j], g, x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// fp32, which tensor cores would round: the same elements by multiplications. The sums of a stage
// are added up first: one chain over all tokens would lose the last bits.
template <class Tile, bool kIsPerToken>
__device__ __forceinline__ void MultiplyInFloat(unsigned char* stage, Elements<Tile>& sums) {
  using Step = StepTile<float, Tile>;
  const ThreadPlace<Tile> thread;
  Elements<Tile> of_stage = {};
  const auto value = [](float read) { return kIsPerToken ? fabsf(read) : read; };
#pragma unroll 2
  for (int t = 0; t < Step::kTokens; ++t) {
    float x[Tile::kBlocksAcross][2];
#pragma unroll
    for (int j = 0; j < Tile::kBlocksAcross; ++j) {
      const float* two = Step::At(stage + Step::kBytes, t, thread.column() + 8 * j);
      x[j][0] = value(two[0]), x[j][1] = value(two[1]);
    }
#pragma unroll
    for (int row = 0; row < 2 * Tile::kBlocksDown; ++row) {
      const float g = value(*Step::At(stage, t, thread.first_row() + thread.g + 8 * row));
#pragma unroll
      for (int j = 0; j < Tile::kBlocksAcross; ++j) {
        of_stage[row / 2][j][row % 2 * 2] += g * x[j][0];
        of_stage[row / 2][j][row % 2 * 2 + 1] += g * x[j][1];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kBlocksDown; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kBlocksAcross; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] += of_stage[i][j][k];
    }
  }
}

// gᵀx of a tile. All threads may write to shared memory afterwards.
template <class Element, class Tile, class Rows, bool kIsPerToken>
__device__ __forceinline__ void Gradient(const ParameterScoresLaunch& p, const TilePlace& place,
                                         Elements<Tile>& sums) {
  using Step = StepTile<Element, Tile>;
  constexpr int kStageBytes = 2 * Step::kBytes;
  unsigned char* const memory = SharedMemory();
  Copier<Element, Tile, Rows> copier(p, place);
// A loop, for the code of a copy is long: unrolled, the kernels take a third longer to compile.
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) copier.Copy(memory + stage * kStageBytes);
  int stage = 0, freed = kStages - 1;
  for (int64_t t = 0; t < p.num_tokens; t += Step::kTokens) {
    WaitForCopies<kStages - 2>();
    // What others copied is there, and nobody reads the stage of the step before any more.
    __syncthreads();
    copier.Copy(memory + freed * kStageBytes);
    if constexpr (sizeof(Element) == 4) {
      MultiplyInFloat<Tile, kIsPerToken>(memory + stage * kStageBytes, sums);
    } else {
      MultiplyOnTensorCores<Element, Tile, kIsPerToken>(memory + stage * kStageBytes, sums);
    }
    freed = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  WaitForCopies<0>();
  __syncthreads();
}

}  // namespace citi
