// libopapi.so, the plumbing: tensors, scalars and arrays of the C interface, and the running of a packed call.

#include "operators.h"

#include <cstdlib>
#include <cstring>

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace standin {

at::ScalarType dtype_of(aclDataType dtype) {
  switch (dtype) {
    case ACL_FLOAT: return at::kFloat;
    case ACL_FLOAT16: return at::kHalf;
    case ACL_BF16: return at::kBFloat16;
    case ACL_DOUBLE: return at::kDouble;
    case ACL_INT8: return at::kChar;
    case ACL_INT16: return at::kShort;
    case ACL_INT32: return at::kInt;
    case ACL_INT64: return at::kLong;
    case ACL_UINT8: return at::kByte;
    case ACL_UINT16: return at::kUInt16;
    case ACL_UINT32: return at::kUInt32;
    case ACL_UINT64: return at::kUInt64;
    case ACL_BOOL: return at::kBool;
    case ACL_COMPLEX64: return at::kComplexFloat;
    case ACL_COMPLEX128: return at::kComplexDouble;
    case ACL_DT_UNDEFINED: return at::ScalarType::Undefined;
    default: refuse("no data type for aclDataType " + std::to_string(dtype));
  }
}

at::Tensor tensor_over(const aclTensor* handle) {
  if (handle == nullptr) return {};
  return at::from_blob(handle->data, handle->sizes, handle->strides, at::TensorOptions().dtype(handle->dtype));
}

int64_t bytes_touched(const at::Tensor& tensor) {
  if (!tensor.defined()) return 0;
  auto bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (tensor.stride(dim) != 0 || tensor.size(dim) == 0) bytes *= tensor.size(dim);
  return bytes;
}

void Description::add_tensor(char role, const at::Tensor& tensor) {
  if (!tensor.defined()) {
    text += "- ";
    return;
  }
  auto join = [](at::IntArrayRef values) {
    std::string joined;
    for (int64_t value : values) joined += (joined.empty() ? "" : ",") + std::to_string(value);
    return joined;
  };
  text += std::string(1, role) + ':' + at::toString(tensor.scalar_type()) + ':' + join(tensor.sizes()) + ':' + join(tensor.strides()) + ' ';
}

void falsify(const Out& output, double factor) {
  if (output.defined() && output.is_floating_point()) output.mul_(factor);
}

void set_view_shape(const aclTensor* handle, at::IntArrayRef sizes) {
  auto* tensor = const_cast<aclTensor*>(handle);
  tensor->sizes = sizes.vec();
  tensor->strides.assign(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) tensor->strides[dim - 1] = tensor->strides[dim] * sizes[dim];
}

void store(const at::Tensor& destination, const at::Tensor& value) {
  if (!destination.defined()) return;
  bool same_shape = destination.sizes() == value.sizes() || (destination.numel() == 1 && value.numel() == 1);
  TORCH_CHECK(same_shape, "its output has shape ", destination.sizes(), ", the kernel's result ", value.sizes());
  destination.copy_(value.reshape(destination.sizes()));
}

double fault_factor(const char* name) {
  static const auto fault = setting("FAULT").value_or("");
  static const size_t colon = fault.find(':');
  if (fault.empty()) return 1;
  if (colon == std::string::npos) refuse("ASCEND_STANDIN_FAULT must look like aclnnMul:1.001, not '" + fault + "'");
  return fault.compare(0, colon, name) == 0 ? std::atof(fault.c_str() + colon + 1) : 1;
}

// Without its operators a step must still find a loss scale that is a number and no overflow, so scalars are computed.
bool runs(const Traffic& traffic) {
  static const bool all = setting("NOOP", int64_t{0}) == 0;
  constexpr int64_t kScalars = 64;
  return all || traffic.read + traffic.written <= kScalars;
}

int run_and_destroy(aclOpExecutor* executor) {
  checked(executor, "an operator");
  // The kernels themselves and nothing around them: no autograd, no autocast, no Python mode of the calling thread.
  at::NoGradGuard no_grad;
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
                                           c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  try {
    executor->run();
  } catch (const std::exception& error) {
    refuse(std::string(executor->name) + ": " + error.what());
  }
  delete executor;
  return 0;
}

namespace {

bool is_private(aclFormat format) {
  switch (format) {
    case ACL_FORMAT_UNDEFINED: case ACL_FORMAT_ND: case ACL_FORMAT_NCHW: case ACL_FORMAT_NHWC: case ACL_FORMAT_NC:
    case ACL_FORMAT_NCL: case ACL_FORMAT_NCDHW: case ACL_FORMAT_NDHWC: return false;
    default: return true;
  }
}

template <class T>
T read_as(const void* value) {
  T result;
  std::memcpy(&result, value, sizeof result);
  return result;
}

Scalar read_scalar(const void* value, aclDataType dtype) {
  switch (dtype) {
    case ACL_BOOL: return read_as<bool>(value);
    case ACL_INT8: return read_as<int8_t>(value);
    case ACL_INT16: return read_as<int16_t>(value);
    case ACL_INT32: return read_as<int32_t>(value);
    case ACL_INT64: return read_as<int64_t>(value);
    case ACL_UINT8: return read_as<uint8_t>(value);
    case ACL_FLOAT16: return static_cast<double>(read_as<at::Half>(value));
    case ACL_BF16: return static_cast<double>(read_as<at::BFloat16>(value));
    case ACL_FLOAT: return static_cast<double>(read_as<float>(value));
    case ACL_DOUBLE: return read_as<double>(value);
    case ACL_COMPLEX64: return read_as<c10::complex<float>>(value);
    case ACL_COMPLEX128: return read_as<c10::complex<double>>(value);
    default: refuse("aclCreateScalar: no scalar of aclDataType " + std::to_string(dtype));
  }
}

template <class Array, class T>
Array* array_of(const T* values, uint64_t size) {
  auto* array = new Array;
  array->values.assign(values, values + size);
  return array;
}

template <class T>
int destroy(const T* handle, const char* user) {
  delete checked(handle, user);
  return 0;
}

}  // namespace
}  // namespace standin

