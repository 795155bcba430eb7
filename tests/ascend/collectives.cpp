// libhccl.so: collectives between the processes of one machine.
//
// The ranks of a communicator share one piece of anonymous memory (a memfd of the root's process, which the others
// open through /proc), so nothing is left behind however a process ends. Each rank has a slot in it; a large tensor
// goes through the slots in pieces. Every element is reduced by one rank, in the order of the ranks, so the result is
// the same bits on all of them whoever comes first.
//
// A call runs when it is given to its stream and waits for the other ranks in that place, at most HCCL_EXEC_TIMEOUT
// seconds (HCCL_CONNECT_TIMEOUT while a communicator is made). Then it names the rank that is missing.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "acl/acl.h"
#include "third_party/hccl/inc/hccl/hccl.h"
#include "standin.h"

namespace {

using Clock = std::chrono::steady_clock;
using standin::checked;

constexpr size_t kSlotBytes = size_t{2} << 20;
constexpr size_t kChannelBytes = size_t{64} << 10;
constexpr int kDefaultExecTimeout = 1836, kDefaultConnectTimeout = 120;  // HCCL's

// What a rank is about to do. All ranks must say the same, or the job would hang or mix data on a device.
struct Announcement {
  char operation[24];
  uint64_t count;
  int32_t dtype, reduction, root;
};

struct Peer {
  alignas(64) std::atomic<uint64_t> arrived;  // how many meetings this rank has come to
  std::atomic<int32_t> process;
  Announcement announcements[2];  // in turn, so that a rank that is ahead does not overwrite what others still read
};

// One direction between two ranks: the sender fills the buffer, the receiver empties it.
struct Channel {
  alignas(64) std::atomic<uint64_t> sent, received;  // pieces
  uint64_t bytes;                                    // in the piece that is under way
  char data[kChannelBytes];
};

// What HcclRootInfo carries from the root to the others.
struct RootInfo {
  char magic[16];
  int32_t process, descriptor;
};
constexpr char kMagic[] = "ascend standin";

int seconds_from(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value != nullptr && std::atoi(value) > 0 ? std::atoi(value) : otherwise;
}

size_t size_of(HcclDataType dtype) {
  switch (dtype) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_UINT32: case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
    default: standin::refuse("HCCL: no collective for data type " + std::to_string(dtype));
  }
}

// ---- the shared memory -----------------------------------------------------------------------------------------------

class Board {
 public:
  Board(int descriptor, uint32_t ranks) : ranks_(ranks) {
    size_t bytes = data_offset() + (ranks + 1) * kSlotBytes;
    if (ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) standin::refuse("HCCL: cannot size the shared memory");
    base_ = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0));
    if (base_ == MAP_FAILED) standin::refuse("HCCL: cannot map the shared memory");
    bytes_ = bytes;
  }
  ~Board() { munmap(base_, bytes_); }
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  Peer& peer(uint32_t rank) const { return reinterpret_cast<Peer*>(base_ + kHeaderBytes)[rank]; }
  Channel& channel(uint32_t from, uint32_t to) const { return reinterpret_cast<Channel*>(base_ + channels_offset())[from * ranks_ + to]; }
  char* slot(uint32_t rank) const { return base_ + data_offset() + rank * kSlotBytes; }
  char* result() const { return slot(ranks_); }

  // Every change of a counter rings; whoever waits looks again.
  void ring() const {
    bell().fetch_add(1);
    syscall(SYS_futex, &bell(), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  }

  // Waits until `done` is true; false if that did not happen before the deadline.
  bool wait(Clock::time_point deadline, const std::function<bool()>& done) const {
    for (;;) {
      uint32_t heard = bell().load();
      if (done()) return true;
      if (Clock::now() >= deadline) return false;
      timespec nap{0, 200'000'000};
      syscall(SYS_futex, &bell(), FUTEX_WAIT, heard, &nap, nullptr, 0);
    }
  }

 private:
  static constexpr size_t kHeaderBytes = 64;
  static size_t rounded(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }
  std::atomic<uint32_t>& bell() const { return *reinterpret_cast<std::atomic<uint32_t>*>(base_); }
  size_t channels_offset() const { return rounded(kHeaderBytes + ranks_ * sizeof(Peer)); }
  size_t data_offset() const { return channels_offset() + rounded(size_t{ranks_} * ranks_ * sizeof(Channel)); }

  uint32_t ranks_;
  char* base_;
  size_t bytes_;
};

