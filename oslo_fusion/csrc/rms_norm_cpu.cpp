// rms_norm on the CPU: parallel over rows. A row is read from memory once; whatever is done to it again finds it in the cache.
//
// The loops are plain and left to the compiler, which is told that sums may be taken in any order. A wheel must run on any
// machine, so they are compiled for three instruction sets of x86 (elsewhere for the compiler's own), and the processor chooses.

#include "rms_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#if defined(__GNUC__)  // clang too
#define OSLO_FUSION_ALWAYS_INLINE __attribute__((always_inline))
#define OSLO_FUSION_RESTRICT __restrict__
#else
#define OSLO_FUSION_ALWAYS_INLINE
#define OSLO_FUSION_RESTRICT
#endif
#define OSLO_FUSION_INLINE inline OSLO_FUSION_ALWAYS_INLINE

#if defined(__GNUC__) && defined(__x86_64__)
#define OSLO_FUSION_TARGETS
#define OSLO_FUSION_AVX2 __attribute__((target("avx2,fma,f16c")))
#define OSLO_FUSION_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")))
#endif

namespace oslo_fusion {
namespace {

constexpr int64_t kNumbersPerTask = 32768;
constexpr int64_t kRowsPerBlock = 64;  // of a weight's gradient that are added up in the narrow type before they go to doubles

template <typename T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// c10's conversions branch, or call an instruction of one number: neither can be vectorised.
OSLO_FUSION_INLINE double widen(double value) { return value; }
OSLO_FUSION_INLINE float widen(float value) { return value; }
OSLO_FUSION_INLINE float widen(at::BFloat16 value) { return c10::bit_cast<float>(static_cast<uint32_t>(value.x) << 16); }
OSLO_FUSION_INLINE float widen(at::Half value) {
  const uint32_t shifted = static_cast<uint32_t>(value.x) << 16, sign = shifted & 0x80000000u, twice = shifted + shifted;
  const float normal = c10::bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = c10::bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = twice < (1u << 27) ? c10::bit_cast<uint32_t>(subnormal) : c10::bit_cast<uint32_t>(normal);
  return c10::bit_cast<float>(sign | magnitude);
}

template <typename T>
OSLO_FUSION_INLINE T narrow(float value) {
  const auto bits = c10::bit_cast<uint32_t>(value);
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return at::BFloat16(static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded), at::BFloat16::from_bits());
  } else if constexpr (std::is_same_v<T, at::Half>) {
    // The addition rounds: its first number has the exponent at which half precision ends.
    const float base = std::abs(value) * 0x1.0p+112f * 0x1.0p-110f;
    const uint32_t twice = bits + bits, bias = std::max(twice & 0xFF000000u, 0x71000000u);
    const auto sum = c10::bit_cast<uint32_t>(c10::bit_cast<float>((bias >> 1) + 0x07800000u) + base);
    const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
    const uint32_t result = ((bits & 0x80000000u) >> 16) | (twice > 0xFF000000u ? 0x7E00u : magnitude);
    return at::Half(static_cast<uint16_t>(result), at::Half::from_bits());
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
OSLO_FUSION_INLINE T narrow(double value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return narrow<T>(static_cast<float>(value));
  }
}

// The sum of f(i). Four sums, so that the next addition does not wait for the last, of as many lanes as the machine has.
template <typename A, typename F>
OSLO_FUSION_INLINE A sum_of(int64_t dim, F&& f) {
  const int64_t quarter = dim / 4;
  A a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += f(i);
    b += f(i + quarter);
    c += f(i + 2 * quarter);
    d += f(i + 3 * quarter);
  }
  for (int64_t i = 4 * quarter; i < dim; ++i) a += f(i);
  return (a + b) + (c + d);
}

// --- forward ---------------------------------------------------------------------------------------------------------

// What a task needs, rows apart. `scale` is in the wide type and complete: ones without a weight.
struct Forward {
  const void* x;
  int64_t x_stride;
  const void* residual;  // nullptr: s is x
  int64_t residual_stride;
  const void* scale;
  void* s;
  void* y;
  void* rstd;
  int64_t dim;
  double eps;
};

