// What the three stand-in libraries share: switches, refusals and the two journals.
// The functions live in libascendcl.so, on which the other libraries depend.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace standin {

// The value of the environment variable ASCEND_STANDIN_<name>, if it is set and not empty.
std::optional<std::string> setting(const char* name);
int64_t setting(const char* name, int64_t otherwise);

// Prints one line that says what was asked for and ends the process. torch_npu goes on after a failed
// operator and computes garbage, so the first failure must be the last thing that happens.
[[noreturn]] void refuse(const std::string& what);

// One line in the operator log: the bytes that a device would have read and written, and the operator's tensors.
void log_operator(const char* name, int64_t bytes_read, int64_t bytes_written, const std::string& tensors);
bool logs_operators();

// One line in the trace. `bytes` is zero where nothing is moved.
void trace(const char* event, const char* detail, int64_t bytes = 0);

// The text that aclGetRecentErrMsg() hands out next.
void set_error_message(const std::string& message);

// Every opaque struct of the C interface begins with its kind. An argument in a wrong place is then named
// instead of ending in a segmentation fault far away.
enum class Kind : uint64_t {
  destroyed = 0x5354414e44000000,
  tensor, tensor_list, scalar, scalar_list, int_array, bool_array, float_array, executor,
  context, stream, event, physical_memory, communicator,
};

const char* name_of(Kind kind);

template <Kind expected>
struct Tagged {
  static constexpr Kind kind = expected;
  Kind tag = expected;
  Tagged() = default;
  Tagged(const Tagged&) = delete;
  Tagged& operator=(const Tagged&) = delete;
  ~Tagged() { *const_cast<volatile Kind*>(&tag) = Kind::destroyed; }
};

template <class T>
T* checked(T* handle, const char* user) {
  if (handle != nullptr && handle->tag != T::kind)
    refuse(std::string(user) + ": expected " + name_of(T::kind) + ", got " + name_of(handle->tag));
  return handle;
}

}  // namespace standin
