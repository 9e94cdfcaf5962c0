// CHECK tests a condition, and CHECK_THROWS tests for an exception. result() returns main's exit status.
#pragma once

#include <cstdio>

namespace fused_sam_test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void check(bool ok, const char* what, const char* file, int line) {
  if (ok) return;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  ++failures();
}

inline int result() {
  if (failures() != 0) std::fprintf(stderr, "%d checks failed\n", failures());
  return failures() == 0 ? 0 : 1;
}

}  // namespace fused_sam_test

#define CHECK(...) fused_sam_test::check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

#define CHECK_THROWS(expression, exception)                                       \
  do {                                                                            \
    bool thrown = false;                                                          \
    try {                                                                         \
      (void)(expression);                                                         \
    } catch (const exception&) {                                                  \
      thrown = true;                                                              \
    }                                                                             \
    fused_sam_test::check(thrown, #expression " throws " #exception, __FILE__, __LINE__); \
  } while (false)
