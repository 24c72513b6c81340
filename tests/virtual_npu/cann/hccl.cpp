// SPDX-License-Identifier: Apache-2.0
// The HCCL C interface over shared-memory communicators (shm.h). Calls are synchronous: what a stream would order is
// ordered by the calls themselves. Reductions run in rank order with fp32 accumulation for fp16 and bf16, so all ranks
// get the same bits.
#pragma GCC visibility push(default)
#include <hccl/hccl.h>
extern "C" {  // probed by name by torch_npu or its tools, but not declared in the wheel's header
HcclResult HcclCommInitRootInfoConfig(uint32_t nRanks, const HcclRootInfo* rootInfo, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* comm);
HcclResult HcclCreateSubCommConfig(HcclComm* comm, uint32_t rankNum, uint32_t* rankIds, uint64_t subCommId,
                                   uint32_t subCommRankId, HcclCommConfig* config, HcclComm* subComm);
HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank);
HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size);
HcclResult HcclGetConfig(HcclConfig config, HcclConfigValue* configValue);
HcclResult HcclBarrier(HcclComm comm, aclrtStream stream);
HcclResult HcclAlltoAllVC(const void* sendBuf, const void* sendCountMatrix, HcclDataType sendType, const void* recvBuf,
                          HcclDataType recvType, HcclComm comm, aclrtStream stream);
const char* HcclGetErrorString(HcclResult code);
}
#pragma GCC visibility pop

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>
#include <type_traits>

#include "error.h"
#include "graph.h"
#include "half.h"
#include "ledger.h"
#include "settings.h"
#include "shm.h"

namespace vnpu {
namespace {

const char* const kTypeNames[] = {"int8",   "int16", "int32",  "fp16",   "fp32", "int64",
                                  "uint64", "uint8", "uint16", "uint32", "fp64", "bf16"};
constexpr uint64_t kTypeBytes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
const char* const kReduceNames[] = {"sum", "prod", "max", "min"};

uint64_t bytes_of(HcclDataType type) {
    // Newer headers know more types (float8 and others) than are emulated here, and end both enumerations at 255.
    if (type < 0 || static_cast<size_t>(type) >= std::size(kTypeBytes)) {
        throw Failure(HCCL_E_NOT_SUPPORT, "HCCL data type " + std::to_string(type) + " is not emulated");
    }
    return kTypeBytes[type];
}

std::string type_text(int64_t type) { return type < 0 ? "" : kTypeNames[type]; }
std::string reduce_text(int64_t op) { return op < 0 ? "" : kReduceNames[op]; }
std::string optional_text(int64_t value) { return value < 0 ? "" : std::to_string(value); }

OpRecord record_of(OpKind kind, int64_t count = -1, int type = -1, int reduce = -1, int64_t root = -1) {
    if (reduce >= static_cast<int>(std::size(kReduceNames)))
        throw Failure(HCCL_E_PARA, "reduce operation " + std::to_string(reduce) + " is unknown");
    OpRecord record;
    record.kind = kind;
    const int64_t values[] = {count, type, reduce, root};
    std::copy(std::begin(values), std::end(values), record.values);
    return record;
}

// ---- reductions

template <class T, class A, A (*Load)(T), T (*Store)(A)>
void reduce_as(char* out, const std::vector<const char*>& in, uint64_t count, HcclReduceOp op) {
    for (uint64_t i = 0; i < count; ++i) {
        T raw;
        std::memcpy(&raw, in[0] + i * sizeof(T), sizeof(T));
        A acc = Load(raw);
        for (size_t r = 1; r < in.size(); ++r) {
            std::memcpy(&raw, in[r] + i * sizeof(T), sizeof(T));
            const A x = Load(raw);
            if (op == HCCL_REDUCE_SUM) acc = static_cast<A>(acc + x);
            if (op == HCCL_REDUCE_PROD) acc = static_cast<A>(acc * x);
            if constexpr (std::is_floating_point_v<A>) {
                if (op >= HCCL_REDUCE_MAX && x != x) acc = x;  // a NaN wins, wherever it comes from
            }
            if (op == HCCL_REDUCE_MAX && x > acc) acc = x;
            if (op == HCCL_REDUCE_MIN && x < acc) acc = x;
        }
        raw = Store(acc);
        std::memcpy(out + i * sizeof(T), &raw, sizeof(T));
    }
}

template <class T, class A = T>
A plain_load(T value) {
    return static_cast<A>(value);
}
template <class T, class A = T>
T plain_store(A value) {
    return static_cast<T>(value);
}

// Integers are reduced in a wider unsigned type for sums and products, so that overflow wraps; max and min need the
// sign.
template <class T>
void reduce_integers(char* out, const std::vector<const char*>& in, uint64_t count, HcclReduceOp op) {
    if (op == HCCL_REDUCE_SUM || op == HCCL_REDUCE_PROD) {
        reduce_as<T, uint64_t, plain_load<T, uint64_t>, plain_store<T, uint64_t>>(out, in, count, op);
    } else {
        reduce_as<T, T, plain_load<T>, plain_store<T>>(out, in, count, op);
    }
}

void reduce(char* out, const std::vector<const char*>& in, uint64_t count, HcclDataType type, HcclReduceOp op) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8: return reduce_integers<int8_t>(out, in, count, op);
        case HCCL_DATA_TYPE_INT16: return reduce_integers<int16_t>(out, in, count, op);
        case HCCL_DATA_TYPE_INT32: return reduce_integers<int32_t>(out, in, count, op);
        case HCCL_DATA_TYPE_INT64: return reduce_integers<int64_t>(out, in, count, op);
        case HCCL_DATA_TYPE_UINT8: return reduce_integers<uint8_t>(out, in, count, op);
        case HCCL_DATA_TYPE_UINT16: return reduce_integers<uint16_t>(out, in, count, op);
        case HCCL_DATA_TYPE_UINT32: return reduce_integers<uint32_t>(out, in, count, op);
        case HCCL_DATA_TYPE_UINT64: return reduce_integers<uint64_t>(out, in, count, op);
        case HCCL_DATA_TYPE_FP16: return reduce_as<uint16_t, float, fp16_to_float, float_to_fp16>(out, in, count, op);
        case HCCL_DATA_TYPE_BFP16: return reduce_as<uint16_t, float, bf16_to_float, float_to_bf16>(out, in, count, op);
        case HCCL_DATA_TYPE_FP32:
            return reduce_as<float, float, plain_load<float>, plain_store<float>>(out, in, count, op);
        case HCCL_DATA_TYPE_FP64:
            return reduce_as<double, double, plain_load<double>, plain_store<double>>(out, in, count, op);
        default: throw Failure(HCCL_E_NOT_SUPPORT, "this data type cannot be reduced");
    }
}

