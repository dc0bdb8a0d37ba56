// Tasks on several threads.
//
// OpenMP, linked as the system's shared libgomp: PyTorch for Linux brings a library of the same
// soname, so that the process has one runtime. Its threads are PyTorch's own, still warm from the
// op before; threads of ours would fight with them for the cores while they spin.
// Without OpenMP, and under ThreadSanitizer, which does not know libgomp: plain threads.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace citi {

// Calls task(i) once for every i < num_tasks, in any order; task must not throw.
template <class Task>
void ParallelFor(int64_t num_tasks, int64_t num_threads, const Task& task) {
  if (num_threads > num_tasks) num_threads = num_tasks;
  if (num_threads <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(num_threads))
  for (int64_t i = 0; i < num_tasks; ++i) task(i);
#else
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < num_tasks; i = next++) task(i);
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_threads));
  try {
    while (static_cast<int64_t>(threads.size()) < num_threads - 1) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that there are do the work.
  }
  work();
  for (std::thread& thread : threads) thread.join();
#endif
}

}  // namespace citi