template <typename S, typename O>
OSLO_FUSION_INLINE void forward_rows(const Forward& work, int64_t begin, int64_t end) {
  using A = wide_t<S>;
  const int64_t dim = work.dim;
  const auto* OSLO_FUSION_RESTRICT scale = static_cast<const A*>(work.scale);
  for (int64_t r = begin; r < end; ++r) {
    const S* OSLO_FUSION_RESTRICT row = static_cast<const S*>(work.x) + r * work.x_stride;
    if (work.residual != nullptr) {
      const S* OSLO_FUSION_RESTRICT residual = static_cast<const S*>(work.residual) + r * work.residual_stride;
      S* OSLO_FUSION_RESTRICT s = static_cast<S*>(work.s) + r * dim;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) s[i] = narrow<S>(widen(row[i]) + widen(residual[i]));
      row = s;
    }
    const A squares = sum_of<A>(dim, [row](int64_t i) OSLO_FUSION_ALWAYS_INLINE {
      const A value = widen(row[i]);
      return value * value;
    });
    const A rstd = A(1) / std::sqrt(squares / static_cast<A>(dim) + static_cast<A>(work.eps));
    static_cast<A*>(work.rstd)[r] = rstd;
    O* OSLO_FUSION_RESTRICT y = static_cast<O*>(work.y) + r * dim;
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) y[i] = narrow<O>(widen(row[i]) * rstd * scale[i]);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

struct Backward {
  const void* dy;
  int64_t dy_stride;
  const void* ds;  // nullptr: nothing reached s by another way
  int64_t ds_stride;
  const void* s;
  int64_t s_stride;
  const void* scale;
  const void* rstd;
  void* dx;
  double* dweight;  // a row of sums per task; nullptr: not wanted
  int64_t dim;
};

template <bool HAS_DS, bool WEIGHT_GRADIENT, typename S, typename D, typename A>
OSLO_FUSION_INLINE void backward_row(const D* OSLO_FUSION_RESTRICT dy, const S* OSLO_FUSION_RESTRICT ds,
                                     const S* OSLO_FUSION_RESTRICT s, const A* OSLO_FUSION_RESTRICT scale, A rstd,
                                     S* OSLO_FUSION_RESTRICT dx, A* OSLO_FUSION_RESTRICT dweight, int64_t dim) {
  const A sum = sum_of<A>(dim, [=](int64_t i) OSLO_FUSION_ALWAYS_INLINE {
    return static_cast<A>(widen(dy[i])) * scale[i] * (widen(s[i]) * rstd);
  });
  const A mean = sum / static_cast<A>(dim);
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) {
    const A g = static_cast<A>(widen(dy[i])), normed = widen(s[i]) * rstd;
    A result = (g * scale[i] - normed * mean) * rstd;
    if constexpr (HAS_DS) result += widen(ds[i]);
    if constexpr (WEIGHT_GRADIENT) dweight[i] += g * normed;
    dx[i] = narrow<S>(result);
  }
}

template <typename S, typename D>
OSLO_FUSION_INLINE void backward_rows(const Backward& work, int64_t begin, int64_t end, double* OSLO_FUSION_RESTRICT total) {
  using A = wide_t<S>;
  const int64_t dim = work.dim;
  const auto* scale = static_cast<const A*>(work.scale);
  // A sum of all rows in float32 would lose what PyTorch's pairwise one keeps.
  const auto block = std::make_unique<A[]>(total == nullptr ? 0 : dim);
  const auto flush = [&, sums = block.get()]() OSLO_FUSION_ALWAYS_INLINE {
    for (int64_t i = 0; i < dim; ++i) {
      total[i] += sums[i];
      sums[i] = 0;
    }
  };
  for (int64_t r = begin; r < end; ++r) {
    const D* dy = static_cast<const D*>(work.dy) + r * work.dy_stride;
    const S* ds = static_cast<const S*>(work.ds) + (work.ds == nullptr ? 0 : r * work.ds_stride);
    const S* s = static_cast<const S*>(work.s) + r * work.s_stride;
    S* dx = static_cast<S*>(work.dx) + r * dim;
    const A rstd = static_cast<const A*>(work.rstd)[r];
    if (total == nullptr) {
      if (work.ds == nullptr) {
        backward_row<false, false>(dy, ds, s, scale, rstd, dx, block.get(), dim);
      } else {
        backward_row<true, false>(dy, ds, s, scale, rstd, dx, block.get(), dim);
      }
      continue;
    }
    if (work.ds == nullptr) {
      backward_row<false, true>(dy, ds, s, scale, rstd, dx, block.get(), dim);
    } else {
      backward_row<true, true>(dy, ds, s, scale, rstd, dx, block.get(), dim);
    }
    if ((r - begin + 1) % kRowsPerBlock == 0) flush();
  }
  if (total != nullptr) flush();
}

// --- one function per instruction set --------------------------------------------------------------------------------

