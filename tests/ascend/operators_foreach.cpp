// Operators over lists of tensors, and what the optimizers and the loss scaler call.

#include "operators.h"

using namespace standin;

template <class Outputs, class Function>
static void for_each(const Outputs& outputs, Function value_of) {
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i] = value_of(i);
}

#define FOREACH_UNARY(Name, function) \
  OPERATOR(Foreach##Name, InList x, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i]); }); }

FOREACH_UNARY(Abs, abs)
FOREACH_UNARY(Acos, acos)
FOREACH_UNARY(Asin, asin)
FOREACH_UNARY(Atan, atan)
FOREACH_UNARY(Cos, cos)
FOREACH_UNARY(Cosh, cosh)
FOREACH_UNARY(Erf, erf)
FOREACH_UNARY(Erfc, erfc)
FOREACH_UNARY(Exp, exp)
FOREACH_UNARY(Expm1, expm1)
FOREACH_UNARY(Log, log)
FOREACH_UNARY(Log10, log10)
FOREACH_UNARY(Log1p, log1p)
FOREACH_UNARY(Log2, log2)
FOREACH_UNARY(Neg, neg)
FOREACH_UNARY(Reciprocal, reciprocal)
FOREACH_UNARY(Sigmoid, sigmoid)
FOREACH_UNARY(Sign, sign)
FOREACH_UNARY(Sin, sin)
FOREACH_UNARY(Sinh, sinh)
FOREACH_UNARY(Sqrt, sqrt)
FOREACH_UNARY(Tan, tan)
FOREACH_UNARY(Tanh, tanh)

OPERATOR(ForeachCopy, InList source, OutList out) { for_each(out, [&](size_t i) { return source[i]; }); }
OPERATOR(ForeachZeroInplace, OutList self) { for (const Out& each : self) each.zero_(); }
OPERATOR(ForeachNorm, InList x, Scalar order, OutList out) { for_each(out, [&](size_t i) { return at::linalg_vector_norm(x[i], order); }); }

// With a list, with one scalar (the first form reads it from a tensor, V2 takes it from the host), with a scalar each.
#define FOREACH_BINARY(Name, function)                                                                                            \
  OPERATOR(Foreach##Name##List, InList x, InList y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y[i]); }); } \
  OPERATOR(Foreach##Name##Scalar, InList x, In y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y.item()); }); } \
  OPERATOR(Foreach##Name##ScalarV2, InList x, Scalar y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y); }); } \
  OPERATOR(Foreach##Name##ScalarList, InList x, Scalars y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y[i]); }); }

FOREACH_BINARY(Mul, mul)
FOREACH_BINARY(Div, div)
FOREACH_BINARY(Pow, pow)

#define FOREACH_SUM(Name, function)                                                                                               \
  OPERATOR(Foreach##Name##List, InList x, InList y, In alpha, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y[i], alpha.item()); }); } \
  OPERATOR(Foreach##Name##ListV2, InList x, InList y, Scalar alpha, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y[i], alpha); }); } \
  OPERATOR(Foreach##Name##Scalar, InList x, In y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y.item()); }); } \
  OPERATOR(Foreach##Name##ScalarV2, InList x, Scalar y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y); }); } \
  OPERATOR(Foreach##Name##ScalarList, InList x, Scalars y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y[i]); }); }

FOREACH_SUM(Add, add)
FOREACH_SUM(Sub, sub)

#define FOREACH_EXTREMUM(Name, function, with_scalar)                                                                             \
  OPERATOR(Foreach##Name##List, InList x, InList y, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], y[i]); }); } \
  OPERATOR(Foreach##Name##Scalar, InList x, In y, OutList out) { for_each(out, [&](size_t i) { return at::with_scalar(x[i], y.item()); }); } \
  OPERATOR(Foreach##Name##ScalarV2, InList x, Scalar y, OutList out) { for_each(out, [&](size_t i) { return at::with_scalar(x[i], y); }); } \
  OPERATOR(Foreach##Name##ScalarList, InList x, Scalars y, OutList out) { for_each(out, [&](size_t i) { return at::with_scalar(x[i], y[i]); }); }

FOREACH_EXTREMUM(Maximum, maximum, clamp_min)
FOREACH_EXTREMUM(Minimum, minimum, clamp_max)

#define FOREACH_TERNARY(Name, function)                                                                                           \
  OPERATOR(Foreach##Name##Scalar, InList x, InList a, InList b, In value, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], a[i], b[i], value.item()); }); } \
  OPERATOR(Foreach##Name##ScalarV2, InList x, InList a, InList b, Scalar value, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], a[i], b[i], value); }); } \
  OPERATOR(Foreach##Name##ScalarList, InList x, InList a, InList b, Scalars value, OutList out) { for_each(out, [&](size_t i) { return at::function(x[i], a[i], b[i], value[i]); }); }

FOREACH_TERNARY(Addcmul, addcmul)
FOREACH_TERNARY(Addcdiv, addcdiv)

OPERATOR(ForeachLerpScalar, InList x, InList end, Scalar weight, OutList out) { for_each(out, [&](size_t i) { return at::lerp(x[i], end[i], weight); }); }
OPERATOR(ForeachLerpList, InList x, InList end, InList weight, OutList out) { for_each(out, [&](size_t i) { return at::lerp(x[i], end[i], weight[i]); }); }
OPERATOR(ForeachPowScalarAndTensor, Scalar base, InList exponent, OutList out) { for_each(out, [&](size_t i) { return at::pow(base, exponent[i]); }); }

// ---- loss scaling --------------------------------------------------------------------------------------------------------

OPERATOR(ForeachNonFiniteCheckAndUnscale, InOutList grads, InOut found_inf, In inv_scale) {
  for (const InOut& grad : grads) {
    if (!at::isfinite(grad).all().item<bool>()) found_inf.fill_(1);
    grad.mul_(inv_scale.item());
  }
}

OPERATOR(AmpUpdateScale, In, In, In found_inf, double growth_factor, double backoff_factor, int64_t growth_interval, InOut scale,
         InOut growth_tracker) {
  at::Tensor scale_tensor = scale, tracker = growth_tracker;
  at::_amp_update_scale_(scale_tensor, tracker, found_inf, growth_factor, backoff_factor, growth_interval);
}

// ---- fused optimizers: one call updates parameters and state in place ------------------------------------------------------

// The gradients are written, divided by the scale, only if there is a scale; the log always counts them as read.
OPERATOR(FusedSgd, InOutList parameters, InList grads, InOutList momentum_buffers, In grad_scale, float weight_decay, float momentum,
         float lr, float dampening, bool nesterov, bool maximize, bool is_first_step) {
  at::_fused_sgd_(parameters.tensors(), grads.tensors(), momentum_buffers.tensors(), weight_decay, momentum, lr, dampening, nesterov,
                  maximize, is_first_step, grad_scale.optional(), std::nullopt);
}

// torch_npu hands over the number of steps already taken; ATen wants the number of the step being taken.
OPERATOR(ApplyAdamWV2, InOut parameter, InOut exp_avg, InOut exp_avg_sq, InOut max_exp_avg_sq, In grad, In step, float lr, float beta1,
         float beta2, float weight_decay, float eps, bool amsgrad, bool maximize) {
  std::vector<at::Tensor> maximum;
  if (max_exp_avg_sq.defined()) maximum.push_back(max_exp_avg_sq);
  at::_fused_adamw_({parameter}, {grad}, {exp_avg}, {exp_avg_sq}, maximum, {at::add(step, 1)}, lr, beta1, beta2, weight_decay, eps,
                    amsgrad, maximize);
}
