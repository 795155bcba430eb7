#include "standin.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>

namespace standin {

std::optional<std::string> setting(const char* name) {
  const char* value = std::getenv((std::string("ASCEND_STANDIN_") + name).c_str());
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

int64_t setting(const char* name, int64_t otherwise) {
  auto text = setting(name);
  if (!text) return otherwise;
  char* end = nullptr;
  int64_t value = std::strtoll(text->c_str(), &end, 10);
  if (*end != '\0' || value < 0)
    refuse(std::string("ASCEND_STANDIN_") + name + " must be a whole number, not '" + *text + "'");
  return value;
}

void refuse(const std::string& what) {
  std::string line = "ascend stand-in: " + what + "\n";
  [[maybe_unused]] auto written = write(STDERR_FILENO, line.data(), line.size());
  std::abort();
}

namespace {

// "%r" in a journal's path stands for the rank, so that the processes of one job can write to files of their own.
std::string with_rank(std::string path) {
  const char* rank = std::getenv("RANK");
  for (size_t at; (at = path.find("%r")) != std::string::npos;) path.replace(at, 2, rank ? rank : "0");
  return path;
}

// A file that lines are appended to, unbuffered: a line is readable as soon as its operator has run, and the
// lines of several processes, or a marker appended by a test, fall between lines, never into one.
class Journal {
 public:
  explicit Journal(const char* switch_name) {
    auto path = setting(switch_name);
    if (!path) return;
    descriptor_ = open(with_rank(*path).c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (descriptor_ < 0) refuse(std::string("cannot write ASCEND_STANDIN_") + switch_name + "=" + *path);
  }
  bool is_open() const { return descriptor_ >= 0; }
  void write_line(const std::string& line) const {
    if (is_open()) [[maybe_unused]] auto written = write(descriptor_, line.data(), line.size());
  }

 private:
  int descriptor_ = -1;
};

const Journal& operator_log() {
  static const Journal journal("OPLOG");
  return journal;
}

}  // namespace

bool logs_operators() { return operator_log().is_open(); }

void log_operator(const char* name, int64_t bytes_read, int64_t bytes_written, const std::string& tensors) {
  operator_log().write_line(std::string(name) + '\t' + std::to_string(bytes_read) + '\t' + std::to_string(bytes_written) + '\t' + tensors + '\n');
}

void trace(const char* event, const char* detail, int64_t bytes) {
  static const Journal journal("TRACE");
  journal.write_line(std::string(event) + '\t' + detail + '\t' + std::to_string(bytes) + '\n');
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::destroyed: return "a destroyed object";
    case Kind::tensor: return "aclTensor";
    case Kind::tensor_list: return "aclTensorList";
    case Kind::scalar: return "aclScalar";
    case Kind::scalar_list: return "aclScalarList";
    case Kind::int_array: return "aclIntArray";
    case Kind::bool_array: return "aclBoolArray";
    case Kind::float_array: return "aclFloatArray";
    case Kind::executor: return "aclOpExecutor";
    case Kind::context: return "aclrtContext";
    case Kind::stream: return "aclrtStream";
    case Kind::event: return "aclrtEvent";
    case Kind::physical_memory: return "aclrtDrvMemHandle";
    case Kind::communicator: return "HcclComm";
  }
  return "something that is no object of the stand-in";
}

}  // namespace standin
