// SPDX-License-Identifier: Apache-2.0
// The acl runtime (devices, memory, streams, events) of the virtual NPU: device memory is host memory and every stream is
// synchronous, so a call has finished when it returns. Signatures come from the acl headers in the torch_npu wheel.
#include <acl/acl.h>
#include <acl/acl_mdl.h>
#include <acl/acl_op_compiler.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "error.h"
#include "graph.h"
#include "settings.h"

namespace {

constexpr aclError kBadParameter = ACL_ERROR_INVALID_PARAM;
constexpr size_t kAlignment = 512;  // what aclrtMalloc promises

thread_local int32_t current_device = -1;

struct Block {
    size_t bytes;
    int32_t device;
};

// A piece of device memory without a device address, and where it lies now: at a place of its own, or in a reserved range.
struct Physical {
    size_t bytes;
    int32_t device;
    void* at;
    bool mapped;
};

struct DeviceMemory {
    std::mutex lock;
    std::unordered_map<void*, Block> blocks;
    std::unordered_map<void*, size_t> reserved;
    std::unordered_map<void*, Physical*> mapped;
    std::unordered_map<int32_t, size_t> used;
};

DeviceMemory& memory() {
    static auto* instance = new DeviceMemory;  // never destroyed: torch_npu frees memory in static destructors
    return *instance;
}

// Devices visible to this process: real CANN numbers those of ASCEND_RT_VISIBLE_DEVICES from 0.
int visible_devices() {
    const char* list = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (list == nullptr || *list == '\0') return vnpu::settings().devices;
    return static_cast<int>(std::count(list, list + std::strlen(list), ',')) + 1;
}

aclError fail(aclError code, const std::string& message) {
    vnpu::set_error(message);
    return code;
}

struct Stream {
    int32_t device;
    int32_t id;
};

struct Event {
    std::atomic<int64_t> recorded_ns{-1};
};

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

aclError copy(void* dst, size_t capacity, const void* src, size_t count) {
    if (count == 0) return ACL_SUCCESS;
    if (dst == nullptr || src == nullptr || count > capacity) {
        return fail(kBadParameter, "aclrtMemcpy: null pointer, or " + std::to_string(count) + " bytes into a buffer of " +
                                       std::to_string(capacity));
    }
    std::memmove(dst, src, count);
    return ACL_SUCCESS;
}

aclError fill(void* pointer, size_t capacity, int32_t value, size_t count) {
    if (count > capacity) return fail(kBadParameter, "aclrtMemset: count is larger than the buffer");
    std::memset(pointer, value, count);
    return ACL_SUCCESS;
}

// Runs `body`, which throws what graphs do not permit.
template <class Body>
aclError permitted(Body body) {
    try {
        return body();
    } catch (const std::exception& error) {
        return fail(ACL_ERROR_RT_FAILURE, error.what());
    }
}

aclError refuse_sync(const char* function, aclrtStream stream = nullptr) {
    return permitted([&] {
        vnpu::graph_refuse_sync(function, stream);
        return ACL_SUCCESS;
    });
}

// A call on a stream that fills `bytes` at `pointer`.
aclError fill_on(aclrtStream stream, const char* function, void* pointer, size_t bytes, const std::function<aclError()>& call) {
    return permitted([&] {
        const vnpu::Turn turn = vnpu::graph_turn(stream, function);
        if (turn != vnpu::Turn::kRun) {
            if (turn == vnpu::Turn::kRecord) vnpu::graph_preserve(stream, pointer, bytes);
            vnpu::graph_record(stream, [call] {
                if (call() != ACL_SUCCESS) throw std::runtime_error(vnpu::take_error());
            });
        }
        return turn == vnpu::Turn::kReplace ? ACL_SUCCESS : call();
    });
}

// Whether the device has room for so many bytes; call it with the lock held.
aclError check_room(const char* function, int32_t device, size_t bytes) {
    const size_t total = static_cast<size_t>(vnpu::settings().device_memory_mb) << 20;
    const size_t used = memory().used[device];
    if (used + bytes <= total) return ACL_SUCCESS;
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, std::string(function) + ": device " + std::to_string(device) + " has " +
                                                    std::to_string(total - used) + " bytes free, " + std::to_string(bytes) +
                                                    " wanted (VIRTUAL_NPU_DEVICE_MEMORY_MB)");
}

aclError allocate(void** pointer, size_t bytes) {
    if (pointer == nullptr || bytes == 0) return fail(kBadParameter, "aclrtMalloc: null pointer or zero bytes");
    if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtMalloc: no device is set on this thread");
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    const aclError room = check_room("aclrtMalloc", current_device, bytes);
    if (room != ACL_SUCCESS) return room;
    void* block = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (block == nullptr) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMalloc: the host has no memory left");
    device_memory.used[current_device] += bytes;
    device_memory.blocks[block] = {bytes, current_device};
    *pointer = block;
    return ACL_SUCCESS;
}