// ---- stages

struct Span {
    char* data;
    uint64_t bytes;
    // The part of it that stage `stage` moves when a stage moves `piece` bytes.
    Span part(uint64_t stage, uint64_t piece) const {
        const uint64_t begin = std::min(bytes, stage * piece);
        return {data + begin, std::min(piece, bytes - begin)};
    }
};

uint64_t stages_for(uint64_t bytes, uint64_t piece) { return std::max<uint64_t>(1, (bytes + piece - 1) / piece); }

void copy(char* to, const char* from, uint64_t bytes) {
    if (bytes != 0) std::memmove(to, from, bytes);
}

// `bytes` is what this rank contributes: its send buffer, or for Recv what it takes.
void log(const Comm& comm, OpKind kind, uint64_t ordinal, uint64_t bytes, double host_us) {
    Fields event("collective");
    event.comm(comm.name(), ordinal, comm.rank(), comm.size()).add("kind", op_name(kind)).add("bytes", bytes);
    ledger_event(event.add("mode", in_graph() ? "graph" : "eager").add("host_us", host_us));
}

// A way between nodes, which shared memory does not take.
void wait_for_link(const Comm& comm, const OpRecord& record) {
    const std::string& path = settings().link_delay_file;
    if (path.empty()) return;
    int64_t us = -1;
    if (!(std::ifstream(path) >> us) || us < 0 || us > 1'000'000) {
        throw comm.failure(HCCL_E_PARA, record.title(),
                           "VIRTUAL_NPU_LINK_DELAY_FILE='" + path + "' holds no number from 0 to 1000000");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(us));
}

// The common part of all group collectives: claim, run, ledger.
void collective(Comm& comm, OpRecord record, uint64_t bytes, const std::function<void(const OpRecord&)>& body) {
    comm.claim(Comm::Use::kCollectives, op_name(record.kind));
    const double host_us = comm.group_operator(record, [&] {
        body(record);
        wait_for_link(comm, record);
    });
    if (!ledger_enabled()) return;
    log(comm, record.kind, record.ordinal, bytes, host_us);
}

// Stages in which every rank shows one span (possibly empty) to all: `read(stage, piece)` takes what it needs of the
// peers' data. `table` (empty, or 2 * size entries) is shown beside it. `longest` is the longest span of any rank.
void share(Comm& comm, const OpRecord& record, Span mine, uint64_t longest, const std::vector<uint64_t>& table,
           const std::function<void(uint64_t, uint64_t)>& read) {
    const uint64_t piece = comm.capacity() / 64 * 64;
    const uint64_t stages = stages_for(longest, piece);
    for (uint64_t stage = 0; stage < stages; ++stage) {
        const Span part = mine.part(stage, piece);
        copy(comm.open_stage(record, part.bytes), part.data, part.bytes);
        std::copy(table.begin(), table.end(), comm.own_table());
        comm.post(record);
        comm.await(record, comm.all_ranks());
        read(stage, piece);
        comm.close_stage();
    }
}

