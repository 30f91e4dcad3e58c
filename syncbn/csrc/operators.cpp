// The operators of the native backend: what `Backend` in syncbn/kernels/backend.py promises, for CPU tensors.
//
// An operator finds the layout of its tensors, forms the coefficients per channel in float64, and hands the passes of
// passes.h to ATen's threads. How the work is cut depends on the number of threads alone, so results repeat.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels.h"
#include "operators.h"

#ifndef SYNCBN_TORCH_VERSION
#error "SYNCBN_TORCH_VERSION: the version of torch that this is compiled for; setup.py defines it"
#endif

// Read from the file before it is loaded; see syncbn/native.py.
extern "C" __attribute__((used, visibility("default"))) const char syncbn_native_built_for[] =
    "syncbn native for torch " SYNCBN_TORCH_VERSION ";";

namespace syncbn {
namespace {

constexpr int64_t kElementsPerJob = 32768;  // what ATen takes to be worth a thread

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
#if defined(__x86_64__)
    // torch's own choice, so that ATEN_CPU_CAPABILITY holds here as well.
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return &avx512_kernels;
    if (capability == "AVX2") return &avx2_kernels;
#endif
    return &baseline_kernels;
  }();
  return *chosen;
}

std::string instruction_set() {
#if defined(__x86_64__)
  if (&kernels() == &avx512_kernels) return "AVX-512";
  if (&kernels() == &avx2_kernels) return "AVX2";
#endif
  return "baseline";
}

const Passes& passes_for(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return kernels().passes[kFloat64];
    case at::kFloat:
      return kernels().passes[kFloat32];
    case at::kBFloat16:
      return kernels().passes[kBFloat16];
    case at::kHalf:
      return kernels().passes[kFloat16];
    default:
      TORCH_CHECK(false, "x: expected float64, float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

// Memory for a few values, on the stack; on the heap from there on.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : heap_(size > kLocal ? new T[size] : nullptr) {}
  T* data() { return heap_ ? heap_.get() : local_.data(); }

 private:
  static constexpr int64_t kLocal = 1024;
  alignas(64) std::array<T, kLocal> local_;
  std::unique_ptr<T[]> heap_;
};

template <class F>
void for_jobs(int64_t jobs, const F& f) {
  if (jobs == 1) {
    f(int64_t{0});
  } else {
    at::parallel_for(0, jobs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) f(job);
    });
  }
}

int64_t num_jobs(const Tensor& x) {
  if (x.numel() < 2 * kElementsPerJob || at::in_parallel_region()) return 1;
  return std::min<int64_t>(at::get_num_threads(), x.numel() / kElementsPerJob);
}

// The bounds of job `index` out of `jobs` over `size` items, in multiples of `unit`.
Range share(int64_t size, int64_t jobs, int64_t index, int64_t unit = 1) {
  const int64_t units = (size + unit - 1) / unit;
  return {std::min(units * index / jobs * unit, size), std::min(units * (index + 1) / jobs * unit, size)};
}

// The stride between neighbours of all spatial dimensions together; nothing where they are no single dimension.
std::optional<int64_t> spatial_stride(const Tensor& t) {
  int64_t stride = 0, next = -1;
  for (int64_t dim = t.dim() - 1; dim >= 2; --dim) {
    if (t.size(dim) == 1) continue;
    if (next < 0) {
      stride = t.stride(dim);
    } else if (t.stride(dim) != next) {
      return std::nullopt;
    }
    next = t.stride(dim) * t.size(dim);
  }
  return stride;
}

int64_t spatial_size(const Tensor& t) {
  int64_t size = 1;
  for (int64_t dim = 2; dim < t.dim(); ++dim) size *= t.size(dim);
  return size;
}

std::optional<Stream> as_stream(const Tensor& t, bool rows, int64_t spatial) {
  const std::optional<int64_t> stride = spatial_stride(t);
  if (!stride) return std::nullopt;
  if (rows ? t.size(1) > 1 && t.stride(1) != 1 : spatial > 1 && *stride != 1) return std::nullopt;
  return Stream{t.data_ptr(), t.stride(0), rows ? *stride : t.stride(1)};
}

