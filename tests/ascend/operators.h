// How an operator is written, and how its call travels from torch_npu to an ATen kernel.
//
//   OPERATOR(Add, In self, In other, Scalar alpha, Out out) { out = at::add(self, other, alpha); }
//
// defines the two functions that torch_npu looks up, aclnnAddGetWorkspaceSize(self, other, alpha, out, &bytes,
// &executor) and aclnnAdd(workspace, bytes, executor, stream). The first packs the call, the second writes it to the
// operator log and runs the body on CPU tensors that lie over the device's memory.
//
// Parameter types of a body, each with the type that crosses the C interface (a wrong one is a crash or garbage:
// int64_t, double and float are different things there):
//   In, Out, InOut          aclTensor*      read, written, both; an optional tensor that is absent is undefined
//   InList, OutList, ...    aclTensorList*
//   Scalar, OptionalScalar  aclScalar*
//   Scalars                 aclScalarList*
//   Ints, OptionalInts      aclIntArray*    absent: empty, nullopt
//   Bools                   aclBoolArray*
//   Dtype                   aclDataType
//   Text                    const char*
//   bool, int8_t, int64_t, uint64_t, float, double   themselves
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <tuple>
#include <vector>

#include "acl/acl.h"
#include "standin.h"

using at::Scalar;

struct aclTensor : standin::Tagged<standin::Kind::tensor> {
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;
  char* data;  // the first element of the view
};
struct aclScalar : standin::Tagged<standin::Kind::scalar> { at::Scalar value; };
struct aclIntArray : standin::Tagged<standin::Kind::int_array> { std::vector<int64_t> values; };
struct aclBoolArray : standin::Tagged<standin::Kind::bool_array> { std::vector<uint8_t> values; };
struct aclFloatArray : standin::Tagged<standin::Kind::float_array> { std::vector<float> values; };
struct aclTensorList : standin::Tagged<standin::Kind::tensor_list> { std::vector<const aclTensor*> values; };
struct aclScalarList : standin::Tagged<standin::Kind::scalar_list> { std::vector<const aclScalar*> values; };

// A packed call.
struct aclOpExecutor : standin::Tagged<standin::Kind::executor> {
  explicit aclOpExecutor(const char* name) : name(name) {}
  virtual ~aclOpExecutor() = default;
  virtual void run() = 0;
  const char* const name;
};

namespace standin {

struct Traffic;

at::ScalarType dtype_of(aclDataType dtype);
at::Tensor tensor_over(const aclTensor* handle);       // undefined where the handle is null
int64_t bytes_touched(const at::Tensor& tensor);       // elements that are expanded (stride 0) count once
void set_view_shape(const aclTensor* handle, at::IntArrayRef sizes);
void store(const at::Tensor& destination, const at::Tensor& value);
double fault_factor(const char* name);                 // 1 unless ASCEND_STANDIN_FAULT names the operator
bool runs(const Traffic& traffic);                     // with ASCEND_STANDIN_NOOP=1 only what handles mere scalars
int run_and_destroy(aclOpExecutor* executor);

struct In : at::Tensor {
  explicit In(const aclTensor* handle) : at::Tensor(tensor_over(handle)) {}
  std::optional<at::Tensor> optional() const { return defined() ? std::optional<at::Tensor>(*this) : std::nullopt; }
};

// Assigning to an output copies the value into the device's memory, cast to the output's type. A shape that differs
// from what torch_npu made room for ends the process. An output that is not wanted is undefined and ignores it.
struct Out : at::Tensor {
  explicit Out(const aclTensor* handle) : at::Tensor(tensor_over(handle)), handle_(handle) {}
  Out(const Out&) = default;
  void operator=(const at::Tensor& value) const { store(*this, value); }
  void operator=(const Out& value) const { store(*this, value); }
  // For operators whose result's size depends on its data: torch_npu asks for the size afterwards.
  void store_with_size(const at::Tensor& value) const {
    set_view_shape(handle_, value.sizes());
    at::Tensor(tensor_over(handle_)).copy_(value);
  }

