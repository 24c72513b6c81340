// SPDX-License-Identifier: Apache-2.0
#include "aclnn_tensor.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "error.h"

namespace vnpu {
namespace {

struct TypeInfo {
    aclDataType type;
    const char* name;
    size_t bytes;
};
constexpr TypeInfo kTypes[] = {{ACL_FLOAT, "fp32", 4},
                               {ACL_FLOAT16, "fp16", 2},
                               {ACL_INT8, "int8", 1},
                               {ACL_INT32, "int32", 4},
                               {ACL_UINT8, "uint8", 1},
                               {ACL_INT16, "int16", 2},
                               {ACL_UINT16, "uint16", 2},
                               {ACL_UINT32, "uint32", 4},
                               {ACL_INT64, "int64", 8},
                               {ACL_UINT64, "uint64", 8},
                               {ACL_DOUBLE, "fp64", 8},
                               {ACL_BOOL, "bool", 1},
                               {ACL_COMPLEX64, "complex64", 8},
                               {ACL_COMPLEX128, "complex128", 16},
                               {ACL_BF16, "bf16", 2}};

const TypeInfo* info(aclDataType type) {
    const auto* found =
        std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TypeInfo& t) { return t.type == type; });
    return found == std::end(kTypes) ? nullptr : found;
}

}  // namespace

size_t element_bytes(aclDataType type) { return info(type) != nullptr ? info(type)->bytes : 0; }
const char* type_name(aclDataType type) { return info(type) != nullptr ? info(type)->name : "unknown type"; }

}  // namespace vnpu

int64_t aclTensor::numel() const {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
}

bool aclTensor::contiguous() const {
    int64_t expected = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        if (shape[i] != 1 && strides[i] != expected) return false;
        expected *= shape[i];
    }
    return true;
}

char* aclTensor::data() const { return base + offset * static_cast<int64_t>(vnpu::element_bytes(type)); }

std::vector<char> aclTensor::packed() const {
    const size_t size = vnpu::element_bytes(type);
    std::vector<char> out(static_cast<size_t>(numel()) * size);
    if (out.empty()) return out;
    if (contiguous()) {
        std::memcpy(out.data(), data(), out.size());
        return out;
    }
    std::vector<int64_t> index(shape.size(), 0);
    for (size_t to = 0; to < out.size(); to += size) {
        int64_t from = 0;
        for (size_t i = 0; i < shape.size(); ++i) from += index[i] * strides[i];
        std::memcpy(out.data() + to, data() + from * static_cast<int64_t>(size), size);
        for (size_t i = shape.size(); i-- > 0 && ++index[i] == shape[i];) index[i] = 0;
    }
    return out;
}

std::string aclTensor::describe() const {
    std::string text = vnpu::type_name(type) + std::string(" [");
    for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return text + "]";
}

namespace {

template <class Array, class T>
Array* make_array(const T* values, uint64_t size) {
    auto* array = new Array;
    if (size != 0) array->values.assign(values, values + size);
    return array;
}

template <class T>
int destroy(const T* object) {
    delete object;
    return ACL_SUCCESS;
}

template <class T>
int destroy_all(const std::vector<const T*>& objects) {
    for (const T* object : objects) delete object;
    return ACL_SUCCESS;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

aclTensor* aclCreateTensor(const int64_t* viewDims, uint64_t viewDimsNum, aclDataType dataType, const int64_t* stride,
                           int64_t offset, aclFormat format, const int64_t* storageDims, uint64_t storageDimsNum,
                           void* tensorData) {
    auto tensor = std::make_unique<aclTensor>();
    tensor->shape.assign(viewDims, viewDims + viewDimsNum);
    tensor->strides.resize(viewDimsNum);
    int64_t dense = 1;
    for (size_t i = viewDimsNum; i-- > 0; dense *= viewDims[i])
        tensor->strides[i] = stride != nullptr ? stride[i] : dense;
    tensor->offset = offset;
    tensor->type = dataType;
    tensor->format = format;
    if (storageDimsNum != 0) tensor->storage.assign(storageDims, storageDims + storageDimsNum);
    tensor->base = static_cast<char*>(tensorData);
    return tensor.release();
}

aclScalar* aclCreateScalar(void* value, aclDataType dataType) {
    const size_t bytes = vnpu::element_bytes(dataType);
    if (value == nullptr || bytes == 0) {
        vnpu::set_error("aclCreateScalar: no value, or data type " + std::to_string(dataType) + " is not emulated");
        return nullptr;
    }
    auto* scalar = new aclScalar;
    scalar->type = dataType;
    std::memcpy(scalar->value, value, bytes);
    return scalar;
}

aclIntArray* aclCreateIntArray(const int64_t* value, uint64_t size) { return make_array<aclIntArray>(value, size); }
aclFloatArray* aclCreateFloatArray(const float* value, uint64_t size) { return make_array<aclFloatArray>(value, size); }
aclBoolArray* aclCreateBoolArray(const bool* value, uint64_t size) { return make_array<aclBoolArray>(value, size); }

// Lists own their elements, as in CANN.
aclTensorList* aclCreateTensorList(const aclTensor* const* value, uint64_t size) {
    auto* list = new aclTensorList;
    if (size != 0) list->tensors.assign(value, value + size);
    return list;
}

aclScalarList* aclCreateScalarList(const aclScalar* const* value, uint64_t size) {
    auto* list = new aclScalarList;
    if (size != 0) list->scalars.assign(value, value + size);
    return list;
}

int aclDestroyTensor(const aclTensor* tensor) { return destroy(tensor); }
int aclDestroyScalar(const aclScalar* scalar) { return destroy(scalar); }
int aclDestroyIntArray(const aclIntArray* array) { return destroy(array); }
int aclDestroyFloatArray(const aclFloatArray* array) { return destroy(array); }
int aclDestroyBoolArray(const aclBoolArray* array) { return destroy(array); }

int aclDestroyTensorList(const aclTensorList* list) {
    if (list != nullptr) destroy_all(list->tensors);
    return destroy(list);
}

int aclDestroyScalarList(const aclScalarList* list) {
    if (list != nullptr) destroy_all(list->scalars);
    return destroy(list);
}

// The caller owns the array that *viewDims is set to (it frees it with delete[]).
int aclGetViewShape(const aclTensor* tensor, int64_t** viewDims, uint64_t* viewDimsNum) {
    if (tensor == nullptr || viewDims == nullptr || viewDimsNum == nullptr) return ACL_ERROR_INVALID_PARAM;
    *viewDimsNum = tensor->shape.size();
    *viewDims = new int64_t[tensor->shape.size()];
    std::copy(tensor->shape.begin(), tensor->shape.end(), *viewDims);
    return ACL_SUCCESS;
}

}  // extern "C"
#pragma GCC visibility pop
