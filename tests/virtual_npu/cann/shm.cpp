// SPDX-License-Identifier: Apache-2.0
#include "shm.h"

#include <fcntl.h>
#include <hccl/hccl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <new>
#include <sstream>
#include <thread>

#include "settings.h"

namespace vnpu {
namespace {

constexpr uint64_t kMagic = 0x766e70752d636f6d;  // "vnpu-com"
constexpr uint64_t kPage = 4096;
constexpr double kSlice = 0.1;  // seconds between two looks at whether the peers still live
constexpr int kSpins = 64;      // about a microsecond: with more ranks than cores, spinning only delays the peers

struct Header {
    std::atomic<uint64_t> nonce;
    std::atomic<uint64_t> ranks_and_window;  // size << 32 | window MB, as the first rank gave them
    Word joined;
};

uint64_t down(uint64_t value, uint64_t step) { return value / step * step; }
uint64_t up(uint64_t value, uint64_t step) { return down(value + step - 1, step); }

double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

bool behind(const Word& word, uint32_t target) {
    return static_cast<int32_t>(word.value.load(std::memory_order_acquire) - target) < 0;
}

std::string errno_text() { return std::strerror(errno); }

// Start time of a living process in clock ticks, 0 if there is none (a zombie is none: it cannot answer any more).
uint64_t start_time_of(int pid) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
    std::string line;
    if (!std::getline(file, line)) return 0;
    const size_t name_end = line.rfind(')');  // the command name may hold blanks and brackets
    if (name_end == std::string::npos) return 0;
    std::istringstream rest(line.substr(name_end + 1));
    std::string state, skipped;
    rest >> state;
    if (state == "Z" || state == "X") return 0;
    for (int i = 0; i < 18; ++i) rest >> skipped;
    uint64_t start = 0;
    rest >> start;
    return start;
}

uint64_t available_memory() {
    std::ifstream file("/proc/meminfo");
    std::string key;
    uint64_t kilobytes = 0;
    while (file >> key >> kilobytes) {
        if (key == "MemAvailable:") return kilobytes * 1024;
        file.ignore(64, '\n');
    }
    return UINT64_MAX;
}

std::string megabytes(uint64_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / (1024.0 * 1024.0));
    return text;
}

// Makes the pages of a part of the memfd exist, so that running out of memory is an error here and not a SIGBUS later.
void reserve_pages(int fd, uint64_t offset, uint64_t bytes, const std::string& purpose) {
    const uint64_t available = available_memory();
    const std::string need = "too little shared memory: " + purpose + " needs " + megabytes(bytes);
    if (bytes > available) throw Failure(HCCL_E_MEMORY, need + ", and " + megabytes(available) + " are available");
    int error = 0;
    do {
        error = posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes));
    } while (error == EINTR);
    if (error != 0) throw Failure(HCCL_E_MEMORY, need + ", and the system refused (" + std::strerror(error) + ")");
}

struct Registry {
    std::mutex lock;
    std::map<std::string, std::unique_ptr<Comm>> comms;
    std::map<uint64_t, int> roots;  // memfds created here that not everybody has opened yet, by nonce
};

Registry& registry() {
    static Registry* instance =
        new Registry;  // never destroyed: torch_npu destroys communicators in static destructors
    return *instance;
}

void forget_root(uint64_t nonce) {
    const std::lock_guard<std::mutex> guard(registry().lock);
    const auto mine = registry().roots.find(nonce);
    if (mine == registry().roots.end()) return;  // made by another process
    close(mine->second);
    registry().roots.erase(mine);
}

}  // namespace

