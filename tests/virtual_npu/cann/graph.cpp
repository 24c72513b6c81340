// SPDX-License-Identifier: Apache-2.0
#include "graph.h"

#include <acl/acl_mdl.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "error.h"
#include "ledger.h"

std::atomic<int> vnpu_graph_activity{0};

namespace vnpu {
namespace {

struct ExternalEvent {
    bool recorded = false;
};

// A number in device memory, and what a stream does with it: torch_npu 2.10 makes its external events of these.
struct Word {
    uint64_t* place = nullptr;
    uint64_t value = 0;
    uint32_t how = 0;  // ACL_STREAM_WAIT_VALUE_*, which older headers do not have

    bool satisfied() const {
        switch (how) {
            case 0: return static_cast<int64_t>(*place - value) >= 0;
            case 1: return *place == value;
            case 2: return (*place & value) != 0;
            default: return ~(*place | value) != 0;
        }
    }
};

struct Node {
    enum class Kind { kCalls, kWait, kReset, kRecord, kAwaitValue, kWriteValue } kind = Kind::kCalls;
    std::vector<std::function<void()>> calls;  // a task group has several, and they are replaced together
    aclrtEvent event = nullptr;                // of the three kinds after that
    Word word;                                 // of the last two
};

struct Graph {
    int64_t id = 0;
    std::vector<std::shared_ptr<Node>> nodes;
    size_t operators = 0;
    std::set<std::pair<const char*, const char*>> memory;  // begin and end of what its calls read and write
    bool lost_memory = false;                              // some of it was given back

    bool uses(const char* begin, const char* end) const {
        return std::any_of(memory.begin(), memory.end(),
                           [&](const auto& range) { return range.first < end && begin < range.second; });
    }
};

struct Saved {
    char* data;
    std::vector<char> bytes;
};

struct Capture {
    std::shared_ptr<Graph> graph = std::make_shared<Graph>();
    aclrtStream origin = nullptr;
    std::thread::id thread;
    aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
    std::string invalid;          // why, if it is
    std::shared_ptr<Node> group;  // the open task group
    std::vector<Saved> saved;
};

struct Execution {
    std::shared_ptr<Graph> graph;
    size_t next = 0;
};

// What a stream has still to do. `running`: a thread is at it right now.
struct Backlog {
    std::deque<Execution> executions;
    bool running = false;
};

// A task group as a handle names it. Handles live as long as the process: callers never give them back.
struct Group {
    std::weak_ptr<Node> node;
};

struct Update {
    std::shared_ptr<Node> node;
    std::vector<std::function<void()>> calls;
};

struct State {
    std::mutex lock;
    std::condition_variable settled;  // a thread has stopped running a replay
    std::map<aclrtStream, std::shared_ptr<Capture>> captures;  // by every stream that takes part
    std::map<aclrtEvent, std::shared_ptr<Capture>> forks;      // ordinary events that were recorded in a capture
    std::map<aclrtEvent, ExternalEvent> external;
    std::map<aclrtStream, Backlog> blocked;
    std::map<aclrtStream, Update> updates;
    std::map<aclmdlRI, std::shared_ptr<Graph>> graphs;
    std::atomic<size_t> alive{0}, externals{0};  // how many graphs and external events there are, without the lock
    int64_t next_id = 1;