// ---- the communicator ------------------------------------------------------------------------------------------------

class Communicator : public standin::Tagged<standin::Kind::communicator> {
 public:
  Communicator(int descriptor, uint32_t rank, uint32_t ranks, int exec_timeout)
      : rank(rank), ranks(ranks), board(descriptor, ranks), exec_timeout_(exec_timeout) {
    board.peer(rank).process = getpid();
  }

  // Comes to the next meeting without waiting for the others.
  void arrive() {
    board.peer(rank).arrived.store(++meetings_);
    board.ring();
  }

  // The first rank that is not at the meeting by the deadline, or -1.
  int64_t missing(Clock::time_point deadline) const {
    auto absent = [&]() -> int64_t {
      for (uint32_t each = 0; each < ranks; ++each)
        if (board.peer(each).arrived.load() < meetings_) return each;
      return -1;
    };
    board.wait(deadline, [&] { return absent() < 0; });
    return absent();
  }

  void meet(const char* operation) {
    arrive();
    int64_t absent = missing(deadline());
    if (absent >= 0) time_out(operation, static_cast<uint32_t>(absent));
  }

  // The first meeting of a collective: all ranks must mean the same.
  void agree(const char* operation, uint64_t count, int32_t dtype, int32_t reduction = -1, int32_t root = -1) {
    Announcement mine{};
    std::strncpy(mine.operation, operation, sizeof mine.operation - 1);
    mine.count = count, mine.dtype = dtype, mine.reduction = reduction, mine.root = root;
    size_t turn = agreements_++ % 2;
    board.peer(rank).announcements[turn] = mine;
    meet(operation);
    for (uint32_t each = 0; each < ranks; ++each) {
      const Announcement& theirs = board.peer(each).announcements[turn];
      if (std::memcmp(&mine, &theirs, sizeof mine) != 0)
        standin::refuse("HCCL: rank " + std::to_string(rank) + " calls " + text(mine) + " while rank " + std::to_string(each) + " calls " + text(theirs));
    }
  }

  [[noreturn]] void time_out(const char* operation, uint32_t absent) const {
    standin::refuse("HCCL: rank " + std::to_string(rank) + " waited " + std::to_string(exec_timeout_) + " s (HCCL_EXEC_TIMEOUT) in " +
                    operation + " for rank " + std::to_string(absent) + fate(absent));
  }

  std::string fate(uint32_t other) const {
    int32_t process = board.peer(other).process.load();
    if (process == 0) return ", which never came";
    return kill(process, 0) == 0 ? ", whose process " + std::to_string(process) + " is alive" : ", whose process " + std::to_string(process) + " is gone";
  }

  Clock::time_point deadline() const { return Clock::now() + std::chrono::seconds(exec_timeout_); }

  const uint32_t rank, ranks;
  const Board board;

 private:
  static std::string text(const Announcement& a) {
    return std::string(a.operation) + " of " + std::to_string(a.count) + " elements (data type " + std::to_string(a.dtype) + ", reduction " +
           std::to_string(a.reduction) + ", root " + std::to_string(a.root) + ")";
  }

  int exec_timeout_;
  uint64_t meetings_ = 0, agreements_ = 0;
};

Communicator& communicator(HcclComm handle, const char* user) {
  auto* comm = checked(static_cast<Communicator*>(handle), user);
  if (comm == nullptr) standin::refuse(std::string(user) + ": no communicator");
  return *comm;
}

// ---- reductions ------------------------------------------------------------------------------------------------------

// 16-bit floats are added in float32 and rounded once.
template <class T> struct Accumulator { using Type = T; };
template <> struct Accumulator<c10::Half> { using Type = float; };
template <> struct Accumulator<c10::BFloat16> { using Type = float; };

template <class A>
A combine(HcclReduceOp operation, A a, A b) {
  switch (operation) {
    case HCCL_REDUCE_SUM: return static_cast<A>(a + b);
    case HCCL_REDUCE_PROD: return static_cast<A>(a * b);
    case HCCL_REDUCE_MAX: return std::max(a, b);
    case HCCL_REDUCE_MIN: return std::min(a, b);
    default: standin::refuse("HCCL: no reduction " + std::to_string(operation));
  }
}

