// SPDX-License-Identifier: Apache-2.0
// aclnnMoeDistributeDispatch(V2) and aclnnMoeDistributeCombine(V2): expert-parallel exchange of token rows.
//
// A dispatch shows its rows and expert ids in its window, waits for all ranks, and takes the rows of its own experts
// from everybody. A combine shows the experts' rows and waits only for the ranks that hold rows of its own tokens. What
// hardware checks on one rank is checked before anything is shown: that rank gets an error, and its peers wait until
// they time out. What hardware corrupts silently (ragged BS without a common global_bs, ...) is compared when the ranks
// meet.
#include <hccl/hccl_types.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <set>

#include "aclnn_phases.h"
#include "error.h"
#include "graph.h"
#include "half.h"
#include "ledger.h"
#include "mc2_limits.h"
#include "settings.h"
#include "shm.h"

namespace vnpu {

// Values of an EP operator's OpRecord.
enum EpValue {
    kBs,
    kMask,
    kGlobalBs,
    kVersion,
    kE,
    kK,
    kH,
    kType,
    kQuant,
    kRanks,
    kSharedNum,
    kAlgorithm,
    kBufferMb,
    kMode,
    kEpValues
};
static_assert(kEpValues <= OpRecord::kValues, "an EP record fits");

const std::vector<OpField>& ep_fields() {
    static const std::vector<OpField> fields = {
        {"BS", true, nullptr},
        {"x_active_mask", true, [](int64_t v) { return std::string(v != 0 ? "yes" : "no"); }},
        {"global_bs", false, nullptr},
        {"version", false, nullptr},
        {"moe_expert_num", false, nullptr},
        {"K", false, nullptr},
        {"H", false, nullptr},
        {"dtype", false, [](int64_t v) { return std::string(type_name(static_cast<aclDataType>(v))); }},
        {"quant_mode", false, nullptr},
        {"ep_world_size", false, nullptr},
        {"shared_expert_num", false, nullptr},
        {"comm_alg", false,
         [](int64_t v) {
             static const char* const names[] = {"fullmesh", "fullmesh_v2", "hierarchy"};
             return std::string(names[v]);
         }},
        {"HCCL_BUFFSIZE", false, nullptr},
        // Compared by check_modes, as a setting says what it means.
        {"mode", true, [](int64_t v) { return std::string(v != 0 ? "graph" : "eager"); }}};
    return fields;
}

// A dispatch whose combine has not run yet. `counts` are the true prefix sums; what the caller holds under the names of
// `assist` and `recv_counts` are numbers that mean nothing (see opaque).
struct EpPair {
    OpRecord record;
    std::vector<int32_t> ids, counts, assist, recv_counts;
    std::vector<char> mask, weights, expand_scales;
};

namespace {

constexpr int64_t kServer = 8;  // ranks of one A2 machine, for the hierarchy algorithm

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

float load(const char* at, aclDataType type) {
    uint16_t h;
    std::memcpy(&h, at, sizeof h);
    return type == ACL_BF16 ? bf16_to_float(h) : fp16_to_float(h);
}

void store(char* at, aclDataType type, float value) {
    const uint16_t h = type == ACL_BF16 ? float_to_bf16(value) : float_to_fp16(value);
    std::memcpy(at, &h, sizeof h);
}

// Fills elements [from, end) of an output with what nobody can take for a result: NaN, or 0x7f bytes for integers.
void poison(const aclTensor* tensor, int64_t from) {
    if (tensor == nullptr || from >= tensor->numel()) return;
    const auto size = static_cast<int64_t>(element_bytes(tensor->type));
    char* begin = tensor->data() + from * size;
    const bool floating = tensor->type == ACL_FLOAT || tensor->type == ACL_FLOAT16 || tensor->type == ACL_BF16;
    std::memset(begin, floating ? 0xff : 0x7f, static_cast<size_t>((tensor->numel() - from) * size));
}

// What the caller must hand on to combine and may not read: it differs by device, algorithm and version on hardware,
// and by call here, so that nothing can come to depend on it.
std::vector<int32_t> opaque(int64_t size) {
    static thread_local std::mt19937 random{std::random_device{}()};
    std::vector<int32_t> values(static_cast<size_t>(size));
    for (int32_t& value : values) value = static_cast<int32_t>(random());
    return values;
}

std::string num(int64_t value) { return std::to_string(value); }

struct Attributes {
    std::string group;
    int64_t ranks, rank, experts, tp_world_size, shard_type, shared_num, shared_ranks, global_bs;
    std::string algorithm;
};

class EpCall : public aclOpExecutor {
public:
    EpCall(bool dispatch, int version, const Attributes& a)
        : dispatch_(dispatch), version_(version), a_(a), comm_(find_comm(a.group)) {
        record_.kind = dispatch ? OpKind::kDispatch : OpKind::kCombine;
    }

    // Both phases: the ids and the mask are device memory, and a captured graph runs only the second phase again.
    virtual void check() = 0;
    virtual void exchange() = 0;

    // The first phase. During a capture nothing can be said about what will lie in memory, nor about the call before.
    void check_arguments() {
        contents_ = !graph_capturing();
        check();
        contents_ = true;
    }

