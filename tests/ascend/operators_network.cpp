// Operators of networks: convolutions, normalisations, pooling, resizing, losses, and random numbers.

#include "operators.h"

#include <ATen/CPUGeneratorImpl.h>

using namespace standin;

// Where ATen has no 16-bit kernel on the CPU, the operator computes in float32 and rounds once.
static at::Tensor wide(const at::Tensor& tensor) {
  return tensor.defined() && (tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16) ? tensor.to(at::kFloat) : tensor;
}

// ---- convolution -------------------------------------------------------------------------------------------------------

OPERATOR(Convolution, In input, In weight, In bias, Ints stride, Ints padding, Ints dilation, bool transposed, Ints output_padding,
         int64_t groups, Out out, int8_t) {
  out = at::convolution(input, weight, bias.optional(), stride, padding, dilation, transposed, output_padding, groups);
}

OPERATOR(ConvolutionBackward, In grad, In input, In weight, OptionalInts bias_sizes, Ints stride, Ints padding, Ints dilation,
         bool transposed, Ints output_padding, int64_t groups, Bools wanted, int8_t, Out grad_input, Out grad_weight, Out grad_bias) {
  std::tie(grad_input, grad_weight, grad_bias) =
      at::convolution_backward(grad, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups,
                               {wanted[0], wanted[1], wanted[2]});
}

OPERATOR(ConvDepthwise2d, In self, In weight, Ints, In bias, Ints stride, Ints padding, Ints dilation, Out out, int8_t) {
  out = at::conv2d(self, weight, bias.optional(), stride, padding, dilation, self.size(1));
}

// ---- normalisation -----------------------------------------------------------------------------------------------------

// ATen's kernels for tensors with gaps sum in another order, and on a CPU this package hands it none.
OPERATOR(BatchNorm, In input, In weight, In bias, InOut running_mean, InOut running_var, bool training, double momentum, double eps,
         Out out, Out save_mean, Out save_invstd) {
  auto [normalised, mean, invstd] =
      at::native_batch_norm(input.contiguous(), weight, bias, running_mean, running_var, training, momentum, eps);
  out = normalised;
  if (training) save_mean = mean, save_invstd = invstd;  // evaluation saves nothing on the CPU
}

OPERATOR(BatchNormBackward, In grad, In input, In weight, In running_mean, In running_var, In save_mean, In save_invstd, bool training,
         double eps, Bools wanted, Out grad_input, Out grad_weight, Out grad_bias) {
  std::tie(grad_input, grad_weight, grad_bias) =
      at::native_batch_norm_backward(grad.contiguous(), input.contiguous(), weight, running_mean, running_var, save_mean,
                                     save_invstd, training, eps, {wanted[0], wanted[1], wanted[2]});
}

OPERATOR(LayerNorm, In input, Ints shape, In weight, In bias, double eps, Out out, Out mean, Out rstd) {
  std::tie(out, mean, rstd) = at::native_layer_norm(input, shape, weight.optional(), bias.optional(), eps);
}

OPERATOR(LayerNormBackward, In grad, In input, Ints shape, In mean, In rstd, In weight, In bias, Bools wanted, Out grad_input,
         Out grad_weight, Out grad_bias) {
  std::tie(grad_input, grad_weight, grad_bias) = at::native_layer_norm_backward(
      grad, input, shape, mean, rstd, weight.optional(), bias.optional(), {wanted[0], wanted[1], wanted[2]});
}

OPERATOR(GroupNorm, In input, In weight, In bias, int64_t n, int64_t c, int64_t hxw, int64_t groups, double eps, Out out, Out mean, Out rstd) {
  std::tie(out, mean, rstd) = at::native_group_norm(input, weight.optional(), bias.optional(), n, c, hxw, groups, eps);
}

OPERATOR(GroupNormBackward, In grad, In input, In mean, In rstd, In weight, int64_t n, int64_t c, int64_t hxw, int64_t groups,
         Bools wanted, Out grad_input, Out grad_weight, Out grad_bias) {
  std::tie(grad_input, grad_weight, grad_bias) = at::native_group_norm_backward(
      grad, input, mean, rstd, weight.optional(), n, c, hxw, groups, {wanted[0], wanted[1], wanted[2]});
}

