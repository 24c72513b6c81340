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
#include "graph.h"

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

// Phase 2: runs the call and frees it, or hands it to the graph that the stream is captured for.
inline int launch(const char* name, aclOpExecutor* executor, aclrtStream stream) {
    try {
        if (executor == nullptr) throw std::invalid_argument("executor is null");
        std::shared_ptr<aclOpExecutor> call(executor);
        const Turn turn = graph_turn(stream, name);
        if (turn == Turn::kRun) {
            call->run();
            return ACL_SUCCESS;
        }
        if (turn == Turn::kRecord) call->leave_results();
        graph_record(stream, [call, name] {
            try {
                call->run();
            } catch (const std::exception& error) {
                throw std::runtime_error(std::string(name) + " in a graph: " + error.what());
            }
        });
        return ACL_SUCCESS;
    } catch (const std::exception& error) {
        set_error(std::string(name) + ": " + error.what());
        return kAclnnRuntime;
    }
}

}  // namespace vnpu
