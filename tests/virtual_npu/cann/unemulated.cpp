// SPDX-License-Identifier: Apache-2.0
// Where the generated stubs land (generate_stubs.py): calling a CANN function that is not emulated is an error that names it.
#include <cxxabi.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "error.h"

extern "C" [[noreturn]] __attribute__((visibility("default"))) void vnpu_unemulated(const char* symbol) {
    int status = 0;
    char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    const std::string name = status == 0 ? readable : symbol;
    std::free(readable);
    vnpu::set_error("CANN function " + name + " is not emulated");
    // The stub jumps here, so this unwinds straight into the caller; torch_npu turns it into a Python RuntimeError.
    throw std::runtime_error("virtual NPU: CANN function " + name + " is not emulated");
}