    void run() override {
        check();
        record_.values[kMode] = in_graph();
        comm_.claim(Comm::Use::kEp, name());
        if (dispatch_) remember_global_bs();
        const double host_us = comm_.group_operator(record_, [&] { exchange(); });
        if (!ledger_enabled()) return;
        Fields event("ep");
        event.comm(comm_.name(), record_.ordinal, comm_.rank(), comm_.size())
            .add("op", dispatch_ ? "dispatch" : "combine");
        if (dispatch_) event.add("quant_mode", record_.values[kQuant]);
        event.add("bs", bs_).add("global_bs", a_.global_bs).add("mask", !mask_.empty()).add("active", active_);
        event.add("k", k_).add("e", a_.experts).add("h", h_).add("mode", in_graph() ? "graph" : "eager");
        ledger_event(event.add("host_us", host_us));
    }

protected:
    std::string name() const { return op_name(record_.kind); }
    int64_t local_experts() const { return a_.experts / a_.ranks; }
    Failure refuse(const std::string& problem) const { return comm_.failure(HCCL_E_PARA, name(), problem); }
    void require(bool good, const std::string& problem) const {
        if (!good) throw refuse(problem);
    }

    void expect(const aclTensor& t, const char* what, std::initializer_list<aclDataType> types,
                std::vector<int64_t> shape) const {
        require(std::count(types.begin(), types.end(), t.type) != 0 && t.shape == shape,
                std::string(what) + " is " + t.describe() + ", which does not fit the other arguments");
    }

    // Sets BS, K and H and checks what hardware checks on one rank (and the rest of the documented limits per SoC).
    void check_attributes(const aclTensor& ids, int64_t h, aclDataType type, int64_t quant) {
        require(ids.shape.size() == 2 && ids.type == ACL_INT32,
                "expert_ids must be int32 (BS, K), not " + ids.describe());
        bs_ = ids.dim(0);
        k_ = ids.dim(1);
        h_ = h;
        const bool a2 = settings().is_a2();
        algorithm_ = chosen_algorithm(a2);
        const bool hierarchy = algorithm_ == Algorithm::kHierarchy;
        require(a_.tp_world_size == 0 || a_.tp_world_size == 1,
                "tp_world_size=" + num(a_.tp_world_size) + " is not emulated");
        require(a_.shard_type == 0, "expert_shard_type=" + num(a_.shard_type) + " is not valid, only 0 is");
        require(a_.shared_ranks == 0, "shared_expert_rank_num=" + num(a_.shared_ranks) + " is not emulated, only 0 is");
        require(a_.shared_num == 1 || (a_.shared_num == 0 && !a2 && version_ == 2),
                "shared_expert_num=" + num(a_.shared_num) + " is not valid without shared-expert ranks");
        require(a_.ranks == comm_.size() && a_.rank == comm_.rank(), "ep_rank_id=" + num(a_.rank) +
                                                                         " of ep_world_size=" + num(a_.ranks) +
                                                                         " is not this rank of the communicator");
        require(a_.experts > 0 && a_.experts % a_.ranks == 0,
                "moe_expert_num=" + num(a_.experts) + " is not a multiple of ep_world_size=" + num(a_.ranks));
        require(a_.global_bs >= bs_ * a_.ranks && a_.global_bs % a_.ranks == 0 && a_.global_bs <= INT32_MAX,
                "global_bs=" + num(a_.global_bs) + " is invalid: it must be a multiple of ep_world_size=" +
                    num(a_.ranks) + " and at least BS*ep_world_size=" + num(bs_ * a_.ranks));
        require(!loose() || (!hierarchy && algorithm_ != Algorithm::kMesh2),
                std::string("comm_alg ") + (hierarchy ? "hierarchy" : "fullmesh_v2") +
                    " cannot work when BS differs between ranks (global_bs=" + num(a_.global_bs) + ", BS=" + num(bs_) +
                    ")" + (hierarchy ? ": it needs global_bs=0" : ""));
        require(a2 || !hierarchy, "the hierarchy algorithm is emulated on A2 only");
        const Shapes shapes{a_.ranks, bs_, k_, h_, a_.experts, a_.global_bs / a_.ranks};
        const std::string problem = shape_problem(shapes, a2, version_, algorithm_, settings().relaxed_shapes);
        require(problem.empty(), problem + " on " + settings().soc);
        const int64_t need_mb = window_mb(shapes, a2, version_, algorithm_, a_.shared_num);
        require(comm_.buffer_mb() >= need_mb, "HCCL_BUFFSIZE=" + num(comm_.buffer_mb()) +
                                                  " (MB) is too small: global_bs=" + num(a_.global_bs) +
                                                  " needs at least " + num(need_mb));
        if (dispatch_) check_layers();
        for (const Delay& delay : settings().delays) {
            require(delay.rank < a_.ranks,
                    "VIRTUAL_NPU_DELAY names rank " + num(delay.rank) + ", but there are " + num(a_.ranks) + " ranks");
        }
        // clang-format off
        const int64_t values[] = {bs_, 0, a_.global_bs, version_, a_.experts, k_, h_, type, quant, a_.ranks,
                                  a_.shared_num, static_cast<int64_t>(algorithm_), comm_.buffer_mb(), in_graph()};
        // clang-format on
        static_assert(sizeof values / sizeof *values == kEpValues, "one value per field");
        std::copy(std::begin(values), std::end(values), record_.values);
    }

    // comm_alg; on A2 two variables turn "" into hierarchy.
    Algorithm chosen_algorithm(bool a2) const {
        const auto on = [](const char* variable, const char* value) {
            const char* text = std::getenv(variable);
            return text != nullptr && std::string(text) == value;
        };
        const std::string& name = a_.algorithm;
        if (name == "hierarchy") return Algorithm::kHierarchy;
        if (name.empty()) {
            return a2 && on("HCCL_INTRA_PCIE_ENABLE", "1") && on("HCCL_INTRA_ROCE_ENABLE", "0") ? Algorithm::kHierarchy
                                                                                                : Algorithm::kMesh;
        }
        if (a2 ? name == "fullmesh" : dispatch_ && name == "fullmesh_v1") return Algorithm::kMesh;
        require(!a2 && dispatch_ && name == "fullmesh_v2", "comm_alg '" + name + "' is unknown on " + settings().soc);
        return Algorithm::kMesh2;
    }

