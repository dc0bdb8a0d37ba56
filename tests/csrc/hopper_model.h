// A model of Hopper's instructions on the host, with the names of cuda/hopper.h: the threads of a
// cluster are threads, clusters run one after another, or at once where they wait for each other.
// Products are in wgmma_model.h.
//
// Written from the PTX ISA alone, section names in brackets; nothing of the plan under test is
// used. Where the ISA leaves time open, the model takes the time that hurts: TMA loads land in any
// order, from a thread of their own; products and TMA stores read shared memory when they are
// waited for. What was missing then is a wrong value, or a data race that ThreadSanitizer sees.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dtype.h"
#include "simt.h"

namespace citi::hopper {

inline std::mutex failure_mutex;
inline std::vector<std::string> failures;

inline void Fail(const std::string& what) {
  const std::lock_guard<std::mutex> lock(failure_mutex);
  if (failures.size() < 8) failures.push_back(what);
}

// A matrix of 16-bit elements, and the box that moves: what a CUtensorMap with the 128-byte swizzle
// and fill by zero holds.
struct TensorMap {
  unsigned char* data;
  int64_t columns, rows, row_bytes;
  int box_columns, box_rows;
};

// [Tensor swizzling modes, 128B] Chunks of 16 bytes change places within 128 bytes by bits 7 to 9
// of the address in shared memory.
inline uint32_t Swizzled(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

// [mbarrier] Pending arrivals and bytes; the phase ends when both are none.
struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t parity = 0;
};

// Shared memory begins where no swizzle does, as it may.
constexpr uint32_t kSharedBase = 0x1a0;
constexpr uint32_t kSharedEnd = 227 * 1024;

class Block {
 public:
  explicit Block(unsigned num_threads)
      : memory(kSharedEnd, 0xff), whole(num_threads), consumers(num_threads - 128) {
    for (unsigned i = 0; i < num_threads; i += 32) {
      warps.push_back(std::make_unique<simt::Barrier>(32));
      groups.push_back(i % 128 == 0 ? std::make_unique<simt::Barrier>(128) : nullptr);
    }
    row_of_lane.resize(num_threads);
  }
  unsigned char* At(uint32_t address, uint32_t size) {
    if (address < kSharedBase || address + size > kSharedEnd) {
      Fail("shared memory is touched at " + std::to_string(address));
      return memory.data();
    }
    return memory.data() + address;
  }
  void Init(uint32_t address, int arrivals) {
    const std::lock_guard<std::mutex> lock(mutex);
    barriers[address] = {arrivals, arrivals, 0, 0};
  }
  void Arrive(uint32_t address, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    Barrier& barrier = Find(address);
    if (--barrier.pending < 0) Fail("more arrivals than the barrier counts");
    barrier.bytes += bytes;
    Complete(&barrier);
  }
  void CompleteBytes(uint32_t address, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    Barrier& barrier = Find(address);
    barrier.bytes -= bytes;
    if (std::abs(barrier.bytes) >= 1 << 20) Fail("bytes beyond what a barrier counts");
    Complete(&barrier);
  }
  void Wait(uint32_t address, uint32_t parity) {
    std::unique_lock<std::mutex> lock(mutex);
    Barrier& barrier = Find(address);
    const auto is_complete = [&] { return barrier.parity != parity; };
    if (changed.wait_for(lock, std::chrono::seconds(100), is_complete)) return;
    std::printf("deadlock at barrier %u, parity %u\n", address, parity);
    for (const std::string& failure : failures) std::printf("%s\n", failure.c_str());
    std::fflush(stdout);
    std::_Exit(1);
  }
  // A barrier that a block leaves behind has seen whole phases.
  bool IsQuiet() {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [address, barrier] : barriers) {
      if (barrier.bytes != 0) return false;
    }
    return true;
  }

  std::vector<unsigned char> memory;
  simt::Barrier whole, consumers;
  std::vector<std::unique_ptr<simt::Barrier>> warps, groups;
  std::vector<uint32_t> row_of_lane;

