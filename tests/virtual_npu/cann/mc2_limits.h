// SPDX-License-Identifier: Apache-2.0
// The documented limits of MC2 dispatch and combine per device and version, and the HCCL window that they need.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace vnpu {

enum class Algorithm { kMesh, kMesh2, kHierarchy };  // "" or fullmesh(_v1), fullmesh_v2, hierarchy

struct Shapes {
    int64_t ranks, bs, k, h, experts, most_bs;  // most_bs: global_bs / ep_world_size
    int64_t local_experts() const { return experts / ranks; }
};

// What is wrong with the shapes, "" if nothing. `relaxed` admits toys: any hidden size and any number of ranks up to
// the largest documented one. Upper limits, and everything that is no shape, are the same in both modes.
std::string shape_problem(const Shapes& shapes, bool a2, int version, Algorithm algorithm, bool relaxed);

// HCCL_BUFFSIZE that the operators need at least, in MB. `shared_num`: shared_expert_num, counted on A3 in version 2.
int64_t window_mb(const Shapes& shapes, bool a2, int version, Algorithm algorithm, int64_t shared_num);

}  // namespace vnpu
