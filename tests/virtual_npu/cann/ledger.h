// SPDX-License-Identifier: Apache-2.0
// What this process did, one JSON object per line in <VIRTUAL_NPU_LEDGER_DIR>/ledger-<pid>.jsonl: communicators,
// collectives, EP operators, violations and engine steps. Statements such as "collectives per step" are read from these
// files and from nothing else. Lines are buffered within a step and written with one append at each step mark (at once
// before the first one), so that a SIGKILL costs at most the current step. A forked child starts a file of its own.
#pragma once
#include <cstdint>
#include <string>

namespace vnpu {

// Collects `"key":value` pairs of one event.
class Fields {
public:
    explicit Fields(const char* event) { add("ev", event); }
    Fields& add(const char* key, const std::string& value);
    Fields& add(const char* key, const char* value) { return add(key, std::string(value)); }
    Fields& add(const char* key, int64_t value) { return raw(key, std::to_string(value)); }
    Fields& add(const char* key, uint64_t value) { return raw(key, std::to_string(value)); }
    Fields& add(const char* key, int value) { return raw(key, std::to_string(value)); }
    Fields& add(const char* key, bool value) { return raw(key, value ? "true" : "false"); }
    Fields& add(const char* key, double value);
    // The fields that all events of a communicator share.
    Fields& comm(const std::string& name, uint64_t ordinal, int rank, int size) {
        return add("comm", name).add("ordinal", ordinal).add("rank", rank).add("size", size);
    }
    const std::string& text() const { return text_; }

private:
    Fields& raw(const char* key, const std::string& value);
    std::string text_;
};

bool ledger_enabled();
// Adds the time ("t", monotonic seconds) and the current engine step ("step", -1 before the first mark); no-op without
// a ledger.
void ledger_event(const Fields& fields);

}  // namespace vnpu

extern "C" {
__attribute__((visibility("default"))) int vnpu_ledger_enabled(void);
// Marks the start of engine step `step`; all later events carry it. `kind` is free text (execute, dummy, profile, ...).
__attribute__((visibility("default"))) void vnpu_ledger_step(int64_t step, const char* kind, int64_t scheduled_tokens);
// Adds {"ev":event,...}; `json_object_fields` is the inside of a JSON object, such as "\"tokens\":3", and is taken as it is.
__attribute__((visibility("default"))) void vnpu_ledger_note(const char* event, const char* json_object_fields);
// Writes what is buffered, and everything later at once: for processes that end by _exit, as forked multiprocessing children do.
__attribute__((visibility("default"))) void vnpu_ledger_flush(void);
}