    // More than this rank's BS asks for: ranks may hold different numbers of rows.
    bool loose() const { return a_.global_bs != bs_ * a_.ranks; }

    // global_bs must be one value in every layer of the network. The binding turns 0 into BS*ep_world_size, so only a
    // larger value is known to be given by the caller; from then on, and before, there may be no other.
    void check_layers() const {
        const Comm::GlobalBs& seen = comm_.global_bs;
        if (seen.latest == 0 || (!seen.loose && !loose())) return;
        require(!seen.varied && seen.latest == a_.global_bs,
                "global_bs=" + num(a_.global_bs) + " (BS=" + num(bs_) + ") differs from " + num(seen.latest) +
                    " of an earlier layer: it must be the same in all layers, and 0 in all or none");
    }

    void remember_global_bs() const {
        Comm::GlobalBs& seen = comm_.global_bs;
        seen.varied |= seen.latest != 0 && seen.latest != a_.global_bs;
        seen.loose |= loose();
        seen.latest = a_.global_bs;
    }

    // Reads the mask and sets how many rows take part.
    void check_mask(const std::optional<aclTensor>& mask) {
        mask_.clear();
        active_ = bs_;
        record_.values[kMask] = mask.has_value();
        if (!mask) return;
        require(version_ == 2, "x_active_mask is reserved in version 1");
        require(mask->shape.size() == 1, "x_active_mask " + mask->describe() + " is not emulated, only bool (BS) is");
        expect(*mask, "x_active_mask", {ACL_BOOL, ACL_INT8, ACL_UINT8}, {bs_});
        require(!loose(), "Different bs on different rank cannot work when isActiveMask=true: global_bs=" +
                              num(a_.global_bs) + " with BS=" + num(bs_) + " and x_active_mask");
        if (!contents_) return;
        mask_ = mask->packed();
        active_ = std::find(mask_.begin(), mask_.end(), 0) - mask_.begin();
        require(std::count(mask_.begin() + active_, mask_.end(), 0) == bs_ - active_,
                "x_active_mask is not a block of True followed by a block of False");
    }

    // Reads the expert ids; rows that take no part may hold anything.
    void check_ids(const aclTensor& ids) {
        if (!contents_) return;
        const std::vector<char> raw = ids.packed();
        ids_.resize(static_cast<size_t>(bs_ * k_));
        if (!ids_.empty()) std::memcpy(ids_.data(), raw.data(), raw.size());
        duplicate_.clear();
        for (int64_t t = 0; t < active_; ++t) {
            std::set<int32_t> seen;
            for (int64_t s = 0; s < k_; ++s) {
                const int32_t id = ids_[static_cast<size_t>(t * k_ + s)];
                require(id >= 0 && id < a_.experts,
                        "expert id " + num(id) + " of row " + num(t) + " is outside 0.." + num(a_.experts - 1));
                if (!seen.insert(id).second) duplicate_ = "row " + num(t) + " names expert " + num(id) + " twice";
            }
        }
        require(duplicate_.empty() || settings().report_duplicate_experts, duplicate_);
    }

    // BS may differ between ranks only if every row of every rank takes part.
    void check_ragged(const std::vector<int>& ranks) const {
        for (const int r : ranks) {
            const OpRecord& other = comm_.record(r);
            if (other.values[kBs] == bs_ || (other.values[kMask] == 0 && mask_.empty())) continue;
            throw comm_.failure(HCCL_E_PARA, record_.title(),
                                "mismatch, BS differs between ranks while x_active_mask is used: rank " +
                                    num(comm_.rank()) + " called " + record_.describe() + ", rank " + num(r) +
                                    " called " + other.describe());
        }
    }

    // One call, in a graph on some ranks and not on others: on the A2 with AIV expansion the operator hangs.
    void check_modes(const std::vector<int>& ranks) const {
        for (const int r : ranks) {
            const int64_t theirs = comm_.record(r).values[kMode];
            if (theirs == record_.values[kMode]) continue;
            const auto text = [](int64_t mode) { return std::string(mode != 0 ? "in a graph" : "eagerly"); };
            const std::string problem = "mixed modes: rank " + num(comm_.rank()) + " runs it " +
                                        text(record_.values[kMode]) + ", rank " + num(r) + " " + text(theirs);
            Fields event("violation");
            event.comm(comm_.name(), record_.ordinal, comm_.rank(), comm_.size()).add("op", op_name(record_.kind));
            event.add("rule", "mixed_modes").add("mode", record_.values[kMode] != 0 ? "graph" : "eager");
            event.add("peer", r).add("peer_mode", theirs != 0 ? "graph" : "eager");
            ledger_event(event.add("text", problem));
            if (settings().report_mixed_modes) return;
            throw comm_.failure(HCCL_E_PARA, record_.title(), problem + " (VIRTUAL_NPU_MIXED_MODES=refuse)");
        }
    }