void Word::set(uint32_t v) {
    value.store(v);
    if (sleepers.load() != 0) syscall(SYS_futex, &value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Word::increment() {
    value.fetch_add(1);
    if (sleepers.load() != 0) syscall(SYS_futex, &value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Word::sleep_while(uint32_t seen, double seconds) {
    for (int i = 0; i < kSpins; ++i) {
        if (value.load() != seen) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    timespec limit{static_cast<time_t>(seconds), static_cast<long>((seconds - static_cast<time_t>(seconds)) * 1e9)};
    sleepers.fetch_add(1);
    syscall(SYS_futex, &value, FUTEX_WAIT, seen, &limit, nullptr, 0);
    sleepers.fetch_sub(1);
}

RootInfo Comm::create_root() {
    settings();  // a bad setting ends here, not in a half-made communicator
    RootInfo root{kMagic, 0, getpid(), -1};
    while (getrandom(&root.nonce, sizeof root.nonce, 0) != sizeof root.nonce) {
    }
    root.fd = memfd_create("virtual_npu_communicator", MFD_CLOEXEC);
    if (root.fd < 0) throw Failure(HCCL_E_MEMORY, "cannot create shared memory: " + errno_text());
    try {
        reserve_pages(root.fd, 0, kPage, "a communicator");
        const ssize_t written = pwrite(root.fd, &root.nonce, sizeof root.nonce, 0);
        if (written != sizeof root.nonce) throw Failure(HCCL_E_MEMORY, "cannot write shared memory: " + errno_text());
    } catch (...) {
        close(root.fd);
        throw;
    }
    const std::lock_guard<std::mutex> guard(registry().lock);
    registry().roots[root.nonce] = root.fd;
    return root;
}

Comm::Comm(const RootInfo& root, int size, int rank, const std::string& name, int64_t buffer_mb)
    : size_(size), rank_(rank), name_(name), buffer_mb_(buffer_mb), owner_(getpid()) {
    if (root.magic != kMagic) throw Failure(HCCL_E_PARA, "the root info was not made by HcclGetRootInfo");
    if (size < 1 || rank < 0 || rank >= size) {
        throw Failure(HCCL_E_PARA,
                      "rank " + std::to_string(rank) + " of " + std::to_string(size) + " ranks is not valid");
    }
    if (name_.empty()) {
        char text[40];
        std::snprintf(text, sizeof text, "vnpu-%016llx", static_cast<unsigned long long>(root.nonce));
        name_ = text;
    }
    for (int r = 0; r < size; ++r) all_ranks_.push_back(r);
    sent_.resize(size);
    received_.resize(size);
    reserved_pieces_.resize(size);

    const uint64_t window_mb = static_cast<uint64_t>(settings().window_mb);
    window_bytes_ = window_mb << 20;
    piece_bytes_ = down(window_bytes_ / 8 / size, 64);
    half_bytes_ = down((window_bytes_ - piece_bytes_ * size) / 2, kPage);
    const uint64_t slots = sizeof(Header) + size * sizeof(RankSlot);
    const uint64_t control = up(slots + uint64_t(size) * size * sizeof(Channel), kPage);
    mapped_ = control + size * window_bytes_;

    const std::string path = "/proc/" + std::to_string(root.pid) + "/fd/" + std::to_string(root.fd);
    fd_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
    uint64_t nonce = 0;
    if (fd_ < 0 || pread(fd_, &nonce, sizeof nonce, 0) != sizeof nonce || nonce != root.nonce) {
        if (fd_ >= 0) close(fd_);
        throw Failure(HCCL_E_OPEN_FILE_FAILURE,
                      "cannot join communicator '" + name_ + "' as rank " + std::to_string(rank) + ": process " +
                          std::to_string(root.pid) +
                          ", which made its root info, has ended or is not visible from here");
    }
    try {
        if (piece_bytes_ == 0 || half_bytes_ < data_offset() + 64 * size) {
            throw Failure(HCCL_E_MEMORY, "VIRTUAL_NPU_WINDOW_MB=" + std::to_string(window_mb) + " is too small for " +
                                             std::to_string(size) + " ranks");
        }
        // Every rank asks for the same size; growing twice to the same size is harmless.
        if (ftruncate(fd_, static_cast<off_t>(mapped_)) != 0) {
            throw Failure(HCCL_E_MEMORY, "too little shared memory: communicator '" + name_ + "' needs up to " +
                                             megabytes(mapped_) + " (" + std::to_string(size) +
                                             " ranks with VIRTUAL_NPU_WINDOW_MB=" + std::to_string(window_mb) +
                                             "), and the system refused (" + errno_text() + ")");
        }
        reserve_pages(fd_, 0, control, "communicator '" + name_ + "'");
        void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
        if (mapping == MAP_FAILED)
            throw Failure(HCCL_E_MEMORY, "cannot map " + megabytes(mapped_) + ": " + errno_text());
        base_ = static_cast<char*>(mapping);
        madvise(base_, mapped_, MADV_DONTFORK);  // a forked child is not a rank
        join(name);
    } catch (...) {
        if (base_ != nullptr) munmap(base_, mapped_);
        close(fd_);
        forget_root(root.nonce);
        throw;
    }
    forget_root(root.nonce);  // everybody has opened it
}

void Comm::join(const std::string& name) {
    const std::string what = "joining";
    Header& header = *reinterpret_cast<Header*>(base_);
    const uint64_t own = uint64_t(size_) << 32 | uint64_t(settings().window_mb);
    uint64_t first = 0;
    if (!header.ranks_and_window.compare_exchange_strong(first, own) && first != own) {
        throw failure(HCCL_E_PARA, what,
                      "this rank says " + std::to_string(size_) + " ranks and VIRTUAL_NPU_WINDOW_MB=" +
                          std::to_string(settings().window_mb) + ", another rank said " + std::to_string(first >> 32) +
                          " ranks and " + std::to_string(first & UINT32_MAX));
    }
    RankSlot& mine = slot(rank_);
    int32_t nobody = 0;
    if (!mine.pid.compare_exchange_strong(nobody, owner_)) {
        throw failure(HCCL_E_PARA, what, "process " + std::to_string(nobody) + " has already joined as this rank");
    }
    mine.start_time = start_time_of(owner_);
    std::strncpy(mine.name, name.c_str(), sizeof mine.name - 1);
    header.joined.increment();
    double begin = now();
    for (uint32_t seen = 0; (seen = header.joined.value.load()) < uint32_t(size_);) {
        header.joined.sleep_while(seen, kSlice);
        std::vector<int> missing;
        for (int r = 0; r < size_; ++r) {
            if (slot(r).pid == 0) missing.push_back(r);
        }
        try {
            if (!missing.empty()) check_peers(what, missing, now() - begin);
        } catch (const Failure&) {
            mine.left = 1;
            throw;
        }
    }
    for (int r = 0; r < size_; ++r) {
        if (std::strcmp(slot(r).name, mine.name) != 0) {
            throw failure(HCCL_E_PARA, what,
                          "this rank names it '" + std::string(mine.name) + "' and rank " + std::to_string(r) + " '" +
                              slot(r).name + "'");
        }
    }
}

Comm::~Comm() {
    close(fd_);
    if (inherited()) return;  // a forked child has neither the mapping nor a say
    closing_ = true;
    const std::lock_guard<std::mutex> guard(lock_);  // an operator that waits in another thread leaves within kSlice
    slot(rank_).left = 1;
    munmap(base_, mapped_);
}

RankSlot& Comm::slot(int rank) const { return reinterpret_cast<RankSlot*>(base_ + sizeof(Header))[rank]; }

Channel& Comm::channel(int from, int to) const {
    return reinterpret_cast<Channel*>(base_ + sizeof(Header) + size_ * sizeof(RankSlot))[from * size_ + to];
}

bool Comm::inherited() const { return getpid() != owner_; }

char* Comm::window(int rank) const { return base_ + mapped_ - (size_ - rank) * window_bytes_; }

uint64_t Comm::data_offset() const { return up(sizeof(OpRecord) + 2 * sizeof(uint64_t) * size_, 64); }

uint64_t* Comm::table_of(int rank) const { return reinterpret_cast<uint64_t*>(half(rank) + sizeof(OpRecord)); }

void Comm::reserve(uint64_t& reserved, const char* start, uint64_t bytes) {
    if (bytes <= reserved) return;
    const uint64_t offset = static_cast<uint64_t>(start - base_);
    const uint64_t grown = up(offset + bytes, 16 * kPage) - offset;
    reserve_pages(fd_, offset + reserved, std::min(grown, mapped_ - offset) - reserved,
                  "rank " + std::to_string(rank_) + " of communicator '" + name_ + "'");
    reserved = grown;
}

Failure Comm::failure(int code, const std::string& what, const std::string& problem) const {
    return Failure(code, what + " on communicator '" + name_ + "', rank " + std::to_string(rank_) + " of " +
                             std::to_string(size_) + ": " + problem);
}

std::string Comm::about(int rank) const {
    const RankSlot& peer = slot(rank);
    std::string text = "rank " + std::to_string(rank);
    if (peer.pid == 0) return text + " (has not joined)";
    text += " (process " + std::to_string(peer.pid);
    const uint64_t last = peer.last;
    const auto kind = static_cast<OpKind>(last >> 1 & 0x7fff);
    if (kind == OpKind::kNone) return text + ", no operator yet)";
    return text + ", last operator " + op_name(kind) + " #" + std::to_string(last >> 16) +
           ((last & 1) != 0 ? ", still in it)" : ", finished)");
}

void Comm::check_usable(const std::string& what) const {
    if (inherited()) {
        throw failure(HCCL_E_UNAVAIL, what, "process " + std::to_string(owner_) + " joined it, not this forked child");
    }
    if (closing_) throw failure(HCCL_E_UNAVAIL, what, "the communicator is being destroyed");
    if (!broken_.empty()) throw failure(async_error_, what, "the communicator is out of use since: " + broken_);
}

void Comm::claim(Use use, const std::string& what) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (use_ != Use::kNone && use_ != use) {
        throw failure(HCCL_E_NOT_SUPPORT, what,
                      use == Use::kEp ? "collectives have run on it, and EP operators need a communicator of their own"
                                      : "EP operators have run on it, so nothing else may");
    }
    use_ = use;
}

void Comm::check_peers(const std::string& what, const std::vector<int>& ranks, double waited) const {
    if (closing_) throw failure(HCCL_E_UNAVAIL, what, "the communicator was destroyed while it waited");
    std::string names;
    for (const int r : ranks) {
        const RankSlot& peer = slot(r);
        if (peer.pid != 0 && start_time_of(peer.pid) != peer.start_time && peer.start_time != 0) {
            throw failure(HCCL_E_REMOTE, what, "waits for " + about(r) + ", whose process has died");
        }
        if (peer.left != 0) throw failure(HCCL_E_REMOTE, what, "waits for " + about(r) + ", which has destroyed it");
        names += (names.empty() ? "" : ", ") + about(r);
    }
    if (waited < settings().timeout_s) return;
    char seconds[32];
    std::snprintf(seconds, sizeof seconds, "%g", settings().timeout_s);
    throw failure(HCCL_E_TIMEOUT, what, std::string("timeout, waited ") + seconds + " s for " + names);
}

void Comm::wait_for(const std::string& what, const std::vector<int>& ranks, Word RankSlot::* word, uint32_t target) {
    const double begin = now();
    double looked = begin;
    for (const int r : ranks) {
        Word& counter = slot(r).*word;
        while (behind(counter, target)) {
            counter.sleep_while(counter.value.load(), std::min(kSlice, settings().timeout_s));
            if (!behind(counter, target) || now() - looked < kSlice / 2) continue;
            looked = now();
            std::vector<int> missing;
            for (const int p : ranks) {
                if (behind(slot(p).*word, target)) missing.push_back(p);
            }
            // Those that posted between the two looks are no longer missing, whatever became of them since.
            try {
                if (!missing.empty()) check_peers(what, missing, looked - begin);
            } catch (const Failure&) {
                const bool still =
                    std::any_of(missing.begin(), missing.end(), [&](int p) { return behind(slot(p).*word, target); });
                if (still) throw;
            }
        }
    }
}

double Comm::group_operator(OpRecord& record, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> guard(lock_);
    check_usable(op_name(record.kind));
    const double begin = now();
    record.ordinal = ++ordinal_;
    const uint64_t mark = record.ordinal << 16 | static_cast<uint64_t>(record.kind) << 1;
    slot(rank_).last = mark | 1;
    try {
        body();
    } catch (const Failure& error) {
        broken_ = error.what();
        async_error_ = error.code;
        throw;
    }
    slot(rank_).last = mark;
    return (now() - begin) * 1e6;
}

char* Comm::open_stage(const OpRecord& record, uint64_t bytes) {
    if (bytes > capacity()) {
        const uint64_t need = (bytes + data_offset() + kPage) * 16 / 7;
        throw failure(HCCL_E_MEMORY, record.title(),
                      "needs a window of " + megabytes(need) +
                          ", VIRTUAL_NPU_WINDOW_MB=" + std::to_string(settings().window_mb) + " is too small");
    }
    ++stage_;
    reserve(reserved_[stage_ & 1], half(rank_), data_offset() + bytes);
    // The half was last used two stages ago. Collectives never wait here: their previous stage was a barrier.
    if (stage_ > 2) wait_for(record.title(), all_ranks_, &RankSlot::read, stage_ - 2);
    return half(rank_) + data_offset();
}

void Comm::post(const OpRecord& record) {
    new (half(rank_)) OpRecord(record);
    slot(rank_).posted.set(stage_);
}

void Comm::await(const OpRecord& own, const std::vector<int>& ranks) {
    wait_for(own.title(), ranks, &RankSlot::posted, stage_);
    for (const int r : ranks) {
        const OpRecord& other = record(r);
        std::string field = own.kind != other.kind ? "operator" : own.ordinal != other.ordinal ? "ordinal" : "";
        if (field.empty()) {
            const std::vector<OpField>& fields = op_fields(own.kind);
            for (size_t i = 0; i < fields.size(); ++i) {
                if (!fields[i].informative && own.values[i] != other.values[i]) {
                    field = fields[i].name;
                    break;
                }
            }
        }
        if (!field.empty()) {
            throw failure(HCCL_E_PARA, own.title(),
                          "mismatch, " + field + " differs: rank " + std::to_string(rank_) + " called " +
                              own.describe() + ", rank " + std::to_string(r) + " called " + other.describe());
        }
    }
}

void Comm::close_stage() { slot(rank_).read.set(stage_); }

void Comm::sleep(const OpRecord& record, double seconds) {
    for (const double end = now() + seconds; now() < end;) {
        std::this_thread::sleep_for(std::chrono::duration<double>(std::min(kSlice, end - now())));
        if (closing_) throw failure(HCCL_E_UNAVAIL, record.title(), "the communicator was destroyed while it waited");
    }
}

std::string Comm::what(const Transfer& t) const {
    return std::string(t.send ? "Send to" : "Recv from") + " rank " + std::to_string(t.peer) + ", message #" +
           std::to_string(t.ordinal);
}

// Moves a transfer on as far as it goes without waiting; true if anything happened.
bool Comm::advance(Transfer& t, bool first_in_line) {
    if (t.finished || !first_in_line) return false;
    Channel& ch = t.send ? channel(rank_, t.peer) : channel(t.peer, rank_);
    Channel::Side& mine = t.send ? ch.sender : ch.receiver;
    Channel::Side& theirs = t.send ? ch.receiver : ch.sender;
    bool happened = false;
    const auto ring = [&] {
        slot(t.peer).bell.increment();
        happened = true;
    };
    if (!t.started) {
        t.ordinal = t.send ? ++sent_[t.peer] : ++received_[t.peer];
        mine.bytes = t.bytes;
        mine.data_type = t.data_type;
        mine.ordinal.store(t.ordinal, std::memory_order_release);
        t.started = true;
        ring();
    }
    if (!t.met) {
        if (theirs.ordinal.load(std::memory_order_acquire) != t.ordinal) return happened;
        if (theirs.bytes != t.bytes || theirs.data_type != t.data_type) {
            const auto side = [](const Channel::Side& s) {
                return std::to_string(s.bytes) + " bytes of data type " + std::to_string(s.data_type);
            };
            throw failure(HCCL_E_PARA, what(t),
                          "mismatch, rank " + std::to_string(t.send ? rank_ : t.peer) + " sends " + side(ch.sender) +
                              " and rank " + std::to_string(t.send ? t.peer : rank_) + " receives " +
                              side(ch.receiver));
        }
        t.met = happened = true;
    }
    const uint32_t all = static_cast<uint32_t>(std::max<uint64_t>(1, (t.bytes + piece_bytes_ - 1) / piece_bytes_));
    char* piece = window(t.send ? rank_ : t.peer) + 2 * half_bytes_ + (t.send ? t.peer : rank_) * piece_bytes_;
    for (;;) {
        const bool full = ch.written.load(std::memory_order_acquire) != ch.taken.load(std::memory_order_acquire);
        if (t.send == full) return happened;
        if (t.pieces == all) {  // the receiver has taken the last piece
            t.finished = true;
            return true;
        }
        const uint64_t bytes = std::min(t.bytes - t.moved, piece_bytes_);
        if (t.send) {
            reserve(reserved_pieces_[t.peer], piece, bytes);
            if (bytes != 0) std::memcpy(piece, t.buffer + t.moved, bytes);
        } else if (bytes != 0) {
            std::memcpy(t.buffer + t.moved, piece, bytes);
        }
        (t.send ? ch.written : ch.taken).fetch_add(1, std::memory_order_acq_rel);
        t.moved += bytes;
        ++t.pieces;
        ring();
        if (!t.send && t.pieces == all) {
            t.finished = true;
            return true;
        }
    }
}

double Comm::exchange(OpKind kind, std::vector<Transfer>& transfers, uint64_t* ordinal) {
    const std::lock_guard<std::mutex> guard(lock_);
    check_usable(op_name(kind));
    for (const Transfer& t : transfers) {
        if (t.peer < 0 || t.peer >= size_) {
            throw failure(HCCL_E_PARA, op_name(kind), "there is no rank " + std::to_string(t.peer));
        }
    }
    const double begin = now();
    *ordinal = ++message_ordinal_;
    const uint64_t mark = *ordinal << 16 | static_cast<uint64_t>(kind) << 1;
    slot(rank_).last = mark | 1;
    try {
        double progressed = now(), looked = progressed;
        for (;;) {
            const uint32_t bell = slot(rank_).bell.value.load();
            bool happened = false;
            std::vector<int> waiting;
            std::string waiting_for;
            for (size_t i = 0; i < transfers.size(); ++i) {
                const auto same_line = [&](const Transfer& o) {
                    return !o.finished && o.send == transfers[i].send && o.peer == transfers[i].peer;
                };
                const auto until = transfers.begin() + static_cast<ptrdiff_t>(i);
                happened |= advance(transfers[i], std::none_of(transfers.begin(), until, same_line));
                if (transfers[i].finished) continue;
                waiting.push_back(transfers[i].peer);
                if (waiting_for.empty() && transfers[i].started) waiting_for = what(transfers[i]);
            }
            if (waiting.empty()) break;
            if (happened) {
                progressed = now();
                continue;
            }
            slot(rank_).bell.sleep_while(bell, std::min(kSlice, settings().timeout_s));
            if (slot(rank_).bell.value.load() == bell && now() - looked >= kSlice / 2) {
                looked = now();
                check_peers(waiting_for, waiting, looked - progressed);
            }
        }
    } catch (const Failure& error) {
        broken_ = error.what();
        async_error_ = error.code;
        throw;
    }
    slot(rank_).last = mark;
    return (now() - begin) * 1e6;
}

const char* op_name(OpKind kind) {
    static const char* const names[] = {"no operator",
                                        "AllReduce",
                                        "AllGather",
                                        "AllGatherV",
                                        "ReduceScatter",
                                        "ReduceScatterV",
                                        "Broadcast",
                                        "Reduce",
                                        "Scatter",
                                        "AlltoAll",
                                        "AlltoAllV",
                                        "AlltoAllVC",
                                        "Barrier",
                                        "Send",
                                        "Recv",
                                        "BatchSendRecv",
                                        "CreateSubComm",
                                        "MoeDistributeDispatch",
                                        "MoeDistributeCombine"};
    static_assert(sizeof names / sizeof *names == static_cast<size_t>(OpKind::kCount), "one name per kind");
    return kind < OpKind::kCount ? names[static_cast<size_t>(kind)] : "an unknown operator";
}

const std::vector<OpField>& op_fields(OpKind kind) {
    return kind == OpKind::kDispatch || kind == OpKind::kCombine ? ep_fields() : collective_fields();
}

std::string OpRecord::describe() const {
    std::string text;
    const std::vector<OpField>& fields = op_fields(kind);
    for (size_t i = 0; i < fields.size(); ++i) {
        const std::string value = fields[i].text != nullptr ? fields[i].text(values[i]) : std::to_string(values[i]);
        if (!value.empty()) text += (text.empty() ? "" : ", ") + std::string(fields[i].name) + "=" + value;
    }
    return title() + " (" + text + ")";
}

std::string OpRecord::title() const { return op_name(kind) + (" #" + std::to_string(ordinal)); }

void register_comm(std::unique_ptr<Comm> comm) {
    const std::lock_guard<std::mutex> guard(registry().lock);
    const std::string name = comm->name();
    const auto same = registry().comms.find(name);
    if (same != registry().comms.end() && same->second->inherited()) registry().comms.erase(same);
    if (!registry().comms.emplace(name, std::move(comm)).second) {
        throw Failure(HCCL_E_PARA, "this process already holds a communicator named '" + name + "'");
    }
}

Comm& find_comm(const std::string& name) {
    const std::lock_guard<std::mutex> guard(registry().lock);
    const auto found = registry().comms.find(name);
    if (found == registry().comms.end()) {
        throw Failure(HCCL_E_NOT_FOUND, "'" + name + "' is not the name of a communicator of this process");
    }
    return *found->second;
}

Comm& checked_comm(void* handle) {
    const std::lock_guard<std::mutex> guard(registry().lock);
    for (const auto& entry : registry().comms) {
        if (entry.second.get() == handle) return *entry.second;
    }
    throw Failure(HCCL_E_PARA, "the communicator handle is not valid, or was destroyed");
}

void destroy_comm(void* handle) {
    Comm& comm = checked_comm(handle);
    std::unique_ptr<Comm> owned;
    {
        const std::lock_guard<std::mutex> guard(registry().lock);
        const auto found = registry().comms.find(comm.name());
        owned = std::move(found->second);
        registry().comms.erase(found);
    }
}

}  // namespace vnpu
