// A caller's mistake: std::invalid_argument, a ValueError in Python.
#pragma once

#include <stdexcept>

#define PB_CHECK(condition, message)                        \
  do {                                                      \
    if (!(condition)) throw std::invalid_argument(message); \
  } while (0)