// Reduces elements [begin, end) of the same place in every rank's slot.
template <class T>
void reduce_typed(const Communicator& comm, HcclReduceOp operation, size_t begin, size_t end, void* output) {
  using A = typename Accumulator<T>::Type;
  std::vector<A> sums(end - begin);
  for (uint32_t rank = 0; rank < comm.ranks; ++rank) {
    const T* values = reinterpret_cast<const T*>(comm.board.slot(rank)) + begin;
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = rank == 0 ? static_cast<A>(values[i]) : combine<A>(operation, sums[i], static_cast<A>(values[i]));
  }
  std::copy(sums.begin(), sums.end(), static_cast<T*>(output));
}

void reduce(const Communicator& comm, HcclDataType dtype, HcclReduceOp operation, size_t begin, size_t end, void* output) {
  switch (dtype) {
    case HCCL_DATA_TYPE_INT8: return reduce_typed<int8_t>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_UINT8: return reduce_typed<uint8_t>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_INT16: return reduce_typed<int16_t>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_INT32: return reduce_typed<int32_t>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_INT64: return reduce_typed<int64_t>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_FP16: return reduce_typed<c10::Half>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_BFP16: return reduce_typed<c10::BFloat16>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_FP32: return reduce_typed<float>(comm, operation, begin, end, output);
    case HCCL_DATA_TYPE_FP64: return reduce_typed<double>(comm, operation, begin, end, output);
    default: standin::refuse("HCCL: no reduction of data type " + std::to_string(dtype));
  }
}

// ---- collectives -----------------------------------------------------------------------------------------------------

// Calls `piece(first, size)` for consecutive parts of `count` elements of which `per_slot` fit into a slot.
template <class Piece>
void in_pieces(size_t count, size_t per_slot, Piece piece) {
  for (size_t first = 0; first < count; first += per_slot) piece(first, std::min(per_slot, count - first));
}

const char* offset_by(const void* base, size_t bytes) { return static_cast<const char*>(base) + bytes; }
char* offset_by(void* base, size_t bytes) { return static_cast<char*>(base) + bytes; }

void all_reduce(Communicator& comm, const char* name, const void* input, void* output, size_t count, HcclDataType dtype, HcclReduceOp operation) {
  size_t width = size_of(dtype);
  in_pieces(count, kSlotBytes / width, [&](size_t first, size_t size) {
    std::memcpy(comm.board.slot(comm.rank), offset_by(input, first * width), size * width);
    comm.meet(name);
    size_t begin = size * comm.rank / comm.ranks, end = size * (comm.rank + 1) / comm.ranks;  // this rank's share
    reduce(comm, dtype, operation, begin, end, comm.board.result() + begin * width);
    comm.meet(name);
    if (output != nullptr) std::memcpy(offset_by(output, first * width), comm.board.result(), size * width);
  });
}

void broadcast(Communicator& comm, void* buffer, size_t bytes, uint32_t root) {
  in_pieces(bytes, kSlotBytes, [&](size_t first, size_t size) {
    if (comm.rank == root) std::memcpy(comm.board.result(), offset_by(buffer, first), size);
    comm.meet("HcclBroadcast");
    if (comm.rank != root) std::memcpy(offset_by(buffer, first), comm.board.result(), size);
    comm.meet("HcclBroadcast");
  });
}

void all_gather(Communicator& comm, const void* input, void* output, size_t bytes) {
  in_pieces(bytes, kSlotBytes, [&](size_t first, size_t size) {
    std::memcpy(comm.board.slot(comm.rank), offset_by(input, first), size);
    comm.meet("HcclAllGather");
    for (uint32_t rank = 0; rank < comm.ranks; ++rank) std::memcpy(offset_by(output, rank * bytes + first), comm.board.slot(rank), size);
    comm.meet("HcclAllGather");
  });
}