    // Call it with the lock held, after any change.
    void count() { vnpu_graph_activity = static_cast<int>(captures.size() + blocked.size() + updates.size()); }
};

State& state() {
    static auto* instance = new State;  // never destroyed: graphs are destroyed in static destructors
    return *instance;
}

using Guard = std::unique_lock<std::mutex>;

thread_local int replaying = 0;
thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

std::string named(aclrtStream stream) {
    char text[32];
    std::snprintf(text, sizeof text, "stream %p", stream);
    return text;
}

[[noreturn]] void refuse(const std::string& what, const std::string& problem) {
    throw std::runtime_error(what + ": " + problem);
}

std::shared_ptr<Capture> capture_of(aclrtStream stream) {
    const auto found = state().captures.find(stream);
    return found == state().captures.end() ? nullptr : found->second;
}

void expect_valid(const Capture& capture, const std::string& what) {
    if (!capture.invalid.empty()) refuse(what, "the capture is invalid since: " + capture.invalid);
}

std::string blocked_text(aclrtStream stream) {
    return named(stream) + " is blocked: its graph waits for an external event that nobody has recorded";
}

void run(const Node& node) {
    ++replaying;
    try {
        for (const auto& call : node.calls) call();
    } catch (...) {
        --replaying;
        throw;
    }
    --replaying;
}

// Runs what a stream has been given, up to a wait for an event that is not recorded. The calls run without the lock.
void advance(Guard& guard, aclrtStream stream) {
    State& s = state();
    const auto found = s.blocked.find(stream);
    if (found == s.blocked.end() || found->second.running) return;
    Backlog& backlog = found->second;
    backlog.running = true;
    const auto stop = [&](bool done) {
        backlog.running = false;
        if (done) s.blocked.erase(stream);
        s.count();
        s.settled.notify_all();
    };
    try {
        while (!backlog.executions.empty()) {
            Execution& execution = backlog.executions.front();
            if (execution.next == execution.graph->nodes.size()) {
                backlog.executions.pop_front();
                continue;
            }
            const std::shared_ptr<Node> node = execution.graph->nodes[execution.next];
            if (node->kind == Node::Kind::kWait && !s.external[node->event].recorded) return stop(false);
            if (node->kind == Node::Kind::kAwaitValue && !node->word.satisfied()) return stop(false);
            ++execution.next;
            if (node->kind == Node::Kind::kReset) s.external[node->event].recorded = false;
            if (node->kind == Node::Kind::kRecord) s.external[node->event].recorded = true;
            if (node->kind == Node::Kind::kWriteValue) *node->word.place = node->word.value;
            if (node->kind != Node::Kind::kCalls) continue;
            guard.unlock();
            try {
                run(*node);
            } catch (...) {
                guard.lock();
                throw;
            }
            guard.lock();
        }
    } catch (...) {
        stop(true);
        throw;
    }
    stop(true);
}

// After an event or a number has changed.
void advance_all(Guard& guard) {
    std::vector<aclrtStream> streams;
    for (const auto& [blocked, _] : state().blocked) streams.push_back(blocked);
    for (const aclrtStream blocked : streams) advance(guard, blocked);
}

// Throws if the stream waits for an event. (Another thread that runs a replay on it is waited for.)
void expect_free(Guard& guard, aclrtStream stream, const std::string& what) {
    const auto idle = [&] {
        const auto found = state().blocked.find(stream);
        return found == state().blocked.end() || !found->second.running;
    };
    state().settled.wait(guard, idle);
    if (state().blocked.count(stream) != 0) refuse(what, blocked_text(stream));
}

void log_graph(const char* action, const Graph& graph) {
    if (!ledger_enabled()) return;
    ledger_event(Fields("graph").add("op", action).add("graph", graph.id).add("calls", uint64_t(graph.operators)));
}

template <class Body>
aclError guarded(const char* function, Body body) {
    try {
        body();
        return ACL_SUCCESS;
    } catch (const std::exception& error) {
        set_error(std::string(function) + ": " + error.what());
        return ACL_ERROR_RT_FAILURE;
    }
}

Node& add_node(Capture& capture, Node::Kind kind, aclrtEvent event) {
    auto node = std::make_shared<Node>();
    node->kind = kind;
    node->event = event;
    capture.graph->nodes.push_back(std::move(node));
    return *capture.graph->nodes.back();
}

// Whether a captured stream has recorded the call on a number. Throws if the stream cannot take one.
bool recorded(Guard& guard, aclrtStream stream, Node::Kind kind, const Word& word) {
    const auto capture = capture_of(stream);
    if (capture == nullptr) {
        expect_free(guard, stream, "the stream");
        return false;
    }
    expect_valid(*capture, named(stream));
    add_node(*capture, kind, nullptr).word = word;
    return true;
}

// Whether events mean nothing to graphs: none is captured or blocked, and none can come to be by an event.
bool events_are_plain() {
    return vnpu_graph_activity.load(std::memory_order_relaxed) == 0 && state().externals == 0;
}

}  // namespace

Turn graph_turn_of(aclrtStream stream, const char* what) {
    if (replaying != 0) return Turn::kRun;
    Guard guard(state().lock);
    if (state().updates.count(stream) != 0) return Turn::kReplace;
    expect_free(guard, stream, what);
    const auto capture = capture_of(stream);
    if (capture == nullptr) return Turn::kRun;
    expect_valid(*capture, what);
    return Turn::kRecord;
}

void graph_record(aclrtStream stream, std::function<void()> call) {
    const Guard guard(state().lock);
    const auto update = state().updates.find(stream);
    if (update != state().updates.end()) {
        update->second.calls.push_back(std::move(call));
        return;
    }
    const auto capture = capture_of(stream);
    if (capture == nullptr) refuse("graph", named(stream) + " is not captured");
    ++capture->graph->operators;
    if (capture->group == nullptr) add_node(*capture, Node::Kind::kCalls, nullptr);
    Node& node = capture->group != nullptr ? *capture->group : *capture->graph->nodes.back();
    node.calls.push_back(std::move(call));
}

void graph_preserve(aclrtStream stream, void* data, size_t bytes) {
    const Guard guard(state().lock);
    const auto capture = capture_of(stream);
    if (capture == nullptr || bytes == 0) return;
    char* begin = static_cast<char*>(data);
    for (const Saved& saved : capture->saved) {
        if (saved.data <= begin && begin + bytes <= saved.data + saved.bytes.size()) return;
    }
    capture->saved.push_back({begin, std::vector<char>(begin, begin + bytes)});
}

void graph_refuse_sync(const char* what, aclrtStream stream) {
    if (vnpu_graph_activity.load(std::memory_order_relaxed) == 0) return;
    if (replaying != 0) return;
    Guard guard(state().lock);
    if (stream != nullptr) {
        expect_free(guard, stream, what);
    } else {
        std::vector<aclrtStream> streams;
        for (const auto& [blocked, _] : state().blocked) streams.push_back(blocked);
        for (const aclrtStream blocked : streams) expect_free(guard, blocked, what);
    }
    const auto forbidden = [&](const Capture& capture) {
        if (stream != nullptr) return capture_of(stream).get() == &capture;
        if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
        if (capture.thread == std::this_thread::get_id()) return capture.mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
        return capture.mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL && thread_mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
    };
    for (const auto& [_, capture] : state().captures) {
        if (!forbidden(*capture)) continue;
        if (capture->invalid.empty()) capture->invalid = std::string(what) + " during the capture";
        refuse(what, "not permitted while " + named(capture->origin) + " is captured, and the capture is invalid now");
    }
}

bool in_graph() { return replaying != 0; }

bool graph_capturing() {
    if (vnpu_graph_activity.load(std::memory_order_relaxed) == 0) return false;
    const Guard guard(state().lock);
    return replaying == 0 && !state().captures.empty();
}

void graph_uses(aclrtStream stream, const void* data, size_t bytes) {
    const Guard guard(state().lock);
    const auto capture = capture_of(stream);
    const char* begin = static_cast<const char*>(data);
    if (capture != nullptr && bytes != 0) capture->graph->memory.insert({begin, begin + bytes});
}

void graph_memory_freed(const void* data, size_t bytes) {
    if (vnpu_graph_activity.load(std::memory_order_relaxed) == 0 && state().alive == 0) return;
    const Guard guard(state().lock);
    const char* begin = static_cast<const char*>(data);
    const char* end = begin + bytes;
    for (const auto& [_, graph] : state().graphs) graph->lost_memory = graph->lost_memory || graph->uses(begin, end);
    for (const auto& [_, capture] : state().captures) {
        capture->graph->lost_memory = capture->graph->lost_memory || capture->graph->uses(begin, end);
        for (Saved& saved : capture->saved) {
            if (begin < saved.data + saved.bytes.size() && saved.data < end) saved.bytes.clear();
        }
    }
}

void graph_event_created(aclrtEvent event, bool external) {
    if (!external) return;
    const Guard guard(state().lock);
    state().external[event] = {};
    state().externals = state().external.size();
}

void graph_event_destroyed(aclrtEvent event) {
    if (events_are_plain()) return;
    const Guard guard(state().lock);
    state().external.erase(event);
    state().externals = state().external.size();
    state().forks.erase(event);
}

void graph_event_recorded(aclrtEvent event, aclrtStream stream) {
    if (events_are_plain()) return;
    State& s = state();
    Guard guard(s.lock);
    const auto external = s.external.find(event);
    const auto capture = capture_of(stream);
    if (capture != nullptr) {
        expect_valid(*capture, "aclrtRecordEvent");
        if (external == s.external.end()) {
            s.forks[event] = capture;
        } else {
            add_node(*capture, Node::Kind::kRecord, event);
        }
        return;
    }
    s.forks.erase(event);
    if (external == s.external.end()) return;
    expect_free(guard, stream, "aclrtRecordEvent");
    external->second.recorded = true;
    advance_all(guard);
}

void graph_event_reset(aclrtEvent event, aclrtStream stream) {
    if (events_are_plain()) return;
    const Guard guard(state().lock);
    const auto external = state().external.find(event);
    if (external == state().external.end()) return;
    const auto capture = capture_of(stream);
    if (capture != nullptr) {
        add_node(*capture, Node::Kind::kReset, event);
    } else {
        external->second.recorded = false;
    }
}

void graph_event_awaited(aclrtEvent event, aclrtStream stream) {
    if (events_are_plain()) return;
    State& s = state();
    const Guard guard(s.lock);
    const auto capture = capture_of(stream);
    const auto external = s.external.find(event);
    if (external != s.external.end()) {
        if (capture != nullptr) {
            add_node(*capture, Node::Kind::kWait, event);
        } else if (!external->second.recorded) {
            refuse("aclrtStreamWaitEvent",
                   "an external event that nobody has recorded: waiting for it outside graphs is not emulated");
        }
        return;
    }
    const auto fork = s.forks.find(event);
    if (fork == s.forks.end()) return;
    if (capture == nullptr) {
        s.captures[stream] = fork->second;
    } else if (capture != fork->second) {
        capture->invalid = fork->second->invalid = "one capture waits for another";
        refuse("aclrtStreamWaitEvent", "the event belongs to another capture, and both are invalid now");
    }
    s.count();
}

void graph_stream_destroyed(aclrtStream stream) {
    if (vnpu_graph_activity.load(std::memory_order_relaxed) == 0) return;
    const Guard guard(state().lock);
    state().captures.erase(stream);
    state().blocked.erase(stream);
    state().updates.erase(stream);
    state().count();
}

}  // namespace vnpu