// Stages in which every rank has one span for each rank: `read(stage, piece)` finds rank r's piece at data(r) + rank()
// * piece.
void spread(Comm& comm, const OpRecord& record, const std::vector<Span>& out, uint64_t longest,
            const std::vector<uint64_t>& table, const std::function<void(uint64_t, uint64_t)>& read) {
    const uint64_t piece =
        std::min(comm.capacity() / comm.size() / 64 * 64, std::max<uint64_t>(64, (longest + 63) / 64 * 64));
    const uint64_t stages = stages_for(longest, piece);
    for (uint64_t stage = 0; stage < stages; ++stage) {
        char* data = comm.open_stage(record, out.empty() ? 0 : piece * comm.size());
        for (size_t r = 0; r < out.size(); ++r) {
            const Span part = out[r].part(stage, piece);
            copy(data + r * piece, part.data, part.bytes);
        }
        std::copy(table.begin(), table.end(), comm.own_table());
        comm.post(record);
        comm.await(record, comm.all_ranks());
        read(stage, piece);
        comm.close_stage();
    }
}

std::vector<const char*> sources(const Comm& comm, uint64_t offset) {
    std::vector<const char*> in;
    for (const int r : comm.all_ranks()) in.push_back(comm.data(r) + offset);
    return in;
}

char* bytes_at(const void* pointer) { return static_cast<char*>(const_cast<void*>(pointer)); }

// The spans of a buffer that is cut by counts and displacements in elements of `size` bytes.
std::vector<Span> cut(const void* buffer, const uint64_t* counts, const uint64_t* displacements, int ranks,
                      uint64_t size) {
    std::vector<Span> spans;
    for (int r = 0; r < ranks; ++r) spans.push_back({bytes_at(buffer) + displacements[r] * size, counts[r] * size});
    return spans;
}

std::vector<Span> cut_evenly(const void* buffer, uint64_t count, int ranks, uint64_t size) {
    std::vector<uint64_t> counts(ranks, count), displacements;
    for (int r = 0; r < ranks; ++r) displacements.push_back(r * count);
    return cut(buffer, counts.data(), displacements.data(), ranks, size);
}

uint64_t longest_of(const std::vector<Span>& spans) {
    uint64_t longest = 0;
    for (const Span& s : spans) longest = std::max(longest, s.bytes);
    return longest;
}

uint64_t total_of(const std::vector<Span>& spans) {
    uint64_t total = 0;
    for (const Span& s : spans) total += s.bytes;
    return total;
}

std::string list(const uint64_t* values, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += (i == 0 ? "[" : ", ") + std::to_string(values[i]);
    return text + "]";
}

// The V forms with one table for all ranks: everybody must have passed the same counts.
void compare_counts(const Comm& comm, const OpRecord& record) {
    const uint64_t* own = comm.table(comm.rank());
    for (const int r : comm.all_ranks()) {
        const uint64_t* other = comm.table(r);
        if (std::equal(own, own + comm.size(), other)) continue;
        throw comm.failure(HCCL_E_PARA, record.title(),
                           "mismatch, counts differ: rank " + std::to_string(comm.rank()) + " gave " +
                               list(own, comm.size()) + ", rank " + std::to_string(r) + " gave " +
                               list(other, comm.size()));
    }
}

std::vector<uint64_t> table_of(const std::vector<Span>& first, const std::vector<Span>& second = {}) {
    std::vector<uint64_t> table;
    for (const Span& s : first) table.push_back(s.bytes);
    for (const Span& s : second) table.push_back(s.bytes);
    return table;
}

void reduce_scatter(Comm& comm, const OpRecord& record, const std::vector<Span>& in, void* out, HcclDataType type,
                    HcclReduceOp op, bool compare) {
    const uint64_t size = bytes_of(type), total = total_of(in);
    collective(comm, record, total, [&](const OpRecord& r) {
        const Span mine{bytes_at(out), in[comm.rank()].bytes};
        spread(comm, r, in, longest_of(in), compare ? table_of(in) : std::vector<uint64_t>(),
               [&](uint64_t stage, uint64_t piece) {
                   if (compare) compare_counts(comm, r);
                   const Span part = mine.part(stage, piece);
                   reduce(part.data, sources(comm, comm.rank() * piece), part.bytes / size, type, op);
               });
    });
}

void all_gather(Comm& comm, const OpRecord& record, Span mine, const std::vector<Span>& out, bool compare) {
    collective(comm, record, mine.bytes, [&](const OpRecord& r) {
        share(comm, r, mine, longest_of(out), compare ? table_of(out) : std::vector<uint64_t>(),
              [&](uint64_t stage, uint64_t piece) {
                  if (compare) compare_counts(comm, r);
                  for (const int p : comm.all_ranks()) {
                      const Span part = out[p].part(stage, piece);
                      copy(part.data, comm.data(p), part.bytes);
                  }
              });
    });
}

