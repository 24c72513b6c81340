// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string_view>

namespace vnpu {
namespace {

constexpr int64_t kMinDeviceMemoryMb = 64;
constexpr int64_t kMinWindowMb = 1;
constexpr int64_t kMaxMb = int64_t{1} << 24;  // 16 TB: anything above is a typing error
constexpr double kMaxTimeout = 86400;
constexpr int kMaxDelayMs = 3600 * 1000;

std::string text(const char* name, const char* fallback) {
    const char* value = std::getenv(name);
    return value != nullptr ? value : fallback;
}

[[noreturn]] void reject(const char* name, const std::string& value, const std::string& allowed) {
    throw std::runtime_error(std::string(name) + "='" + value + "' is not valid: it must be " + allowed);
}

int64_t integer(const char* name, int64_t fallback, int64_t least, int64_t most) {
    const std::string value = text(name, "");
    if (std::getenv(name) == nullptr) return fallback;
    int64_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size() || number < least || number > most) {
        reject(name, value, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return number;
}

// Takes a number of up to nine digits, or one character, from the front of `text`.
bool take(std::string_view& text, int& number) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + std::min<size_t>(text.size(), 9), number);
    text.remove_prefix(static_cast<size_t>(end - text.data()));
    return error == std::errc();
}
bool take(std::string_view& text, char wanted) {
    const bool found = !text.empty() && text.front() == wanted;
    if (found) text.remove_prefix(1);
    return found;
}

std::vector<Delay> delays(const char* name) {
    const std::string value = text(name, "");
    std::vector<Delay> all;
    std::string_view rest = value;
    for (bool more = !rest.empty(); more;) {
        Delay delay{};
        bool good = take(rest, delay.rank) && take(rest, ':') && take(rest, delay.ms);
        if (good && take(rest, '@')) good = take(rest, delay.nth) && delay.nth > 0;
        more = take(rest, ',');
        good = good && (more || rest.empty()) && delay.rank >= 0 && delay.ms > 0 && delay.ms <= kMaxDelayMs;
        const auto same = [&](const Delay& other) { return other.rank == delay.rank; };
        if (!good || std::any_of(all.begin(), all.end(), same)) {
            reject(name, value,
                   "<rank>:<ms> or <rank>:<ms>@<nth dispatch>, several with commas, each rank once, ms from 1 to " +
                       std::to_string(kMaxDelayMs));
        }
        all.push_back(delay);
    }
    return all;
}

std::string choice(const char* name, std::initializer_list<const char*> allowed) {
    const std::string value = text(name, *allowed.begin());
    std::string listed;
    for (const char* one : allowed) {
        if (value == one) return value;
        listed += listed.empty() ? one : std::string(" or ") + one;
    }
    reject(name, value, listed);
}

double seconds(const char* name, double fallback) {
    const std::string value = text(name, "");
    if (std::getenv(name) == nullptr) return fallback;
    char* end = nullptr;
    const double number = std::strtod(value.c_str(), &end);
    if (value.empty() || *end != '\0' || !(number > 0) || number > kMaxTimeout) {
        reject(name, value, "a number of seconds above 0, at most 86400");
    }
    return number;
}

std::string readable_file(const char* name) {
    const std::string path = text(name, "");
    if (!path.empty() && access(path.c_str(), R_OK) != 0) {
        reject(name, path, std::string("a file that can be read (") + std::strerror(errno) + ")");
    }
    return path;
}

std::string writable_directory(const char* name) {
    const std::string path = text(name, "");
    if (!path.empty() && access((path + "/.").c_str(), W_OK | X_OK) != 0) {
        reject(name, path, std::string("a directory that exists and can be written (") + std::strerror(errno) + ")");
    }
    return path;
}

Settings read() {
    Settings s;
    s.soc = choice("VIRTUAL_NPU_SOC", {"Ascend910_9391", "Ascend910B1"});
    s.devices = static_cast<int>(integer("VIRTUAL_NPU_DEVICES", 8, 1, 1024));
    s.device_memory_mb = integer("VIRTUAL_NPU_DEVICE_MEMORY_MB", 2048, kMinDeviceMemoryMb, kMaxMb);
    s.window_mb = integer("VIRTUAL_NPU_WINDOW_MB", 64, kMinWindowMb, kMaxMb);
    s.timeout_s = seconds("VIRTUAL_NPU_TIMEOUT_S", 60);
    s.relaxed_shapes = choice("VIRTUAL_NPU_SHAPES", {"strict", "relaxed"}) == "relaxed";
    s.report_duplicate_experts = choice("VIRTUAL_NPU_DUPLICATE_EXPERTS", {"refuse", "report"}) == "report";
    s.report_mixed_modes = choice("VIRTUAL_NPU_MIXED_MODES", {"refuse", "report"}) == "report";
    s.delays = delays("VIRTUAL_NPU_DELAY");
    s.link_delay_file = readable_file("VIRTUAL_NPU_LINK_DELAY_FILE");
    s.ledger_dir = writable_directory("VIRTUAL_NPU_LEDGER_DIR");
    return s;
}

}  // namespace

const Settings& settings() {
    struct Owned {
        pid_t process;
        Settings settings;
    };
    // A throw changes nothing, so that every later call fails the same way. Never destroyed, for calls made while
    // exiting and for texts that callers keep.
    static std::atomic<const Owned*> latest{nullptr};
    const Owned* known = latest;
    if (known == nullptr || known->process != getpid()) {
        const Owned* fresh = new Owned{getpid(), read()};
        if (latest.compare_exchange_strong(known, fresh)) return fresh->settings;
        delete fresh;  // another thread was faster
    }
    return known->settings;
}

}  // namespace vnpu
