// The operators of the native backend, for callers in C++; syncbn/kernels/backend.py says what they promise.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace syncbn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor moments(const Tensor& x, const OptionalTensor& mask);

Tensor finalize(const Tensor& payload, double eps, OptionalTensor running_mean, OptionalTensor running_var,
                OptionalTensor num_batches, std::optional<double> momentum, OptionalTensor num_nonfinite);

Tensor normalize(const Tensor& x, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
                 OptionalTensor residual, const OptionalTensor& mask, int64_t activation, double negative_slope);

// sums, g, dγ, dβ; no g where it is dy as it was given.
std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> gradient_sums(
    Tensor dy, const Tensor& x, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
    OptionalTensor y, OptionalTensor residual, const OptionalTensor& mask, int64_t activation, double negative_slope);

Tensor input_gradient(Tensor grad, const Tensor& x, const Tensor& statistics, const Tensor& sums,
                      const OptionalTensor& weight, const OptionalTensor& mask);

}  // namespace syncbn