 private:
  Barrier& Find(uint32_t address) {
    const auto found = barriers.find(address);
    if (found != barriers.end()) return found->second;
    Fail("no barrier at " + std::to_string(address));
    return nowhere;
  }
  void Complete(Barrier* barrier) {
    if (barrier->pending != 0 || barrier->bytes != 0) return;
    barrier->pending = barrier->arrivals;
    barrier->parity ^= 1u;
    changed.notify_all();
  }
  std::mutex mutex;
  std::condition_variable changed;
  std::map<uint32_t, Barrier> barriers;
  Barrier nowhere;
};

// [cp.async.bulk.tensor] Loads, done by a thread of their own in random order.
class LoadEngine {
 public:
  LoadEngine() : thread_([this] { Run(); }) {}
  ~LoadEngine() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void Add(std::function<void()> load) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loads_.push_back(std::move(load));
    }
    changed_.notify_all();
  }

 private:
  void Run() {
    std::mt19937 random(7);
    for (;;) {
      std::function<void()> load;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return ends_ || !loads_.empty(); });
        if (loads_.empty()) return;
        const size_t chosen = random() % loads_.size();
        load = std::move(loads_[chosen]);
        loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(chosen));
      }
      load();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> loads_;
  bool ends_ = false;
  std::thread thread_;
};

struct Cluster {
  Cluster(int size, unsigned num_threads) : all(num_threads * static_cast<unsigned>(size)) {
    for (int i = 0; i < size; ++i) blocks.push_back(std::make_unique<Block>(num_threads));
  }
  std::vector<std::unique_ptr<Block>> blocks;
  simt::Barrier all;
  LoadEngine engine;
};

struct Product {
  DType dtype;
  bool is_column_major;
  int width;
  float* acc;
  uint64_t left, right;
};

struct Store {
  const TensorMap* map;
  uint32_t from;
  int32_t column, row;
};

// What a thread has under way.
struct Thread {
  Cluster* cluster;
  Block* block;
  uint32_t rank, index, block_index, num_blocks;
  std::vector<Product> issued;
  std::deque<std::vector<Product>> batches;
  std::vector<Store> stores;
  std::deque<std::vector<Store>> groups;
  bool is_fenced = false;          // wgmma.fence since the last commit
  bool has_unseen_writes = false;  // st.shared since the last proxy fence
  bool reached_others = false;     // another block's memory since the last cluster barrier
  bool has_seen_others = false;    // other blocks' writes since the last proxy fence
};
inline thread_local Thread me;

inline uint32_t ThreadIndex() { return me.index; }
inline uint32_t BlockIndex() { return me.block_index; }
inline uint32_t NumBlocks() { return me.num_blocks; }
inline uint32_t SharedBase() { return kSharedBase; }
inline uint32_t Uniform(uint32_t value) { return value; }
inline bool ElectLane() { return me.index % 32 == 0; }
inline void SyncWarp() { me.block->warps[me.index / 32]->Wait(); }

template <int kRegisters>
void ShrinkRegisters() {}
template <int kRegisters>
void GrowRegisters() {}

// [bar.sync] One warp group each here, or all but the first.
template <int kNumThreads>
void SyncThreads(uint32_t barrier) {
  static_assert(kNumThreads == 128 || kNumThreads == 256);
  if (me.has_unseen_writes) Fail("shared memory was written and not fenced for TMA");
  if constexpr (kNumThreads == 128) {
    if (barrier != me.index / 128) Fail("another warp group's barrier");
    me.block->groups[me.index / 128 * 4]->Wait();
  } else {
    if (barrier != 3 || me.index < 128) Fail("not the barrier of the consumers");
    me.block->consumers.Wait();
  }
}

template <int kCluster>
void SyncCluster() {
  me.cluster->all.Wait();
  me.reached_others = false;
}

template <int kCluster>
uint32_t RankInCluster() {
  return me.rank;
}

