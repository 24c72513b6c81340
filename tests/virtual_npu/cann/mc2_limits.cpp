// SPDX-License-Identifier: Apache-2.0
#include "mc2_limits.h"

#include <algorithm>

namespace vnpu {
namespace {

constexpr int64_t kMb = 1 << 20, kAny = INT32_MAX;

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

std::string num(int64_t value) { return std::to_string(value); }

struct Limits {
    bool a2;
    int version;
    Algorithm algorithm;
    std::vector<int64_t> ranks;  // two numbers: from, to; otherwise these and no other
    int64_t most_bs, most_k, least_h, most_h, h_step, most_experts, most_local;
};

// Where documents differ the stricter one counts: on A2, BS of the hierarchy algorithm is 256 (512 with later drivers),
// ep_world_size below 16 and more than 512 experts are recent.
const Limits kLimits[] = {
    {true, 1, Algorithm::kMesh, {16, 32, 64}, 256, 16, 32, 7168, 32, 512, 24},
    {true, 1, Algorithm::kHierarchy, {16, 32, 64}, 256, 16, 32, 10240, 32, 512, kAny},
    {true, 2, Algorithm::kMesh, {16, 32, 64, 128, 256}, 256, 16, 32, 7168, 32, 512, kAny},
    {true, 2, Algorithm::kHierarchy, {16, 32, 64}, 256, 16, 32, 10240, 32, 512, kAny},
    {false, 1, Algorithm::kMesh, {8, 16, 32, 64, 128, 144, 256, 288}, 512, 8, 7168, 7168, 1, 512, kAny},
    {false, 2, Algorithm::kMesh, {2, 768}, 512, 16, 1024, 8192, 1, 1024, kAny},
    {false, 2, Algorithm::kMesh2, {2, 768}, 256, 12, 1024, 8192, 1, 1024, kAny},
};

std::string listed(const std::vector<int64_t>& ranks) {
    if (ranks.size() == 2) return num(ranks[0]) + ".." + num(ranks[1]);
    std::string text;
    for (const int64_t one : ranks) text += (text.empty() ? "" : ", ") + num(one);
    return text;
}

std::string outside(const char* name, int64_t value, int64_t least, int64_t most) {
    return value < least || value > most
               ? std::string(name) + "=" + num(value) + " is outside " + num(least) + ".." + num(most)
               : "";
}

}  // namespace

std::string shape_problem(const Shapes& s, bool a2, int version, Algorithm algorithm, bool relaxed) {
    const Limits* limits = std::find_if(std::begin(kLimits), std::end(kLimits), [&](const Limits& l) {
        return l.a2 == a2 && l.version == version && l.algorithm == algorithm;
    });
    if (limits == std::end(kLimits)) return "this algorithm does not exist in version " + num(version);
    const std::vector<std::string> always = {
        outside("BS", s.bs, 1, limits->most_bs),
        outside("K", s.k, 1, std::min(limits->most_k, s.experts)),
        outside("ep_world_size", s.ranks, 1, limits->ranks.back()),
        outside("H", s.h, 1, limits->most_h),
        outside("moe_expert_num", s.experts, 1, limits->most_experts),
        outside("moe_expert_num/ep_world_size", s.local_experts(), 1, limits->most_local)};
    for (const std::string& problem : always) {
        if (!problem.empty()) return problem;
    }
    if (relaxed) return "";
    const std::string hint = " (VIRTUAL_NPU_SHAPES=relaxed lifts this)";
    const bool known_size = limits->ranks.size() == 2
                                ? s.ranks >= limits->ranks[0]
                                : std::count(limits->ranks.begin(), limits->ranks.end(), s.ranks) != 0;
    if (!known_size) return "ep_world_size=" + num(s.ranks) + " is not in " + listed(limits->ranks) + hint;
    if (s.h < limits->least_h) return outside("H", s.h, limits->least_h, limits->most_h) + hint;
    if (s.h % limits->h_step != 0) return "H=" + num(s.h) + " is not a multiple of " + num(limits->h_step) + hint;
    return "";
}

int64_t window_mb(const Shapes& s, bool a2, int version, Algorithm algorithm, int64_t shared_num) {
    const int64_t l = s.local_experts();
    int64_t bytes = 0;
    if (a2 && algorithm == Algorithm::kHierarchy) {
        bytes = (s.experts + s.ranks / 4) * up(s.most_bs * (s.h * 2 + 16 * up(s.k, 8)), 512) + 8 * kMb;
    } else if (a2) {
        bytes = 2 * (s.most_bs * s.ranks * std::min(l, s.k) * s.h * 2 + 2 * kMb);
    } else if (version == 1) {
        bytes = 2 * s.most_bs * 2 * (s.h + 128) * (s.ranks * l + s.k + 1) + 2 * kMb;
    } else {
        const int64_t row = up(2 * s.h, 32) + 64;
        bytes =
            2 * (l * s.most_bs * s.ranks * (algorithm == Algorithm::kMesh2 ? (row + 479) / 480 * 512 : up(row, 512)) +
                 (s.k + shared_num) * s.most_bs * up(2 * s.h, 512));
    }
    return (bytes + kMb - 1) / kMb;
}

}  // namespace vnpu