    bool contents_ = true;  // whether memory holds what the call will find
    const bool dispatch_;
    const int version_;
    const Attributes a_;
    Comm& comm_;
    OpRecord record_;
    Algorithm algorithm_ = Algorithm::kMesh;
    int64_t bs_ = 0, k_ = 0, h_ = 0, active_ = 0;
    std::vector<char> mask_;
    std::vector<int32_t> ids_;
    std::string duplicate_;
};

std::optional<aclTensor> keep(const aclTensor* tensor) {
    return tensor != nullptr ? std::optional<aclTensor>(*tensor) : std::nullopt;
}

// How the data of a dispatch lie in the window: the active rows' count, expert ids, routing weights (if any), row
// scales, and rows. With smooth scales a row is quantised for each slot apart, otherwise once.
struct DispatchLayout {
    int64_t rows, ids_at, weights_at, scales_at, rows_at, row_bytes;
    DispatchLayout(int64_t active, int64_t k, bool weights, bool per_slot, int64_t row_bytes_) : row_bytes(row_bytes_) {
        rows = active * (per_slot ? k : 1);
        ids_at = 64;
        weights_at = ids_at + up(active * k * 4, 64);
        scales_at = weights_at + (weights ? up(active * k * 4, 64) : 0);
        rows_at = scales_at + up(rows * 4, 64);
    }
    int64_t bytes() const { return rows_at + rows * row_bytes; }
};

class Dispatch : public EpCall {
public:
    struct Outputs {
        aclTensor *expand_x, *dynamic_scales, *assist, *token_nums, *recv_counts, *tp_recv_counts, *expand_scales;
    };

    Dispatch(int version, const Attributes& a, const aclTensor* x, const aclTensor* ids, const aclTensor* scales,
             const aclTensor* mask, const aclTensor* weights, int64_t quant, int64_t nums_type, const Outputs& out)
        : EpCall(true, version, a),
          x_(keep(x)),
          expert_ids_(keep(ids)),
          scales_(keep(scales)),
          active_mask_(keep(mask)),
          weights_(keep(weights)),
          quant_(quant),
          nums_type_(nums_type),
          expand_x_(keep(out.expand_x)),
          dynamic_scales_(keep(out.dynamic_scales)),
          assist_(keep(out.assist)),
          token_nums_(keep(out.token_nums)),
          recv_counts_(keep(out.recv_counts)),
          tp_recv_counts_(keep(out.tp_recv_counts)),
          expand_scales_(keep(out.expand_scales)) {}

    void check() override {
        require(x_ && expert_ids_ && expand_x_ && assist_ && token_nums_ && recv_counts_, "an argument is missing");
        require(x_->shape.size() == 2, "x must be (BS, H), not " + x_->describe());
        require(quant_ == 0 || quant_ == 2, "quant_mode=" + num(quant_) + " is not supported on " + settings().soc);
        require(quant_ == 2 || !scales_, "scales without quant_mode 2");
        require(nums_type_ == 0 || nums_type_ == 1,
                "expert_token_nums_type=" + num(nums_type_) + " is not valid, only 0 and 1 are");
        check_attributes(*expert_ids_, x_->dim(1), x_->type, quant_);
        expect(*x_, "x", {ACL_BF16, ACL_FLOAT16}, {bs_, h_});
        check_mask(active_mask_);
        check_ids(*expert_ids_);
        if (scales_) expect(*scales_, "scales", {ACL_FLOAT}, {a_.experts, h_});
        const int64_t a = a_.global_bs * std::min(local_experts(), k_);
        expect(*expand_x_, "expand_x", {quant_ != 0 ? ACL_INT8 : x_->type}, {a, h_});
        require(
            assist_->type == ACL_INT32 && assist_->numel() >= (version_ == 1 ? bs_ * k_ : std::max(bs_ * k_, a * 128)),
            "expand_idx is " + assist_->describe());
        expect(*token_nums_, "expert_token_nums", {ACL_INT64}, {local_experts()});
        const int64_t offsets = weights_ ? 2 * a_.global_bs * k_ * (a_.ranks / kServer) : 0;
        require(recv_counts_->type == ACL_INT32 && recv_counts_->numel() >= a_.ranks * local_experts() + offsets,
                "ep_recv_counts is " + recv_counts_->describe());
        check_weights(a);
        require(quant_ == 0 || (dynamic_scales_ && dynamic_scales_->type == ACL_FLOAT && dynamic_scales_->numel() >= a),
                "dynamic_scales is missing or too small");
        require(!contents_ || comm_.ep_pair == nullptr,
                "called twice in a row: the combine of dispatch #" +
                    (comm_.ep_pair != nullptr ? std::to_string(comm_.ep_pair->record.ordinal) : "") + " has not run");
    }

    void exchange() override {
        if (const Delay* delay = own_delay()) comm_.sleep(record_, delay->ms / 1000.0);
        const int64_t row_bytes = h_ * (quant_ != 0 ? 1 : 2);
        const DispatchLayout mine(active_, k_, weights_.has_value(), scales_.has_value(), row_bytes);
        pack(comm_.open_stage(record_, static_cast<uint64_t>(mine.bytes())), mine);
        comm_.post(record_);
        comm_.await(record_, comm_.all_ranks());
        check_modes(comm_.all_ranks());
        check_ragged(comm_.all_ranks());
        take();
        comm_.close_stage();
        if (!duplicate_.empty()) report_duplicate();
    }

    // As if no row had arrived.
    void leave_results() override {
        for (const auto* out : {&expand_x_, &dynamic_scales_, &assist_, &recv_counts_, &tp_recv_counts_, &expand_scales_}) {
            poison(*out ? &**out : nullptr, 0);
        }
        std::memset(token_nums_->data(), 0, static_cast<size_t>(token_nums_->numel()) * 8);
    }

private:
    // Hierarchy weights the rows where the experts are, so dispatch sends the weights along.
    void check_weights(int64_t rows) const {
        const bool hierarchy = algorithm_ == Algorithm::kHierarchy;
        require(!weights_ || hierarchy, "expert_scales is for the hierarchy algorithm only");
        if (!hierarchy) return;
        require(weights_.has_value(), "expert_scales is missing, which the hierarchy algorithm needs");
        expect(*weights_, "expert_scales", {ACL_FLOAT}, {bs_, k_});
        require(expand_scales_ && expand_scales_->type == ACL_FLOAT && expand_scales_->numel() >= rows,
                "expand_scales is missing or too small");
    }