// SyncBatchNorm: each process sums over its batch, the sums of all are joined, each normalises with the joint
// statistics. The CPU has no kernels for it, so these are the formulas, with sums in double.

static std::vector<int64_t> all_but_channels(const at::Tensor& input) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    if (dim != 1) dims.push_back(dim);
  return dims;
}

static at::Tensor per_channel(const at::Tensor& values, const at::Tensor& input) {
  std::vector<int64_t> shape(input.dim(), 1);
  shape[1] = -1;
  return wide(values).reshape(shape);
}

static at::Tensor channel_sum(const at::Tensor& values) { return at::sum(values, all_but_channels(values), false, at::kDouble); }

static void update_running(const at::Tensor& running, const at::Tensor& value, double momentum) {
  if (running.defined()) running.copy_(running.to(at::kDouble) * (1 - momentum) + value * momentum);
}

OPERATOR(BatchNormReduce, In self, Out sum, Out square_sum) {
  sum = channel_sum(self);
  square_sum = channel_sum(at::square(self.to(at::kDouble)));
}

OPERATOR(SyncBatchNormGatherStats, In sum, In square_sum, In counts, InOut running_mean, InOut running_var, float momentum, float eps,
         Out mean, Out invstd) {
  double total = at::sum(counts, at::kDouble).item<double>();
  auto joint_mean = at::sum(sum, 0, false, at::kDouble) / total;
  auto joint_var = at::sum(square_sum, 0, false, at::kDouble) / total - at::square(joint_mean);
  update_running(running_mean, joint_mean, momentum);
  update_running(running_var, joint_var * (total / (total - 1)), momentum);
  mean = joint_mean;
  invstd = at::rsqrt(joint_var + eps);
}

// The same from means and inverse standard deviations instead of sums: torch.nn.SyncBatchNorm's own way.
OPERATOR(BatchNormStats, In self, double eps, Out mean, Out invstd) {
  auto [var, average] = at::var_mean(self.to(at::kDouble), all_but_channels(self), Scalar(0));
  mean = average, invstd = at::rsqrt(var + eps);
}

OPERATOR(BatchNormGatherStatsWithCounts, In, In means, In invstds, InOut running_mean, InOut running_var, double momentum, double eps,
         In counts, Out mean, Out invstd) {
  auto weights = counts.to(at::kDouble).reshape({-1, 1});
  auto each_mean = means.to(at::kDouble), each_var = 1 / at::square(invstds.to(at::kDouble)) - eps;
  double total = weights.sum().item<double>();
  auto joint_mean = (each_mean * weights).sum(0) / total;
  auto joint_var = ((each_var + at::square(each_mean - joint_mean)) * weights).sum(0) / total;
  update_running(running_mean, joint_mean, momentum);
  update_running(running_var, joint_var * (total / (total - 1)), momentum);
  mean = joint_mean, invstd = at::rsqrt(joint_var + eps);
}

OPERATOR(BatchNormElemt, In input, In weight, In bias, In mean, In invstd, double, Out out) {
  auto normalised = (wide(input) - per_channel(mean, input)) * per_channel(invstd, input);
  if (weight.defined()) normalised = normalised * per_channel(weight, input);
  if (bias.defined()) normalised = normalised + per_channel(bias, input);
  out = normalised;
}

OPERATOR(BatchNormReduceBackward, In grad, In self, In mean, In invstd, In, bool, bool, bool, Out sum_dy, Out sum_dy_xmu, Out grad_weight,
         Out grad_bias) {
  auto dy = channel_sum(grad);
  auto dy_xmu = channel_sum(grad.to(at::kDouble) * (self.to(at::kDouble) - per_channel(mean.to(at::kDouble), self)));
  sum_dy = dy, sum_dy_xmu = dy_xmu;
  grad_weight = dy_xmu * invstd, grad_bias = dy;
}