void all_to_all(Comm& comm, const OpRecord& record, const std::vector<Span>& out, const std::vector<Span>& in,
                bool same_counts) {
    collective(comm, record, total_of(out), [&](const OpRecord& r) {
        uint64_t longest = longest_of(out);
        if (!same_counts) {  // a stage for the counts alone: they say how many stages follow
            share(comm, r, {nullptr, 0}, 0, table_of(out, in), [&](uint64_t, uint64_t) {
                for (const int from : comm.all_ranks()) {
                    for (const int to : comm.all_ranks()) {
                        const uint64_t sends = comm.table(from)[to], takes = comm.table(to)[comm.size() + from];
                        longest = std::max(longest, sends);
                        if (sends == takes) continue;
                        throw comm.failure(HCCL_E_PARA, r.title(),
                                           "mismatch, rank " + std::to_string(from) + " sends " +
                                               std::to_string(sends) + " bytes to rank " + std::to_string(to) +
                                               ", which expects " + std::to_string(takes));
                    }
                }
            });
        }
        spread(comm, r, out, longest, {}, [&](uint64_t stage, uint64_t piece) {
            for (const int from : comm.all_ranks()) {
                const Span part = in[from].part(stage, piece);
                copy(part.data, comm.data(from) + comm.rank() * piece, part.bytes);
            }
        });
    });
}

void check_root(const Comm& comm, uint32_t root, OpKind kind) {
    if (root >= static_cast<uint32_t>(comm.size())) {
        throw comm.failure(HCCL_E_PARA, op_name(kind), "there is no rank " + std::to_string(root));
    }
}

void point_to_point(Comm& comm, OpKind kind, std::vector<Transfer> transfers) {
    comm.claim(Comm::Use::kCollectives, op_name(kind));
    uint64_t ordinal = 0, bytes = 0;
    const double host_us = comm.exchange(kind, transfers, &ordinal);
    if (!ledger_enabled()) return;
    for (const Transfer& t : transfers) bytes += t.send || kind == OpKind::kRecv ? t.bytes : 0;
    log(comm, kind, ordinal, bytes, host_us);
}

// ---- communicators

int64_t default_buffer_mb() {
    const char* text = std::getenv("HCCL_BUFFSIZE");
    if (text == nullptr || *text == '\0') return HCCL_COMM_DEFAULT_BUFFSIZE;
    char* end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (*end != '\0' || value < 1)
        throw Failure(HCCL_E_PARA, std::string("HCCL_BUFFSIZE='") + text + "' is not a number of MB");
    return value;
}

Comm* make_comm(const RootInfo& root, uint32_t size, uint32_t rank, const HcclCommConfig* config) {
    std::string name;
    int64_t buffer_mb = default_buffer_mb();
    if (config != nullptr) {
        uint64_t bytes = 0;  // how much of the structure the caller's version has
        uint32_t magic = 0;
        std::memcpy(&bytes, config->reserved, sizeof bytes);
        std::memcpy(&magic, config->reserved + sizeof bytes, sizeof magic);
        if (magic != HCCL_COMM_CONFIG_MAGIC_WORD)
            throw Failure(HCCL_E_PARA, "HcclCommConfig was not made by HcclCommConfigInit");
        const uint32_t unset = UINT32_MAX;
        if (config->hcclBufferSize != unset && config->hcclBufferSize != 0) buffer_mb = config->hcclBufferSize;
        if (bytes >= offsetof(HcclCommConfig, hcclCommName) + COMM_NAME_MAX_LENGTH) {
            name.assign(config->hcclCommName, strnlen(config->hcclCommName, COMM_NAME_MAX_LENGTH - 1));
        }
    }
    auto comm = std::make_unique<Comm>(root, static_cast<int>(size), static_cast<int>(rank), name, buffer_mb);
    Comm* handle = comm.get();
    register_comm(std::move(comm));
    if (ledger_enabled())
        ledger_event(
            Fields("comm").add("comm", handle->name()).add("rank", handle->rank()).add("size", handle->size()));
    return handle;
}

RootInfo unpack(const HcclRootInfo* info) {
    RootInfo root;
    std::memcpy(&root, info->internal, sizeof root);
    return root;
}

template <class Body>
HcclResult guarded(Body body) {
    try {
        body();
        return HCCL_SUCCESS;
    } catch (const Failure& error) {
        set_error(std::string("HCCL: ") + error.what());
        return static_cast<HcclResult>(error.code);
    } catch (const std::exception& error) {
        set_error(std::string("HCCL: ") + error.what());
        return HCCL_E_INTERNAL;
    }
}

// Runs an operator, or hands it to the graph that its stream is captured for, which is why `body` owns its arguments.
// `results` says where it writes: a capture leaves zeros there, which nothing takes for an index out of range.
template <class Results, class Body>
void submit(aclrtStream stream, OpKind kind, Results results, Body body) {
    const Turn turn = graph_turn(stream, op_name(kind));
    if (turn == Turn::kRun) return body();
    if (turn == Turn::kRecord) {
        for (const Span& span : std::vector<Span>(results())) {
            graph_preserve(stream, span.data, span.bytes);
            if (span.bytes != 0) std::memset(span.data, 0, span.bytes);
        }
    }
    graph_record(stream, std::move(body));
}

template <class Results, class Body>
HcclResult on_stream(aclrtStream stream, OpKind kind, Results results, Body body) {
    return guarded([&] { submit(stream, kind, results, body); });
}

