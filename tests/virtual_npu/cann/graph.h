// SPDX-License-Identifier: Apache-2.0
// ACL graphs: capture of what is called on a stream, and replay.
//
// A captured call is a closure over the addresses that it was called with, so a replay reads and writes what lies there
// by then. Nothing on a capturing stream is executed as far as a caller can see: operators are computed once for the
// shapes of their results, and what they wrote over is put back when the capture ends. Communication is recorded only.
//
// A replay runs at once, up to a wait for an external event that is not recorded yet. It goes on in the call that
// records the event, as in FULL mode, where the host updates attention after it has started the replay.
#pragma once
#include <acl/acl.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <string>

// Captures, updates and blocked replays at the moment: 0 in eager mode, and then calls need not ask anything else.
extern "C" __attribute__((visibility("default"))) std::atomic<int> vnpu_graph_activity;

namespace vnpu {

// What a call on a stream does.
enum class Turn {
    kRun,     // it runs
    kRecord,  // the stream is captured: record it; computing it, for the shapes of its results, must not be seen
    kReplace  // a task group is updated: record it, do not run it
};

#pragma GCC visibility push(default)  // kernels.so uses these too

// Throws std::runtime_error if the stream cannot take a call: its capture is invalid, or a replay blocks it.
Turn graph_turn_of(aclrtStream stream, const char* what);
inline Turn graph_turn(aclrtStream stream, const char* what) {
    return vnpu_graph_activity.load(std::memory_order_relaxed) == 0 ? Turn::kRun : graph_turn_of(stream, what);
}
// Adds a call to the capture or update of this stream. `call` throws what is wrong.
void graph_record(aclrtStream stream, std::function<void()> call);
// Keeps memory that the capture of this stream is about to change, until the capture ends.
void graph_preserve(aclrtStream stream, void* data, size_t bytes);
// Memory that the latest recorded calls of this stream read or write: once it is given back, the graph cannot run.
void graph_uses(aclrtStream stream, const void* data, size_t bytes);
// For calls that wait for the device. With a stream: refused if it is captured, or blocked. Without (nullptr): refused
// during captures of this thread, or in "global" mode of any thread. A refusal ends the capture.
void graph_refuse_sync(const char* what, aclrtStream stream);

#pragma GCC visibility pop

// Whether this thread runs a replay.
bool in_graph();
// Whether any stream is captured: what lies in memory then is not what a call will find.
bool graph_capturing();
// Device memory is given back: it is not put back when a capture ends, and graphs that use it cannot run any more.
void graph_memory_freed(const void* data, size_t bytes);

// Events. A wait on a captured stream takes the waiting one into the capture; an external event stays a wait.
void graph_event_created(aclrtEvent event, bool external);
void graph_event_destroyed(aclrtEvent event);
void graph_event_recorded(aclrtEvent event, aclrtStream stream);
void graph_event_reset(aclrtEvent event, aclrtStream stream);
void graph_event_awaited(aclrtEvent event, aclrtStream stream);
void graph_stream_destroyed(aclrtStream stream);

}  // namespace vnpu