OPERATOR(BatchNormElemtBackward, In grad, In input, In mean, In invstd, In weight, In sum_dy, In sum_dy_xmu, In count, Out out) {
  double total = at::sum(count, at::kDouble).item<double>();
  auto scale = per_channel(invstd, input);
  auto centred = wide(input) - per_channel(mean, input);
  auto result = wide(grad) - per_channel(sum_dy, input) / total - centred * at::square(scale) * per_channel(sum_dy_xmu, input) / total;
  result = result * scale;
  out = weight.defined() ? result * per_channel(weight, input) : result;
}

// ---- pooling -----------------------------------------------------------------------------------------------------------

OPERATOR(MaxPool2dWithIndices, In self, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode, Out out, Out indices) {
  std::tie(out, indices) = at::max_pool2d_with_indices(self, kernel, stride, padding, dilation, ceil_mode);
}

OPERATOR(MaxPool2dWithIndicesBackward, In grad, In self, In indices, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode,
         Out out) {
  out = at::max_pool2d_with_indices_backward(grad, self, kernel, stride, padding, dilation, ceil_mode, indices.to(at::kLong));
}

// The device keeps the places of the maxima as a bit mask of its own layout. Nobody reads it but the backward
// operator, which here finds the places again.
OPERATOR(MaxPool2dWithMask, In self, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode, Out out, Out) {
  out = at::max_pool2d(self, kernel, stride, padding, dilation, ceil_mode);
}

OPERATOR(MaxPool2dWithMaskBackward, In grad, In self, In, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode, Out out) {
  auto indices = std::get<1>(at::max_pool2d_with_indices(self, kernel, stride, padding, dilation, ceil_mode));
  out = at::max_pool2d_with_indices_backward(grad, self, kernel, stride, padding, dilation, ceil_mode, indices);
}

static std::optional<int64_t> divisor(int64_t value) { return value == 0 ? std::nullopt : std::optional<int64_t>(value); }

OPERATOR(AvgPool2d, In self, Ints kernel, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad, int64_t divide_by, int8_t,
         Out out) {
  out = at::avg_pool2d(self, kernel, stride, padding, ceil_mode, count_include_pad, divisor(divide_by));
}

OPERATOR(AvgPool2dBackward, In grad, In self, Ints kernel, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad,
         int64_t divide_by, int8_t, Out out) {
  out = at::avg_pool2d_backward(grad, self, kernel, stride, padding, ceil_mode, count_include_pad, divisor(divide_by));
}

OPERATOR(AdaptiveAvgPool2d, In self, Ints size, Out out) { out = at::_adaptive_avg_pool2d(self, size); }
OPERATOR(AdaptiveAvgPool2dBackward, In grad, In self, Out out) { out = at::_adaptive_avg_pool2d_backward(grad, self); }
OPERATOR(AdaptiveMaxPool2d, In self, Ints size, Out out, Out indices) { std::tie(out, indices) = at::adaptive_max_pool2d(self, size); }
OPERATOR(AdaptiveMaxPool2dBackward, In grad, In self, In indices, Out out) { out = at::adaptive_max_pool2d_backward(grad, self, indices.to(at::kLong)); }

// ---- resizing; a scale of zero is "none given" ---------------------------------------------------------------------------

static std::optional<double> scale(double value) { return value > 0 ? std::optional<double>(value) : std::nullopt; }

#define RESIZE(Name, function)                                                                                                  \
  OPERATOR(Name, In self, Ints size, bool align_corners, double h, double w, Out out) {                                         \
    out = at::function(self, size, align_corners, scale(h), scale(w));                                                          \
  }
#define RESIZE_BACKWARD(Name, function)                                                                                         \
  OPERATOR(Name, In grad, Ints size, Ints input_size, bool align_corners, double h, double w, Out out) {                        \
    out = at::function(grad, size, input_size, align_corners, scale(h), scale(w));                                              \
  }

