// SPDX-License-Identifier: Apache-2.0
// One place for failures: what went wrong is kept for aclGetRecentErrMsg, so that torch_npu prints it with its exception.
#pragma once
#include <string>

namespace vnpu {

// Remember `message` as this thread's latest failure (what aclGetRecentErrMsg returns next) and echo it to stderr, prefixed
// with "[virtual NPU] ", because some callers drop the text.
void set_error(const std::string& message);

// The latest failure of this thread, or "" if there was none; reading it clears it.
std::string take_error();

}  // namespace vnpu
