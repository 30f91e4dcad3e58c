// The whole layer in one call, differentiation and the meetings in shared memory included: what Python costs between
// the passes is more than the passes themselves take on a small batch.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "operators.h"

namespace syncbn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Where the ranks of a group meet in shared memory. `exchange` is 0 for a rank without peers.
struct Meeting {
  int64_t exchange;
  std::string forward, backward;
};

// Sums over the ranks, in place. What keeps them apart is told in Python: syncbn/operators.py defines
// `raise_exchange_failure`, whose exceptions pass through here and through autograd as they are.
void all_reduce_sum(const Tensor& payload, int64_t exchange, const std::string& label) {
  static const auto reduce =
      find<int64_t(int64_t, const Tensor&, std::string_view)>("syncbn_native::exchange_all_reduce_sum");
  const int64_t outcome = reduce.call(exchange, payload, label);
  if (outcome == 0) return;
  static const auto fail =
      find<void(int64_t, int64_t, std::string_view, int64_t)>("syncbn::raise_exchange_failure");
  fail.call(exchange, outcome, label, payload.numel());
  TORCH_CHECK(false, "the all-reduce of ", label, " failed (outcome ", outcome, ")");
}

// The same gradients in operations that autograd can differentiate; syncbn/operators.py defines it.
variable_list differentiable_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                      const OptionalTensor& y, const OptionalTensor& mask, const Tensor& statistics,
                                      int64_t activation, double slope, double eps, const Meeting& meeting) {
  static const auto op =
      find<variable_list(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, int64_t,
                         double, double, int64_t, std::string_view)>("syncbn::differentiable_backward");
  return op.call(dy, x, weight, bias, residual, y, mask, statistics, activation, slope, eps, meeting.exchange,
                 meeting.backward);
}

// Whether what lies in memory is what the tensor says, and nobody is to be told of the operations on it: no negated
// view, no tensor of zeros without memory, no subclass or transformation of torch.func. Kernels read memory as it is.
bool is_plain(const Tensor& t) {
  static const c10::DispatchKeySet usual({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                          c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return usual.has_all(t.key_set());
}
bool is_plain(const OptionalTensor& t) { return !t || is_plain(*t); }

constexpr int64_t kSilu = 3;  // of kernels.h

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }

class Layer : public torch::autograd::Function<Layer> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches,
                        const OptionalTensor& num_nonfinite, std::optional<double> momentum, double eps,
                        int64_t activation, double slope, const Meeting& meeting) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor payload = moments(x, std::nullopt);
    if (meeting.exchange) all_reduce_sum(payload, meeting.exchange, meeting.forward);
    const Tensor statistics = finalize(payload, eps, running_mean, running_var, num_batches, momentum, num_nonfinite);
    const Tensor y = normalize(x, statistics, weight, bias, residual, std::nullopt, activation, slope);
    const bool saves_residual = activation == kSilu, saves_output = activation != 0 && !saves_residual;
    ctx->save_for_backward({x, undefined(weight), undefined(bias), saves_residual ? undefined(residual) : Tensor(),
                            saves_output ? y : Tensor(), statistics});
    ctx->saved_data["options"] = std::make_tuple(activation, slope, eps, residual.has_value());
    ctx->saved_data["meeting"] = std::make_tuple(meeting.exchange, meeting.backward);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list outputs) {
    const Tensor dy = outputs[0]._is_zerotensor() ? at::zeros(outputs[0].sizes(), outputs[0].options())
                                                  : outputs[0].resolve_neg();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &statistics = saved[5];
    const OptionalTensor weight = optional(saved[1]), bias = optional(saved[2]), residual = optional(saved[3]),
                         y = optional(saved[4]);
    const auto [activation, slope, eps, has_residual] =
        ctx->saved_data["options"].to<std::tuple<int64_t, double, double, bool>>();
    Meeting meeting{};
    std::tie(meeting.exchange, meeting.backward) = ctx->saved_data["meeting"].to<std::tuple<int64_t, std::string>>();
    // Autograd counts the tensors among the arguments, leaving out those that were not given.
    size_t next = 1;
    const bool needs_input = ctx->needs_input_grad(0), needs_weight = weight && ctx->needs_input_grad(next++),
               needs_bias = bias && ctx->needs_input_grad(next++),
               needs_residual = has_residual && ctx->needs_input_grad(next);
    variable_list gradients;
    if (at::GradMode::is_enabled() || !is_plain(dy)) {  // the former with create_graph=True
      gradients = differentiable_backward(dy, x, weight, bias, residual, y, std::nullopt, statistics, activation,
                                          slope, eps, meeting);
    } else {
      auto [sums, grad, grad_weight, grad_bias] =
          gradient_sums(dy, x, statistics, weight, bias, y, residual, std::nullopt, activation, slope);
      // Always, even where this rank's input needs no gradient: another rank's may, and every rank has to come.
      if (meeting.exchange) all_reduce_sum(sums, meeting.exchange, meeting.backward);
      const Tensor g = grad.value_or(dy);
      gradients = {needs_input ? input_gradient(g, x, statistics, sums, weight, std::nullopt) : Tensor(),
                   undefined(grad_weight), undefined(grad_bias), g};
    }
    return {needs_input ? gradients[0] : Tensor(), needs_weight ? gradients[1] : Tensor(),
            needs_bias ? gradients[2] : Tensor(), needs_residual ? gradients[3] : Tensor(),
            Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

bool fits_channels(const Tensor& x, const OptionalTensor& t) {
  if (!t) return true;
  const at::ScalarType type = x.scalar_type();
  const bool half = type == at::kHalf || type == at::kBFloat16;
  return is_plain(*t) && t->dim() == 1 && t->size(0) == x.size(1) &&
         (t->scalar_type() == type || (half && t->scalar_type() == at::kFloat));
}

bool fits_counter(const OptionalTensor& t) {
  return !t || (is_plain(*t) && t->scalar_type() == at::kLong && t->numel() == 1);
}

// What syncbn/arguments.py checks, which then says what is wrong; and that no mode wants to see the operations.
bool fits(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
          const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  const at::ScalarType type = x.scalar_type();
  return !c10::impl::dispatch_mode_enabled() && is_plain(x) && is_plain(residual) && x.dim() >= 2 &&
         x.numel() > x.size(1) &&
         (type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16) &&
         (!residual || (residual->sizes() == x.sizes() && residual->scalar_type() == type)) &&
         fits_channels(x, weight) && fits_channels(x, bias) && fits_channels(x, running_mean) &&
         fits_channels(x, running_var);
}

OptionalTensor layer(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, const OptionalTensor& num_batches,
                     const OptionalTensor& num_nonfinite, std::optional<double> momentum, double eps,
                     int64_t activation, double slope, int64_t exchange, std::string_view forward,
                     std::string_view backward) {
  if (!fits(x, weight, bias, residual, running_mean, running_var) || !fits_counter(num_batches) ||
      !fits_counter(num_nonfinite)) {
    return std::nullopt;
  }
  const Meeting meeting{exchange, std::string(forward), std::string(backward)};
  return Layer::apply(x, weight, bias, residual, running_mean, running_var, num_batches, num_nonfinite, momentum, eps,
                      activation, slope, meeting);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncbn_native, m) {
  m.def(
      "layer(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches, Tensor(d!)? num_nonfinite, float? momentum, float eps, "
      "int activation, float negative_slope, int exchange, str forward, str backward) -> Tensor?");
}

TORCH_LIBRARY_IMPL(syncbn_native, CompositeImplicitAutograd, m) { m.impl("layer", layer); }

}  // namespace syncbn