 private:
  const aclTensor* handle_;
};

struct InOut : Out {
  using Out::Out;
  InOut(const InOut&) = default;
  using Out::operator=;
  void operator=(const InOut& value) const { store(*this, value); }
};

template <class T>
struct ListOf : std::vector<T> {
  explicit ListOf(const aclTensorList* handle) {
    if (handle == nullptr) return;
    for (const aclTensor* each : handle->values) this->emplace_back(each);
  }
  std::vector<at::Tensor> tensors() const { return {this->begin(), this->end()}; }
};
using InList = ListOf<In>;
using OutList = ListOf<Out>;
using InOutList = ListOf<InOut>;

struct OptionalScalar : std::optional<Scalar> { using std::optional<Scalar>::optional; };
using Scalars = std::vector<Scalar>;
using Ints = at::IntArrayRef;
using OptionalInts = at::OptionalIntArrayRef;
using Bools = std::vector<bool>;
using Dtype = at::ScalarType;
using Text = std::string;

// ---- from the C interface to a body's parameters -----------------------------------------------------------------

// Wire<T>::Type crosses the C interface; Wire<T>::Kept lives until the call has run.
template <class T>
struct Wire {
  using Type = T;
  using Kept = T;
  static T unpack(T value) { return value; }
};

template <class T, class Handle>
struct Opaque {
  using Type = const Handle*;
  using Kept = const Handle*;
};

template <> struct Wire<In> : Opaque<In, aclTensor> { static In unpack(Type handle) { return In(handle); } };
template <> struct Wire<Out> : Opaque<Out, aclTensor> { static Out unpack(Type handle) { return Out(handle); } };
template <> struct Wire<InOut> : Opaque<InOut, aclTensor> { static InOut unpack(Type handle) { return InOut(handle); } };

template <class T> struct Wire<ListOf<T>> : Opaque<ListOf<T>, aclTensorList> {
  static ListOf<T> unpack(const aclTensorList* handle) { return ListOf<T>(handle); }
};

template <> struct Wire<Scalar> : Opaque<Scalar, aclScalar> {
  static Scalar unpack(Type handle) { return handle->value; }
};

template <> struct Wire<OptionalScalar> : Opaque<OptionalScalar, aclScalar> {
  static OptionalScalar unpack(Type handle) { return handle ? OptionalScalar(handle->value) : OptionalScalar(); }
};

template <> struct Wire<Scalars> : Opaque<Scalars, aclScalarList> {
  static Scalars unpack(Type handle) {
    Scalars values;
    for (const aclScalar* each : handle->values) values.push_back(each->value);
    return values;
  }
};

template <> struct Wire<Ints> : Opaque<Ints, aclIntArray> {
  static Ints unpack(Type handle) { return handle ? Ints(handle->values) : Ints(); }
};

template <> struct Wire<OptionalInts> : Opaque<OptionalInts, aclIntArray> {
  static OptionalInts unpack(Type handle) { return handle ? OptionalInts(handle->values) : OptionalInts(); }
};

template <> struct Wire<Bools> : Opaque<Bools, aclBoolArray> {
  static Bools unpack(Type handle) { return Bools(handle->values.begin(), handle->values.end()); }
};

template <> struct Wire<Dtype> {
  using Type = aclDataType;
  using Kept = aclDataType;
  static Dtype unpack(aclDataType dtype) { return dtype_of(dtype); }
};

template <> struct Wire<Text> {  // the caller's string may be gone when the call runs
  using Type = const char*;
  using Kept = std::string;
  static const Text& unpack(const Text& text) { return text; }
};

// ---- what a parameter reads and writes, and its fault --------------------------------------------------------------

struct Traffic {
  int64_t read = 0, written = 0;