using namespace standin;

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dims, aclDataType dtype, const int64_t* strides, int64_t offset,
                           aclFormat format, const int64_t*, uint64_t, void* storage) {
  if (is_private(format)) refuse("a tensor in the private format " + std::to_string(format));
  auto* tensor = new aclTensor;
  tensor->dtype = dtype_of(dtype);
  tensor->sizes.assign(sizes, sizes + dims);
  tensor->strides.assign(strides, strides + dims);
  tensor->data = static_cast<char*>(storage) + offset * static_cast<int64_t>(at::elementSize(tensor->dtype));
  return tensor;
}

aclScalar* aclCreateScalar(void* value, aclDataType dtype) {
  auto* scalar = new aclScalar;
  scalar->value = read_scalar(value, dtype);
  return scalar;
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) { return array_of<aclIntArray>(values, size); }
aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) { return array_of<aclBoolArray>(values, size); }
aclFloatArray* aclCreateFloatArray(const float* values, uint64_t size) { return array_of<aclFloatArray>(values, size); }
aclTensorList* aclCreateTensorList(const aclTensor* const* values, uint64_t size) { return array_of<aclTensorList>(values, size); }
aclScalarList* aclCreateScalarList(const aclScalar* const* values, uint64_t size) { return array_of<aclScalarList>(values, size); }

int aclDestroyTensor(const aclTensor* tensor) { return destroy(tensor, "aclDestroyTensor"); }
int aclDestroyScalar(const aclScalar* scalar) { return destroy(scalar, "aclDestroyScalar"); }
int aclDestroyIntArray(const aclIntArray* array) { return destroy(array, "aclDestroyIntArray"); }
int aclDestroyBoolArray(const aclBoolArray* array) { return destroy(array, "aclDestroyBoolArray"); }
int aclDestroyFloatArray(const aclFloatArray* array) { return destroy(array, "aclDestroyFloatArray"); }

// A list owns its elements.
int aclDestroyTensorList(const aclTensorList* list) {
  for (const aclTensor* each : checked(list, "aclDestroyTensorList")->values) aclDestroyTensor(each);
  return destroy(list, "aclDestroyTensorList");
}

int aclDestroyScalarList(const aclScalarList* list) {
  for (const aclScalar* each : checked(list, "aclDestroyScalarList")->values) aclDestroyScalar(each);
  return destroy(list, "aclDestroyScalarList");
}

int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* dims) {
  checked(tensor, "aclGetViewShape");
  *dims = tensor->sizes.size();
  *sizes = new int64_t[tensor->sizes.size()];  // the caller deletes it
  std::copy(tensor->sizes.begin(), tensor->sizes.end(), *sizes);
  return 0;
}

}  // extern "C"