// A slot holds one part for each rank, in the order of the ranks.
void reduce_scatter(Communicator& comm, const void* input, void* output, size_t count, HcclDataType dtype, HcclReduceOp operation) {
  size_t width = size_of(dtype);
  in_pieces(count, kSlotBytes / width / comm.ranks, [&](size_t first, size_t size) {
    for (uint32_t rank = 0; rank < comm.ranks; ++rank)
      std::memcpy(comm.board.slot(comm.rank) + rank * size * width, offset_by(input, (rank * count + first) * width), size * width);
    comm.meet("HcclReduceScatter");
    reduce(comm, dtype, operation, comm.rank * size, (comm.rank + 1) * size, offset_by(output, first * width));
    comm.meet("HcclReduceScatter");
  });
}

void scatter(Communicator& comm, const void* input, void* output, size_t bytes, uint32_t root) {
  in_pieces(bytes, kSlotBytes, [&](size_t first, size_t size) {
    if (comm.rank == root)
      for (uint32_t rank = 0; rank < comm.ranks; ++rank) std::memcpy(comm.board.slot(rank), offset_by(input, rank * bytes + first), size);
    comm.meet("HcclScatter");
    std::memcpy(offset_by(output, first), comm.board.slot(comm.rank), size);
    comm.meet("HcclScatter");
  });
}

// ---- from one rank to another ----------------------------------------------------------------------------------------

struct Transfer {
  Channel* channel;
  bool sends;
  uint32_t other;
  char* data;
  size_t left;

  // Moves one piece if the other side is ready for it.
  bool advance() {
    uint64_t sent = channel->sent.load(), received = channel->received.load();
    if (left == 0 || (sent == received) != sends) return false;
    size_t size = sends ? std::min(left, kChannelBytes) : channel->bytes;
    if (size > left) standin::refuse("HCCL: rank " + std::to_string(other) + " sends more than is received");
    if (sends) {
      std::memcpy(channel->data, data, size);
      channel->bytes = size;
      channel->sent.store(sent + 1);
    } else {
      std::memcpy(data, channel->data, size);
      channel->received.store(received + 1);
    }
    data += size, left -= size;
    return true;
  }
};

Transfer sending(Communicator& comm, const void* data, size_t bytes, uint32_t to) {
  return {&comm.board.channel(comm.rank, to), true, to, static_cast<char*>(const_cast<void*>(data)), bytes};
}

Transfer receiving(Communicator& comm, void* data, size_t bytes, uint32_t from) {
  return {&comm.board.channel(from, comm.rank), false, from, static_cast<char*>(data), bytes};
}

// All transfers side by side, so no order of sends and receives can lock up.
void run(Communicator& comm, const char* operation, std::vector<Transfer> transfers) {
  auto deadline = comm.deadline();
  auto unfinished = [](const Transfer& each) { return each.left > 0; };
  while (std::any_of(transfers.begin(), transfers.end(), unfinished)) {
    bool moved = comm.board.wait(deadline, [&] {
      bool any = false;
      for (Transfer& each : transfers)
        while (each.advance()) any = true;
      return any;
    });
    if (!moved) comm.time_out(operation, std::find_if(transfers.begin(), transfers.end(), unfinished)->other);
    comm.board.ring();
  }
}

// Sends and receives between HcclGroupStart and HcclGroupEnd run together when the group ends.
struct Group {
  int depth = 0;
  std::vector<std::pair<Communicator*, Transfer>> transfers;
};
thread_local Group group;

void run_or_group(Communicator& comm, const char* operation, const Transfer& transfer) {
  if (group.depth > 0) group.transfers.emplace_back(&comm, transfer);
  else run(comm, operation, {transfer});
}

// ---- making a communicator -------------------------------------------------------------------------------------------

HcclResult fail(HcclResult code, const std::string& message) {
  standin::set_error_message(message);
  return code;
}

HcclResult connect(uint32_t ranks, const HcclRootInfo* root_info, uint32_t rank, int exec_timeout, HcclComm* result) {
  RootInfo info;
  std::memcpy(&info, root_info->internal, sizeof info);
  if (std::strcmp(info.magic, kMagic) != 0) return fail(HCCL_E_PARA, "this HcclRootInfo was not made by HcclGetRootInfo");
  bool own = info.process == getpid();
  std::string path = "/proc/" + std::to_string(info.process) + "/fd/" + std::to_string(info.descriptor);
  int descriptor = own ? info.descriptor : open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return fail(HCCL_E_TIMEOUT, "HCCL: the root's process " + std::to_string(info.process) + " is gone");

  auto comm = std::make_unique<Communicator>(descriptor, rank, ranks, exec_timeout);
  int patience = seconds_from("HCCL_CONNECT_TIMEOUT", kDefaultConnectTimeout);
  comm->arrive();
  int64_t absent = comm->missing(Clock::now() + std::chrono::seconds(patience));
  close(descriptor);
  if (absent >= 0)
    return fail(HCCL_E_TIMEOUT, "HCCL: rank " + std::to_string(rank) + " waited " + std::to_string(patience) + " s (HCCL_CONNECT_TIMEOUT) for rank " +
                                    std::to_string(absent) + comm->fate(static_cast<uint32_t>(absent)));
  *result = comm.release();
  return HCCL_SUCCESS;
}

