// libascendcl.so: devices, memory, streams, events and copies.
//
// A device is a number, its memory is host memory, and a stream runs each task at the moment it is given one, in
// the thread that gives it. So an event is complete as soon as it is recorded and waiting never waits. What a real
// device would have waited for is written to the trace.

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <sstream>
#include <unordered_map>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "standin.h"

using standin::checked;
using standin::Kind;
using standin::setting;
using standin::Tagged;
using standin::trace;

namespace {

constexpr size_t kMaxDevices = 64;
constexpr size_t kAlignment = 512;  // what CANN promises for device memory

struct Context : Tagged<Kind::context> { int32_t device = 0; };
struct Stream : Tagged<Kind::stream> { int32_t id = 0; };
struct Event : Tagged<Kind::event> { std::chrono::steady_clock::time_point recorded{}; };
struct PhysicalMemory : Tagged<Kind::physical_memory> { size_t size = 0; int32_t device = 0; };

int32_t installed_devices() {
  auto count = static_cast<int32_t>(setting("DEVICES", 8));
  if (count < 1 || count > static_cast<int32_t>(kMaxDevices)) standin::refuse("ASCEND_STANDIN_DEVICES must be 1 to 64");
  return count;
}

// The devices that ASCEND_RT_VISIBLE_DEVICES leaves to this process: its list up to the first number that is none or
// was there before. They are numbered anew, and all are alike, so their count is all there is to know.
int32_t visible_devices() {
  int32_t installed = installed_devices();
  const char* list = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (list == nullptr || *list == '\0') return installed;
  std::set<int32_t> seen;
  std::istringstream words(list);
  for (std::string word; std::getline(words, word, ',');) {
    char* end = nullptr;
    auto device = static_cast<int32_t>(std::strtol(word.c_str(), &end, 10));
    if (end == word.c_str() || *end != '\0' || device < 0 || device >= installed || !seen.insert(device).second) break;
  }
  return static_cast<int32_t>(seen.size());
}

int32_t device_count() {
  static const int32_t count = visible_devices();
  return count;
}

Context* context_of(int32_t device) {
  static std::array<Context, kMaxDevices> contexts;
  contexts[device].device = device;
  return &contexts[device];
}

thread_local Context* current_context = nullptr;
thread_local std::string error_message;

aclError fail(aclError code, const std::string& message) {
  standin::set_error_message(message);
  return code;
}

// ---- memory ------------------------------------------------------------------------------------------------

struct Ledger {
  size_t capacity = static_cast<size_t>(setting("MEMORY", int64_t{64} << 30));
  std::array<std::atomic<size_t>, kMaxDevices> used{};
  std::mutex mutex;
  std::unordered_map<void*, std::pair<size_t, int32_t>> blocks;

  bool take(int32_t device, size_t size) {
    if (used[device].fetch_add(size) + size <= capacity) return true;
    used[device] -= size;
    return false;
  }
};

Ledger& ledger() {
  static auto* instance = new Ledger;  // never destroyed: torch_npu frees memory while the process ends
  return *instance;
}

aclError out_of_memory(size_t size) {
  return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no " + std::to_string(size) + " bytes left on the device");
}

aclError allocate(void** pointer, size_t size) {
  if (current_context == nullptr) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device is set in this thread");
  int32_t device = current_context->device;
  size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
  if (!ledger().take(device, rounded)) return out_of_memory(size);
  *pointer = std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
  if (*pointer == nullptr) standin::refuse("this machine has no " + std::to_string(size) + " bytes of memory left");
  std::lock_guard lock(ledger().mutex);
  ledger().blocks[*pointer] = {rounded, device};
  return ACL_SUCCESS;
}

// ---- copies ------------------------------------------------------------------------------------------------

const char* name_of(aclrtMemcpyKind kind) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST: return "H2H";
    case ACL_MEMCPY_HOST_TO_DEVICE:
    case ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE: return "H2D";
    case ACL_MEMCPY_DEVICE_TO_HOST: return "D2H";
    case ACL_MEMCPY_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INNER_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INTER_DEVICE_TO_DEVICE: return "D2D";
    default: return "default";
  }
}

aclError copy(const char* event, void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind kind) {
  if (size > room) standin::refuse("a copy of " + std::to_string(size) + " bytes into " + std::to_string(room));
  trace(event, name_of(kind), static_cast<int64_t>(size));
  std::memmove(to, from, size);
  return ACL_SUCCESS;
}

}  // namespace

void standin::set_error_message(const std::string& message) { error_message = message; }

