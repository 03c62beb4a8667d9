// Everything that Python sees of the compiled extension is registered in this file, and nowhere else.
//
// What an operation *means* (schema, reference, fake, gradient) is defined in Python, in oslo_fusion/ops. So operators
// are not defined here: their kernels register over the existing definition, one block per dispatch key,
//
//     TORCH_LIBRARY_IMPL(oslo_fusion, CPU, m) {
//       m.impl("rms_norm", &oslo_fusion::rms_norm_cpu);
//     }
//
// and never with TORCH_LIBRARY(oslo_fusion, m), which would claim the whole namespace and collide with Python's definitions.
//
// <torch/extension.h> is not included on purpose: it parses all of torch's C++ frontend, which multiplies the build time.

#include "no_repeat_ngram.h"
#include "rms_norm.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>

namespace oslo_fusion {
namespace {

// __clang__ is asked first: clang defines __GNUC__ too, and claims to be GCC 4.2.
std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_FULL_VER);
#else
  return "unknown";
#endif
}

// "20" for C++20. MSVC leaves __cplusplus at 199711L unless asked otherwise and keeps the truth in _MSVC_LANG.
std::string cpp_standard() {
#if defined(_MSVC_LANG)
  constexpr long standard = _MSVC_LANG;
#else
  constexpr long standard = __cplusplus;
#endif
  return std::to_string(standard / 100 % 100);
}

// The widest vector extension the compiler was allowed to use, not what this processor has.
std::string vector_extension() {
#if defined(__AVX512F__)
  return "AVX512";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "none";
#endif
}

// Without OpenMP at compile time at::parallel_for is a plain loop in our code, whatever torch itself was built with.
std::string openmp() {
#if defined(_OPENMP)
  return "yes";
#else
  return "no";
#endif
}

// Whether setup.py compiled the .cu files too.
std::string cuda() {
#if defined(OSLO_FUSION_WITH_CUDA)
  return "yes";
#else
  return "no";
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", compiler()},
      {"cpp_standard", cpp_standard()},
      {"torch", TORCH_VERSION},
      {"openmp", openmp()},
      {"vector_extension", vector_extension()},
      {"cuda", cuda()},
  };
}

}  // namespace
}  // namespace oslo_fusion

TORCH_LIBRARY_IMPL(oslo_fusion, CPU, m) {
  m.impl("no_repeat_ngram_", &oslo_fusion::no_repeat_ngram_cpu_);
  m.impl("no_repeat_ngram", &oslo_fusion::no_repeat_ngram_cpu);
  m.impl("rms_norm", &oslo_fusion::rms_norm_cpu);
  m.impl("add_rms_norm", &oslo_fusion::add_rms_norm_cpu);
  m.impl("rms_norm_backward", &oslo_fusion::rms_norm_backward_cpu);
}

#if defined(OSLO_FUSION_WITH_CUDA)
// Triton's kernels hold the CUDA key of the plain names, so these have names of their own.
TORCH_LIBRARY_IMPL(oslo_fusion, CUDA, m) {
  m.impl("no_repeat_ngram_cuda_", &oslo_fusion::no_repeat_ngram_cuda_);
  m.impl("no_repeat_ngram_cuda", &oslo_fusion::no_repeat_ngram_cuda);
  m.impl("rms_norm_cuda", &oslo_fusion::rms_norm_cuda);
  m.impl("add_rms_norm_cuda", &oslo_fusion::add_rms_norm_cuda);
  m.impl("rms_norm_backward_cuda", &oslo_fusion::rms_norm_backward_cuda);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of oslo_fusion. Load it through oslo_fusion.extension, which explains when it can't be loaded.";
  m.def("build_info", &oslo_fusion::build_info, "How this extension was compiled: a dict of str to str.");
}