// x and the tensors that go with it, in the layout that a pass takes.
//
// Planes and rows are taken as they are, slices of channels and of samples included. Any other x is copied into the
// layout that empty_like gives it (torch's memory formats are among them), or else made contiguous; what goes with it
// is copied into the layout of x where it has another.
class Layout {
 public:
  explicit Layout(const Tensor& x) : original_(x), x_(x), spatial_(spatial_size(x)) {
    TORCH_CHECK(x.device().is_cpu() && x.layout() == at::kStrided, "x: expected a dense tensor on the CPU");
    TORCH_CHECK(x.dim() >= 2, "x: expected shape (N, C, *), got ", x.sizes());
    if (choose(x_)) return;
    x_ = at::empty_like(x).copy_(x);
    if (choose(x_)) return;
    x_ = x.contiguous();
    TORCH_INTERNAL_ASSERT(choose(x_));
  }

  const Tensor& x() const { return x_; }

  // Has `stream` read t; t becomes its copy where it needs one.
  void input(const char* name, Tensor& t, Stream& stream) {
    TORCH_CHECK(t.sizes() == x_.sizes() && t.scalar_type() == x_.scalar_type() && t.device().is_cpu(), name,
                ": expected ", x_.scalar_type(), " of shape ", x_.sizes(), " on the CPU, as x, got ", t.scalar_type(),
                " of shape ", t.sizes(), " on ", t.device());
    if (!as_stream(t, rows_, spatial_)) t = dense().copy_(t);
    add(t, stream);
  }
  void input_x(Stream& stream) { add(x_, stream); }

  // Has `stream` write a new tensor; `result` turns that into one laid out as empty_like lays out the original x.
  Tensor output(Stream& stream) {
    Tensor t = at::empty_like(original_);
    output_needs_copy_ = !as_stream(t, rows_, spatial_);
    if (output_needs_copy_) t = dense();
    add(t, stream);
    return t;
  }
  Tensor result(const Tensor& output) const {
    return output_needs_copy_ ? at::empty_like(original_).copy_(output) : output;
  }

  // To be called once all streams are known: rows that follow each other in all of them become one long sample.
  Batch batch(const OptionalTensor& mask) {
    Batch batch{rows_, x_.size(0), x_.size(1), spatial_, nullptr};
    if (mask) {
      TORCH_CHECK(mask->scalar_type() == at::kBool && mask->is_contiguous() && mask->device().is_cpu() &&
                      mask->numel() == batch.n * batch.s,
                  "mask: expected contiguous bool of shape (N, 1, *) on the CPU for x of shape ", x_.sizes(), ", got ",
                  mask->scalar_type(), " of shape ", mask->sizes());
      batch.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    }
    if (!rows_) return batch;
    const auto follows = [&](Stream* t) { return spatial_ == 1 || batch.n == 1 || t->outer == spatial_ * t->inner; };
    if (std::all_of(streams_.begin(), streams_.begin() + num_streams_, follows)) {
      if (spatial_ == 1) {
        for (size_t i = 0; i < num_streams_; ++i) streams_[i]->inner = streams_[i]->outer;
      }
      batch.s *= batch.n;
      batch.n = 1;
    }
    return batch;
  }

 private:
  bool choose(const Tensor& x) {
    const bool planes = as_stream(x, false, spatial_).has_value(), rows = as_stream(x, true, spatial_).has_value();
    rows_ = rows && (!planes || spatial_ == 1);
    return planes || rows;
  }
  void add(const Tensor& t, Stream& stream) {
    stream = *as_stream(t, rows_, spatial_);
    streams_[num_streams_++] = &stream;
  }
  Tensor dense() const {
    c10::SmallVector<int64_t, 5> strides(x_.dim());
    int64_t next = rows_ ? x_.size(1) : 1;
    for (int64_t dim = x_.dim() - 1; dim >= 2; --dim) {
      strides[dim] = next;
      next *= x_.size(dim);
    }
    strides[1] = rows_ ? 1 : next;
    strides[0] = rows_ ? next : next * x_.size(1);
    return at::empty_strided(x_.sizes(), strides, x_.options());
  }