extern "C" {

// ---- process and device ------------------------------------------------------------------------------------

aclError aclInit(const char*) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }
void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

const char* aclrtGetSocName() {
  static const std::string name = setting("CHIP").value_or("Ascend910B3");
  return name.c_str();
}

const char* aclGetRecentErrMsg() { return error_message.c_str(); }
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = static_cast<uint32_t>(device_count());
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count())
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "device " + std::to_string(device) + " of " + std::to_string(device_count()));
  current_context = context_of(device);
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* device) {
  if (current_context == nullptr) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = current_context->device;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }

aclError aclrtGetCurrentContext(aclrtContext* context) {
  *context = current_context;
  return current_context == nullptr ? ACL_ERROR_RT_CONTEXT_NULL : ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  current_context = checked(static_cast<Context*>(context), "aclrtSetCurrentContext");
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  if (flags != nullptr) *flags = 0;
  *active = current_context != nullptr && current_context->device == device;
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can_access, int32_t, int32_t) {
  *can_access = 1;
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

aclError aclrtDeviceGetBareTgid(int32_t* process) {
  *process = getpid();
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t* value) {
  switch (what) {  // an Ascend 910B3's
    case ACL_DEVICE_INFO_AI_CORE_NUM: *value = 20; return ACL_SUCCESS;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM: *value = 40; return ACL_SUCCESS;
    case ACL_DEVICE_INFO_L2_SIZE: *value = int64_t{192} << 20; return ACL_SUCCESS;
    default: return ACL_ERROR_INVALID_PARAM;
  }
}

aclError aclGetCannAttributeList(const aclCannAttr** attributes, size_t* count) {
  static const aclCannAttr supported[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16, ACL_CANN_ATTR_JIT_COMPILE};
  *attributes = supported;
  *count = std::size(supported);
  return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  *value = attribute != ACL_CANN_ATTR_JIT_COMPILE;
  return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  *version = {};
  setting("CANN").value_or("9.0.0").copy(version->version, sizeof version->version - 1);
  return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, setting("CANN").value_or("9.0.0").c_str());
  return ACL_SUCCESS;
}

// Options. "disable" for just-in-time compilation is what sends torch_npu to the aclnn operators.
size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof "disable"; }

aclError aclGetCompileopt(aclCompileOpt, char* value, size_t length) {
  std::strncpy(value, "disable", length);
  return ACL_SUCCESS;
}

aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }

static std::array<std::atomic<int64_t>, 16> system_parameters;

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  system_parameters.at(option) = value;
  return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  *value = system_parameters.at(option);
  return ACL_SUCCESS;
}

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }

aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  *actual = timeout;
  return ACL_SUCCESS;
}

// ---- memory ------------------------------------------------------------------------------------------------

aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) { return allocate(pointer, size); }
aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy) { return allocate(pointer, size); }

aclError aclrtFree(void* pointer) {
  std::lock_guard lock(ledger().mutex);
  auto block = ledger().blocks.find(pointer);
  if (block == ledger().blocks.end()) standin::refuse("aclrtFree of memory that is not allocated");
  ledger().used[block->second.second] -= block->second.first;
  ledger().blocks.erase(block);
  std::free(pointer);
  return ACL_SUCCESS;
}

aclError aclrtMallocHost(void** pointer, size_t size) {
  *pointer = std::aligned_alloc(kAlignment, (size + kAlignment) / kAlignment * kAlignment);
  return *pointer == nullptr ? ACL_ERROR_BAD_ALLOC : ACL_SUCCESS;
}

aclError aclrtFreeHost(void* pointer) {
  std::free(pointer);
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  if (current_context == nullptr) return ACL_ERROR_RT_CONTEXT_NULL;
  *total = ledger().capacity;
  *free = *total - ledger().used[current_context->device];
  return ACL_SUCCESS;
}

