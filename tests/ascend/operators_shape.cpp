// Operators that reduce, order, move or select elements, and the products of matrices.

#include "operators.h"

using namespace standin;

// ---- reductions --------------------------------------------------------------------------------------------------------

OPERATOR(ReduceSum, In self, Ints dims, bool keepdim, Dtype dtype, Out out) { out = at::sum(self, dims, keepdim, dtype); }
OPERATOR(ReduceNansum, In self, Ints dims, bool keepdim, Dtype dtype, Out out) { out = at::nansum(self, dims, keepdim, dtype); }
OPERATOR(Mean, In self, Ints dims, bool keepdim, Dtype dtype, Out out) { out = at::mean(self, dims, keepdim, dtype); }
OPERATOR(Prod, In self, Dtype dtype, Out out) { out = at::prod(self, dtype); }
OPERATOR(ProdDim, In self, int64_t dim, bool keepdim, Dtype dtype, Out out) { out = at::prod(self, dim, keepdim, dtype); }
OPERATOR(Amax, In self, Ints dims, bool keepdim, Out out) { out = at::amax(self, dims, keepdim); }
OPERATOR(Amin, In self, Ints dims, bool keepdim, Out out) { out = at::amin(self, dims, keepdim); }
OPERATOR(Max, In self, Out out) { out = at::max(self); }
OPERATOR(Min, In self, Out out) { out = at::min(self); }
OPERATOR(MaxDim, In self, int64_t dim, bool keepdim, Out values, Out indices) { std::tie(values, indices) = at::max(self, dim, keepdim); }
OPERATOR(MinDim, In self, int64_t dim, bool keepdim, Out values, Out indices) { std::tie(values, indices) = at::min(self, dim, keepdim); }
OPERATOR(ArgMax, In self, int64_t dim, bool keepdim, Out out) { out = at::argmax(self, dim, keepdim); }
OPERATOR(ArgMin, In self, int64_t dim, bool keepdim, Out out) { out = at::argmin(self, dim, keepdim); }
OPERATOR(Aminmax, In self, Ints dims, bool keepdim, Out low, Out high) { low = at::amin(self, dims, keepdim), high = at::amax(self, dims, keepdim); }
OPERATOR(AminmaxAll, In self, Out low, Out high) { std::tie(low, high) = at::aminmax(self); }
OPERATOR(AminmaxDim, In self, int64_t dim, bool keepdim, Out low, Out high) { std::tie(low, high) = at::aminmax(self, dim, keepdim); }
OPERATOR(All, In self, Ints dims, bool keepdim, Out out) { out = dims.empty() ? at::all(self) : at::all(self, dims, keepdim); }
OPERATOR(Any, In self, Ints dims, bool keepdim, Out out) { out = dims.empty() ? at::any(self) : at::any(self, dims, keepdim); }
OPERATOR(LogSumExp, In self, Ints dims, bool keepdim, Out out) { out = at::logsumexp(self, dims, keepdim); }

OPERATOR(VarCorrection, In self, Ints dims, int64_t correction, bool keepdim, Out out) { out = at::var(self, dims, Scalar(correction), keepdim); }
OPERATOR(Std, In self, Ints dims, int64_t correction, bool keepdim, Out out) { out = at::std(self, dims, Scalar(correction), keepdim); }
OPERATOR(VarMean, In self, Ints dims, int64_t correction, bool keepdim, Out var, Out mean) { std::tie(var, mean) = at::var_mean(self, dims, Scalar(correction), keepdim); }
OPERATOR(StdMeanCorrection, In self, Ints dims, int64_t correction, bool keepdim, Out std, Out mean) { std::tie(std, mean) = at::std_mean(self, dims, Scalar(correction), keepdim); }
OPERATOR(LinalgVectorNorm, In self, Scalar order, OptionalInts dims, bool keepdim, Dtype dtype, Out out) {
  if (dims && dims->empty()) dims = std::nullopt;
  out = at::linalg_vector_norm(self, order, dims, keepdim, dtype);
}
OPERATOR(Norm, In self, Scalar order, Ints dims, bool keepdim, Out out) { out = at::norm(self, order, dims, keepdim); }

OPERATOR(Renorm, In self, Scalar order, int64_t dim, Scalar limit, Out out) { out = at::renorm(self, order, dim, limit); }
OPERATOR(InplaceRenorm, InOut self, Scalar order, int64_t dim, Scalar limit) { self = at::renorm(self, order, dim, limit); }
OPERATOR(Trace, In self, Out out) { out = at::trace(self); }