inline void InitBarrier(uint32_t barrier, int arrivals) { me.block->Init(barrier, arrivals); }
inline void FenceInit() {}
inline void WaitBarrier(uint32_t barrier, uint32_t parity) { me.block->Wait(barrier, parity); }
inline void ArriveAndExpect(uint32_t barrier, int bytes) { me.block->Arrive(barrier, bytes); }

template <int kCluster>
void Arrive(uint32_t barrier, uint32_t rank) {
  if (rank >= kCluster) Fail("a block outside of the cluster");
  if (rank != me.rank) me.reached_others = true;
  me.cluster->blocks[rank]->Arrive(barrier, 0);
}

inline void ArriveHere(uint32_t barrier) { me.block->Arrive(barrier, 0); }

inline bool IsInside(const TensorMap& map, int64_t column, int64_t row) {
  return column >= 0 && column < map.columns && row >= 0 && row < map.rows;
}

// [Tiled mode] Rows of the box follow one another; what lies outside is zero, and counted.
inline void Load(const TensorMap& map, Block* block, uint32_t to, uint32_t barrier, int32_t column,
                 int32_t row) {
  if (to % 128 != 0 || map.box_columns != 64) Fail("a box that cannot be swizzled so");
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const uint32_t address = to + static_cast<uint32_t>(r * map.box_columns + c) * 2;
      unsigned char* element = block->At(Swizzled(address), 2);
      if (IsInside(map, column + c, row + r)) {
        std::memcpy(element, map.data + (row + r) * map.row_bytes + (column + c) * 2, 2);
      } else {
        std::memset(element, 0, 2);
      }
    }
  }
  block->CompleteBytes(barrier, int64_t{2} * map.box_rows * map.box_columns);
}

inline void LoadBox(const TensorMap& map, uint32_t to, uint32_t barrier, int32_t column,
                    int32_t row) {
  if (me.has_seen_others) Fail("TMA may not see what other blocks wrote");
  Block* block = me.block;
  me.cluster->engine.Add([=, &map] { Load(map, block, to, barrier, column, row); });
}

// [Cache hints] A policy changes no value; only those of the ISA are known.
inline void CheckPolicy(uint64_t policy) {
  const bool is_known =
      policy == 0x1000000000000000 || policy == 0x12F0000000000000 || policy == 0x14F0000000000000;
  if (!is_known) Fail("not a cache policy");
}

inline void LoadBox(const TensorMap& map, uint32_t to, uint32_t barrier, int32_t column,
                    int32_t row, uint64_t policy) {
  CheckPolicy(policy);
  LoadBox(map, to, barrier, column, row);
}

inline void LoadBoxToCluster(const TensorMap& map, uint32_t to, uint32_t barrier, int32_t column,
                             int32_t row, uint16_t mask, uint64_t policy) {
  CheckPolicy(policy);
  me.reached_others = true;
  for (size_t rank = 0; rank < 16; ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    if (rank >= me.cluster->blocks.size()) {
      Fail("a block outside of the cluster");
      return;
    }
    Block* block = me.cluster->blocks[rank].get();
    me.cluster->engine.Add([=, &map] { Load(map, block, to, barrier, column, row); });
  }
}

inline void Write(const Store& store) {
  const TensorMap& map = *store.map;
  if (store.from % 128 != 0) Fail("a box that cannot be swizzled so");
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      if (!IsInside(map, store.column + c, store.row + r)) continue;
      const uint32_t address = store.from + static_cast<uint32_t>(r * map.box_columns + c) * 2;
      std::memcpy(map.data + (store.row + r) * map.row_bytes + (store.column + c) * 2,
                  me.block->At(Swizzled(address), 2), 2);
    }
  }
}

inline void StoreBox(const TensorMap& map, uint32_t from, int32_t column, int32_t row,
                     uint64_t policy) {
  CheckPolicy(policy);
  me.stores.push_back({&map, from, column, row});
}

inline void CommitStores() {
  me.groups.push_back(std::move(me.stores));
  me.stores.clear();
}

