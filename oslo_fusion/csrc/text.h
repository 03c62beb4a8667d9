// Numbers and shapes in error messages.
//
// TORCH_CHECK writes its arguments to a stream inside this library. Where the compiler's libstdc++ is another than the one that
// torch brought into the process, a stream made here writes text, and crashes at the first number. So numbers become text first.

#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <cstdio>
#include <string>

namespace oslo_fusion {

inline std::string text(int64_t number) { return std::to_string(number); }

inline std::string text(double number) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", number);
  return digits;
}

// "[4, 8]"
inline std::string text(c10::IntArrayRef sizes) {
  std::string result = "[";
  for (size_t dim = 0; dim < sizes.size(); ++dim) result += (dim ? ", " : "") + text(sizes[dim]);
  return result + "]";
}

}  // namespace oslo_fusion