OPERATOR(Cumsum, In self, int64_t dim, Dtype, Out out) { out = at::cumsum(self, dim, out.scalar_type()); }
OPERATOR(Cumprod, In self, Scalar dim, Dtype, Out out) { out = at::cumprod(self, dim.toLong(), out.scalar_type()); }
OPERATOR(Cummax, In self, int64_t dim, Out values, Out indices) { std::tie(values, indices) = at::cummax(self, dim); }
OPERATOR(Cummin, In self, int64_t dim, Out values, Out indices) { std::tie(values, indices) = at::cummin(self, dim); }
OPERATOR(Bincount, In self, In weight, int64_t minlength, Out out) { out = at::bincount(self, weight.optional(), minlength); }
OPERATOR(Histc, In self, int64_t bins, Scalar low, Scalar high, Out out) { out = at::histc(self, bins, low, high); }

// ---- order -------------------------------------------------------------------------------------------------------------

OPERATOR(Sort, In self, bool stable, int64_t dim, bool descending, Out values, Out indices) { std::tie(values, indices) = at::sort(self, stable, dim, descending); }
OPERATOR(Topk, In self, int64_t k, int64_t dim, bool largest, bool sorted, Out values, Out indices) { std::tie(values, indices) = at::topk(self, k, dim, largest, sorted); }
OPERATOR(Kthvalue, In self, int64_t k, int64_t dim, bool keepdim, Out values, Out indices) { std::tie(values, indices) = at::kthvalue(self, k, dim, keepdim); }
OPERATOR(Median, In self, Out out) { out = at::median(self); }
OPERATOR(MedianDim, In self, int64_t dim, bool keepdim, Out values, Out indices) { std::tie(values, indices) = at::median(self, dim, keepdim); }
OPERATOR(SearchSorted, In sorted, In self, bool int32, bool right, In sorter, Out out) { out = at::searchsorted(sorted, self, int32, right, std::nullopt, sorter.optional()); }
OPERATOR(SearchSorteds, In sorted, Scalar self, bool int32, bool right, In sorter, Out out) { out = at::searchsorted(sorted, self, int32, right, std::nullopt, sorter.optional()); }
OPERATOR(Bucketize, In self, In boundaries, bool int32, bool right, Out out) { out = at::bucketize(self, boundaries, int32, right); }

OPERATOR(Nonzero, In self, Out out) { out.store_with_size(at::nonzero(self)); }
OPERATOR(NonzeroV2, In self, Out out) { out.store_with_size(at::nonzero(self).t()); }
OPERATOR(MaskedSelect, In self, In mask, Out out) { out.store_with_size(at::masked_select(self, mask)); }
OPERATOR(Unique, In self, bool sorted, bool return_inverse, Out values, Out inverse) {
  auto [unique, positions] = at::_unique(self, sorted, return_inverse);
  values.store_with_size(unique);
  if (return_inverse) inverse = positions;
}
OPERATOR(Unique2, In self, bool sorted, bool return_inverse, bool return_counts, Out values, Out inverse, Out counts) {
  auto [unique, positions, numbers] = at::_unique2(self, sorted, return_inverse, return_counts);
  values.store_with_size(unique);
  if (return_inverse) inverse = positions;
  if (return_counts) counts.store_with_size(numbers);
}

// ---- moving and selecting ----------------------------------------------------------------------------------------------