// A host array with one count per rank.
std::vector<uint64_t> counts_of(const void* counts, const Comm& comm) {
    const auto* begin = static_cast<const uint64_t*>(counts);
    return {begin, begin + comm.size()};
}

void require(const void* pointer, const char* name) {
    if (pointer == nullptr) throw Failure(HCCL_E_PTR, std::string(name) + " is null");
}

std::atomic<int32_t> deterministic{0};

}  // namespace

const std::vector<OpField>& collective_fields() {
    static const std::vector<OpField> fields = {{"count", false, optional_text},
                                                {"data type", false, type_text},
                                                {"reduce op", false, reduce_text},
                                                {"root", false, optional_text}};
    return fields;
}

}  // namespace vnpu

using namespace vnpu;

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* rootInfo) {
    return guarded([&] {
        require(rootInfo, "rootInfo");
        const RootInfo root = Comm::create_root();
        std::memset(rootInfo->internal, 0, sizeof rootInfo->internal);
        std::memcpy(rootInfo->internal, &root, sizeof root);
    });
}

HcclResult HcclCommInitRootInfo(uint32_t nRanks, const HcclRootInfo* rootInfo, uint32_t rank, HcclComm* comm) {
    return HcclCommInitRootInfoConfig(nRanks, rootInfo, rank, nullptr, comm);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t nRanks, const HcclRootInfo* rootInfo, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* comm) {
    return guarded([&] {
        require(rootInfo, "rootInfo");
        require(comm, "comm");
        *comm = make_comm(unpack(rootInfo), nRanks, rank, config);
    });
}

HcclResult HcclCommInitAll(uint32_t ndev, int32_t*, HcclComm*) {
    return guarded([&] {
        throw Failure(HCCL_E_NOT_SUPPORT, "HcclCommInitAll is not emulated: " + std::to_string(ndev) +
                                              " devices in one process cannot meet in synchronous calls");
    });
}

// Ranks outside the sub-group call it with rankIds = nullptr and get no communicator. The first member makes the root
// info and sends it to the others over the parent.
HcclResult HcclCreateSubCommConfig(HcclComm* comm, uint32_t rankNum, uint32_t* rankIds, uint64_t subCommId,
                                   uint32_t subCommRankId, HcclCommConfig* config, HcclComm* subComm) {
    return guarded([&] {
        require(comm, "comm");
        require(subComm, "subComm");
        Comm& parent = checked_comm(*comm);
        *subComm = nullptr;
        if (rankIds == nullptr) return;
        if (rankNum == 0 || subCommRankId >= rankNum ||
            rankIds[subCommRankId] != static_cast<uint32_t>(parent.rank())) {
            throw parent.failure(HCCL_E_PARA, "CreateSubComm",
                                 "this rank is not entry " + std::to_string(subCommRankId) + " of the list");
        }
        struct Invitation {
            uint64_t id;
            RootInfo root;
        } invitation{subCommId, {}};
        std::vector<Transfer> transfers;
        const auto move = [&](bool send, uint32_t peer) {
            transfers.push_back({send, static_cast<int>(peer), reinterpret_cast<char*>(&invitation), sizeof invitation,
                                 HCCL_DATA_TYPE_UINT8});
        };
        if (subCommRankId == 0) {
            invitation.root = Comm::create_root();
            for (uint32_t i = 1; i < rankNum; ++i) move(true, rankIds[i]);
        } else {
            move(false, rankIds[0]);
        }
        point_to_point(parent, OpKind::kCreateSubComm, transfers);
        if (invitation.id != subCommId) {
            throw parent.failure(HCCL_E_PARA, "CreateSubComm",
                                 "this rank makes sub-communicator " + std::to_string(subCommId) + ", rank " +
                                     std::to_string(rankIds[0]) + " makes " + std::to_string(invitation.id));
        }
        *subComm = make_comm(invitation.root, rankNum, subCommRankId, config);
    });
}

HcclResult HcclCommDestroy(HcclComm comm) {
    return guarded([&] { destroy_comm(comm); });
}

uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

HcclResult HcclGetCommName(HcclComm comm, char* commName) {
    return guarded([&] {
        require(commName, "commName");
        const std::string& name = checked_comm(comm).name();
        std::memcpy(commName, name.c_str(), name.size() + 1);
    });
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
    return guarded([&] {
        require(rank, "rank");
        *rank = static_cast<uint32_t>(checked_comm(comm).rank());
    });
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
    return guarded([&] {
        require(size, "size");
        *size = static_cast<uint32_t>(checked_comm(comm).size());
    });
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* asyncError) {
    return guarded([&] {
        require(asyncError, "asyncError");
        *asyncError = static_cast<HcclResult>(checked_comm(comm).async_error());
    });
}

const char* HcclGetErrorString(HcclResult code) {
    static const char* const texts[] = {
        "no error",         "parameter error",   "null pointer",       "memory error",       "internal error",
        "not supported",    "not found",         "unavailable",        "system call error",  "timeout",
        "cannot open file", "TCP connect error", "RoCE connect error", "TCP transfer error", "RoCE transfer error",
        "runtime error",    "driver error",      "profiling error",    "CCE error",          "network error",
        "try again",        "remote error"};
    return code >= 0 && static_cast<size_t>(code) < sizeof texts / sizeof *texts ? texts[code] : "unknown error";
}

HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue configValue) {
    return guarded([&] {
        if (config != HCCL_DETERMINISTIC)
            throw Failure(HCCL_E_NOT_SUPPORT, "HcclConfig " + std::to_string(config) + " is unknown");
        deterministic = configValue.value;  // reductions here always are
    });
}

HcclResult HcclGetConfig(HcclConfig config, HcclConfigValue* configValue) {
    return guarded([&] {
        require(configValue, "configValue");
        if (config != HCCL_DETERMINISTIC)
            throw Failure(HCCL_E_NOT_SUPPORT, "HcclConfig " + std::to_string(config) + " is unknown");
        configValue->value = deterministic;
    });
}

HcclResult HcclAllReduce(void* sendBuf, void* recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
                         HcclComm handle, aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{{bytes_at(recvBuf), count * bytes_of(dataType)}}; };
    return on_stream(stream, OpKind::kAllReduce, results, [=] {
        Comm& comm = checked_comm(handle);
        const uint64_t size = bytes_of(dataType), bytes = count * size;
        collective(comm, record_of(OpKind::kAllReduce, count, dataType, op), bytes, [&](const OpRecord& record) {
            const Span out{bytes_at(recvBuf), bytes};
            share(comm, record, {bytes_at(sendBuf), bytes}, bytes, {}, [&](uint64_t stage, uint64_t piece) {
                const Span part = out.part(stage, piece);
                reduce(part.data, sources(comm, 0), part.bytes / size, dataType, op);
            });
        });
    });
}

HcclResult HcclReduce(void* sendBuf, void* recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op,
                      uint32_t root, HcclComm handle, aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{{bytes_at(recvBuf), count * bytes_of(dataType)}}; };
    return on_stream(stream, OpKind::kReduce, results, [=] {
        Comm& comm = checked_comm(handle);
        check_root(comm, root, OpKind::kReduce);
        const uint64_t size = bytes_of(dataType), bytes = count * size;
        collective(comm, record_of(OpKind::kReduce, count, dataType, op, root), bytes, [&](const OpRecord& record) {
            const Span out{bytes_at(recvBuf), bytes};
            share(comm, record, {bytes_at(sendBuf), bytes}, bytes, {}, [&](uint64_t stage, uint64_t piece) {
                if (comm.rank() != static_cast<int>(root)) return;
                const Span part = out.part(stage, piece);
                reduce(part.data, sources(comm, 0), part.bytes / size, dataType, op);
            });
        });
    });
}

HcclResult HcclBroadcast(void* buf, uint64_t count, HcclDataType dataType, uint32_t root, HcclComm handle,
                         aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{}; };
    return on_stream(stream, OpKind::kBroadcast, results, [=] {
        Comm& comm = checked_comm(handle);
        check_root(comm, root, OpKind::kBroadcast);
        const Span whole{bytes_at(buf), count * bytes_of(dataType)};
        const bool sends = comm.rank() == static_cast<int>(root);
        collective(comm, record_of(OpKind::kBroadcast, count, dataType, -1, root), whole.bytes,
                   [&](const OpRecord& record) {
                       share(comm, record, sends ? whole : Span{nullptr, 0}, whole.bytes, {},
                             [&](uint64_t stage, uint64_t piece) {
                                 const Span part = whole.part(stage, piece);
                                 if (!sends) copy(part.data, comm.data(static_cast<int>(root)), part.bytes);
                             });
                   });
    });
}

HcclResult HcclScatter(void* sendBuf, void* recvBuf, uint64_t recvCount, HcclDataType dataType, uint32_t root,
                       HcclComm handle, aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{{bytes_at(recvBuf), recvCount * bytes_of(dataType)}}; };
    return on_stream(stream, OpKind::kScatter, results, [=] {
        Comm& comm = checked_comm(handle);
        check_root(comm, root, OpKind::kScatter);
        const uint64_t size = bytes_of(dataType);
        const Span mine{bytes_at(recvBuf), recvCount * size};
        std::vector<Span> out;
        if (comm.rank() == static_cast<int>(root)) out = cut_evenly(sendBuf, recvCount, comm.size(), size);
        collective(comm, record_of(OpKind::kScatter, recvCount, dataType, -1, root), mine.bytes,
                   [&](const OpRecord& record) {
                       spread(comm, record, out, mine.bytes, {}, [&](uint64_t stage, uint64_t piece) {
                           const Span part = mine.part(stage, piece);
                           copy(part.data, comm.data(static_cast<int>(root)) + comm.rank() * piece, part.bytes);
                       });
                   });
    });
}

