// CHECK_WORDS(expression, words) checks that the expression throws an exception whose text contains the words.
#pragma once

#include <cstring>
#include <exception>

#include "check.h"

#define CHECK_WORDS(expression, words)                                                                     \
  do {                                                                                                     \
    bool said = false;                                                                                     \
    try {                                                                                                  \
      (void)(expression);                                                                                  \
    } catch (const std::exception& error) {                                                                \
      said = std::strstr(error.what(), words) != nullptr;                                                  \
    }                                                                                                      \
    fused_sam_test::check(said, #expression " throws words with: " words, __FILE__, __LINE__);             \
  } while (false)