template <typename S, typename O>
void forward_plain(const Forward& work, int64_t begin, int64_t end) {
  forward_rows<S, O>(work, begin, end);
}
template <typename S, typename D>
void backward_plain(const Backward& work, int64_t begin, int64_t end, double* total) {
  backward_rows<S, D>(work, begin, end, total);
}

#if defined(OSLO_FUSION_TARGETS)
template <typename S, typename O>
OSLO_FUSION_AVX2 void forward_avx2(const Forward& work, int64_t begin, int64_t end) {
  forward_rows<S, O>(work, begin, end);
}
template <typename S, typename O>
OSLO_FUSION_AVX512 void forward_avx512(const Forward& work, int64_t begin, int64_t end) {
  forward_rows<S, O>(work, begin, end);
}
template <typename S, typename D>
OSLO_FUSION_AVX2 void backward_avx2(const Backward& work, int64_t begin, int64_t end, double* total) {
  backward_rows<S, D>(work, begin, end, total);
}
template <typename S, typename D>
OSLO_FUSION_AVX512 void backward_avx512(const Backward& work, int64_t begin, int64_t end, double* total) {
  backward_rows<S, D>(work, begin, end, total);
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
bool has_avx512() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}
#endif

template <typename S, typename O>
auto choose_forward() {
#if defined(OSLO_FUSION_TARGETS)
  if (has_avx512()) return &forward_avx512<S, O>;
  if (has_avx2()) return &forward_avx2<S, O>;
#endif
  return &forward_plain<S, O>;
}

template <typename S, typename D>
auto choose_backward() {
#if defined(OSLO_FUSION_TARGETS)
  if (has_avx512()) return &backward_avx512<S, D>;
  if (has_avx2()) return &backward_avx2<S, D>;
#endif
  return &backward_plain<S, D>;
}

// --- launchers -------------------------------------------------------------------------------------------------------

// Calls f with a null pointer to each of the two types.
template <typename F>
void dispatch(at::ScalarType first, at::ScalarType second, F&& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, first, "rms_norm", [&] {
    using first_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, second, "rms_norm",
                                    [&] { f(static_cast<first_t*>(nullptr), static_cast<scalar_t*>(nullptr)); });
  });
}

// The weight with its offset, in what the norm is computed in.
struct Scale {
  at::Tensor kept;
  std::unique_ptr<char[]> made;
  const void* data = nullptr;

  Scale(const std::optional<at::Tensor>& weight, double offset, at::ScalarType wide, int64_t dim) {
    if (weight && offset == 0.0 && weight->scalar_type() == wide) {
      kept = weight->resolve_neg().contiguous();
      data = kept.const_data_ptr();
      return;
    }
    made.reset(new char[dim * c10::elementSize(wide)]);
    data = made.get();
    if (wide == at::kDouble) {
      fill<double>(weight, offset, dim);
    } else {
      fill<float>(weight, offset, dim);
    }
  }

 private:
  template <typename A>
  void fill(const std::optional<at::Tensor>& weight, double offset, int64_t dim) {
    auto* to = reinterpret_cast<A*>(made.get());
    if (!weight) {
      std::fill(to, to + dim, A(1));
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight->scalar_type(), "rms_norm", [&] {
      const at::Tensor given = weight->resolve_neg();
      const auto* from = given.const_data_ptr<scalar_t>();
      const int64_t stride = given.stride(0);
      const A added = static_cast<A>(offset);
      for (int64_t i = 0; i < dim; ++i) to[i] = static_cast<A>(widen(from[i * stride])) + added;
    });
  }
};

Three forward(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& residual, double eps,
              double weight_offset, std::optional<at::ScalarType> out_dtype) {
  check_rms_norm(x, weight, residual, eps, out_dtype);
  const auto [s_dtype, y_dtype] = rms_norm_dtypes(x, weight, residual, out_dtype);
  const auto wide = wide_dtype(s_dtype);
  const int64_t dim = x.size(-1), rows = x.numel() / dim;
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(y_dtype));
  at::Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(wide));
  at::Tensor s = residual ? at::empty(x.sizes(), x.options().dtype(s_dtype)) : x;
  if (rows == 0) return {y, s, rstd};
  const Rows x_rows = as_rows(x.to(s_dtype));  // exact: s has the wider type of the two
  const Rows residual_rows = residual ? as_rows(residual->to(s_dtype)) : Rows{};
  const Scale scale(weight, weight_offset, wide, dim);
  Forward work{};
  work.x = x_rows.tensor.const_data_ptr();
  work.x_stride = x_rows.stride;
  if (residual) {
    work.residual = residual_rows.tensor.const_data_ptr();
    work.residual_stride = residual_rows.stride;
    work.s = s.mutable_data_ptr();
  }
  work.scale = scale.data;
  work.y = y.mutable_data_ptr();
  work.rstd = rstd.mutable_data_ptr();
  work.dim = dim;
  work.eps = eps;
  dispatch(s_dtype, y_dtype, [&](auto* s_type, auto* y_type) {
    const auto run = choose_forward<std::remove_pointer_t<decltype(s_type)>, std::remove_pointer_t<decltype(y_type)>>();
    const int64_t grain = std::max<int64_t>(kNumbersPerTask / dim, 1);
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { run(work, begin, end); });
  });
  return {y, s, rstd};
}

}  // namespace