  Tensor original_;
  Tensor x_;
  int64_t spatial_;
  bool rows_ = false;
  bool output_needs_copy_ = false;
  std::array<Stream*, 4> streams_{};
  size_t num_streams_ = 0;
};

int64_t count_positions(const Batch& batch) {
  const int64_t positions = batch.n * batch.s;
  return batch.mask ? std::count_if(batch.mask, batch.mask + positions, [](uint8_t m) { return m != 0; }) : positions;
}

// Runs a reduction's jobs, pass(part, first, second, spare), and leaves their sums, added in the order of the jobs, in
// `sums`, (2, C).
template <class Pass>
void reduce(const Batch& batch, const Tensor& x, double* sums, const Pass& pass) {
  const int64_t channels = batch.c;
  std::fill_n(sums, 2 * channels, 0.0);
  if (x.numel() == 0) return;
  const int64_t jobs = num_jobs(x), size = batch.rows ? batch.n * batch.s : planes_tiling(batch).tiles;
  if (!batch.rows && (channels >= 4 * jobs || size < jobs)) {  // whole channels: nothing to add up
    const int64_t channel_jobs = std::min(jobs, channels);
    for_jobs(channel_jobs, [&](int64_t job) {
      const Range own = share(channels, channel_jobs, job);
      pass(Part{own.begin, own.end, 0, size}, sums, sums + channels, nullptr);
    });
    return;
  }
  Scratch<double> spare(jobs * channels), others((jobs - 1) * 2 * channels);
  std::fill_n(others.data(), (jobs - 1) * 2 * channels, 0.0);
  for_jobs(jobs, [&](int64_t job) {
    const Range own = share(size, jobs, job);
    double* target = job == 0 ? sums : others.data() + (job - 1) * 2 * channels;
    pass(Part{0, channels, own.begin, own.end}, target, target + channels, spare.data() + job * channels);
  });
  for (int64_t job = 1; job < jobs; ++job) {
    for (int64_t i = 0; i < 2 * channels; ++i) sums[i] += others.data()[(job - 1) * 2 * channels + i];
  }
}

// Runs an element-wise pass's jobs, pass(range).
template <class Pass>
void map(const Batch& batch, const Tensor& x, const Pass& pass) {
  if (x.numel() == 0) return;
  const int64_t jobs = num_jobs(x), size = batch.n * batch.s * (batch.rows ? 1 : batch.c);
  for_jobs(jobs, [&](int64_t job) { pass(share(size, jobs, job)); });
}

// Calls f with a null pointer to the elements' type.
template <class F>
void with_type(const char* name, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return f(static_cast<double*>(nullptr));
    case at::kFloat:
      return f(static_cast<float*>(nullptr));
    case at::kBFloat16:
      return f(static_cast<at::BFloat16*>(nullptr));
    case at::kHalf:
      return f(static_cast<at::Half*>(nullptr));
    default:
      TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

void check_channels(const char* name, const Tensor& t, int64_t channels) {
  TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.device().is_cpu(), name, ": expected shape (", channels,
              ",) on the CPU, got ", t.sizes(), " on ", t.device());
}

// Values per channel in float64; `missing` where there is no tensor.
class Channels {
 public:
  Channels(const char* name, const OptionalTensor& t, int64_t size, double missing) : values_(size) {
    if (!t) {
      std::fill_n(values_.data(), size, missing);
      return;
    }
    check_channels(name, *t, size);
    with_type(name, *t, [&](auto* type) {
      const auto* from = static_cast<decltype(type)>(t->data_ptr());
      const int64_t stride = t->stride(0);
      for (int64_t c = 0; c < size; ++c) values_.data()[c] = static_cast<double>(from[c * stride]);
    });
  }
  double operator[](int64_t c) { return values_.data()[c]; }

