# SPDX-License-Identifier: Apache-2.0
# The communication half of the virtual NPU alone, for its own tests:
#   make -f cann/comm.mk PYTHON=<venv>/bin/python BUILD=<folder> [SANITIZE=1]      builds BUILD/libvirtual_comm.so
#   make -f cann/comm.mk PYTHON=<venv>/bin/python BUILD=<folder> SANITIZE=1 check-sanitized     and runs the tests on it
COMM_SOURCES := settings.cpp error.cpp graph.cpp ledger.cpp shm.cpp hccl.cpp aclnn_tensor.cpp aclnn_pad.cpp mc2_limits.cpp mc2.cpp

PYTHON ?= python3
BUILD ?= ../../build/virtual_comm
CXX ?= g++
CANN := $(dir $(lastword $(MAKEFILE_LIST)))
HEADERS := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/torch_npu/include
COMM_FLAGS := -std=c++17 -O2 -g -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -MMD -MP \
    -isystem $(HEADERS) -isystem $(HEADERS)/third_party/acl/inc -isystem $(HEADERS)/third_party/hccl/inc
ifdef SANITIZE
COMM_FLAGS += -fsanitize=address,undefined -fno-sanitize=enum -fno-sanitize-recover=undefined -fno-omit-frame-pointer
endif
COMM_OBJECTS := $(COMM_SOURCES:%.cpp=$(BUILD)/%.o)

$(BUILD)/libvirtual_comm.so: $(COMM_OBJECTS)
	$(CXX) $(COMM_FLAGS) -shared -Wl,--no-undefined -o $@ $^ -lpthread

$(BUILD)/%.o: $(CANN)%.cpp
	@mkdir -p $(@D)
	$(CXX) $(COMM_FLAGS) -c $< -o $@

# The enums of the C interface take any int from a caller, and Python itself leaks, hence the two exceptions above and here.
check-sanitized: $(BUILD)/libvirtual_comm.so
	LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 VIRTUAL_NPU_TEST_LIBRARY=$(abspath $<) $(PYTHON) -m pytest -q \
	    tests/test_npu_settings.py tests/test_hccl.py tests/test_mc2.py tests/test_mc2_contracts.py
.PHONY: check-sanitized

-include $(COMM_OBJECTS:.o=.d)
