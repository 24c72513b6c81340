// SPDX-License-Identifier: Apache-2.0
#include "ledger.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "error.h"
#include "settings.h"

namespace vnpu {
namespace {

constexpr size_t kBufferBytes = 64 * 1024;

class Ledger {
public:
    // Never destroyed: torch_npu destroys communicators in static destructors, which may still write events.
    static Ledger& get() {
        static Ledger* instance = new Ledger;
        return *instance;
    }

    void event(const std::string& fields) {
        const std::lock_guard<std::mutex> guard(lock_);
        append(fields);
        // After a violation, stock may kill the process before it exits.
        const bool violation = fields.rfind("\"ev\":\"violation\"", 0) == 0;
        if (violation || step_ < 0 || at_exit_ || buffer_.size() >= kBufferBytes) flush();
    }

    void step(int64_t step, const Fields& fields) {
        const std::lock_guard<std::mutex> guard(lock_);
        step_ = step;
        append(fields.text());
        flush();
    }

    void finish() {
        const std::lock_guard<std::mutex> guard(lock_);
        at_exit_ = true;
        flush();
    }

private:
    Ledger() {
        pthread_atfork([] { get().lock_.lock(); }, [] { get().lock_.unlock(); }, [] { get().start_child(); });
    }

    // The parent still holds what is in the buffer and writes it itself.
    void start_child() {
        buffer_.clear();
        step_ = -1;
        if (file_ >= 0) close(file_);
        file_ = -1;
        lock_.unlock();
    }

    void append(const std::string& fields) {
        using namespace std::chrono;
        const double now = duration<double>(steady_clock::now().time_since_epoch()).count();
        char stamp[64];
        const bool own_step = fields.rfind("\"ev\":\"step\"", 0) == 0;
        std::snprintf(stamp, sizeof stamp, own_step ? ",\"t\":%.6f}\n" : ",\"t\":%.6f,\"step\":%lld}\n", now,
                      static_cast<long long>(step_));
        buffer_ += "{" + fields + stamp;
    }

    void flush() {
        if (buffer_.empty()) return;
        const std::string path = settings().ledger_dir + "/ledger-" + std::to_string(getpid()) + ".jsonl";
        if (file_ < 0) file_ = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        size_t written = 0;
        while (file_ >= 0 && written < buffer_.size()) {
            const ssize_t n = write(file_, buffer_.data() + written, buffer_.size() - written);
            if (n < 0 && errno != EINTR) break;
            if (n > 0) written += static_cast<size_t>(n);
        }
        if (written < buffer_.size()) set_error("ledger " + path + " lost events: " + std::strerror(errno));
        buffer_.clear();
    }

    std::mutex lock_;
    std::string buffer_;
    int64_t step_ = -1;
    int file_ = -1;
    bool at_exit_ = false;
};

struct FlushAtExit {
    ~FlushAtExit() {
        if (ledger_enabled()) Ledger::get().finish();
    }
} flush_at_exit;

std::string quoted(const std::string& value) {
    std::string out = "\"";
    for (const char c : value) {
        char code[8];
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            std::snprintf(code, sizeof code, "\\u%04x", c);
            out += code;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

}  // namespace

Fields& Fields::raw(const char* key, const std::string& value) {
    if (!text_.empty()) text_ += ',';
    text_ += quoted(key) + ":" + value;
    return *this;
}

Fields& Fields::add(const char* key, const std::string& value) { return raw(key, quoted(value)); }

Fields& Fields::add(const char* key, double value) {
    char number[64];
    std::snprintf(number, sizeof number, "%.1f", value);
    return raw(key, number);
}

bool ledger_enabled() {
    try {
        return !settings().ledger_dir.empty();
    } catch (const std::exception&) {
        return false;  // bad settings are reported by aclInit, which then refuses to start
    }
}

void ledger_event(const Fields& fields) {
    if (ledger_enabled()) Ledger::get().event(fields.text());
}

}  // namespace vnpu

extern "C" {

int vnpu_ledger_enabled(void) { return vnpu::ledger_enabled() ? 1 : 0; }

void vnpu_ledger_step(int64_t step, const char* kind, int64_t scheduled_tokens) {
    if (!vnpu::ledger_enabled()) return;
    vnpu::Fields fields("step");
    fields.add("step", step).add("kind", kind != nullptr ? kind : "").add("scheduled_tokens", scheduled_tokens);
    vnpu::Ledger::get().step(step, fields);
}

void vnpu_ledger_note(const char* event, const char* json_object_fields) {
    if (!vnpu::ledger_enabled() || event == nullptr || json_object_fields == nullptr) return;
    std::string fields = vnpu::Fields(event).text();
    if (*json_object_fields != '\0') fields += std::string(",") + json_object_fields;
    vnpu::Ledger::get().event(fields);
}

void vnpu_ledger_flush(void) {
    if (vnpu::ledger_enabled()) vnpu::Ledger::get().finish();
}

}  // extern "C"