using namespace vnpu;

#pragma GCC visibility push(default)
extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
    return guarded("aclmdlRICaptureBegin", [&] {
        State& s = state();
        Guard guard(s.lock);
        if (stream == nullptr) throw std::invalid_argument("the default stream cannot be captured");
        if (capture_of(stream) != nullptr) throw std::invalid_argument(named(stream) + " is captured already");
        expect_free(guard, stream, "the stream");
        const auto capture = std::make_shared<Capture>();
        capture->graph->id = s.next_id++;
        capture->origin = stream;
        capture->thread = std::this_thread::get_id();
        capture->mode = mode;
        s.captures[stream] = capture;
        s.count();
    });
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status, aclmdlRI* model) {
    *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (model != nullptr) *model = nullptr;
    if (vnpu_graph_activity.load(std::memory_order_relaxed) == 0) return ACL_SUCCESS;
    const Guard guard(state().lock);
    const auto capture = capture_of(stream);
    if (capture == nullptr) return ACL_SUCCESS;
    *status = capture->invalid.empty() ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
    if (model != nullptr) *model = capture->graph.get();
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI* model) {
    std::shared_ptr<Capture> capture;  // its closures are destroyed without the lock
    return guarded("aclmdlRICaptureEnd", [&] {
        State& s = state();
        const Guard guard(s.lock);
        *model = nullptr;
        capture = capture_of(stream);
        if (capture == nullptr) throw std::invalid_argument(named(stream) + " is not captured");
        if (capture->origin != stream) throw std::invalid_argument("the capture began on " + named(capture->origin));
        for (auto one = s.captures.begin(); one != s.captures.end();) {
            one = one->second == capture ? s.captures.erase(one) : std::next(one);
        }
        // From now on its events order nothing: all that was before them has run.
        for (auto one = s.forks.begin(); one != s.forks.end();) {
            one = one->second == capture ? s.forks.erase(one) : std::next(one);
        }
        s.count();
        // The oldest copy of a place last: it is what was there before the capture.
        for (auto saved = capture->saved.rbegin(); saved != capture->saved.rend(); ++saved) {
            if (!saved->bytes.empty()) std::memcpy(saved->data, saved->bytes.data(), saved->bytes.size());
        }
        capture->saved.clear();
        expect_valid(*capture, named(stream));
        if (capture->group != nullptr) throw std::runtime_error("a task group is still open");
        *model = capture->graph.get();
        s.graphs[*model] = capture->graph;
        s.alive = s.graphs.size();
        log_graph("capture", *capture->graph);
    });
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
    return guarded("aclmdlRIExecuteAsync", [&] {
        State& s = state();
        Guard guard(s.lock);
        const auto found = s.graphs.find(model);
        if (found == s.graphs.end()) throw std::invalid_argument("this graph does not exist (any more)");
        if (found->second->lost_memory) throw std::runtime_error("memory that the graph uses has been given back since");
        if (capture_of(stream) != nullptr) throw std::runtime_error("a graph inside a captured graph is not emulated");
        log_graph("replay", *found->second);
        s.blocked[stream].executions.push_back({found->second, 0});
        s.count();
        advance(guard, stream);
    });
}