// Static per device: torch_npu compares contexts by pointer.
std::array<char, 1024> context_tags;

aclrtContext context_of(int32_t device) { return &context_tags.at(static_cast<size_t>(device)); }

}  // namespace

#pragma GCC visibility push(default)  // not every function here is declared in the headers of this torch_npu
extern "C" {

// ---- life cycle -----------------------------------------------------------------------------------------------------------

aclError aclInit(const char*) {
    try {
        vnpu::settings();
    } catch (const std::exception& error) {
        return fail(kBadParameter, error.what());
    }
    return ACL_SUCCESS;
}

aclError aclFinalize() { return ACL_SUCCESS; }

const char* aclGetRecentErrMsg() {
    static thread_local std::string text;
    text = vnpu::take_error();
    return text.c_str();
}

void aclAppLog(aclLogLevel level, const char*, const char*, uint32_t, const char* format, ...) {
    if (level < ACL_ERROR) return;
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
}

const char* aclrtGetSocName() {
    try {
        return vnpu::settings().soc.c_str();
    } catch (const std::exception&) {
        return nullptr;  // aclInit says why
    }
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
    // The CANN release that vllm-ascend 0.11.0 is built for; torch_npu gates features on it.
    std::memset(version, 0, sizeof(*version));
    std::snprintf(version->version, sizeof(version->version), "8.3.RC2");
    return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
    switch (info) {
        case ACL_DEVICE_INFO_AI_CORE_NUM: *value = 24; return ACL_SUCCESS;
        case ACL_DEVICE_INFO_VECTOR_CORE_NUM: *value = 48; return ACL_SUCCESS;
        case ACL_DEVICE_INFO_L2_SIZE: *value = 192LL << 20; return ACL_SUCCESS;
        default: return fail(ACL_ERROR_API_NOT_SUPPORT, "aclGetDeviceCapability: attribute " + std::to_string(info) +
                                                            " is not emulated");
    }
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
    *list = nullptr;
    *count = 0;
    return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr, int32_t* value) {
    *value = 0;
    return ACL_SUCCESS;
}

// ---- devices and contexts -------------------------------------------------------------------------------------------------

aclError aclrtGetDeviceCount(uint32_t* count) {
    try {
        *count = static_cast<uint32_t>(visible_devices());
    } catch (const std::exception& error) {
        return fail(kBadParameter, error.what());
    }
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= visible_devices()) {
        return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtSetDevice: device " + std::to_string(device) + ", but this process sees " +
                                                    std::to_string(visible_devices()) + " (VIRTUAL_NPU_DEVICES)");
    }
    current_device = device;
    return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }
aclError aclrtDeviceTaskAbort(int32_t, uint32_t) { return ACL_SUCCESS; }

aclError aclrtGetDevice(int32_t* device) {
    if (current_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;  // the documented way to say "none set"
    *device = current_device;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
    if (current_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
    *context = context_of(current_device);
    return ACL_SUCCESS;
}

aclError aclrtCreateContext(aclrtContext* context, int32_t device) {
    const aclError status = aclrtSetDevice(device);
    if (status == ACL_SUCCESS) *context = context_of(device);
    return status;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    const auto device = static_cast<char*>(context) - context_tags.data();
    if (device < 0 || device >= static_cast<ptrdiff_t>(context_tags.size())) return kBadParameter;
    current_device = static_cast<int32_t>(device);
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
    *can = device != peer;
    return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
    *pid = getpid();
    return ACL_SUCCESS;
}

aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* info) {
    info->cubeUtilization = info->vectorUtilization = info->aicpuUtilization = info->memoryUtilization = 0;
    return ACL_SUCCESS;
}

// Settings of the hardware's arithmetic and time-outs that have no counterpart on a CPU; accepted because they change no result.
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 64; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t length) {
    if (length > 0) std::memset(value, 0, length);
    return ACL_SUCCESS;
}

// Every call is synchronous, so an error is returned by the call that made it and none is ever pending.
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

// ---- memory ---------------------------------------------------------------------------------------------------------------

aclError aclrtMalloc(void** pointer, size_t bytes, aclrtMemMallocPolicy) { return allocate(pointer, bytes); }
aclError aclrtMallocAlign32(void** pointer, size_t bytes, aclrtMemMallocPolicy) { return allocate(pointer, bytes); }