template <int kPending>
void WaitStoresRead() {
  while (me.groups.size() > kPending) {
    for (const Store& store : me.groups.front()) Write(store);
    me.groups.pop_front();
  }
}

inline float* SharedFloats(uint32_t address) {
  return reinterpret_cast<float*>(me.block->At(address, 4));
}

// [red.release, ld.acquire] What a thread has written or seen goes with the count.
inline void FenceProxies() { me.has_seen_others = false; }
inline void FenceDevice() {}
inline void AddToCount(uint32_t* count) { __atomic_fetch_add(count, 1u, __ATOMIC_RELEASE); }
inline void WaitForCount(const uint32_t* count, uint32_t wanted) {
  me.has_seen_others = true;
  for (int poll = 0; poll < 1000000; ++poll) {
    if (__atomic_load_n(count, __ATOMIC_ACQUIRE) >= wanted) return;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  std::printf("a count that is waited for in vain\n");
  std::fflush(stdout);
  std::_Exit(1);
}

inline void FenceSharedWrites() { me.has_unseen_writes = false; }

// [stmatrix] .x4: lane 8 j + i names row i of matrix j; lane l holds 2 elements of row l / 4.
inline void StoreMatrices(uint32_t row, const uint32_t (&values)[4]) {
  const uint32_t first = me.index / 32 * 32, lane = me.index % 32;
  me.block->row_of_lane[me.index] = row;
  SyncWarp();
  if (row % 16 != 0) Fail("a row of a matrix is aligned to 16 bytes");
  for (uint32_t j = 0; j < 4; ++j) {
    const uint32_t there = me.block->row_of_lane[first + 8 * j + lane / 4] + lane % 4 * 4;
    std::memcpy(me.block->At(there, 4), &values[j], 4);
  }
  me.has_unseen_writes = true;
  SyncWarp();
}

template <DType kDType>
uint32_t Pack(float low, float high) {
  if constexpr (kDType == DType::kBFloat16) {
    return BFloat16BitsOf(low) | static_cast<uint32_t>(BFloat16BitsOf(high)) << 16;
  } else {
    return Float16BitsOf(low) | static_cast<uint32_t>(Float16BitsOf(high)) << 16;
  }
}

// Runs the blocks from `first` on, `count` of them, whole clusters, all at once.
template <class Kernel>
void RunTogether(int64_t first, int64_t count, int64_t num_blocks, int cluster_size,
                 unsigned num_threads, const Kernel& kernel) {
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::thread> threads;
  for (int64_t block = first; block < first + count; ++block) {
    if ((block - first) % cluster_size == 0) {
      clusters.push_back(std::make_unique<Cluster>(cluster_size, num_threads));
    }
    Cluster* cluster = clusters.back().get();
    for (unsigned i = 0; i < num_threads; ++i) {
      threads.emplace_back([=, &kernel] {
        me = Thread{};
        me.cluster = cluster;
        me.rank = static_cast<uint32_t>((block - first) % cluster_size);
        me.block = cluster->blocks[me.rank].get();
        me.index = i;
        me.block_index = static_cast<uint32_t>(block);
        me.num_blocks = static_cast<uint32_t>(num_blocks);
        kernel();
        if (!me.issued.empty() || !me.batches.empty()) Fail("products are under way at the end");
        if (!me.stores.empty() || !me.groups.empty()) Fail("stores are under way at the end");
        // [Distributed shared memory] A block whose memory others reach must not have ended.
        if (me.reached_others) Fail("another block is reached, which may have ended");
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      if (!block->IsQuiet()) Fail("loads are under way at the end");
    }
  }
}

// Runs the blocks of a kernel, a cluster of them at a time.
template <class Kernel>
void RunClusters(int64_t num_blocks, int cluster_size, unsigned num_threads, const Kernel& kernel) {
  for (int64_t first = 0; first < num_blocks; first += cluster_size) {
    RunTogether(first, cluster_size, num_blocks, cluster_size, num_threads, kernel);
  }
}

}  // namespace citi::hopper