    // The entry of VIRTUAL_NPU_DELAY that slows this dispatch, if there is one.
    const Delay* own_delay() const {
        const int nth = static_cast<int>((record_.ordinal + 1) / 2);  // every dispatch is followed by its combine
        for (const Delay& delay : settings().delays) {
            if (delay.rank == comm_.rank() && (delay.nth == 0 || delay.nth == nth)) return &delay;
        }
        return nullptr;
    }

    void pack(char* to, const DispatchLayout& layout) const {
        const std::vector<char> x = x_->packed(), smooth = scales_ ? scales_->packed() : std::vector<char>();
        std::memcpy(to, &active_, sizeof active_);
        if (active_ == 0) return;
        std::memcpy(to + layout.ids_at, ids_.data(), static_cast<size_t>(active_ * k_ * 4));
        if (weights_)
            std::memcpy(to + layout.weights_at, weights_->packed().data(), static_cast<size_t>(active_ * k_ * 4));
        if (quant_ == 0) {
            std::memcpy(to + layout.rows_at, x.data(), static_cast<size_t>(active_ * layout.row_bytes));
            return;
        }
        for (int64_t row = 0; row < layout.rows; ++row) {
            const int64_t token = scales_ ? row / k_ : row;
            const char* factors = scales_ ? smooth.data() + int64_t(ids_[static_cast<size_t>(row)]) * h_ * 4 : nullptr;
            const float scale =
                quantise(x.data() + token * h_ * 2, factors, to + layout.rows_at + row * layout.row_bytes);
            std::memcpy(to + layout.scales_at + row * 4, &scale, sizeof scale);
        }
    }

    // One row to int8; returns the scale that undoes it. A row of zeros has an infinite factor: 0*inf is stored as 0,
    // scale 0.
    float quantise(const char* row, const char* factors, char* out) const {
        std::vector<float> values(static_cast<size_t>(h_));
        float most = 0;
        for (int64_t i = 0; i < h_; ++i) {
            float value = load(row + i * 2, x_->type), factor = 1;
            if (factors != nullptr) std::memcpy(&factor, factors + i * 4, sizeof factor);
            values[static_cast<size_t>(i)] = value *= factor;
            most = std::max(most, std::fabs(value));
        }
        const float scale = 127.0f / most;
        for (int64_t i = 0; i < h_; ++i) {
            const float scaled = std::nearbyint(values[static_cast<size_t>(i)] * scale);
            out[i] =
                std::isnan(scaled) ? 0 : static_cast<char>(static_cast<int8_t>(std::clamp(scaled, -128.0f, 127.0f)));
        }
        return 1.0f / scale;
    }

    // Takes the rows of this rank's experts: by local expert, then source rank, then source order.
    void take() {
        const int64_t l = local_experts(), first = comm_.rank() * l, ranks = a_.ranks;
        struct Source {
            const char* data;
            int64_t active;
            const int32_t* ids;
        };
        std::vector<Source> sources;
        std::vector<int32_t> counts(static_cast<size_t>(l * ranks), 0);
        for (const int r : comm_.all_ranks()) {
            Source source{comm_.data(r), 0, nullptr};
            std::memcpy(&source.active, source.data, sizeof source.active);
            source.ids = reinterpret_cast<const int32_t*>(source.data + 64);
            for (int64_t i = 0; i < source.active * k_; ++i) {
                const int64_t e = source.ids[i] - first;
                if (e >= 0 && e < l) ++counts[static_cast<size_t>(e * ranks + r)];
            }
            sources.push_back(source);
        }
        for (size_t i = 1; i < counts.size(); ++i) counts[i] += counts[i - 1];
        const int64_t total = counts.back();
        if (total > expand_x_->dim(0)) {
            throw comm_.failure(HCCL_E_PARA, record_.title(),
                                num(total) + " rows arrive, expand_x holds " + num(expand_x_->dim(0)) +
                                    ": rows that name an expert twice overrun it");
        }
        std::vector<int32_t> next(counts.size(), 0);
        for (size_t i = 1; i < counts.size(); ++i) next[i] = counts[i - 1];
        for (const int r : comm_.all_ranks()) {
            const Source& source = sources[static_cast<size_t>(r)];
            const DispatchLayout layout(source.active, k_, weights_.has_value(), scales_.has_value(),
                                        h_ * (quant_ != 0 ? 1 : 2));
            for (int64_t i = 0; i < source.active * k_; ++i) {
                const int32_t id = source.ids[i];
                if (id < first || id >= first + l) continue;
                const int32_t row = next[static_cast<size_t>((id - first) * ranks + r)]++;
                const int64_t from = scales_ ? i : i / k_;
                std::memcpy(expand_x_->data() + row * layout.row_bytes,
                            source.data + layout.rows_at + from * layout.row_bytes,
                            static_cast<size_t>(layout.row_bytes));
                if (quant_ != 0)
                    std::memcpy(dynamic_scales_->data() + row * 4, source.data + layout.scales_at + from * 4, 4);
                if (weights_) std::memcpy(expand_scales_->data() + row * 4, source.data + layout.weights_at + i * 4, 4);
            }
        }
        for (int64_t e = 0; e < l; ++e) {
            const int64_t end = counts[static_cast<size_t>((e + 1) * ranks - 1)];
            const int64_t value = nums_type_ == 0 || e == 0 ? end : end - counts[static_cast<size_t>(e * ranks - 1)];
            std::memcpy(token_nums_->data() + e * 8, &value, sizeof value);
        }
        EpPair pair;
        pair.record = record_;
        pair.ids = ids_;
        pair.counts = counts;
        pair.mask = mask_;
        pair.assist = opaque(version_ == 1 ? active_ * k_ : total * 3);
        pair.recv_counts = opaque(recv_counts_->numel());
        write(*assist_, pair.assist);
        write(*recv_counts_, pair.recv_counts);
        poison(&*expand_x_, total * h_);
        poison(dynamic_scales_ ? &*dynamic_scales_ : nullptr, quant_ != 0 ? total : 0);
        poison(tp_recv_counts_ ? &*tp_recv_counts_ : nullptr, 0);
        poison(expand_scales_ ? &*expand_scales_ : nullptr, weights_ ? total : 0);
        if (weights_) {
            pair.weights = weights_->packed();
            pair.expand_scales.assign(expand_scales_->data(), expand_scales_->data() + total * 4);
        }
        comm_.ep_pair = std::make_shared<EpPair>(std::move(pair));
    }