aclError aclrtFree(void* pointer) {
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    const auto found = device_memory.blocks.find(pointer);
    if (found == device_memory.blocks.end()) return fail(kBadParameter, "aclrtFree: not a pointer from aclrtMalloc");
    device_memory.used[found->second.device] -= found->second.bytes;
    vnpu::graph_memory_freed(pointer, found->second.bytes);
    device_memory.blocks.erase(found);
    std::free(pointer);
    return ACL_SUCCESS;
}

// Expandable segments: addresses are reserved once, and device memory is moved into and out of them. The move keeps the contents
// and costs neither a copy nor a file descriptor.

aclError aclrtReserveMemAddress(void** pointer, size_t bytes, size_t, void* expected, uint64_t) {
    void* range = mmap(expected, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtReserveMemAddress: no address range of that size");
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    device_memory.reserved[range] = bytes;
    *pointer = range;
    return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void* pointer) {
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    const auto found = device_memory.reserved.find(pointer);
    if (found == device_memory.reserved.end()) return fail(kBadParameter, "aclrtReleaseMemAddress: not a reserved range");
    munmap(pointer, found->second);
    device_memory.reserved.erase(found);
    return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t bytes, const aclrtPhysicalMemProp* properties, uint64_t) {
    const auto device = static_cast<int32_t>(properties->location.id);
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    const aclError room = check_room("aclrtMallocPhysical", device, bytes);
    if (room != ACL_SUCCESS) return room;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMallocPhysical: the host has no memory left");
    device_memory.used[device] += bytes;
    *handle = reinterpret_cast<aclrtDrvMemHandle>(new Physical{bytes, device, at, false});
    return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    auto* physical = reinterpret_cast<Physical*>(handle);
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    if (physical->mapped) return fail(kBadParameter, "aclrtFreePhysical: the memory is still mapped");
    munmap(physical->at, physical->bytes);
    device_memory.used[physical->device] -= physical->bytes;
    delete physical;
    return ACL_SUCCESS;
}

aclError aclrtMapMem(void* pointer, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
    auto* physical = reinterpret_cast<Physical*>(handle);
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    if (physical->mapped || offset != 0 || bytes != physical->bytes) {
        return fail(kBadParameter, "aclrtMapMem: memory is mapped once and as a whole (other mappings are not emulated)");
    }
    if (mremap(physical->at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, pointer) == MAP_FAILED) {
        return fail(kBadParameter, std::string("aclrtMapMem: ") + std::strerror(errno));
    }
    physical->at = pointer;
    physical->mapped = true;
    device_memory.mapped[pointer] = physical;
    return ACL_SUCCESS;
}

aclError aclrtUnmapMem(void* pointer) {
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    const auto found = device_memory.mapped.find(pointer);
    if (found == device_memory.mapped.end()) return fail(kBadParameter, "aclrtUnmapMem: nothing is mapped there");
    Physical* physical = found->second;
    // DONTUNMAP: the range stays reserved, so that nothing else gets its addresses in between.
    void* at = mremap(pointer, physical->bytes, physical->bytes, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, nullptr);
    if (at == MAP_FAILED || mprotect(pointer, physical->bytes, PROT_NONE) != 0) {
        return fail(kBadParameter, std::string("aclrtUnmapMem: ") + std::strerror(errno));
    }
    vnpu::graph_memory_freed(pointer, physical->bytes);
    physical->at = at;
    physical->mapped = false;
    device_memory.mapped.erase(found);
    return ACL_SUCCESS;
}

aclError aclrtMallocHost(void** pointer, size_t bytes) {
    *pointer = std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
    return *pointer == nullptr ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_SUCCESS;
}

aclError aclrtFreeHost(void* pointer) {
    std::free(pointer);
    return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total_bytes) {
    if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetMemInfo: no device is set on this thread");
    auto& device_memory = memory();
    const std::lock_guard<std::mutex> guard(device_memory.lock);
    *total_bytes = static_cast<size_t>(vnpu::settings().device_memory_mb) << 20;
    *free_bytes = *total_bytes - device_memory.used[current_device];
    return ACL_SUCCESS;
}

aclError aclrtMemcpy(void* dst, size_t capacity, const void* src, size_t count, aclrtMemcpyKind) {
    const aclError refused = refuse_sync("aclrtMemcpy");
    return refused != ACL_SUCCESS ? refused : copy(dst, capacity, src, count);
}

aclError aclrtMemcpyAsync(void* dst, size_t capacity, const void* src, size_t count, aclrtMemcpyKind, aclrtStream stream) {
    return fill_on(stream, "aclrtMemcpyAsync", dst, std::min(capacity, count), [=] { return copy(dst, capacity, src, count); });
}

aclError aclrtMemset(void* pointer, size_t capacity, int32_t value, size_t count) {
    const aclError refused = refuse_sync("aclrtMemset");
    return refused != ACL_SUCCESS ? refused : fill(pointer, capacity, value, count);
}

aclError aclrtMemsetAsync(void* pointer, size_t capacity, int32_t value, size_t count, aclrtStream stream) {
    return fill_on(stream, "aclrtMemsetAsync", pointer, std::min(capacity, count),
                   [=] { return fill(pointer, capacity, value, count); });
}

aclError aclrtCmoAsync(void*, size_t, aclrtCmoType, aclrtStream) { return ACL_SUCCESS; }  // a cache hint only

// ---- streams and events ---------------------------------------------------------------------------------------------------

aclError aclrtCreateStream(aclrtStream* stream) {
    static std::atomic<int32_t> next_id{0};
    if (current_device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtCreateStream: no device is set on this thread");
    *stream = new (std::nothrow) Stream{current_device, next_id++};
    return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }

aclError aclrtDestroyStream(aclrtStream stream) {
    vnpu::graph_stream_destroyed(stream);
    delete static_cast<Stream*>(stream);
    return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
    *id = stream == nullptr ? -1 : static_cast<Stream*>(stream)->id;
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
    if (const aclError refused = refuse_sync("aclrtStreamQuery", stream)) return refused;
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
    *flag = 0;
    return ACL_SUCCESS;
}
// By symbol name: headers of older wheels do not declare it. Its attributes are about failures, overflow and profiling.
aclError set_attribute(aclrtStream, int, const void*) __asm__("aclrtSetStreamAttribute");
aclError set_attribute(aclrtStream, int, const void*) { return ACL_SUCCESS; }
aclError aclrtSynchronizeStream(aclrtStream stream) { return refuse_sync("aclrtSynchronizeStream", stream); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }
aclError aclrtSynchronizeDevice() { return refuse_sync("aclrtSynchronizeDevice"); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

aclError aclrtLaunchCallback(aclrtCallback callback, void* data, aclrtCallbackBlockType, aclrtStream) {
    callback(data);
    return ACL_SUCCESS;
}
aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtProcessReport(int32_t) { return ACL_SUCCESS; }

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
    *event = new (std::nothrow) Event;
    vnpu::graph_event_created(*event, (flag & ACL_EVENT_EXTERNAL) != 0);
    return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }

aclError aclrtDestroyEvent(aclrtEvent event) {
    vnpu::graph_event_destroyed(event);
    delete static_cast<Event*>(event);
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    static_cast<Event*>(event)->recorded_ns = now_ns();
    return permitted([&] {
        vnpu::graph_event_recorded(event, stream);
        return ACL_SUCCESS;
    });
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
    static_cast<Event*>(event)->recorded_ns = -1;
    vnpu::graph_event_reset(event, stream);
    return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    return permitted([&] {
        vnpu::graph_event_awaited(event, stream);
        return ACL_SUCCESS;
    });
}

aclError aclrtSynchronizeEvent(aclrtEvent) { return ACL_SUCCESS; }

aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus* status) {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
    *milliseconds = static_cast<float>(static_cast<Event*>(end)->recorded_ns - static_cast<Event*>(start)->recorded_ns) / 1e6F;
    return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
    *microseconds = static_cast<uint64_t>(static_cast<Event*>(event)->recorded_ns / 1000);
    return ACL_SUCCESS;
}

// ---- single operators by name (aclop) ----------------------------------------------------------------------------------------
// torch_npu falls back to these when it has no aclnn function. None is emulated; the descriptors exist so that the operator can
// be named in the error.

struct aclTensorDesc {
    aclDataType type;
    aclFormat format;
    std::vector<int64_t> dims;
};
struct aclDataBuffer {};
struct aclopAttr {};

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* dims, aclFormat format) {
    return new aclTensorDesc{type, format, std::vector<int64_t>(dims, dims + count)};
}
void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }
void aclSetTensorDescName(aclTensorDesc*, const char*) {}
aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return ACL_SUCCESS; }
aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }
aclDataType aclGetTensorDescType(const aclTensorDesc* desc) { return desc->type; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc->dims.size(); }
aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
    *size = desc->dims.at(index);
    return ACL_SUCCESS;
}
aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return new aclDataBuffer; }
aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
    delete buffer;
    return ACL_SUCCESS;
}
aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return ACL_SUCCESS; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return ACL_SUCCESS; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const*) { return ACL_SUCCESS; }

aclError aclopCompileAndExecute(const char* op_type, int, const aclTensorDesc* const*, const aclDataBuffer* const*, int,
                                const aclTensorDesc* const*, aclDataBuffer* const*, const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
    return fail(ACL_ERROR_OP_NOT_FOUND, std::string("operator ") + op_type + " is not emulated");
}

}  // extern "C"
#pragma GCC visibility pop