 private:
  Scratch<double> values_;
};

const double* statistics_of(const char* name, const Tensor& t, int64_t values) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.is_contiguous() && t.numel() == values && t.device().is_cpu(), name,
              ": expected ", values, " contiguous float64 values on the CPU, got ", t.scalar_type(), " of shape ",
              t.sizes());
  return t.const_data_ptr<double>();
}

Activation activation_of(int64_t code) {
  TORCH_CHECK(0 <= code && code < kNumActivations, "activation: expected 0 to 3, got ", code);
  return static_cast<Activation>(code);
}

// `affine` of syncbn/moments.py: pivot, scale and shift, (C,) each, one after the other.
template <class A>
void form_affine(const double* statistics, int64_t channels, Channels& weight, Channels& bias, A* coefficients) {
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = statistics[c], scale = statistics[channels + c] * weight[c];
    const A pivot = static_cast<A>(mean);
    coefficients[c] = pivot;
    coefficients[channels + c] = static_cast<A>(scale);
    coefficients[2 * channels + c] = static_cast<A>((static_cast<double>(pivot) - mean) * scale + bias[c]);
  }
}

// Calls f with coefficients of the precision that x is computed in, memory for `size` of them.
template <class F>
void with_coefficients(const Tensor& x, int64_t size, const F& f) {
  if (x.scalar_type() == at::kDouble) {
    Scratch<double> coefficients(size);
    f(coefficients.data());
  } else {
    Scratch<float> coefficients(size);
    f(coefficients.data());
  }
}

}  // namespace

Tensor moments(const Tensor& x, const OptionalTensor& mask) {
  Layout layout(x);
  Stream stream;
  layout.input_x(stream);
  const Batch batch = layout.batch(mask);
  Tensor payload = at::empty({2 * batch.c + 1}, x.options().dtype(at::kDouble).memory_format(std::nullopt));
  double* sums = payload.mutable_data_ptr<double>();
  sums[2 * batch.c] = static_cast<double>(count_positions(batch));
  const Passes& passes = passes_for(x);
  reduce(batch, x, sums, [&](Part part, double* first, double* second, double* spare) {
    passes.moments(batch, stream, part, first, second, spare);
  });
  return payload;
}

