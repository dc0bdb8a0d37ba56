// Runs CUDA kernels on the host: the threads of a block are threads, blocks run one after another.
//
// Include before device code. Barriers and shuffles are those of CUDA, for whole blocks and whole
// warps; a barrier that is missing is a data race, which ThreadSanitizer sees. Shared memory of a
// launch holds NaN when a block begins.
#pragma once

#include <pthread.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
// One block at a time: what is static is shared by its threads.
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace citi::simt {

constexpr unsigned kThreadsOfWarp = 32;

struct Index {
  unsigned x;
};

class Barrier {
 public:
  explicit Barrier(unsigned num_threads) { pthread_barrier_init(&barrier_, nullptr, num_threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void Wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Block {
  Block(unsigned num_threads, size_t shared_bytes)
      : barrier(num_threads), words(num_threads), memory(shared_bytes + kAlignment) {
    for (unsigned i = 0; i < num_threads; i += kThreadsOfWarp) {
      warps.push_back(std::make_unique<Barrier>(kThreadsOfWarp));
    }
  }
  unsigned char* Memory() {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (kAlignment - address % kAlignment) % kAlignment;
  }
  static constexpr size_t kAlignment = 128;
  Barrier barrier;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<std::array<uint64_t, 8>> words;  // what a thread shows its warp
  std::vector<unsigned char> memory;
};

inline thread_local Index thread_index;
inline thread_local Index block_index;
inline thread_local Index grid_size;
inline thread_local Block* block;

// Calls use(words of lane 0, 1, ... of this thread's warp), when all of them have come.
template <class Use>
void WithWarp(const std::array<uint64_t, 8>& mine, const Use& use) {
  Barrier& warp = *block->warps[thread_index.x / kThreadsOfWarp];
  block->words[thread_index.x] = mine;
  warp.Wait();
  use(block->words.data() + thread_index.x / kThreadsOfWarp * kThreadsOfWarp);
  warp.Wait();
}

template <class Value>
uint64_t AsWord(const Value& value) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class Value>
Value FromWord(uint64_t word) {
  Value value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class Value>
Value OfLane(const Value& value, unsigned lane) {
  Value received{};
  WithWarp({AsWord(value)}, [&](const auto* words) { received = FromWord<Value>(words[lane][0]); });
  return received;
}

template <class Kernel, class... Arguments>
void LaunchShared(int64_t num_blocks, unsigned num_threads, size_t shared_bytes, Kernel* kernel,
                  Arguments... arguments) {
  Block shared(num_threads, shared_bytes);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < num_threads; ++i) {
    threads.emplace_back([=, &shared] {
      block = &shared;
      thread_index.x = i;
      grid_size.x = static_cast<unsigned>(num_blocks);
      for (int64_t number = 0; number < num_blocks; ++number) {
        block_index.x = static_cast<unsigned>(number);
        if (i == 0) std::memset(shared.memory.data(), 0xff, shared.memory.size());
        shared.barrier.Wait();
        kernel(arguments...);
        shared.barrier.Wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

template <class Kernel, class... Arguments>
void Launch(int64_t num_blocks, unsigned num_threads, Kernel* kernel, Arguments... arguments) {
  LaunchShared(num_blocks, num_threads, 0, kernel, arguments...);
}

}  // namespace citi::simt

#define threadIdx (::citi::simt::thread_index)
#define blockIdx (::citi::simt::block_index)
#define gridDim (::citi::simt::grid_size)

inline void __syncthreads() { citi::simt::block->barrier.Wait(); }

// Whether it holds for every thread of the block.
inline int __syncthreads_and(int holds) {
  citi::simt::Block& block = *citi::simt::block;
  block.words[threadIdx.x][0] = holds != 0;
  block.barrier.Wait();
  int all = 1;
  for (const auto& words : block.words) all = all && words[0] != 0;
  block.barrier.Wait();
  return all;
}

inline void __syncwarp(unsigned = 0xffffffffu) {
  citi::simt::block->warps[threadIdx.x / citi::simt::kThreadsOfWarp]->Wait();
}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return citi::simt::OfLane(value, (threadIdx.x ^ static_cast<unsigned>(mask)) % 32u);
}

template <class Value>
Value __shfl_sync(unsigned, Value value, int lane) {
  return citi::simt::OfLane(value, static_cast<unsigned>(lane) % 32u);
}

template <class Value>
Value __shfl_up_sync(unsigned, Value value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32u;
  return citi::simt::OfLane(value, lane < distance ? lane : lane - distance);
}