// Expandable segments: address space is reserved first, memory is put under it later.
aclError aclrtReserveMemAddress(void** pointer, size_t size, size_t, void* hint, uint64_t) {
  *pointer = mmap(hint, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return ACL_ERROR_BAD_ALLOC;
  std::lock_guard lock(ledger().mutex);
  ledger().blocks[*pointer] = {size, -1};
  return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void* pointer) {
  std::lock_guard lock(ledger().mutex);
  auto block = ledger().blocks.extract(pointer);
  if (!block) standin::refuse("aclrtReleaseMemAddress of addresses that are not reserved");
  munmap(pointer, block.mapped().first);
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t size, const aclrtPhysicalMemProp* property, uint64_t) {
  auto device = static_cast<int32_t>(property->location.id);
  if (!ledger().take(device, size)) return out_of_memory(size);
  auto* memory = new PhysicalMemory;
  memory->size = size;
  memory->device = device;
  *handle = memory;
  return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto* memory = checked(static_cast<PhysicalMemory*>(handle), "aclrtFreePhysical");
  ledger().used[memory->device] -= memory->size;
  delete memory;
  return ACL_SUCCESS;
}

static std::unordered_map<void*, size_t>& mapped_sizes() {
  static auto* sizes = new std::unordered_map<void*, size_t>;
  return *sizes;
}

aclError aclrtMapMem(void* pointer, size_t size, size_t, aclrtDrvMemHandle, uint64_t) {
  std::lock_guard lock(ledger().mutex);
  mapped_sizes()[pointer] = size;
  return mprotect(pointer, size, PROT_READ | PROT_WRITE) == 0 ? ACL_SUCCESS : ACL_ERROR_BAD_ALLOC;
}

aclError aclrtUnmapMem(void* pointer) {
  std::lock_guard lock(ledger().mutex);
  size_t size = mapped_sizes().extract(pointer).mapped();
  madvise(pointer, size, MADV_DONTNEED);
  return mprotect(pointer, size, PROT_NONE) == 0 ? ACL_SUCCESS : ACL_ERROR_BAD_ALLOC;
}

// ---- copies ------------------------------------------------------------------------------------------------

aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind kind) {
  return copy("copy", to, room, from, size, kind);
}

aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind kind, aclrtStream) {
  return copy("copy_async", to, room, from, size, kind);
}

aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind kind, aclrtStream) {
  return copy("copy_async", to, room, from, size, kind);
}

aclError aclrtMemset(void* pointer, size_t room, int32_t value, size_t size) {
  if (size > room) standin::refuse("aclrtMemset past the end of its memory");
  std::memset(pointer, value, size);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* pointer, size_t room, int32_t value, size_t size, aclrtStream) {
  return aclrtMemset(pointer, room, value, size);
}

// ---- streams -----------------------------------------------------------------------------------------------

aclError aclrtCreateStream(aclrtStream* stream) {
  static std::atomic<int32_t> next_id{0};
  auto* created = new Stream;
  created->id = next_id++;
  *stream = created;
  return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }

aclError aclrtDestroyStream(aclrtStream stream) {
  delete checked(static_cast<Stream*>(stream), "aclrtDestroyStream");
  return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return ACL_SUCCESS; }

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  *id = stream == nullptr ? 0 : checked(static_cast<Stream*>(stream), "aclrtStreamGetId")->id;
  return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus* status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(aclrtStream) {
  trace("synchronize", "stream");
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }

aclError aclrtSynchronizeDevice(void) {
  trace("synchronize", "device");
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  checked(static_cast<Stream*>(stream), "aclrtStreamWaitEvent");
  checked(static_cast<Event*>(event), "aclrtStreamWaitEvent");
  trace("wait", "stream");
  return ACL_SUCCESS;
}

aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType, aclrtStream) {
  function(argument);
  return ACL_SUCCESS;
}

aclError aclrtLaunchHostFunc(aclrtStream, aclrtHostFunc function, void* argument) {
  function(argument);
  return ACL_SUCCESS;
}

aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }

aclError aclrtProcessReport(int32_t milliseconds) {  // callbacks have run already, so there is never a report
  usleep(static_cast<useconds_t>(milliseconds > 0 ? milliseconds : 1) * 1000);
  return ACL_ERROR_RT_REPORT_TIMEOUT;
}

// ---- events ------------------------------------------------------------------------------------------------

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
  *event = new Event;
  return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }

aclError aclrtDestroyEvent(aclrtEvent event) {
  delete checked(static_cast<Event*>(event), "aclrtDestroyEvent");
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream) {
  checked(static_cast<Event*>(event), "aclrtRecordEvent")->recorded = std::chrono::steady_clock::now();
  return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream) {
  checked(static_cast<Event*>(event), "aclrtResetEvent");
  return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus* status) {
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  checked(static_cast<Event*>(event), "aclrtSynchronizeEvent");
  trace("synchronize", "event");
  return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  auto elapsed = checked(static_cast<Event*>(end), "aclrtEventElapsedTime")->recorded -
                 checked(static_cast<Event*>(start), "aclrtEventElapsedTime")->recorded;
  *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count();
  return ACL_SUCCESS;
}

}  // extern "C"