  void add(const In& input) { read += bytes_touched(input); }
  void add(const Out& output) { written += bytes_touched(output); }
  void add(const InOut& both) { read += bytes_touched(both), written += bytes_touched(both); }
  template <class T> void add(const ListOf<T>& list) { for (const T& each : list) add(each); }
  template <class T> std::enable_if_t<!std::is_base_of_v<at::Tensor, T>> add(const T&) {}
};

// The tensors of a call for the operator log, separated by spaces: role (r, w, b for both), dtype, sizes, strides, such
// as "r:Half:2,3,4:12,4,1"; "-" for one that is absent; a list in brackets.
struct Description {
  std::string text;

  void add(const In& input) { add_tensor('r', input); }
  void add(const Out& output) { add_tensor('w', output); }
  void add(const InOut& both) { add_tensor('b', both); }
  template <class T> void add(const ListOf<T>& list) {
    text += "[ ";
    for (const T& each : list) add(each);
    text += "] ";
  }
  template <class T> std::enable_if_t<!std::is_base_of_v<at::Tensor, T>> add(const T&) {}

 private:
  void add_tensor(char role, const at::Tensor& tensor);
};

void falsify(const Out& output, double factor);
template <class T> std::enable_if_t<std::is_base_of_v<Out, T>> falsify(const ListOf<T>& list, double factor) { for (const T& each : list) falsify(each, factor); }
template <class T> std::enable_if_t<!std::is_base_of_v<Out, T>> falsify(const T&, double) {}

// ---- the call --------------------------------------------------------------------------------------------------------

template <class T> void check(const char* name, T* handle) { checked(handle, name); }
template <class T> void check(const char*, T) {}
inline void check(const char*, const char*) {}

template <class... Parameters>
struct Call final : aclOpExecutor {
  using Body = void (*)(Parameters...);

  Call(const char* name, Body body, typename Wire<Parameters>::Type... arguments) : aclOpExecutor(name), body(body), arguments(arguments...) {
    (check(name, arguments), ...);
  }

  void run() override {
    std::apply([this](const auto&... each) { run_with(Wire<Parameters>::unpack(each)...); }, arguments);
  }

 private:
  void run_with(const Parameters&... unpacked) const {
    Traffic traffic;
    (traffic.add(unpacked), ...);
    if (logs_operators()) {
      Description description;
      (description.add(unpacked), ...);
      log_operator(name, traffic.read, traffic.written, description.text);
    }
    if (!runs(traffic)) return;
    body(unpacked...);
    double factor = fault_factor(name);
    if (factor != 1) (falsify(unpacked, factor), ...);
  }

  Body body;
  std::tuple<typename Wire<Parameters>::Kept...> arguments;
};

using Address = void (*)();

// The functions with C linkage: their parameters follow from the body's, so the body is written only once.
template <auto body, const char* name> struct Entry;
template <class... Parameters, void (*body)(Parameters...), const char* name>
struct Entry<body, name> {
  static int pack(typename Wire<Parameters>::Type... arguments, uint64_t* workspace_bytes, aclOpExecutor** executor) {
    *workspace_bytes = 0;
    *executor = new Call<Parameters...>(name, body, arguments...);
    return 0;
  }
};

}  // namespace standin

// An indirect function (ifunc) gives a symbol the address that its resolver returns: the way to give a template's
// instance a C name without repeating its parameters.
#define OPERATOR(Name, ...)                                                                             \
  static void Name(__VA_ARGS__);                                                                        \
  static constexpr char name_of_##Name[] = "aclnn" #Name;                                               \
  extern "C" {                                                                                          \
  static Address resolve_aclnn##Name() { return reinterpret_cast<Address>(&Entry<&Name, name_of_##Name>::pack); } \
  void aclnn##Name##GetWorkspaceSize() __attribute__((ifunc("resolve_aclnn" #Name)));                   \
  int aclnn##Name(void*, uint64_t, aclOpExecutor* executor, aclrtStream) { return run_and_destroy(executor); } \
  }                                                                                                     \
  static void Name(__VA_ARGS__)
