// SPDX-License-Identifier: Apache-2.0
// Communicators over shared memory: what HCCL collectives and the MC2 operators are built from.
//
// One memfd per communicator, without a name anywhere: the root info carries the creator's pid and descriptor, and the
// peers open it through /proc, so the kernel frees it with the last process whatever happens. It holds a control part
// (one slot per rank, one channel per ordered pair of ranks) and one window per rank: two halves that alternate from
// stage to stage, and a part for point-to-point pieces. Pages are reserved when a rank first needs them.
//
// A group operator is a series of stages. In each a rank fills a half of its own window, posts the stage number, waits
// until the peers whose data it needs have posted it too, and reads theirs. Every half starts with an OpRecord that
// says which call its owner is in, so that different calls are found at the first stage, by all ranks. All waiting is
// by futex and ends after Settings::timeout_s, or as soon as a peer that is waited for has died.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace vnpu {

// An error with the HcclResult that reports it.
struct Failure : std::runtime_error {
    Failure(int code_, const std::string& message) : std::runtime_error(message), code(code_) {}
    int code;
};

// clang-format off
enum class OpKind : uint32_t {
    kNone, kAllReduce, kAllGather, kAllGatherV, kReduceScatter, kReduceScatterV, kBroadcast, kReduce, kScatter,
    kAlltoAll, kAlltoAllV, kAlltoAllVC, kBarrier, kSend, kRecv, kBatchSendRecv, kCreateSubComm, kDispatch,
    kCombine, kCount
};
// clang-format on
const char* op_name(OpKind kind);

// Which call a rank is in. `values` are compared between ranks, except those of fields marked as informative.
struct OpRecord {
    static constexpr int kValues = 16;
    OpKind kind = OpKind::kNone;
    uint64_t ordinal = 0;  // 1 for the first group operator on the communicator
    int64_t values[kValues] = {};
    std::string title() const;     // "AllReduce #3"
    std::string describe() const;  // "AllReduce #3 (count=4, ...)"
};
struct OpField {
    const char* name;
    bool informative;                    // may differ between ranks
    std::string (*text)(int64_t value);  // nullptr: as a number; "" leaves the field out
};
// The fields of a kind of operator, in the order of OpRecord::values.
const std::vector<OpField>& op_fields(OpKind kind);
const std::vector<OpField>& collective_fields();  // hccl.cpp
const std::vector<OpField>& ep_fields();          // mc2.cpp

struct alignas(64) Word {  // a counter that other processes can wait for
    std::atomic<uint32_t> value;
    std::atomic<uint32_t> sleepers;
    void set(uint32_t v);
    void increment();
    void sleep_while(uint32_t seen, double seconds);  // short spin, then futex; may return early
};

struct RankSlot {
    Word posted;                       // stages whose data are in this rank's window
    Word read;                         // stages this rank has finished reading
    Word bell;                         // rung when something happened on one of its channels
    std::atomic<int32_t> pid;          // 0: has not joined
    std::atomic<uint64_t> start_time;  // of that process, so that a recycled pid is not taken for it
    std::atomic<uint32_t> left;        // destroyed its communicator
    std::atomic<uint64_t> last;        // latest operator: ordinal << 16 | kind << 1 | still inside
    char name[128];                    // the communicator's name as this rank gave it
};

struct Channel {  // from one rank to one other, one message at a time
    struct Side {
        std::atomic<uint32_t> ordinal;  // of the message this side is ready for; written after the rest
        uint32_t data_type;
        uint64_t bytes;
    } sender, receiver;
    std::atomic<uint32_t> written, taken;  // pieces
};

struct Transfer {  // one message of a Send, Recv or BatchSendRecv
    bool send;
    int peer;
    char* buffer;
    uint64_t bytes;
    uint32_t data_type;
    // progress
    uint32_t ordinal = 0;
    uint64_t moved = 0;
    uint32_t pieces = 0;
    bool started = false, met = false, finished = false;
};

struct RootInfo {
    uint64_t magic, nonce;
    int32_t pid, fd;
};

struct EpPair;  // mc2.cpp: the dispatch that waits for its combine

class Comm {
public:
    static RootInfo create_root();
    // Collective: returns once all `size` ranks have joined. `name` may be empty.
    Comm(const RootInfo& root, int size, int rank, const std::string& name, int64_t buffer_mb);
    ~Comm();
    Comm(const Comm&) = delete;
    Comm& operator=(const Comm&) = delete;