    static void write(const aclTensor& tensor, const std::vector<int32_t>& values) {
        if (!values.empty()) std::memcpy(tensor.data(), values.data(), values.size() * 4);
        poison(&tensor, static_cast<int64_t>(values.size()));
    }

    void report_duplicate() const {
        static std::atomic<bool> said{false};
        if (!said.exchange(true))
            set_error(
                comm_
                    .failure(0, record_.title(),
                             duplicate_ +
                                 ", which the operator forbids (reported once, VIRTUAL_NPU_DUPLICATE_EXPERTS=report)")
                    .what());
        Fields event("violation");
        event.comm(comm_.name(), record_.ordinal, comm_.rank(), comm_.size());
        ledger_event(event.add("rule", "duplicate_expert").add("text", duplicate_));
    }

    const std::optional<aclTensor> x_, expert_ids_, scales_, active_mask_, weights_;
    const int64_t quant_, nums_type_;
    const std::optional<aclTensor> expand_x_, dynamic_scales_, assist_, token_nums_, recv_counts_, tp_recv_counts_,
        expand_scales_;
};

class Combine : public EpCall {
public:
    Combine(int version, const Attributes& a, const aclTensor* expand_x, const aclTensor* ids, const aclTensor* assist,
            const aclTensor* counts, const aclTensor* weights, const aclTensor* mask, const aclTensor* expand_scales,
            const aclTensor* shared, int64_t comm_quant, const aclTensor* out)
        : EpCall(false, version, a),
          rows_(keep(expand_x)),
          expert_ids_(keep(ids)),
          assist_(keep(assist)),
          counts_(keep(counts)),
          weights_(keep(weights)),
          active_mask_(keep(mask)),
          expand_scales_(keep(expand_scales)),
          shared_(keep(shared)),
          comm_quant_(comm_quant),
          out_(keep(out)) {}

    void check() override {
        require(rows_ && expert_ids_ && assist_ && counts_ && weights_ && out_, "an argument is missing");
        require(rows_->shape.size() == 2, "expand_x must be (A, H), not " + rows_->describe());
        require(comm_quant_ == 0, "comm_quant_mode=" + num(comm_quant_) + " is not emulated");
        check_attributes(*expert_ids_, rows_->dim(1), rows_->type, 0);
        expect(*rows_, "expand_x", {ACL_BF16, ACL_FLOAT16}, {a_.global_bs * std::min(local_experts(), k_), h_});
        expect(*weights_, "expert_scales", {ACL_FLOAT}, {bs_, k_});
        expect(*out_, "the output", {rows_->type}, {bs_, h_});
        require(!shared_ || (shared_->type == rows_->type && shared_->numel() == bs_ * h_),
                "shared_expert_x is " + (shared_ ? shared_->describe() : ""));
        check_mask(active_mask_);
        check_ids(*expert_ids_);
        if (!contents_) return;
        require(comm_.ep_pair != nullptr, "called without a dispatch before it");
        const EpPair& pair = *comm_.ep_pair;
        for (size_t i = 0; i < kEpValues; ++i) {
            if (i == kMode) continue;  // a rank may leave its graph in between
            if (i == kQuant || i == kType) continue;  // the experts return full precision whatever was sent
            const bool mesh2 = pair.record.values[i] == static_cast<int64_t>(Algorithm::kMesh2);
            if (i == kAlgorithm && mesh2 && algorithm_ == Algorithm::kMesh) continue;  // combine has no such name
            require(pair.record.values[i] == record_.values[i],
                    std::string(ep_fields()[i].name) + " differs from the paired dispatch: " + record_.describe() +
                        " after " + pair.record.describe());
        }
        require(std::equal(ids_.begin(), ids_.begin() + active_ * k_, pair.ids.begin()),
                "expert_ids differ from the paired dispatch");
        require(mask_ == pair.mask, "x_active_mask differs from the paired dispatch");
        require(starts_with(*counts_, pair.recv_counts), "ep_send_counts is not what the paired dispatch returned");
        require(starts_with(*assist_, pair.assist),
                "assist_info_for_combine (expand_idx) is not what the paired dispatch returned");
        if (algorithm_ != Algorithm::kHierarchy) return;
        // Rows are weighted where they are: by expand_scales, which holds the weights that dispatch was given.
        require(expand_scales_ && starts_with(*expand_scales_, pair.expand_scales),
                "expand_scales is not what the paired dispatch returned");
        require(weights_->packed() == pair.weights, "expert_scales differ from the paired dispatch");
    }

