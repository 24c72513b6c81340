// SPDX-License-Identifier: Apache-2.0
// The virtual NPU's settings, read once per process from the environment (VIRTUAL_NPU_*); a forked child reads its own.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace vnpu {

// One entry of VIRTUAL_NPU_DELAY: this rank's device is late by `ms` at every dispatch, or only at its `nth` one.
struct Delay {
    int rank;  // in the communicator of the dispatch
    int ms;
    int nth;  // 1 = the communicator's first dispatch, 0 = every one
};

struct Settings {
    // VIRTUAL_NPU_SOC, as aclrtGetSocName spells it: Ascend910B1 (A2) or Ascend910_9391 (A3, default)
    std::string soc;
    // VIRTUAL_NPU_DEVICES, default 8, at least 1
    int devices;
    // VIRTUAL_NPU_DEVICE_MEMORY_MB, memory that each device reports, default 2048
    int64_t device_memory_mb;
    // VIRTUAL_NPU_WINDOW_MB, shared memory of one rank in one communicator at most, default 64
    int64_t window_mb;
    // VIRTUAL_NPU_TIMEOUT_S, how long a rank waits for its peers inside one operator, default 60
    double timeout_s;
    // VIRTUAL_NPU_SHAPES: strict (default; documented limits per SoC) or relaxed (toy hidden sizes, small EP)
    bool relaxed_shapes;
    // VIRTUAL_NPU_DUPLICATE_EXPERTS: refuse (default) a row that names one expert twice, or report it (on stderr once,
    // in the ledger each time) and go on as long as the rows fit: stock 0.11.0 profile runs draw such rows
    bool report_duplicate_experts;
    // VIRTUAL_NPU_MIXED_MODES: refuse (default) a dispatch or combine that some ranks run in a graph and others eagerly,
    // or report it (in the ledger) and go on
    bool report_mixed_modes;
    // VIRTUAL_NPU_DELAY: <rank>:<ms>[@<nth dispatch>], several with commas, one per rank; default none
    std::vector<Delay> delays;
    // VIRTUAL_NPU_LINK_DELAY_FILE, a file with a number of microseconds, which every HCCL collective takes longer, as if
    // nodes were far apart; it is read each time, so that it can change. "" = none
    std::string link_delay_file;
    // VIRTUAL_NPU_LEDGER_DIR, an existing directory; "" = no ledger
    std::string ledger_dir;

    bool is_a2() const { return soc.rfind("Ascend910B", 0) == 0; }
    bool is_a3() const { return soc.rfind("Ascend910_93", 0) == 0; }
};

// Parses and validates on the first call. A bad value is a std::runtime_error that names the variable, the value found
// and what is allowed; aclInit reports it, so a process with bad settings never gets a device.
const Settings& settings();

}  // namespace vnpu
