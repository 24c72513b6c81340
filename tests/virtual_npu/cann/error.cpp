// SPDX-License-Identifier: Apache-2.0
#include "error.h"

#include <cstdio>

namespace vnpu {
namespace {
thread_local std::string latest;
}

void set_error(const std::string& message) {
    latest = message;
    // One write, so that lines of several processes do not mix.
    const std::string line = "[virtual NPU] " + message + "\n";
    std::fwrite(line.data(), 1, line.size(), stderr);
    std::fflush(stderr);
}

std::string take_error() {
    std::string message;
    message.swap(latest);
    return message;
}

}  // namespace vnpu
