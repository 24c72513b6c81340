// SPDX-License-Identifier: Apache-2.0
// The two phases every aclnn operator has, with exceptions turned into a status and the text of aclGetRecentErrMsg.
#pragma once
#include <acl/acl_base.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "aclnn_tensor.h"
#include "error.h"

using aclrtStream = void*;

namespace vnpu {

constexpr int kAclnnInvalid = 161002, kAclnnRuntime = 361001;  // ACLNN_ERR_PARAM_INVALID, ACLNN_ERR_RUNTIME_ERROR

// Phase 1: `make` builds the call and throws what is wrong with its arguments.
template <typename Make>
int prepare(const char* name, uint64_t* workspace_size, aclOpExecutor** executor, Make make) {
    try {
        if (workspace_size == nullptr || executor == nullptr) throw std::invalid_argument("workspaceSize or executor is null");
        *executor = make().release();
        *workspace_size = 0;
        return ACL_SUCCESS;
    } catch (const std::exception& error) {
        set_error(std::string(name) + ": " + error.what());
        return kAclnnInvalid;
    }
}

// Phase 2: runs the call and frees it.
inline int launch(const char* name, aclOpExecutor* executor) {
    try {
        if (executor == nullptr) throw std::invalid_argument("executor is null");
        const std::unique_ptr<aclOpExecutor> call(executor);
        call->run();
        return ACL_SUCCESS;
    } catch (const std::exception& error) {
        set_error(std::string(name) + ": " + error.what());
        return kAclnnRuntime;
    }
}

}  // namespace vnpu