aclError aclmdlRIDestroy(aclmdlRI model) {
    std::shared_ptr<Graph> graph;  // its closures are destroyed without the lock
    const Guard guard(state().lock);
    const auto found = state().graphs.find(model);
    if (found == state().graphs.end()) return ACL_SUCCESS;
    graph = found->second;
    state().graphs.erase(found);
    state().alive = state().graphs.size();
    return ACL_SUCCESS;
}

aclError aclmdlRIDebugPrint(aclmdlRI model) {
    const Guard guard(state().lock);
    const auto found = state().graphs.find(model);
    if (found == state().graphs.end()) return ACL_ERROR_INVALID_PARAM;
    std::fprintf(stderr, "[virtual NPU] graph %lld: %zu nodes, %zu calls\n", static_cast<long long>(found->second->id),
                 found->second->nodes.size(), found->second->operators);
    return ACL_SUCCESS;
}

// Headers of older wheels declare neither of these two.
aclError aclrtValueWrite(void* place, uint64_t value, uint32_t, aclrtStream stream) {
    return guarded("aclrtValueWrite", [&] {
        const Word word{static_cast<uint64_t*>(place), value, 0};
        Guard guard(state().lock);
        if (recorded(guard, stream, Node::Kind::kWriteValue, word)) return;
        *word.place = value;
        advance_all(guard);
    });
}