RESIZE(UpsampleBilinear2d, upsample_bilinear2d)
RESIZE(UpsampleBilinear2dAA, _upsample_bilinear2d_aa)
RESIZE(UpsampleBicubic2d, upsample_bicubic2d)
RESIZE(UpsampleBicubic2dAA, _upsample_bicubic2d_aa)
RESIZE_BACKWARD(UpsampleBilinear2dBackward, upsample_bilinear2d_backward)
RESIZE_BACKWARD(UpsampleBilinear2dBackwardV2, upsample_bilinear2d_backward)
RESIZE_BACKWARD(UpsampleBilinear2dAABackward, _upsample_bilinear2d_aa_backward)
RESIZE_BACKWARD(UpsampleBicubic2dBackward, upsample_bicubic2d_backward)
RESIZE_BACKWARD(UpsampleBicubic2dAAGrad, _upsample_bicubic2d_aa_backward)

OPERATOR(UpsampleNearest2d, In self, Ints size, Out out) { out = at::upsample_nearest2d(self, size); }
OPERATOR(UpsampleNearest2dV2, In self, Ints size, float h, float w, Out out) { out = at::upsample_nearest2d(self, size, scale(h), scale(w)); }
OPERATOR(UpsampleNearest2dBackward, In grad, Ints size, Ints input_size, double h, double w, Out out) { out = at::upsample_nearest2d_backward(grad, size, input_size, scale(h), scale(w)); }

OPERATOR(AffineGrid, In theta, Ints size, bool align_corners, Out out) { out = at::affine_grid_generator(theta, size, align_corners); }
OPERATOR(GridSampler2D, In input, In grid, int64_t mode, int64_t padding, bool align_corners, Out out) { out = at::grid_sampler_2d(input, grid, mode, padding, align_corners); }
OPERATOR(GridSampler2DBackward, In grad, In input, In grid, int64_t mode, int64_t padding, bool align_corners, Bools wanted, Out grad_input,
         Out grad_grid) {
  std::tie(grad_input, grad_grid) = at::grid_sampler_2d_backward(grad, input, grid, mode, padding, align_corners, {wanted[0], wanted[1]});
}

// ---- softmax and losses --------------------------------------------------------------------------------------------------

OPERATOR(Softmax, In self, int64_t dim, Out out) { out = at::softmax(self, dim, out.scalar_type()); }
OPERATOR(SoftmaxBackward, In grad, In output, int64_t dim, Out out) { out = at::_softmax_backward_data(grad, output, dim, output.scalar_type()); }
OPERATOR(LogSoftmax, In self, int64_t dim, Out out) { out = at::log_softmax(self, dim, out.scalar_type()); }
OPERATOR(LogSoftmaxBackward, In grad, In output, int64_t dim, Out out) { out = at::_log_softmax_backward_data(grad, output, dim, output.scalar_type()); }

OPERATOR(NLLLoss, In self, In target, In weight, int64_t reduction, int64_t ignored, Out out, Out total_weight) {
  std::tie(out, total_weight) = at::nll_loss_forward(wide(self), target.to(at::kLong), wide(weight), reduction, ignored);
}
OPERATOR(NLLLossBackward, In grad, In self, In target, In weight, int64_t reduction, int64_t ignored, In total_weight, Out out) {
  out = at::nll_loss_backward(wide(grad), wide(self), target.to(at::kLong), wide(weight), reduction, ignored, wide(total_weight).reshape({}));
}
OPERATOR(NLLLoss2d, In self, In target, In weight, int64_t reduction, int64_t ignored, Out out, Out total_weight) {
  std::tie(out, total_weight) = at::nll_loss2d_forward(wide(self), target.to(at::kLong), wide(weight), reduction, ignored);
}
OPERATOR(NLLLoss2dBackward, In grad, In self, In target, In weight, int64_t reduction, int64_t ignored, In total_weight, Out out) {
  out = at::nll_loss2d_backward(wide(grad), wide(self), target.to(at::kLong), wide(weight), reduction, ignored, wide(total_weight).reshape({}));
}