HcclResult HcclAllGather(void* sendBuf, void* recvBuf, uint64_t sendCount, HcclDataType dataType, HcclComm handle,
                         aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{{bytes_at(recvBuf), sendCount * bytes_of(dataType) * checked_comm(handle).size()}}; };
    return on_stream(stream, OpKind::kAllGather, results, [=] {
        Comm& comm = checked_comm(handle);
        const uint64_t size = bytes_of(dataType);
        all_gather(comm, record_of(OpKind::kAllGather, sendCount, dataType), {bytes_at(sendBuf), sendCount * size},
                   cut_evenly(recvBuf, sendCount, comm.size(), size), false);
    });
}

// The headers of torch_npu 2.7 and 2.9 disagree on the const of two functions; the label keeps both out of it.
#pragma GCC visibility push(default)
HcclResult vnpu_all_gather_v(const void* sendBuf, uint64_t sendCount, const void* recvBuf, const void* recvCounts,
                             const void* rdispls, HcclDataType dataType, HcclComm handle,
                             aclrtStream) __asm__("HcclAllGatherV");
HcclResult vnpu_reduce_scatter_v(const void* sendBuf, const void* sendCounts, const void* sdispls, const void* recvBuf,
                                 uint64_t recvCount, HcclDataType dataType, HcclReduceOp op, HcclComm handle,
                                 aclrtStream) __asm__("HcclReduceScatterV");
#pragma GCC visibility pop

HcclResult vnpu_all_gather_v(const void* sendBuf, uint64_t sendCount, const void* recvBuf, const void* recvCounts,
                             const void* rdispls, HcclDataType dataType, HcclComm handle, aclrtStream stream) {
    return guarded([&] {
        Comm& comm = checked_comm(handle);
        const auto counts = counts_of(recvCounts, comm), displacements = counts_of(rdispls, comm);
        const uint64_t size = bytes_of(dataType);
        if (counts[comm.rank()] != sendCount) {
            throw comm.failure(HCCL_E_PARA, "AllGatherV",
                               "sends " + std::to_string(sendCount) + " elements, its own receive count is " +
                                   std::to_string(counts[comm.rank()]));
        }
        const auto out = cut(recvBuf, counts.data(), displacements.data(), comm.size(), size);
        submit(stream, OpKind::kAllGatherV, [&] { return out; }, [=] {
            all_gather(checked_comm(handle), record_of(OpKind::kAllGatherV, -1, dataType),
                       {bytes_at(sendBuf), sendCount * size}, out, true);
        });
    });
}

HcclResult HcclReduceScatter(void* sendBuf, void* recvBuf, uint64_t recvCount, HcclDataType dataType, HcclReduceOp op,
                             HcclComm handle, aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{{bytes_at(recvBuf), recvCount * bytes_of(dataType)}}; };
    return on_stream(stream, OpKind::kReduceScatter, results, [=] {
        Comm& comm = checked_comm(handle);
        reduce_scatter(comm, record_of(OpKind::kReduceScatter, recvCount, dataType, op),
                       cut_evenly(sendBuf, recvCount, comm.size(), bytes_of(dataType)), recvBuf, dataType, op, false);
    });
}

HcclResult vnpu_reduce_scatter_v(const void* sendBuf, const void* sendCounts, const void* sdispls, const void* recvBuf,
                                 uint64_t recvCount, HcclDataType dataType, HcclReduceOp op, HcclComm handle,
                                 aclrtStream stream) {
    return guarded([&] {
        Comm& comm = checked_comm(handle);
        const auto counts = counts_of(sendCounts, comm), displacements = counts_of(sdispls, comm);
        if (counts[comm.rank()] != recvCount) {
            throw comm.failure(HCCL_E_PARA, "ReduceScatterV",
                               "receives " + std::to_string(recvCount) + " elements, its own send count is " +
                                   std::to_string(counts[comm.rank()]));
        }
        const uint64_t size = bytes_of(dataType);
        const auto in = cut(sendBuf, counts.data(), displacements.data(), comm.size(), size);
        const auto results = [&] { return std::vector<Span>{{bytes_at(recvBuf), recvCount * size}}; };
        submit(stream, OpKind::kReduceScatterV, results, [=] {
            reduce_scatter(checked_comm(handle), record_of(OpKind::kReduceScatterV, -1, dataType), in,
                           bytes_at(recvBuf), dataType, op, true);
        });
    });
}

HcclResult HcclAlltoAll(const void* sendBuf, uint64_t sendCount, HcclDataType sendType, const void* recvBuf,
                        uint64_t recvCount, HcclDataType recvType, HcclComm handle, aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{{bytes_at(recvBuf), recvCount * bytes_of(recvType) * checked_comm(handle).size()}}; };
    return on_stream(stream, OpKind::kAlltoAll, results, [=] {
        Comm& comm = checked_comm(handle);
        if (sendCount * bytes_of(sendType) != recvCount * bytes_of(recvType)) {
            throw comm.failure(HCCL_E_PARA, "AlltoAll",
                               "sends " + std::to_string(sendCount * bytes_of(sendType)) +
                                   " bytes to each rank but expects " + std::to_string(recvCount * bytes_of(recvType)));
        }
        all_to_all(comm, record_of(OpKind::kAlltoAll, sendCount, sendType),
                   cut_evenly(sendBuf, sendCount, comm.size(), bytes_of(sendType)),
                   cut_evenly(recvBuf, recvCount, comm.size(), bytes_of(recvType)), true);
    });
}