aclError aclrtValueWait(void* place, uint64_t value, uint32_t how, aclrtStream stream) {
    return guarded("aclrtValueWait", [&] {
        const Word word{static_cast<uint64_t*>(place), value, how};
        Guard guard(state().lock);
        if (recorded(guard, stream, Node::Kind::kAwaitValue, word)) return;
        if (!word.satisfied()) throw std::runtime_error("waiting for a number outside graphs is not emulated");
    });
}

// By symbol name: headers of older wheels do not declare it.
aclError exchange_mode(aclmdlRICaptureMode* mode) __asm__("aclmdlRICaptureThreadExchangeMode");
aclError exchange_mode(aclmdlRICaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
    return guarded("aclmdlRICaptureTaskGrpBegin", [&] {
        const Guard guard(state().lock);
        const auto capture = capture_of(stream);
        if (capture == nullptr) throw std::invalid_argument(named(stream) + " is not captured");
        if (capture->group != nullptr) throw std::invalid_argument("a task group is open already");
        capture->group = std::make_shared<Node>();
        capture->graph->nodes.push_back(capture->group);
    });
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp* handle) {
    return guarded("aclmdlRICaptureTaskGrpEnd", [&] {
        const Guard guard(state().lock);
        const auto capture = capture_of(stream);
        if (capture == nullptr || capture->group == nullptr) throw std::invalid_argument("no task group is open");
        *handle = reinterpret_cast<aclrtTaskGrp>(new Group{capture->group});
        capture->group = nullptr;
    });
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle) {
    return guarded("aclmdlRICaptureTaskUpdateBegin", [&] {
        State& s = state();
        const Guard guard(s.lock);
        const auto node = reinterpret_cast<Group*>(handle)->node.lock();
        if (node == nullptr) throw std::invalid_argument("the graph of this task group does not exist any more");
        if (capture_of(stream) != nullptr) throw std::invalid_argument(named(stream) + " is captured");
        if (!s.updates.emplace(stream, Update{node, {}}).second) {
            throw std::invalid_argument("an update is open already on " + named(stream));
        }
        s.count();
    });
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
    Update update;  // what it leaves is destroyed without the lock
    return guarded("aclmdlRICaptureTaskUpdateEnd", [&] {
        State& s = state();
        const Guard guard(s.lock);
        const auto found = s.updates.find(stream);
        if (found == s.updates.end()) throw std::invalid_argument("no update is open on " + named(stream));
        update = std::move(found->second);
        s.updates.erase(found);
        s.count();
        if (update.calls.size() != update.node->calls.size()) {
            throw std::invalid_argument("the task group holds " + std::to_string(update.node->calls.size()) +
                                        " calls, the update " + std::to_string(update.calls.size()));
        }
        std::swap(update.calls, update.node->calls);
    });
}

}  // extern "C"
#pragma GCC visibility pop