    void exchange() override {
        const std::shared_ptr<EpPair> pair = std::move(comm_.ep_pair);
        comm_.ep_pair = nullptr;
        const int64_t l = local_experts(), row_bytes = h_ * 2, total = pair->counts.back();
        const int64_t rows_at = up(static_cast<int64_t>(pair->counts.size()) * 4, 64);
        char* to = comm_.open_stage(record_, static_cast<uint64_t>(rows_at + total * row_bytes));
        std::memcpy(to, pair->counts.data(), pair->counts.size() * 4);
        const std::vector<char> rows = rows_->contiguous() ? std::vector<char>() : rows_->packed();
        if (total != 0)
            std::memcpy(to + rows_at, rows.empty() ? rows_->data() : rows.data(),
                        static_cast<size_t>(total * row_bytes));
        comm_.post(record_);
        std::set<int> owners;
        for (int64_t i = 0; i < active_ * k_; ++i) owners.insert(static_cast<int>(ids_[static_cast<size_t>(i)] / l));
        const std::vector<int> senders(owners.begin(), owners.end());
        comm_.await(record_, senders);
        check_modes(senders);

        // Where a slot's row is: after the rows of the same expert from lower ranks, in this rank's own order.
        std::vector<const char*> slots(static_cast<size_t>(active_ * k_));
        std::vector<int64_t> used(static_cast<size_t>(a_.experts), 0);
        for (size_t i = 0; i < slots.size(); ++i) {
            const int64_t id = ids_[i], at = id % l * a_.ranks + comm_.rank() - 1;
            const char* data = comm_.data(static_cast<int>(id / l));
            int32_t start = 0;
            if (at >= 0) std::memcpy(&start, data + at * 4, sizeof start);
            slots[i] = data + rows_at + (start + used[static_cast<size_t>(id)]++) * row_bytes;
        }
        add_up(slots);
        comm_.close_stage();
    }

    void leave_results() override { std::memset(out_->data(), 0, static_cast<size_t>(bs_ * h_) * 2); }

private:
    // Slot by slot in order, each product and each sum rounded to fp32 on its own, so the bits depend on the row alone.
    // Hierarchy first adds what comes from one server, then the servers' sums.
    void add_up(const std::vector<const char*>& rows) const {
        struct Slot {
            const char* row;
            float weight;
            int64_t server;
        };
        const std::vector<char> weights = weights_->packed(),
                                shared = shared_ ? shared_->packed() : std::vector<char>();
        std::vector<Slot> slots(static_cast<size_t>(k_));
        for (int64_t t = 0; t < active_; ++t) {
            for (int64_t s = 0; s < k_; ++s) {
                const auto at = static_cast<size_t>(t * k_ + s);
                Slot& slot = slots[static_cast<size_t>(s)] = {rows[at], 0, 0};
                std::memcpy(&slot.weight, weights.data() + at * 4, sizeof slot.weight);
                if (algorithm_ == Algorithm::kHierarchy) slot.server = ids_[at] / local_experts() / kServer;
            }
            std::stable_sort(slots.begin(), slots.end(),
                             [](const Slot& a, const Slot& b) { return a.server < b.server; });
            for (int64_t i = 0; i < h_; ++i) {
                float sum = 0, part = 0;
                int64_t server = 0;
                for (const Slot& slot : slots) {
                    if (slot.server != server) {
                        sum = sum + part;
                        part = 0;
                        server = slot.server;
                    }
                    const float product = load(slot.row + i * 2, rows_->type) * slot.weight;
                    part = part + product;
                }
                sum = sum + part;
                if (shared_) sum = sum + load(shared.data() + (t * h_ + i) * 2, shared_->type);
                store(out_->data() + (t * h_ + i) * 2, out_->type, sum);
            }
        }
        poison(&*out_, active_ * h_);
    }

    template <class T>
    static bool starts_with(const aclTensor& tensor, const std::vector<T>& values) {
        const size_t bytes = values.size() * sizeof(T);
        const std::vector<char> raw = tensor.packed();
        return raw.size() >= bytes && (bytes == 0 || std::memcmp(raw.data(), values.data(), bytes) == 0);
    }

    const std::optional<aclTensor> rows_, expert_ids_, assist_, counts_, weights_, active_mask_, expand_scales_,
        shared_;
    const int64_t comm_quant_;
    const std::optional<aclTensor> out_;
};

// What the first phase refuses, before the rank has told its peers anything.
std::unique_ptr<EpCall> checked(std::unique_ptr<EpCall> call) {
    call->check_arguments();
    return call;
}

std::string text(const char* value) { return value != nullptr ? value : ""; }

Attributes attributes(const char* group, int64_t ranks, int64_t rank, int64_t experts, int64_t tp_world_size,
                      int64_t shard_type, int64_t shared_num, int64_t shared_ranks, int64_t global_bs,
                      const char* algorithm) {
    return {text(group), ranks,      rank,         experts,   tp_world_size,
            shard_type,  shared_num, shared_ranks, global_bs, text(algorithm)};
}

}  // namespace
}  // namespace vnpu

using namespace vnpu;

