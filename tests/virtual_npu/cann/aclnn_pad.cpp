// SPDX-License-Identifier: Apache-2.0
// aclnnConstantPadNd: torch_npu calls it past the dispatcher, when it pads the buffers of HCCL's all_gather and all_to_all to
// 512 bytes.
#include <cstring>
#include <memory>
#include <string>

#include "aclnn_phases.h"

namespace vnpu {
namespace {

class Pad : public aclOpExecutor {
public:
    Pad(const aclTensor* self, const aclIntArray* pad, const aclScalar* value, aclTensor* out)
        : self_(*self), pad_(*pad), value_(*value), out_(*out) {
        const size_t dims = self->shape.size();
        if (pad->values.size() % 2 != 0 || pad->values.size() > 2 * dims) throw std::invalid_argument("pad list does not fit the tensor");
        if (!out->contiguous() || out->type != self->type) throw std::invalid_argument("out must be contiguous and of self's type");
        for (size_t i = 0; i < dims; ++i) {
            if (before(i) < 0 || after(i) < 0) throw std::invalid_argument("negative padding is not emulated");
            if (out->dim(i) != self->dim(i) + before(i) + after(i)) throw std::invalid_argument("out has the wrong shape");
        }
    }

    void run() override {
        const size_t bytes = element_bytes(self_.type);
        const bool zero = std::all_of(value_.value, value_.value + sizeof(value_.value), [](unsigned char c) { return c == 0; });
        if (!zero) throw std::invalid_argument("a padding value other than 0 is not emulated");
        std::memset(out_.data(), 0, static_cast<size_t>(out_.numel()) * bytes);
        const std::vector<char> source = self_.packed();
        if (source.empty()) return;
        copy(source.data(), out_.data(), 0, bytes);
    }

    void leave_results() override { run(); }

private:
    // The pad list starts at the last dimension.
    int64_t at(size_t dim, size_t side) const {
        const size_t index = 2 * (self_.shape.size() - 1 - dim) + side;
        return index < pad_.values.size() ? pad_.values[index] : 0;
    }
    int64_t before(size_t dim) const { return at(dim, 0); }
    int64_t after(size_t dim) const { return at(dim, 1); }

    static int64_t row(const aclTensor& tensor, size_t dim) {  // elements of one step in `dim`
        int64_t count = 1;
        for (size_t i = dim + 1; i < tensor.shape.size(); ++i) count *= tensor.dim(i);
        return count;
    }

    void copy(const char* from, char* to, size_t dim, size_t bytes) const {
        const auto from_step = static_cast<size_t>(row(self_, dim)) * bytes, to_step = static_cast<size_t>(row(out_, dim)) * bytes;
        to += static_cast<size_t>(before(dim)) * to_step;
        if (dim + 1 == self_.shape.size()) {
            std::memcpy(to, from, static_cast<size_t>(self_.dim(dim)) * bytes);
            return;
        }
        for (int64_t i = 0; i < self_.dim(dim); ++i, from += from_step, to += to_step) copy(from, to, dim + 1, bytes);
    }

    const aclTensor self_;
    const aclIntArray pad_;
    const aclScalar value_;
    const aclTensor out_;
};

}  // namespace
}  // namespace vnpu

#pragma GCC visibility push(default)
extern "C" {

int aclnnConstantPadNdGetWorkspaceSize(const aclTensor* self, const aclIntArray* pad, const aclScalar* value, aclTensor* out,
                                       uint64_t* workspaceSize, aclOpExecutor** executor) {
    return vnpu::prepare("aclnnConstantPadNd", workspaceSize, executor,
                         [&] { return std::make_unique<vnpu::Pad>(self, pad, value, out); });
}

int aclnnConstantPadNd(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {
    return vnpu::launch("aclnnConstantPadNd", executor, stream);
}

}  // extern "C"
#pragma GCC visibility pop