void traced(const char* name, size_t bytes) { standin::trace("collective", name, static_cast<int64_t>(bytes)); }

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* root_info) {
  RootInfo info{};
  std::strcpy(info.magic, kMagic);
  info.process = getpid();
  info.descriptor = memfd_create("ascend_standin_hccl", MFD_CLOEXEC);
  if (info.descriptor < 0) return fail(HCCL_E_MEMORY, "HCCL: no shared memory");
  std::memset(root_info, 0, sizeof *root_info);
  std::memcpy(root_info->internal, &info, sizeof info);
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo* root_info, uint32_t rank, HcclComm* comm) {
  return connect(ranks, root_info, rank, seconds_from("HCCL_EXEC_TIMEOUT", kDefaultExecTimeout), comm);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo* root_info, uint32_t rank, const HcclCommConfig*, HcclComm* comm) {
  return HcclCommInitRootInfo(ranks, root_info, rank, comm);
}

HcclResult HcclCommDestroy(HcclComm comm) {
  delete &communicator(comm, "HcclCommDestroy");
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
  communicator(comm, "HcclGetCommAsyncError");
  *error = HCCL_SUCCESS;
  return HCCL_SUCCESS;
}

static std::atomic<int32_t> deterministic;

HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue value) {
  if (config == HCCL_DETERMINISTIC) deterministic = value.value;
  return HCCL_SUCCESS;
}

HcclResult HcclGetConfig(HcclConfig, HcclConfigValue* value) {
  value->value = deterministic;
  return HCCL_SUCCESS;
}

uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

HcclResult HcclGetCommName(HcclComm comm, char* name) {
  std::snprintf(name, COMM_NAME_MAX_LENGTH, "standin_of_%u", communicator(comm, "HcclGetCommName").ranks);
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t* ranks) {
  *ranks = communicator(comm, "HcclGetRankSize").ranks;
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  *rank = communicator(comm, "HcclGetRankId").rank;
  return HCCL_SUCCESS;
}

HcclResult HcclAllReduce(void* input, void* output, uint64_t count, HcclDataType dtype, HcclReduceOp operation, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("AllReduce", count * size_of(dtype));
  comm.agree(__func__, count, dtype, operation);
  all_reduce(comm, __func__, input, output, count, dtype, operation);
  return HCCL_SUCCESS;
}

HcclResult HcclReduce(void* input, void* output, uint64_t count, HcclDataType dtype, HcclReduceOp operation, uint32_t root, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("Reduce", count * size_of(dtype));
  comm.agree(__func__, count, dtype, operation, static_cast<int32_t>(root));
  all_reduce(comm, __func__, input, comm.rank == root ? output : nullptr, count, dtype, operation);
  return HCCL_SUCCESS;
}

HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType dtype, uint32_t root, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("Broadcast", count * size_of(dtype));
  comm.agree(__func__, count, dtype, -1, static_cast<int32_t>(root));
  broadcast(comm, buffer, count * size_of(dtype), root);
  return HCCL_SUCCESS;
}

HcclResult HcclAllGather(void* input, void* output, uint64_t count, HcclDataType dtype, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("AllGather", count * size_of(dtype));
  comm.agree(__func__, count, dtype);
  all_gather(comm, input, output, count * size_of(dtype));
  return HCCL_SUCCESS;
}

HcclResult HcclReduceScatter(void* input, void* output, uint64_t count, HcclDataType dtype, HcclReduceOp operation, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("ReduceScatter", count * size_of(dtype));
  comm.agree(__func__, count, dtype, operation);
  reduce_scatter(comm, input, output, count, dtype, operation);
  return HCCL_SUCCESS;
}