namespace {

void fold_in(const char* name, Tensor& target, int64_t channels, double factor, const double* batch) {
  check_channels(name, target, channels);
  with_type(name, target, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* values = static_cast<T*>(target.data_ptr());
    const int64_t stride = target.stride(0);
    for (int64_t c = 0; c < channels; ++c) {
      const double old = static_cast<double>(values[c * stride]);
      values[c * stride] = static_cast<T>(old + factor * (batch[c] - old));
    }
  });
  target.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

// `finalize` and `update_running` of syncbn/moments.py.
Tensor finalize(const Tensor& payload, double eps, OptionalTensor running_mean, OptionalTensor running_var,
                OptionalTensor num_batches, std::optional<double> momentum, OptionalTensor num_nonfinite) {
  const int64_t channels = payload.numel() / 2;
  const double* sums = statistics_of("payload", payload, 2 * channels + 1);
  Tensor statistics = at::empty_like(payload);
  double* results = statistics.mutable_data_ptr<double>();
  Scratch<double> deviations(channels);
  kernels().finalize(sums, channels, eps, results, deviations.data());
  if (!running_mean || !running_var) return statistics;

  const double count = sums[2 * channels];
  bool counts = count > 1;
  const auto increment = [](const char* name, const Tensor& counter) {
    TORCH_CHECK(counter.scalar_type() == at::kLong && counter.numel() == 1 && counter.device().is_cpu(), name,
                ": expected one int64 on the CPU, got ", counter.scalar_type(), " of shape ", counter.sizes());
    counter.unsafeGetTensorImpl()->bump_version();
    return ++*counter.mutable_data_ptr<int64_t>();
  };
  if (num_nonfinite) {
    if (!std::all_of(sums, sums + 2 * channels + 1, [](double value) { return std::isfinite(value); })) {
      increment("num_nonfinite", *num_nonfinite);
      counts = false;
    }
  }
  if (!counts) return statistics;
  double factor = momentum.value_or(0);
  if (num_batches) {
    const int64_t batches = increment("num_batches", *num_batches);
    if (!momentum) factor = 1.0 / static_cast<double>(batches);
  } else {
    TORCH_CHECK(momentum, "num_batches: required without momentum");
  }
  fold_in("running_mean", *running_mean, channels, factor, results);
  for (int64_t c = 0; c < channels; ++c) deviations.data()[c] /= count - 1;
  fold_in("running_var", *running_var, channels, factor, deviations.data());
  return statistics;
}

Tensor normalize(const Tensor& x, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
                 OptionalTensor residual, const OptionalTensor& mask, int64_t activation, double negative_slope) {
  Layout layout(x);
  Normalize arguments{};
  arguments.activation = activation_of(activation);
  arguments.negative_slope = negative_slope;
  layout.input_x(arguments.x);
  if (residual) layout.input("residual", *residual, arguments.residual);
  Tensor y = layout.output(arguments.y);
  const Batch batch = layout.batch(mask);
  Channels gamma("weight", weight, batch.c, 1), beta("bias", bias, batch.c, 0);
  with_coefficients(x, 3 * batch.c, [&](auto* coefficients) {
    form_affine(statistics_of("statistics", statistics, 2 * batch.c + 1), batch.c, gamma, beta, coefficients);
    arguments.pivot = coefficients;
    arguments.scale = coefficients + batch.c;
    arguments.shift = coefficients + 2 * batch.c;
    const Passes& passes = passes_for(x);
    map(batch, x, [&](Range range) { passes.normalize(batch, arguments, range); });
  });
  return layout.result(y);
}

namespace {

// The gradient of a parameter, in its dtype: from(c) for each channel.
template <class F>
OptionalTensor parameter_gradient(const char* name, const OptionalTensor& parameter, int64_t channels, const F& from) {
  if (!parameter) return std::nullopt;
  Tensor gradient = at::empty({channels}, parameter->options());
  with_type(name, gradient, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* values = static_cast<T*>(gradient.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(from(c));
  });
  return gradient;
}

}  // namespace

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> gradient_sums(
    Tensor dy, const Tensor& x, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
    OptionalTensor y, OptionalTensor residual, const OptionalTensor& mask, int64_t activation, double negative_slope) {
  Layout layout(x);
  GradientSums arguments{};
  arguments.activation = activation_of(activation);
  arguments.negative_slope = negative_slope;
  const Tensor given = dy;
  layout.input("dy", dy, arguments.dy);
  layout.input_x(arguments.x);
  if (arguments.activation == kRelu || arguments.activation == kLeakyRelu) {
    TORCH_CHECK(y, "y: required for relu and leaky_relu");
    layout.input("y", *y, arguments.saved);
  } else if (arguments.activation == kSilu && residual) {
    layout.input("residual", *residual, arguments.saved);
  }
  OptionalTensor grad;
  const bool writes = arguments.activation != kIdentity || mask;
  if (writes) {
    grad = layout.output(arguments.grad);
  } else if (!dy.is_same(given)) {
    grad = dy;  // its copy: the second pass need not make another
  }
  const Batch batch = layout.batch(mask);
  const int64_t channels = batch.c;
  const double* mean = statistics_of("statistics", statistics, 2 * channels + 1);
  Tensor result = at::empty({2, channels}, x.options().dtype(at::kDouble).memory_format(std::nullopt));
  double* sums = result.mutable_data_ptr<double>();
  Channels gamma("weight", weight, channels, 1), beta("bias", bias, channels, 0);
  with_coefficients(x, 3 * channels, [&](auto* coefficients) {
    form_affine(mean, channels, gamma, beta, coefficients);
    arguments.pivot = coefficients;
    arguments.scale = coefficients + channels;
    arguments.shift = coefficients + 2 * channels;
    const Passes& passes = passes_for(x);
    reduce(batch, x, sums, [&](Part part, double* first, double* second, double*) {
      passes.gradient_sums(batch, arguments, part, first, second);
    });
    // From about the pivot to about the mean.
    for (int64_t c = 0; c < channels; ++c) sums[channels + c] -= (mean[c] - coefficients[c]) * sums[c];
  });
  const double* invstd = mean + channels;
  return {result, writes ? OptionalTensor(layout.result(*grad)) : grad,
          parameter_gradient("weight", weight, channels, [&](int64_t c) { return sums[channels + c] * invstd[c]; }),
          parameter_gradient("bias", bias, channels, [&](int64_t c) { return sums[c]; })};
}

namespace {

// `input_gradient` of syncbn/moments.py: pivot, scale and shift, then grad_scale, (C,) each.
template <class A>
void form_input_gradient(const double* statistics, const double* sums, int64_t channels, Channels& weight,
                         A* coefficients) {
  const double n = std::max(statistics[2 * channels], 1.0);
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = statistics[c], invstd = statistics[channels + c];
    const double grad_scale = invstd * weight[c];
    const double scale = grad_scale * invstd * invstd * sums[channels + c] / -n;
    const A pivot = static_cast<A>(mean);
    coefficients[c] = pivot;
    coefficients[channels + c] = static_cast<A>(scale);
    coefficients[2 * channels + c] =
        static_cast<A>(grad_scale * sums[c] / -n + (static_cast<double>(pivot) - mean) * scale);
    coefficients[3 * channels + c] = static_cast<A>(grad_scale);
  }
}

}  // namespace