    int size() const { return size_; }
    int rank() const { return rank_; }
    const std::string& name() const { return name_; }
    int64_t buffer_mb() const { return buffer_mb_; }  // HCCL_BUFFSIZE or the communicator's own hcclBufferSize
    int async_error() const { return async_error_; }
    bool inherited() const;  // made before a fork, so not usable here

    // Runs one group operator: gives `record` its ordinal, keeps what the others see of this rank up to date, and after
    // a failure refuses everything that follows. Returns the microseconds it blocked.
    double group_operator(OpRecord& record, const std::function<void()>& body);
    // Runs transfers concurrently until all are finished. Returns the microseconds it blocked.
    double exchange(OpKind kind, std::vector<Transfer>& transfers, uint64_t* ordinal);

    // Inside a group operator.
    uint64_t capacity() const { return half_bytes_ - data_offset(); }  // data bytes of one stage
    char* open_stage(const OpRecord& record, uint64_t bytes);          // where this rank's data go, at least `bytes`
    uint64_t* own_table() { return table_of(rank_); }                  // 2 * size() counts beside the data
    void post(const OpRecord& record);
    void await(const OpRecord& record, const std::vector<int>& ranks);  // also compares the records
    const std::vector<int>& all_ranks() const { return all_ranks_; }
    const OpRecord& record(int rank) const { return *reinterpret_cast<const OpRecord*>(half(rank)); }
    const uint64_t* table(int rank) const { return table_of(rank); }
    const char* data(int rank) const { return half(rank) + data_offset(); }
    void close_stage();
    void sleep(const OpRecord& record, double seconds);  // a slow device; ends early if the communicator is destroyed

    // The failure text every check on the communicator uses: "<what> on communicator 'x', rank 1 of 4: <problem>".
    Failure failure(int code, const std::string& what, const std::string& problem) const;

    enum class Use { kNone, kCollectives, kEp };
    void claim(Use use, const std::string& what);  // an EP communicator is dedicated: mixing is a failure
    std::shared_ptr<EpPair> ep_pair;
    struct GlobalBs {  // of the EP operators so far
        int64_t latest = 0;   // 0: there was none
        bool varied = false;  // more than one value
        bool loose = false;   // one was above BS*size, so it was given explicitly
    } global_bs;

private:
    RankSlot& slot(int rank) const;
    Channel& channel(int from, int to) const;
    char* window(int rank) const;
    char* half(int rank) const { return window(rank) + (stage_ & 1) * half_bytes_; }
    uint64_t data_offset() const;
    uint64_t* table_of(int rank) const;
    void join(const std::string& name);
    void reserve(uint64_t& reserved, const char* start, uint64_t bytes);
    void check_usable(const std::string& what) const;
    void wait_for(const std::string& what, const std::vector<int>& ranks, Word RankSlot::* word, uint32_t target);
    // Fails if one of `ranks` can never answer, or if time is up.
    void check_peers(const std::string& what, const std::vector<int>& ranks, double waited) const;
    std::string about(int rank) const;
    bool advance(Transfer& transfer, bool first_in_line);
    std::string what(const Transfer& transfer) const;

    int size_, rank_;
    std::string name_;
    int64_t buffer_mb_;
    int owner_;  // the process that joined: a forked child must not use it
    int fd_ = -1;
    char* base_ = nullptr;
    uint64_t mapped_ = 0, window_bytes_ = 0, half_bytes_ = 0, piece_bytes_ = 0;
    uint64_t reserved_[2] = {0, 0};
    std::vector<uint64_t> reserved_pieces_;
    std::vector<int> all_ranks_;
    std::vector<uint32_t> sent_, received_;  // messages per peer
    uint32_t stage_ = 0;
    uint64_t ordinal_ = 0, message_ordinal_ = 0;
    Use use_ = Use::kNone;
    std::string broken_;  // the failure that ended this communicator
    std::atomic<int> async_error_{0};
    std::atomic<bool> closing_{false};
    std::mutex lock_;
};

// Communicators of this process by name, as the MC2 operators address them (group_ep). Both throw a Failure.
void register_comm(std::unique_ptr<Comm> comm);
Comm& find_comm(const std::string& name);
Comm& checked_comm(void* handle);
void destroy_comm(void* handle);

}  // namespace vnpu