Two rms_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, double weight_offset,
                 std::optional<at::ScalarType> out_dtype) {
  auto [y, s, rstd] = forward(x, weight, std::nullopt, eps, weight_offset, out_dtype);
  return {y, rstd};
}

Three add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight, double eps,
                       double weight_offset, std::optional<at::ScalarType> out_dtype) {
  return forward(x, weight, residual, eps, weight_offset, out_dtype);
}

Two rms_norm_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& ds, const at::Tensor& s,
                          const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double weight_offset,
                          bool weight_gradient) {
  check_rms_norm_backward(dy, ds, s, weight, rstd);
  const auto wide = wide_dtype(s.scalar_type());
  if (ds && ds->scalar_type() != s.scalar_type()) {  // autograd gives a gradient of the same dtype; others are rare
    auto [dx, dweight] = rms_norm_backward_cpu(dy, ds->to(wide), s.to(wide), weight, rstd, weight_offset, weight_gradient);
    return {dx.to(s.scalar_type()), dweight.numel() == 0 ? dweight.to(s.scalar_type()) : dweight};
  }
  weight_gradient = weight_gradient && weight;
  const int64_t dim = s.size(-1), rows = s.numel() / dim;
  at::Tensor dx = at::empty(s.sizes(), s.options());
  if (rows == 0) return {dx, weight_gradient ? at::zeros({dim}, weight->options()) : at::empty({0}, s.options())};
  const Rows dy_rows = as_rows(dy), s_rows = as_rows(s), ds_rows = ds ? as_rows(*ds) : Rows{};
  const Scale scale(weight, weight_offset, wide, dim);
  const at::Tensor kept_rstd = rstd.contiguous();
  // A task per thread, each with a row of sums, added up in their order: the same for the same number of threads.
  const int64_t grain = std::max<int64_t>(kNumbersPerTask / dim, 1);
  const int64_t tasks = std::max<int64_t>(std::min<int64_t>(at::get_num_threads(), rows / grain), 1);
  at::Tensor partials = weight_gradient ? at::zeros({tasks, dim}, s.options().dtype(at::kDouble)) : at::Tensor();
  Backward work{};
  work.dy = dy_rows.tensor.const_data_ptr();
  work.dy_stride = dy_rows.stride;
  if (ds) {
    work.ds = ds_rows.tensor.const_data_ptr();
    work.ds_stride = ds_rows.stride;
  }
  work.s = s_rows.tensor.const_data_ptr();
  work.s_stride = s_rows.stride;
  work.scale = scale.data;
  work.rstd = kept_rstd.const_data_ptr();
  work.dx = dx.mutable_data_ptr();
  work.dweight = weight_gradient ? partials.mutable_data_ptr<double>() : nullptr;
  work.dim = dim;
  dispatch(s.scalar_type(), dy.scalar_type(), [&](auto* s_type, auto* dy_type) {
    const auto run = choose_backward<std::remove_pointer_t<decltype(s_type)>, std::remove_pointer_t<decltype(dy_type)>>();
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        double* total = work.dweight == nullptr ? nullptr : work.dweight + t * dim;
        run(work, t * rows / tasks, (t + 1) * rows / tasks, total);
      }
    });
  });
  if (!weight_gradient) return {dx, at::empty({0}, s.options())};
  at::Tensor dweight = at::empty({dim}, weight->options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight->scalar_type(), "rms_norm", [&] {
    auto* to = dweight.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < dim; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < tasks; ++t) sum += work.dweight[t * dim + i];
      to[i] = narrow<scalar_t>(sum);
    }
  });
  return {dx, dweight};
}

}  // namespace oslo_fusion