Tensor input_gradient(Tensor grad, const Tensor& x, const Tensor& statistics, const Tensor& sums,
                      const OptionalTensor& weight, const OptionalTensor& mask) {
  Layout layout(x);
  InputGradient arguments{};
  layout.input("grad", grad, arguments.grad);
  layout.input_x(arguments.x);
  Tensor dx = layout.output(arguments.dx);
  const Batch batch = layout.batch(mask);
  Channels gamma("weight", weight, batch.c, 1);
  with_coefficients(x, 4 * batch.c, [&](auto* coefficients) {
    form_input_gradient(statistics_of("statistics", statistics, 2 * batch.c + 1),
                        statistics_of("sums", sums, 2 * batch.c), batch.c, gamma, coefficients);
    arguments.pivot = coefficients;
    arguments.scale = coefficients + batch.c;
    arguments.shift = coefficients + 2 * batch.c;
    arguments.grad_scale = coefficients + 3 * batch.c;
    const Passes& passes = passes_for(x);
    map(batch, x, [&](Range range) { passes.input_gradient(batch, arguments, range); });
  });
  return layout.result(dx);
}

TORCH_LIBRARY(syncbn_native, m) {
  m.def("instruction_set() -> str", [] { return instruction_set(); });
  m.def("moments(Tensor x, Tensor? mask) -> Tensor");
  m.def(
      "finalize(Tensor payload, float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches, float? momentum, Tensor(d!)? num_nonfinite) -> Tensor");
  m.def(
      "normalize(Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
      "int activation, float negative_slope) -> Tensor");
  m.def(
      "gradient_sums(Tensor dy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? y, "
      "Tensor? residual, Tensor? mask, int activation, float negative_slope) -> (Tensor, Tensor?, Tensor?, Tensor?)");
  m.def(
      "input_gradient(Tensor grad, Tensor x, Tensor statistics, Tensor sums, Tensor? weight, Tensor? mask) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(syncbn_native, CPU, m) {
  m.impl("moments", moments);
  m.impl("finalize", finalize);
  m.impl("normalize", normalize);
  m.impl("gradient_sums", gradient_sums);
  m.impl("input_gradient", input_gradient);
}

// The layer differentiates; below it autograd has nothing to look at.
TORCH_LIBRARY_IMPL(syncbn_native, Autograd, m) {
  for (const char* name : {"moments", "finalize", "normalize", "gradient_sums", "input_gradient"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace syncbn