// The gradient of a mean is the gradient of the sum divided by the number of elements.
static at::Tensor mean_grad(const at::Tensor& grad, const at::Tensor& self, int64_t reduction) {
  return reduction == at::Reduction::Mean ? wide(grad) / self.numel() : wide(grad);
}

OPERATOR(KlDiv, In self, In target, int64_t reduction, bool log_target, Out out) { out = at::kl_div(wide(self), wide(target), reduction, log_target); }
OPERATOR(KlDivBackward, In grad, In self, In target, int64_t reduction, bool log_target, Out out) {
  auto probability = log_target ? at::exp(wide(target)) : wide(target);
  out = -probability * mean_grad(grad, self, reduction);
}
OPERATOR(KlDivTargetBackward, In grad, In self, In target, int64_t reduction, bool log_target, Out out) {
  auto t = wide(target), x = wide(self);
  auto slope = log_target ? at::exp(t) * (t - x + 1) : at::where(t > 0, at::log(t) + 1 - x, at::zeros_like(t));
  out = slope * mean_grad(grad, self, reduction);
}

OPERATOR(MseLoss, In self, In target, int64_t reduction, Out out) { out = at::mse_loss(self, target, reduction); }
OPERATOR(MseLossBackward, In grad, In self, In target, int64_t reduction, Out out) { out = at::mse_loss_backward(grad, self, target, reduction); }
OPERATOR(L1Loss, In self, In target, int64_t reduction, Out out) { out = at::l1_loss(self, target, reduction); }
OPERATOR(L1LossBackward, In grad, In self, In target, int64_t reduction, Out out) { out = at::sign(self - target) * mean_grad(grad, self, reduction); }
OPERATOR(SmoothL1Loss, In self, In target, int64_t reduction, float beta, Out out) { out = at::smooth_l1_loss(self, target, reduction, beta); }
OPERATOR(SmoothL1LossBackward, In grad, In self, In target, int64_t reduction, float beta, Out out) { out = at::smooth_l1_loss_backward(grad, self, target, reduction, beta); }
OPERATOR(SoftMarginLoss, In self, In target, int64_t reduction, Out out) { out = at::soft_margin_loss(self, target, reduction); }
OPERATOR(SoftMarginLossBackward, In grad, In self, In target, int64_t reduction, Out out) { out = at::soft_margin_loss_backward(grad, self, target, reduction); }

OPERATOR(BinaryCrossEntropy, In self, In target, In weight, int64_t reduction, Out out) { out = at::binary_cross_entropy(wide(self), wide(target), wide(weight), reduction); }
OPERATOR(BinaryCrossEntropyBackward, In grad, In self, In target, In weight, int64_t reduction, Out out) {
  out = at::binary_cross_entropy_backward(wide(grad), wide(self), wide(target), wide(weight), reduction);
}
OPERATOR(BinaryCrossEntropyWithLogits, In self, In target, In weight, In pos_weight, int64_t reduction, Out out) {
  out = at::binary_cross_entropy_with_logits(wide(self), wide(target), wide(weight), wide(pos_weight), reduction);
}
OPERATOR(BinaryCrossEntropyWithLogitsBackward, In grad, In self, In target, In weight, In pos_weight, int64_t reduction, Out out) {
  auto t = wide(target), probability = at::sigmoid(wide(self));
  auto slope = pos_weight.defined() ? probability * (pos_weight * t + 1 - t) - pos_weight * t : probability - t;
  if (weight.defined()) slope = slope * wide(weight);
  out = slope * mean_grad(grad, self, reduction);
}

// ---- random numbers: a function of (seed, offset), as on the device, but not the device's numbers --------------------------

static at::Generator generator(uint64_t seed, uint64_t offset) {
  return at::make_generator<at::CPUGeneratorImpl>(seed ^ (offset + 1) * 0x9e3779b97f4a7c15u);
}

