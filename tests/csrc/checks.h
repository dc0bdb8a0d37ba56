// Checks that count, and say where they failed.
#pragma once

#include <cstdio>
#include <string>

namespace citi {

inline int num_failures = 0;
inline int num_checks = 0;

inline void Check(bool holds, const std::string& what, const char* file, int line) {
  ++num_checks;
  if (holds) return;
  ++num_failures;
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

#define CHECK(condition, what) Check((condition), (what), __FILE__, __LINE__)

inline int Report() {
  std::printf("%d checks, %d failed\n", num_checks, num_failures);
  return num_failures == 0 ? 0 : 1;
}

}  // namespace citi