OPERATOR(Cat, InList tensors, int64_t dim, Out out) { out = at::cat(tensors.tensors(), dim); }
OPERATOR(Stack, InList tensors, int64_t dim, Out out) { out = at::stack(tensors.tensors(), dim); }
OPERATOR(SplitWithSize, In self, Ints sizes, int64_t dim, OutList outputs) {
  auto parts = at::split_with_sizes(self, sizes, dim);
  for (size_t i = 0; i < parts.size(); ++i) outputs[i] = parts[i];
}
OPERATOR(Repeat, In self, Ints repeats, Out out) { out = self.repeat(repeats); }
OPERATOR(RepeatInterleaveInt, In self, int64_t repeats, int64_t, Out out) { out = at::repeat_interleave(self, repeats); }
OPERATOR(RepeatInterleaveIntWithDim, In self, int64_t repeats, int64_t dim, int64_t, Out out) { out = at::repeat_interleave(self, repeats, dim); }
OPERATOR(RepeatInterleave, In self, In repeats, int64_t, Out out) { out = at::repeat_interleave(self, repeats); }
OPERATOR(RepeatInterleaveWithDim, In self, In repeats, int64_t dim, int64_t, Out out) { out = at::repeat_interleave(self, repeats, dim); }
OPERATOR(Flip, In self, Ints dims, Out out) { out = at::flip(self, dims); }
OPERATOR(Roll, In self, Ints shifts, Ints dims, Out out) { out = at::roll(self, shifts, dims); }
OPERATOR(Tril, In self, int64_t diagonal, Out out) { out = at::tril(self, diagonal); }
OPERATOR(Triu, In self, int64_t diagonal, Out out) { out = at::triu(self, diagonal); }
OPERATOR(InplaceTril, InOut self, int64_t diagonal) { self = at::tril(self, diagonal); }
OPERATOR(InplaceTriu, InOut self, int64_t diagonal) { self = at::triu(self, diagonal); }
OPERATOR(ConstantPadNd, In self, Ints padding, Scalar value, Out out) { out = at::constant_pad_nd(self, padding, value); }
OPERATOR(ReflectionPad1d, In self, Ints padding, Out out) { out = at::reflection_pad1d(self, padding); }
OPERATOR(ReflectionPad1dBackward, In grad, In self, Ints padding, Out out) { out = at::reflection_pad1d_backward(grad, self, padding); }
OPERATOR(ReflectionPad2d, In self, Ints padding, Out out) { out = at::reflection_pad2d(self, padding); }
OPERATOR(ReflectionPad2dBackward, In grad, In self, Ints padding, Out out) { out = at::reflection_pad2d_backward(grad, self, padding); }
OPERATOR(ReplicationPad1d, In self, Ints padding, Out out) { out = at::replication_pad1d(self, padding); }
OPERATOR(ReplicationPad1dBackward, In grad, In self, Ints padding, Out out) { out = at::replication_pad1d_backward(grad, self, padding); }
OPERATOR(ReplicationPad2d, In self, Ints padding, Out out) { out = at::replication_pad2d(self, padding); }
OPERATOR(ReplicationPad2dBackward, In grad, In self, Ints padding, Out out) { out = at::replication_pad2d_backward(grad, self, padding); }
OPERATOR(UnfoldGrad, In grad, Ints sizes, int64_t dim, int64_t size, int64_t step, Out out) { out = at::unfold_backward(grad, sizes, dim, size, step); }
OPERATOR(Im2col, In self, Ints kernel, Ints dilation, Ints padding, Ints stride, Out out) { out = at::im2col(self, kernel, dilation, padding, stride); }
OPERATOR(Im2colBackward, In self, Ints size, Ints kernel, Ints dilation, Ints padding, Ints stride, Out out) { out = at::col2im(self, size, kernel, dilation, padding, stride); }

// torch_npu writes "no index for this dimension" as an empty tensor of one dimension.
static c10::List<std::optional<at::Tensor>> indices_of(const InList& list) {
  c10::List<std::optional<at::Tensor>> indices;
  for (const In& each : list) {
    bool absent = each.numel() == 0 && each.dim() == 1 && each.is_floating_point();
    indices.push_back(absent ? std::nullopt : each.optional());
  }
  return indices;
}