OPERATOR(InplaceNormal, Out self, float mean, float std, int64_t seed, int64_t offset) { self.normal_(mean, std, generator(seed, offset)); }
OPERATOR(InplaceUniform, Out self, double from, double to, int64_t seed, int64_t offset) { self.uniform_(from, to, generator(seed, offset)); }
OPERATOR(InplaceBernoulli, Out self, Scalar p, uint64_t seed, uint64_t offset) { self.bernoulli_(p.toDouble(), generator(seed, offset)); }
OPERATOR(InplaceBernoulliTensor, Out self, In p, uint64_t seed, uint64_t offset) { self.bernoulli_(p, generator(seed, offset)); }
OPERATOR(InplaceRandom, Out self, int64_t from, int64_t to, uint64_t seed, uint64_t offset) { self.random_(from, to, generator(seed, offset)); }
OPERATOR(InplaceRandomWithoutFromTo, Out self, uint64_t seed, uint64_t offset) { self.random_(generator(seed, offset)); }
OPERATOR(Randperm, int64_t n, uint64_t seed, uint64_t offset, Out out) { out = at::randperm(n, generator(seed, offset), out.options()); }
OPERATOR(Multinomial, In self, int64_t samples, bool replacement, uint64_t seed, uint64_t offset, Out out) { out = at::multinomial(self, samples, replacement, generator(seed, offset)); }
OPERATOR(NormalTensorTensor, In mean, In std, int64_t seed, int64_t offset, Out out) { out = at::normal(mean, std, generator(seed, offset)); }
OPERATOR(NormalTensorFloat, In mean, float std, int64_t seed, int64_t offset, Out out) { out = at::normal(mean, std, generator(seed, offset)); }
OPERATOR(NormalFloatTensor, float mean, In std, int64_t seed, int64_t offset, Out out) { out = at::normal(mean, std, generator(seed, offset)); }

OPERATOR(NormalFloatFloat, float mean, float std, int64_t seed, int64_t offset, Out out) { out = at::normal(mean, std, out.sizes(), generator(seed, offset)); }

// A dropout's mask has one bit for an element; a bit that is set keeps the element.

static void set_bits(const at::Tensor& mask, const at::Tensor& keep) {
  auto* bytes = mask.data_ptr<uint8_t>();
  const auto* kept = keep.const_data_ptr<bool>();
  mask.zero_();
  for (int64_t i = 0; i < keep.numel(); ++i) bytes[i / 8] |= static_cast<uint8_t>(kept[i] << (i % 8));
}

static at::Tensor bits(const at::Tensor& mask, at::IntArrayRef sizes) {
  auto keep = at::empty(sizes, at::kBool);
  const auto* bytes = mask.const_data_ptr<uint8_t>();
  auto* kept = keep.data_ptr<bool>();
  for (int64_t i = 0; i < keep.numel(); ++i) kept[i] = bytes[i / 8] >> (i % 8) & 1;
  return keep;
}

static at::Tensor draw_mask(at::IntArrayRef sizes, double drop, uint64_t seed, uint64_t offset) {
  return at::empty(sizes, at::kBool).bernoulli_(1 - drop, generator(seed, offset));
}

static at::Tensor drop(const at::Tensor& self, const at::Tensor& keep, double p) { return p == 1 ? at::zeros_like(self) : self * keep / (1 - p); }

OPERATOR(DropoutGenMaskV2, Ints shape, double p, int64_t seed, int64_t offset, Dtype, Out mask) { set_bits(mask, draw_mask(shape, p, seed, offset)); }
OPERATOR(DropoutGenMask, Ints shape, double p, int64_t seed, int64_t offset, Out mask) { set_bits(mask, draw_mask(shape, p, seed, offset)); }
OPERATOR(DropoutDoMask, In self, In mask, double p, Out out) { out = drop(self, bits(mask, self.sizes()), p); }
OPERATOR(DropoutV3, In self, In, double p, int64_t seed, int64_t offset, Out out, Out mask) {
  auto keep = draw_mask(self.sizes(), p, seed, offset);
  set_bits(mask, keep);
  out = drop(self, keep, p);
}