HcclResult HcclAlltoAllV(const void* sendBuf, const void* sendCounts, const void* sdispls, HcclDataType sendType,
                         const void* recvBuf, const void* recvCounts, const void* rdispls, HcclDataType recvType,
                         HcclComm handle, aclrtStream stream) {
    return guarded([&] {
        const Comm& comm = checked_comm(handle);
        const auto spans = [&](const void* buffer, const void* counts, const void* displacements, HcclDataType type) {
            return cut(buffer, static_cast<const uint64_t*>(counts), static_cast<const uint64_t*>(displacements),
                       comm.size(), bytes_of(type));
        };
        const auto out = spans(sendBuf, sendCounts, sdispls, sendType);
        const auto in = spans(recvBuf, recvCounts, rdispls, recvType);
        submit(stream, OpKind::kAlltoAllV, [&] { return in; }, [=] {
            all_to_all(checked_comm(handle), record_of(OpKind::kAlltoAllV, -1, sendType), out, in, false);
        });
    });
}

// Entry (i, j) of the matrix is what rank i sends to rank j; both buffers are dense.
HcclResult HcclAlltoAllVC(const void* sendBuf, const void* sendCountMatrix, HcclDataType sendType, const void* recvBuf,
                          HcclDataType recvType, HcclComm handle, aclrtStream stream) {
    return guarded([&] {
        Comm& comm = checked_comm(handle);
        const auto* matrix = static_cast<const uint64_t*>(sendCountMatrix);
        std::vector<uint64_t> sends, takes, send_offsets, take_offsets;
        uint64_t sent = 0, taken = 0;
        for (const int r : comm.all_ranks()) {
            sends.push_back(matrix[comm.rank() * comm.size() + r]);
            takes.push_back(matrix[r * comm.size() + comm.rank()]);
            send_offsets.push_back(sent);
            take_offsets.push_back(taken);
            sent += sends.back();
            taken += takes.back();
        }
        const auto out = cut(sendBuf, sends.data(), send_offsets.data(), comm.size(), bytes_of(sendType));
        const auto in = cut(recvBuf, takes.data(), take_offsets.data(), comm.size(), bytes_of(recvType));
        submit(stream, OpKind::kAlltoAllVC, [&] { return in; }, [=] {
            all_to_all(checked_comm(handle), record_of(OpKind::kAlltoAllVC, -1, sendType), out, in, false);
        });
    });
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{}; };
    return on_stream(stream, OpKind::kBarrier, results, [=] {
        Comm& comm = checked_comm(handle);
        collective(comm, record_of(OpKind::kBarrier), 0, [&](const OpRecord& record) {
            share(comm, record, {nullptr, 0}, 0, {}, [](uint64_t, uint64_t) {});
        });
    });
}

HcclResult HcclSend(void* sendBuf, uint64_t count, HcclDataType dataType, uint32_t destRank, HcclComm handle,
                    aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{}; };
    return on_stream(stream, OpKind::kSend, results, [=] {
        point_to_point(checked_comm(handle), OpKind::kSend,
                       {{true, static_cast<int>(destRank), bytes_at(sendBuf), count * bytes_of(dataType),
                         static_cast<uint32_t>(dataType)}});
    });
}

HcclResult HcclRecv(void* recvBuf, uint64_t count, HcclDataType dataType, uint32_t srcRank, HcclComm handle,
                    aclrtStream stream) {
    const auto results = [=] { return std::vector<Span>{{bytes_at(recvBuf), count * bytes_of(dataType)}}; };
    return on_stream(stream, OpKind::kRecv, results, [=] {
        point_to_point(checked_comm(handle), OpKind::kRecv,
                       {{false, static_cast<int>(srcRank), bytes_at(recvBuf), count * bytes_of(dataType),
                         static_cast<uint32_t>(dataType)}});
    });
}

HcclResult HcclBatchSendRecv(HcclSendRecvItemDef* sendRecvInfo, uint32_t itemNum, HcclComm handle,
                             aclrtStream stream) {
    return guarded([&] {
        if (itemNum != 0) require(sendRecvInfo, "sendRecvInfo");
        std::vector<Transfer> transfers;
        std::vector<Span> received;
        for (uint32_t i = 0; i < itemNum; ++i) {
            const HcclSendRecvItemDef& item = sendRecvInfo[i];
            const uint64_t bytes = item.count * bytes_of(item.dataType);
            transfers.push_back({item.sendRecvType == HCCL_SEND, static_cast<int>(item.remoteRank),
                                 static_cast<char*>(item.buf), bytes, static_cast<uint32_t>(item.dataType)});
            if (item.sendRecvType != HCCL_SEND) received.push_back({static_cast<char*>(item.buf), bytes});
        }
        submit(stream, OpKind::kBatchSendRecv, [&] { return received; }, [=] {
            point_to_point(checked_comm(handle), OpKind::kBatchSendRecv, transfers);
        });
    });
}

}  // extern "C"