HcclResult HcclScatter(void* input, void* output, uint64_t count, HcclDataType dtype, uint32_t root, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("Scatter", count * size_of(dtype));
  comm.agree(__func__, count, dtype, -1, static_cast<int32_t>(root));
  scatter(comm, input, output, count * size_of(dtype), root);
  return HCCL_SUCCESS;
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream) {
  communicator(handle, __func__).agree(__func__, 0, -1);
  return HCCL_SUCCESS;
}

HcclResult HcclSend(void* data, uint64_t count, HcclDataType dtype, uint32_t to, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("Send", count * size_of(dtype));
  run_or_group(comm, __func__, sending(comm, data, count * size_of(dtype), to));
  return HCCL_SUCCESS;
}

HcclResult HcclRecv(void* data, uint64_t count, HcclDataType dtype, uint32_t from, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  traced("Recv", count * size_of(dtype));
  run_or_group(comm, __func__, receiving(comm, data, count * size_of(dtype), from));
  return HCCL_SUCCESS;
}

HcclResult HcclGroupStart() {
  ++group.depth;
  return HCCL_SUCCESS;
}

HcclResult HcclGroupEnd() {
  if (--group.depth > 0) return HCCL_SUCCESS;
  auto transfers = std::exchange(group.transfers, {});
  while (!transfers.empty()) {
    Communicator* comm = transfers.front().first;
    std::vector<Transfer> own;
    for (const auto& [owner, transfer] : transfers)
      if (owner == comm) own.push_back(transfer);
    run(*comm, __func__, std::move(own));
    std::erase_if(transfers, [&](const auto& each) { return each.first == comm; });
  }
  return HCCL_SUCCESS;
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  std::vector<Transfer> transfers;
  for (const HcclSendRecvItem* item = items; item != items + count; ++item) {
    size_t bytes = item->count * size_of(item->dataType);
    traced(item->sendRecvType == HCCL_SEND ? "Send" : "Recv", bytes);
    transfers.push_back(item->sendRecvType == HCCL_SEND ? sending(comm, item->buf, bytes, item->remoteRank) : receiving(comm, item->buf, bytes, item->remoteRank));
  }
  run(comm, __func__, std::move(transfers));
  return HCCL_SUCCESS;
}

HcclResult HcclAlltoAllV(const void* input, const void* send_counts, const void* send_offsets, HcclDataType send_dtype, const void* output,
                         const void* receive_counts, const void* receive_offsets, HcclDataType receive_dtype, HcclComm handle, aclrtStream) {
  auto& comm = communicator(handle, __func__);
  auto number = [](const void* numbers, uint32_t rank) { return static_cast<const uint64_t*>(numbers)[rank]; };
  size_t send_width = size_of(send_dtype), receive_width = size_of(receive_dtype);
  std::vector<Transfer> transfers;
  for (uint32_t rank = 0; rank < comm.ranks; ++rank) {
    size_t bytes = number(send_counts, rank) * send_width;
    traced("AlltoAll", bytes);
    transfers.push_back(sending(comm, offset_by(input, number(send_offsets, rank) * send_width), bytes, rank));
    transfers.push_back(receiving(comm, offset_by(const_cast<void*>(output), number(receive_offsets, rank) * receive_width),
                                  number(receive_counts, rank) * receive_width, rank));
  }
  run(comm, __func__, std::move(transfers));
  return HCCL_SUCCESS;
}

HcclResult HcclAlltoAll(const void* input, uint64_t send_count, HcclDataType send_dtype, const void* output, uint64_t receive_count,
                        HcclDataType receive_dtype, HcclComm handle, aclrtStream stream) {
  uint32_t ranks = communicator(handle, __func__).ranks;
  std::vector<uint64_t> send_counts(ranks, send_count), receive_counts(ranks, receive_count), send_offsets(ranks), receive_offsets(ranks);
  for (uint32_t rank = 0; rank < ranks; ++rank) send_offsets[rank] = rank * send_count, receive_offsets[rank] = rank * receive_count;
  return HcclAlltoAllV(input, send_counts.data(), send_offsets.data(), send_dtype, output, receive_counts.data(), receive_offsets.data(),
                       receive_dtype, handle, stream);
}

}  // extern "C"