// Parameter order: what op-plugin 7.2 (torch_npu 2.7.1) passes through EXEC_NPU_CMD.
#pragma GCC visibility push(default)
extern "C" {

int aclnnMoeDistributeDispatchGetWorkspaceSize(
    const aclTensor* x, const aclTensor* expertIds, const aclTensor* scales, const aclTensor* xActiveMask,
    const aclTensor* expertScales, char* groupEp, int64_t epWorldSize, int64_t epRankId, int64_t moeExpertNum, char*,
    int64_t tpWorldSize, int64_t, int64_t expertShardType, int64_t sharedExpertNum, int64_t sharedExpertRankNum,
    int64_t quantMode, int64_t globalBs, int64_t expertTokenNumsType, aclTensor* expandX, aclTensor* dynamicScales,
    aclTensor* expandIdx, aclTensor* expertTokenNums, aclTensor* epRecvCounts, aclTensor* tpRecvCounts,
    aclTensor* expandScales, uint64_t* workspaceSize, aclOpExecutor** executor) {
    return prepare("aclnnMoeDistributeDispatch", workspaceSize, executor, [&] {
        return checked(
            std::make_unique<Dispatch>(1,
                                       attributes(groupEp, epWorldSize, epRankId, moeExpertNum, tpWorldSize,
                                                  expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, ""),
                                       x, expertIds, scales, xActiveMask, expertScales, quantMode, expertTokenNumsType,
                                       Dispatch::Outputs{expandX, dynamicScales, expandIdx, expertTokenNums,
                                                         epRecvCounts, tpRecvCounts, expandScales}));
    });
}

int aclnnMoeDistributeDispatchV2GetWorkspaceSize(
    const aclTensor* x, const aclTensor* expertIds, const aclTensor* scales, const aclTensor* xActiveMask,
    const aclTensor* expertScales, char* groupEp, int64_t epWorldSize, int64_t epRankId, int64_t moeExpertNum, char*,
    int64_t tpWorldSize, int64_t, int64_t expertShardType, int64_t sharedExpertNum, int64_t sharedExpertRankNum,
    int64_t quantMode, int64_t globalBs, int64_t expertTokenNumsType, char* commAlg, aclTensor* expandX,
    aclTensor* dynamicScales, aclTensor* assistInfoForCombine, aclTensor* expertTokenNums, aclTensor* epRecvCounts,
    aclTensor* tpRecvCounts, aclTensor* expandScales, uint64_t* workspaceSize, aclOpExecutor** executor) {
    return prepare("aclnnMoeDistributeDispatchV2", workspaceSize, executor, [&] {
        return checked(std::make_unique<Dispatch>(
            2,
            attributes(groupEp, epWorldSize, epRankId, moeExpertNum, tpWorldSize, expertShardType, sharedExpertNum,
                       sharedExpertRankNum, globalBs, commAlg),
            x, expertIds, scales, xActiveMask, expertScales, quantMode, expertTokenNumsType,
            Dispatch::Outputs{expandX, dynamicScales, assistInfoForCombine, expertTokenNums, epRecvCounts, tpRecvCounts,
                              expandScales}));
    });
}

int aclnnMoeDistributeCombineGetWorkspaceSize(
    const aclTensor* expandX, const aclTensor* expertIds, const aclTensor* expandIdx, const aclTensor* epSendCounts,
    const aclTensor* expertScales, const aclTensor*, const aclTensor* xActiveMask, const aclTensor*, const aclTensor*,
    const aclTensor*, const aclTensor* expandScales, char* groupEp, int64_t epWorldSize, int64_t epRankId,
    int64_t moeExpertNum, char*, int64_t tpWorldSize, int64_t, int64_t expertShardType, int64_t sharedExpertNum,
    int64_t sharedExpertRankNum, int64_t globalBs, int64_t, int64_t commQuantMode, int64_t, aclTensor* x,
    uint64_t* workspaceSize, aclOpExecutor** executor) {
    return prepare("aclnnMoeDistributeCombine", workspaceSize, executor, [&] {
        return checked(
            std::make_unique<Combine>(1,
                                      attributes(groupEp, epWorldSize, epRankId, moeExpertNum, tpWorldSize,
                                                 expertShardType, sharedExpertNum, sharedExpertRankNum, globalBs, ""),
                                      expandX, expertIds, expandIdx, epSendCounts, expertScales, xActiveMask,
                                      expandScales, nullptr, commQuantMode, x));
    });
}

int aclnnMoeDistributeCombineV2GetWorkspaceSize(
    const aclTensor* expandX, const aclTensor* expertIds, const aclTensor* assistInfoForCombine,
    const aclTensor* epSendCounts, const aclTensor* expertScales, const aclTensor*, const aclTensor* xActiveMask,
    const aclTensor*, const aclTensor*, const aclTensor*, const aclTensor* expandScales, const aclTensor* sharedExpertX,
    char* groupEp, int64_t epWorldSize, int64_t epRankId, int64_t moeExpertNum, char*, int64_t tpWorldSize, int64_t,
    int64_t expertShardType, int64_t sharedExpertNum, int64_t sharedExpertRankNum, int64_t globalBs, int64_t,
    int64_t commQuantMode, int64_t, char* commAlg, aclTensor* x, uint64_t* workspaceSize, aclOpExecutor** executor) {
    return prepare("aclnnMoeDistributeCombineV2", workspaceSize, executor, [&] {
        return checked(std::make_unique<Combine>(
            2,
            attributes(groupEp, epWorldSize, epRankId, moeExpertNum, tpWorldSize, expertShardType, sharedExpertNum,
                       sharedExpertRankNum, globalBs, commAlg),
            expandX, expertIds, assistInfoForCombine, epSendCounts, expertScales, xActiveMask, expandScales,
            sharedExpertX, commQuantMode, x));
    });
}

int aclnnMoeDistributeDispatch(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
    return launch("aclnnMoeDistributeDispatch", executor, stream);
}
int aclnnMoeDistributeDispatchV2(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
    return launch("aclnnMoeDistributeDispatchV2", executor, stream);
}
int aclnnMoeDistributeCombine(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
    return launch("aclnnMoeDistributeCombine", executor, stream);
}
int aclnnMoeDistributeCombineV2(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
    return launch("aclnnMoeDistributeCombineV2", executor, stream);
}

}  // extern "C"
#pragma GCC visibility pop
