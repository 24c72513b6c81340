// SPDX-License-Identifier: Apache-2.0
// The argument objects of aclnn operators (libopapi), as torch_npu's op-plugin builds them for each call.
#pragma once
#include <acl/acl_base.h>

#include <cstdint>
#include <string>
#include <vector>

struct aclTensor {
    std::vector<int64_t> shape, strides;  // strides in elements
    int64_t offset = 0;                   // of the first element, in elements of the storage
    aclDataType type = ACL_DT_UNDEFINED;
    aclFormat format = ACL_FORMAT_ND;
    std::vector<int64_t> storage;
    char* base = nullptr;  // start of the storage

    int64_t numel() const;
    int64_t dim(size_t i) const { return shape[i]; }
    bool contiguous() const;
    char* data() const;                // first element
    std::vector<char> packed() const;  // the elements in row-major order
    std::string describe() const;      // "bf16 [4, 64]"
};
struct aclScalar {
    aclDataType type = ACL_DT_UNDEFINED;
    unsigned char value[16] = {};
};
struct aclIntArray {
    std::vector<int64_t> values;
};
struct aclFloatArray {
    std::vector<float> values;
};
struct aclBoolArray {
    std::vector<char> values;
};
struct aclTensorList {
    std::vector<const aclTensor*> tensors;
};
struct aclScalarList {
    std::vector<const aclScalar*> scalars;
};

// What the first phase of an aclnn operator leaves for the second. It owns its arguments: a graph runs it again and again.
struct aclOpExecutor {
    virtual ~aclOpExecutor() = default;
    virtual void run() = 0;  // throws std::exception
    // Instead of run during a capture: values that the operators after it can be computed with, for their shapes.
    virtual void leave_results() = 0;
};

namespace vnpu {

size_t element_bytes(aclDataType type);  // 0 for types that tensors here cannot have
const char* type_name(aclDataType type);

}  // namespace vnpu