OPERATOR(Index, In self, InList indices, Out out) { out = at::index(self, indices_of(indices)); }
OPERATOR(IndexPutImpl, InOut self, InList indices, In value, bool accumulate, bool) { self = at::index_put(self, indices_of(indices), value, accumulate); }
OPERATOR(IndexSelect, In self, int64_t dim, In index, Out out) { out = at::index_select(self, dim, index); }
OPERATOR(IndexAdd, In self, int64_t dim, In index, In source, Scalar alpha, Out out) { out = at::index_add(self, dim, index, source, alpha); }
OPERATOR(IndexCopy, In self, int64_t dim, In index, In source, Out out) { out = at::index_copy(self, dim, index, source); }
OPERATOR(InplaceIndexCopy, InOut self, int64_t dim, In index, In source) { self = at::index_copy(self, dim, index, source); }
OPERATOR(IndexFillTensor, In self, int64_t dim, Ints index, Scalar value, Out out) { out = at::index_fill(self, dim, at::tensor(index), value); }
OPERATOR(InplaceIndexFillTensor, InOut self, int64_t dim, Ints index, Scalar value) { self = at::index_fill(self, dim, at::tensor(index), value); }
OPERATOR(IndexFill, In self, int64_t dim, In index, Scalar value, Out out) { out = at::index_fill(self, dim, index, value); }
OPERATOR(InplaceIndexFill, InOut self, int64_t dim, In index, Scalar value) { self = at::index_fill(self, dim, index, value); }
OPERATOR(Gather, In self, int64_t dim, In index, Out out) { out = at::gather(self, dim, index); }
OPERATOR(ScatterAdd, In self, int64_t dim, In index, In source, Out out) { out = at::scatter_add(self, dim, index, source); }
OPERATOR(InplaceMaskedScatter, InOut self, In mask, In source) { self = at::masked_scatter(self, mask, source); }
OPERATOR(Take, In self, In index, Out out) { out = at::take(self, index); }
OPERATOR(Embedding, In weight, In indices, Out out) { out = at::embedding(weight, indices); }
OPERATOR(EmbeddingDenseBackward, In grad, In indices, int64_t count, int64_t padding, bool by_frequency, Out out) { out = at::embedding_dense_backward(grad, indices, count, padding, by_frequency); }
OPERATOR(OneHot, In self, int64_t depth, In on, In off, int64_t, Out out) { out = at::where(at::one_hot(self.to(at::kLong), depth).to(at::kBool), on.reshape({}), off.reshape({})); }

// Reductions of a scatter as torch_npu numbers them.
template <class Source>
static at::Tensor scatter(const at::Tensor& self, int64_t dim, const at::Tensor& index, const Source& source, int64_t reduction) {
  if (reduction == 0) return at::scatter(self, dim, index, source);
  return at::scatter(self, dim, index, source, reduction == 1 ? "add" : "multiply");
}

OPERATOR(Scatter, In self, int64_t dim, In index, In source, int64_t reduction, Out out) { out = scatter<at::Tensor>(self, dim, index, source, reduction); }
OPERATOR(ScatterValue, In self, int64_t dim, In index, Scalar value, int64_t reduction, Out out) { out = scatter<Scalar>(self, dim, index, value, reduction); }
OPERATOR(InplaceScatter, InOut self, int64_t dim, In index, In source, int64_t reduction) { self = scatter<at::Tensor>(self, dim, index, source, reduction); }
OPERATOR(InplaceScatterValue, InOut self, int64_t dim, In index, Scalar value, int64_t reduction) { self = scatter<Scalar>(self, dim, index, value, reduction); }

// ---- products of matrices; the trailing int8_t says how the cube unit may round ------------------------------------------

OPERATOR(Mm, In self, In other, Out out, int8_t) { out = at::mm(self, other); }
OPERATOR(Matmul, In self, In other, Out out, int8_t) { out = at::matmul(self, other); }
OPERATOR(BatchMatMul, In self, In other, Out out, int8_t) { out = at::bmm(self, other); }
OPERATOR(Addmm, In self, In a, In b, Scalar beta, Scalar alpha, Out out, int8_t) { out = at::addmm(self, a, b, beta, alpha); }
OPERATOR(InplaceAddmm, InOut self, In a, In b, Scalar beta, Scalar alpha, int8_t) { self = at::addmm(self, a, b, beta, alpha); }
OPERATOR(Baddbmm, In self, In a, In b, Scalar beta, Scalar alpha, Out out, int8_t) { out = at::baddbmm(self, a, b, beta, alpha); }
OPERATOR(Addbmm, In self, In a, In b, Scalar beta, Scalar alpha, Out out, int8_t) { out = at::addbmm(self, a, b, beta, alpha); }
OPERATOR(Addmv, In self, In a, In b, Scalar alpha, Scalar beta, Out out, int8_t) { out = at::addmv(self, a, b, beta, alpha); }
OPERATOR(Addr, In self, In a, In b, Scalar beta, Scalar alpha, Out out) { out = at::addr(self, a, b, beta, alpha); }
OPERATOR(Mv, In self, In vector, Out out, int8_t) { out = at::mv(self, vector); }
OPERATOR(Dot, In self, In other, Out out) { out = at::dot(self, other); }
