// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

namespace vnpu {
namespace {

constexpr int64_t kMinDeviceMemoryMb = 64;
constexpr int64_t kMinWindowMb = 1;
constexpr int64_t kMaxMb = int64_t{1} << 24;  // 16 TB: anything above is a typing error
constexpr double kMaxTimeout = 86400;

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
    s.ledger_dir = writable_directory("VIRTUAL_NPU_LEDGER_DIR");
    return s;
}

}  // namespace

const Settings& settings() {
    // A throw leaves it unset, so that every later call fails the same way; never destroyed, for calls made while
    // exiting.
    static const Settings* const instance = new Settings(read());
    return *instance;
}

}  // namespace vnpu
