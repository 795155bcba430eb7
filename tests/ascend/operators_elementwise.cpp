// Operators that work element by element: arithmetic, comparisons, activations and their gradients, fills, casts.

#include "operators.h"

using namespace standin;

// An operator and its in-place twin.
#define UNARY(Name, function)                                    \
  OPERATOR(Name, In self, Out out) { out = at::function(self); } \
  OPERATOR(Inplace##Name, InOut self) { self = at::function(self); }

UNARY(Abs, abs)
UNARY(Acos, acos)
UNARY(Acosh, acosh)
UNARY(Asin, asin)
UNARY(Asinh, asinh)
UNARY(Atan, atan)
UNARY(Atanh, atanh)
UNARY(Ceil, ceil)
UNARY(Cos, cos)
UNARY(Cosh, cosh)
UNARY(Erf, erf)
UNARY(Erfc, erfc)
UNARY(Erfinv, erfinv)
UNARY(Exp, exp)
UNARY(Exp2, exp2)
UNARY(Expm1, expm1)
UNARY(Floor, floor)
UNARY(Frac, frac)
UNARY(Hardsigmoid, hardsigmoid)
UNARY(Hardswish, hardswish)
UNARY(Log, log)
UNARY(Log10, log10)
UNARY(Log1p, log1p)
UNARY(Log2, log2)
UNARY(LogicalNot, logical_not)
UNARY(Mish, mish)
UNARY(Neg, neg)
UNARY(Reciprocal, reciprocal)
UNARY(Relu, relu)
UNARY(Round, round)
UNARY(Rsqrt, rsqrt)
UNARY(Sigmoid, sigmoid)
UNARY(Sign, sign)
UNARY(Silu, silu)
UNARY(Sin, sin)
UNARY(Sinc, sinc)
UNARY(Sinh, sinh)
UNARY(Sqrt, sqrt)
UNARY(Tan, tan)
UNARY(Tanh, tanh)
UNARY(Trunc, trunc)

OPERATOR(BitwiseNot, In self, Out out) { out = at::bitwise_not(self); }
OPERATOR(IsFinite, In self, Out out) { out = at::isfinite(self); }
OPERATOR(IsNegInf, In self, Out out) { out = at::isneginf(self); }
OPERATOR(IsPosInf, In self, Out out) { out = at::isposinf(self); }
OPERATOR(Signbit, In self, Out out) { out = at::signbit(self); }
OPERATOR(RoundDecimals, In self, int64_t decimals, Out out) { out = at::round(self, decimals); }
OPERATOR(InplaceRoundDecimals, InOut self, int64_t decimals) { self = at::round(self, decimals); }

OPERATOR(NanToNum, In self, float nan, float posinf, float neginf, Out out) { out = at::nan_to_num(self, nan, posinf, neginf); }
OPERATOR(InplaceNanToNum, InOut self, float nan, float posinf, float neginf) { self = at::nan_to_num(self, nan, posinf, neginf); }

// ---- arithmetic ----------------------------------------------------------------------------------------------------

OPERATOR(Add, In self, In other, Scalar alpha, Out out) { out = at::add(self, other, alpha); }
OPERATOR(Adds, In self, Scalar other, Scalar alpha, Out out) { out = at::add(self, other, alpha); }
OPERATOR(AddV3, Scalar self, In other, Scalar alpha, Out out) { out = at::add(at::mul(other, alpha), self); }
OPERATOR(InplaceAdd, InOut self, In other, Scalar alpha) { self = at::add(self, other, alpha); }
OPERATOR(InplaceAdds, InOut self, Scalar other, Scalar alpha) { self = at::add(self, other, alpha); }
OPERATOR(AddRelu, In self, In other, Scalar alpha, Out out) { out = at::relu(at::add(self, other, alpha)); }
OPERATOR(InplaceAddRelu, InOut self, In other, Scalar alpha) { self = at::relu(at::add(self, other, alpha)); }

OPERATOR(Sub, In self, In other, Scalar alpha, Out out) { out = at::sub(self, other, alpha); }
OPERATOR(Subs, In self, Scalar other, Scalar alpha, Out out) { out = at::sub(self, other, alpha); }
OPERATOR(InplaceSub, InOut self, In other, Scalar alpha) { self = at::sub(self, other, alpha); }
OPERATOR(InplaceSubs, InOut self, Scalar other, Scalar alpha) { self = at::sub(self, other, alpha); }
OPERATOR(Rsub, In self, In other, Scalar alpha, Out out) { out = at::rsub(self, other, alpha); }
OPERATOR(Rsubs, In self, Scalar other, Scalar alpha, Out out) { out = at::rsub(self, other, alpha); }

OPERATOR(Mul, In self, In other, Out out) { out = at::mul(self, other); }
OPERATOR(Muls, In self, Scalar other, Out out) { out = at::mul(self, other); }
OPERATOR(InplaceMul, InOut self, In other) { self = at::mul(self, other); }
OPERATOR(InplaceMuls, InOut self, Scalar other) { self = at::mul(self, other); }

// Rounding modes of a division as torch_npu numbers them.
static std::optional<c10::string_view> rounding(int64_t mode) {
  if (mode == 1) return "trunc";
  if (mode == 2) return "floor";
  return std::nullopt;
}

OPERATOR(Div, In self, In other, Out out) { out = at::div(self, other); }
OPERATOR(Divs, In self, Scalar other, Out out) { out = at::div(self, other); }
OPERATOR(InplaceDiv, InOut self, In other) { self = at::div(self, other); }
OPERATOR(InplaceDivs, InOut self, Scalar other) { self = at::div(self, other); }
OPERATOR(DivMod, In self, In other, int mode, Out out) { out = at::div(self, other, rounding(mode)); }
OPERATOR(DivMods, In self, Scalar other, int mode, Out out) { out = at::div(self, other, rounding(mode)); }
OPERATOR(InplaceDivMod, InOut self, In other, int mode) { self = at::div(self, other, rounding(mode)); }
OPERATOR(InplaceDivMods, InOut self, Scalar other, int mode) { self = at::div(self, other, rounding(mode)); }
OPERATOR(FloorDivide, In self, In other, Out out) { out = at::floor_divide(self, other); }
OPERATOR(FloorDivides, In self, Scalar other, Out out) { out = at::floor_divide(self, other); }
OPERATOR(InplaceFloorDivide, InOut self, In other) { self = at::floor_divide(self, other); }
OPERATOR(InplaceFloorDivides, InOut self, Scalar other) { self = at::floor_divide(self, other); }
OPERATOR(FmodTensor, In self, In other, Out out) { out = at::fmod(self, other); }
OPERATOR(FmodScalar, In self, Scalar other, Out out) { out = at::fmod(self, other); }
OPERATOR(InplaceFmodTensor, InOut self, In other) { self = at::fmod(self, other); }
OPERATOR(InplaceFmodScalar, InOut self, Scalar other) { self = at::fmod(self, other); }
OPERATOR(RemainderTensorTensor, In self, In other, Out out) { out = at::remainder(self, other); }
OPERATOR(RemainderTensorScalar, In self, Scalar other, Out out) { out = at::remainder(self, other); }
OPERATOR(RemainderScalarTensor, Scalar self, In other, Out out) { out = at::remainder(self, other); }
OPERATOR(InplaceRemainderTensorTensor, InOut self, In other) { self = at::remainder(self, other); }
OPERATOR(InplaceRemainderTensorScalar, InOut self, Scalar other) { self = at::remainder(self, other); }

OPERATOR(PowTensorScalar, In self, Scalar exponent, Out out) { out = at::pow(self, exponent); }
OPERATOR(PowTensorTensor, In self, In exponent, Out out) { out = at::pow(self, exponent); }
OPERATOR(PowScalarTensor, Scalar self, In exponent, Out out) { out = at::pow(self, exponent); }
OPERATOR(InplacePowTensorScalar, InOut self, Scalar exponent) { self = at::pow(self, exponent); }
OPERATOR(InplacePowTensorTensor, InOut self, In exponent) { self = at::pow(self, exponent); }

OPERATOR(Addcmul, In self, In a, In b, Scalar value, Out out) { out = at::addcmul(self, a, b, value); }
OPERATOR(Addcdiv, In self, In a, In b, Scalar value, Out out) { out = at::addcdiv(self, a, b, value); }
OPERATOR(InplaceAddcmul, InOut self, In a, In b, Scalar value) { self = at::addcmul(self, a, b, value); }
OPERATOR(InplaceAddcdiv, InOut self, In a, In b, Scalar value) { self = at::addcdiv(self, a, b, value); }
OPERATOR(Lerp, In self, In end, In weight, Out out) { out = at::lerp(self, end, weight); }
OPERATOR(Lerps, In self, In end, Scalar weight, Out out) { out = at::lerp(self, end, weight); }
OPERATOR(InplaceLerp, InOut self, In end, In weight) { self = at::lerp(self, end, weight); }
OPERATOR(InplaceLerps, InOut self, In end, Scalar weight) { self = at::lerp(self, end, weight); }

OPERATOR(Maximum, In self, In other, Out out) { out = at::maximum(self, other); }
OPERATOR(Minimum, In self, In other, Out out) { out = at::minimum(self, other); }
OPERATOR(Atan2, In self, In other, Out out) { out = at::atan2(self, other); }
OPERATOR(InplaceAtan2, InOut self, In other) { self = at::atan2(self, other); }
OPERATOR(XLogYTensor, In self, In other, Out out) { out = at::xlogy(self, other); }
OPERATOR(XLogYScalarOther, In self, Scalar other, Out out) { out = at::xlogy(self, other); }
OPERATOR(XLogYScalarSelf, Scalar self, In other, Out out) { out = at::xlogy(self, other); }
OPERATOR(InplaceXLogYScalarOther, InOut self, Scalar other) { self = at::xlogy(self, other); }
OPERATOR(LogAddExp, In self, In other, Out out) { out = at::logaddexp(self, other); }

OPERATOR(Clamp, In self, OptionalScalar low, OptionalScalar high, Out out) { out = at::clamp(self, low, high); }
OPERATOR(ClampTensor, In self, In low, In high, Out out) { out = at::clamp(self, low.optional(), high.optional()); }
OPERATOR(ClampMin, In self, Scalar low, Out out) { out = at::clamp_min(self, low); }
OPERATOR(ClampMax, In self, Scalar high, Out out) { out = at::clamp_max(self, high); }
OPERATOR(ClampMinTensor, In self, In low, Out out) { out = at::clamp_min(self, low); }
OPERATOR(ClampMaxTensor, In self, In high, Out out) { out = at::clamp_max(self, high); }
OPERATOR(InplaceClampMax, InOut self, Scalar high) { self = at::clamp_max(self, high); }
OPERATOR(InplaceClampMinTensor, InOut self, In low) { self = at::clamp_min(self, low); }
OPERATOR(InplaceClampMaxTensor, InOut self, In high) { self = at::clamp_max(self, high); }

// ---- comparisons and logic -------------------------------------------------------------------------------------------

#define COMPARISON(Name, function)                                                            \
  OPERATOR(Name##Tensor, In self, In other, Out out) { out = at::function(self, other); }     \
  OPERATOR(Name##Scalar, In self, Scalar other, Out out) { out = at::function(self, other); } \
  OPERATOR(Inplace##Name##Tensor, InOut self, In other) { self = at::function(self, other); } \
  OPERATOR(Inplace##Name##Scalar, InOut self, Scalar other) { self = at::function(self, other); }

COMPARISON(Eq, eq)
COMPARISON(Ne, ne)
COMPARISON(Ge, ge)
COMPARISON(Gt, gt)
COMPARISON(Le, le)
COMPARISON(Lt, lt)
COMPARISON(BitwiseAnd, bitwise_and)
COMPARISON(BitwiseOr, bitwise_or)
COMPARISON(BitwiseXor, bitwise_xor)

OPERATOR(LessScalar, In self, Scalar other, Out out) { out = at::lt(self, other); }
OPERATOR(IsInTensorScalar, In elements, Scalar test, bool unique, bool invert, Out out) { out = at::isin(elements, test, unique, invert); }
OPERATOR(IsInScalarTensor, Scalar element, In tests, bool unique, bool invert, Out out) { out = at::isin(element, tests, unique, invert); }
OPERATOR(Equal, In self, In other, Out out) { out = at::scalar_tensor(at::equal(self, other), at::kBool).reshape(out.sizes()); }
OPERATOR(IsClose, In self, In other, double rtol, double atol, bool equal_nan, Out out) { out = at::isclose(self, other, rtol, atol, equal_nan); }
OPERATOR(LogicalAnd, In self, In other, Out out) { out = at::logical_and(self, other); }
OPERATOR(LogicalOr, In self, In other, Out out) { out = at::logical_or(self, other); }
OPERATOR(LogicalXor, In self, In other, Out out) { out = at::logical_xor(self, other); }
OPERATOR(InplaceLogicalAnd, InOut self, In other) { self = at::logical_and(self, other); }
OPERATOR(InplaceLogicalOr, InOut self, In other) { self = at::logical_or(self, other); }
OPERATOR(LeftShift, In self, In other, Out out) { out = at::bitwise_left_shift(self, other); }
OPERATOR(LeftShifts, In self, Scalar other, Out out) { out = at::bitwise_left_shift(self, other); }
OPERATOR(RightShift, In self, In other, Out out) { out = at::bitwise_right_shift(self, other); }

OPERATOR(SWhere, In condition, In self, In other, Out out) { out = at::where(condition, self, other); }
OPERATOR(InplaceMaskedFillScalar, InOut self, In mask, Scalar value) { self = at::masked_fill(self, mask, value); }
OPERATOR(InplaceMaskedFillTensor, InOut self, In mask, In value) { self = at::masked_fill(self, mask, value.reshape({})); }

// ---- activations -----------------------------------------------------------------------------------------------------

OPERATOR(Threshold, In self, Scalar threshold, Scalar value, Out out) { out = at::threshold(self, threshold, value); }
OPERATOR(InplaceThreshold, InOut self, Scalar threshold, Scalar value) { self = at::threshold(self, threshold, value); }
OPERATOR(ThresholdBackward, In grad, In self, Scalar threshold, Out out) { out = at::threshold_backward(grad, self, threshold); }
OPERATOR(LeakyRelu, In self, Scalar slope, Out out) { out = at::leaky_relu(self, slope); }
OPERATOR(InplaceLeakyRelu, InOut self, Scalar slope) { self = at::leaky_relu(self, slope); }
OPERATOR(LeakyReluBackward, In grad, In self, Scalar slope, bool self_is_result, Out out) { out = at::leaky_relu_backward(grad, self, slope, self_is_result); }
OPERATOR(Elu, In self, Scalar alpha, Scalar scale, Scalar input_scale, Out out) { out = at::elu(self, alpha, scale, input_scale); }
OPERATOR(InplaceElu, InOut self, Scalar alpha, Scalar scale, Scalar input_scale) { self = at::elu(self, alpha, scale, input_scale); }
OPERATOR(EluBackward, In grad, Scalar alpha, Scalar scale, Scalar input_scale, bool is_result, In self, Out out) { out = at::elu_backward(grad, alpha, scale, input_scale, is_result, self); }
OPERATOR(Celu, In self, Scalar alpha, Out out) { out = at::celu(self, alpha); }
OPERATOR(InplaceCelu, InOut self, Scalar alpha) { self = at::celu(self, alpha); }
OPERATOR(Gelu, In self, Out out) { out = at::gelu(self); }
OPERATOR(GeluBackward, In grad, In self, Out out) { out = at::gelu_backward(grad, self); }
OPERATOR(GeluV2, In self, int64_t approximate, Out out) { out = at::gelu(self, approximate == 0 ? "none" : "tanh"); }
OPERATOR(GeluBackwardV2, In grad, In self, Text approximate, Out out) { out = at::gelu_backward(grad, self, approximate); }
OPERATOR(Glu, In self, int64_t dim, Out out) { out = at::glu(self, dim); }
OPERATOR(GluBackward, In grad, In self, int64_t dim, Out out) { out = at::glu_backward(grad, self, dim); }
OPERATOR(Hardtanh, In self, Scalar low, Scalar high, Out out) { out = at::hardtanh(self, low, high); }
OPERATOR(InplaceHardtanh, InOut self, Scalar low, Scalar high) { self = at::hardtanh(self, low, high); }
OPERATOR(HardtanhBackward, In grad, In self, Scalar low, Scalar high, Out out) { out = at::hardtanh_backward(grad, self, low, high); }
OPERATOR(HardsigmoidBackward, In grad, In self, Out out) { out = at::hardsigmoid_backward(grad, self); }
OPERATOR(HardswishBackward, In grad, In self, Out out) { out = at::hardswish_backward(grad, self); }
OPERATOR(HardswishBackwardV2, In grad, In self, Out out) { out = at::hardswish_backward(grad, self); }
OPERATOR(MishBackward, In grad, In self, Out out) { out = at::mish_backward(grad, self); }
OPERATOR(SigmoidBackward, In grad, In output, Out out) { out = at::sigmoid_backward(grad, output); }
OPERATOR(SiluBackward, In grad, In self, Out out) { out = at::silu_backward(grad, self); }
OPERATOR(TanhBackward, In grad, In output, Out out) { out = at::tanh_backward(grad, output); }
OPERATOR(Softplus, In self, Scalar beta, Scalar threshold, Out out) { out = at::softplus(self, beta, threshold); }
OPERATOR(SoftplusBackward, In grad, In self, Scalar beta, Scalar threshold, Out out) { out = at::softplus_backward(grad, self, beta, threshold); }
OPERATOR(LogSigmoid, In self, Out out) { out = at::log_sigmoid(self); }
OPERATOR(LogSigmoidForward, In self, Out out, Out) { out = at::log_sigmoid(self); }
OPERATOR(LogSigmoidBackward, In grad, In self, In, Out out) { out = grad * at::sigmoid(-self); }
OPERATOR(Prelu, In self, In weight, Out out) { out = at::_prelu_kernel(self, weight); }
OPERATOR(Hardshrink, In self, Scalar lambda, Out out) { out = at::hardshrink(self, lambda); }
OPERATOR(HardshrinkBackward, In grad, In self, Scalar lambda, Out out) { out = at::hardshrink_backward(grad, self, lambda); }
OPERATOR(Softshrink, In self, Scalar lambda, Out out) { out = at::softshrink(self, lambda); }
OPERATOR(SoftshrinkBackward, In grad, In self, Scalar lambda, Out out) { out = at::softshrink_backward(grad, self, lambda); }

// ---- fills, copies, casts --------------------------------------------------------------------------------------------

OPERATOR(Complex, In real, In imaginary, Out out) { out = at::complex(real, imaginary); }
OPERATOR(InplaceCopy, Out self, In source) { self.copy_(source); }
OPERATOR(Cast, In self, Dtype, Out out) { out = self; }
OPERATOR(InplaceZero, Out self) { self.zero_(); }
OPERATOR(InplaceOne, Out self) { self.fill_(1); }
OPERATOR(InplaceFillScalar, Out self, Scalar value) { self.fill_(value); }
OPERATOR(InplaceFillTensor, Out self, In value) { self.fill_(value.reshape({})); }
OPERATOR(InplaceFillDiagonal, InOut self, Scalar value, bool wrap) { self.fill_diagonal_(value, wrap); }
OPERATOR(Arange, Scalar start, Scalar end, Scalar step, Out out) { out = at::arange(start, end, step, out.options()); }
OPERATOR(Range, Scalar start, Scalar end, Scalar step, Out out) { out = at::range(start, end, step, out.options()); }
OPERATOR(Linspace, Scalar start, Scalar end, int64_t steps, Out out) { out = at::linspace(start, end, steps, out.options()); }
OPERATOR(Eye, int64_t rows, int64_t columns, Out out) { out = at::eye(rows, columns, out.options()); }
