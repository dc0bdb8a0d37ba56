// Runs CUDA kernels on the host: the threads of a block are threads, blocks run one after another.
//
// Include before device code. Barriers and shuffles are those of CUDA, for whole blocks and whole
// warps; a barrier that is missing is a data race, which ThreadSanitizer sees.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
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
  explicit Block(unsigned num_threads) : barrier(num_threads), exchanged(num_threads) {
    for (unsigned i = 0; i < num_threads; i += kThreadsOfWarp) {
      warps.push_back(std::make_unique<Barrier>(kThreadsOfWarp));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<float> exchanged;
};

inline thread_local Index thread_index;
inline thread_local Index block_index;
inline thread_local Block* block;

template <class Kernel, class... Arguments>
void Launch(int64_t num_blocks, unsigned num_threads, Kernel* kernel, Arguments... arguments) {
  Block shared(num_threads);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < num_threads; ++i) {
    threads.emplace_back([=, &shared] {
      block = &shared;
      thread_index.x = i;
      for (int64_t number = 0; number < num_blocks; ++number) {
        block_index.x = static_cast<unsigned>(number);
        kernel(arguments...);
        shared.barrier.Wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace citi::simt

#define threadIdx (::citi::simt::thread_index)
#define blockIdx (::citi::simt::block_index)

inline void __syncthreads() { citi::simt::block->barrier.Wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  citi::simt::Block& block = *citi::simt::block;
  citi::simt::Barrier& warp = *block.warps[threadIdx.x / citi::simt::kThreadsOfWarp];
  block.exchanged[threadIdx.x] = value;
  warp.Wait();
  const float received = block.exchanged[threadIdx.x ^ static_cast<unsigned>(mask)];
  warp.Wait();
  return received;
}
