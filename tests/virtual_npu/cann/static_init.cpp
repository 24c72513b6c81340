// SPDX-License-Identifier: Apache-2.0
// What the static initialisers of vllm_ascend's kernel libraries call while they are loaded. Their kernels themselves are not
// emulated: launching one ends in its generated stub.
#define _GLIBCXX_USE_CXX11_ABI 0  // CANN's C++ interfaces use the old std::string
#include <acl/acl.h>

#include <cstdint>
#include <cstdio>
#include <string>

#pragma GCC visibility push(default)

class ErrorManager {
  public:
    static ErrorManager& GetInstance();
    const std::string& GetLogHeader();
};

ErrorManager& ErrorManager::GetInstance() {
    static ErrorManager instance;
    return instance;
}

const std::string& ErrorManager::GetLogHeader() {
    static const std::string header;
    return header;
}

extern "C" {

int32_t rtGetSocVersion(char* version, uint32_t capacity) {
    const char* name = aclrtGetSocName();
    std::snprintf(version, capacity, "%s", name != nullptr ? name : "");
    return 0;
}

// Kernel binaries are registered at load time, whether or not one is ever launched.
int32_t rtRegisterAllKernel(const void*, void** handle) {
    static char token;
    *handle = &token;
    return 0;
}

int32_t rtDevBinaryUnRegister(void*) { return 0; }

// The same in newer wheels. By symbol name, as the headers of older ones do not declare them.
aclError load_binary(const void*, size_t, const void*, void**) __asm__("aclrtBinaryLoadFromData");
aclError unload_binary(void*) __asm__("aclrtBinaryUnLoad");

aclError load_binary(const void*, size_t, const void*, void** handle) {
    static char token;
    *handle = &token;
    return ACL_SUCCESS;
}

aclError unload_binary(void*) { return ACL_SUCCESS; }

int32_t MsprofRegisterCallback(uint32_t, void*) { return 0; }  // no profiler is attached

}  // extern "C"
#pragma GCC visibility pop
