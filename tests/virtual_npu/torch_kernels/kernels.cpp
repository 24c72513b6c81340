// SPDX-License-Identifier: Apache-2.0
// Compute for the virtual NPU: device memory is host memory, so every aten operator that torch_npu implements is run by torch's own
// CPU kernel on CPU tensors that alias the NPU tensors' memory. torch_npu keeps what describes memory (allocation, views, strides).
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/to_native.h>
#include <c10/core/CPUAllocator.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../cann/graph.h"

namespace vnpu {

constexpr auto kNpu = c10::DispatchKey::PrivateUse1;

at::Tensor alias_of(const at::Tensor& tensor, c10::DataPtr data) {
    const auto& storage = tensor.storage();
    c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(),
                       /*resizable=*/true);
    auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                           tensor.dtype());
    auto* impl = result.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) result._set_conj(true);
    if (tensor.is_neg()) result._set_neg(true);
    return result;
}

// A CPU tensor over the same memory: same sizes, strides, offset and dtype. Writing to one writes to the other.
at::Tensor as_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
    // The alias owns a reference to the NPU storage, so a kernel that keeps it keeps the memory alive.
    auto* owner = new c10::Storage(tensor.storage());
    return alias_of(tensor, c10::DataPtr(owner->mutable_data(), owner, [](void* held) { delete static_cast<c10::Storage*>(held); },
                                         c10::Device(c10::DeviceType::CPU)));
}

// ---- graphs ---------------------------------------------------------------------------------------------------------------

aclrtStream current_stream() { return c10_npu::getCurrentNPUStream().stream(false); }

// As as_cpu, but without a reference, as a graph holds tensors: an address, at which other things may lie at a replay.
at::Tensor at_address(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
    void* data = tensor.storage().mutable_data();
    graph_uses(current_stream(), data, tensor.storage().nbytes());
    return alias_of(tensor, c10::DataPtr(data, c10::Device(c10::DeviceType::CPU)));
}

// Whether the call that is being made runs, or what else becomes of it. One load in eager mode.
Turn current_turn(const char* what) {
    if (vnpu_graph_activity.load(std::memory_order_relaxed) == 0) return Turn::kRun;
    return graph_turn_of(current_stream(), what);
}

// Keeps what a captured call is about to write over.
void preserve(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_privateuseone() || tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    graph_preserve(current_stream(), tensor.mutable_data_ptr(), static_cast<size_t>(last + 1) * tensor.element_size());
}

// What a replay computed goes where the capture put its result.
void put(const at::Tensor& result, const at::Tensor& place, const std::string& name) {
    TORCH_CHECK(result.sizes() == place.sizes() && result.scalar_type() == place.scalar_type(), "virtual NPU: ", name,
                " in a graph: the shape of its result depends on values: ", result.sizes(), ", when captured ", place.sizes());
    place.copy_(result);
}

// A new tensor on `device` with the values and strides of the CPU tensor.
at::Tensor as_npu(const at::Tensor& cpu, c10::Device device) {
    if (!cpu.defined()) return cpu;
    auto result = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(device));
    as_cpu(result).copy_(cpu);
    return result;
}

namespace {

struct Argument {
    at::Tensor npu;
    at::Tensor cpu;
};

// The CPU stand-in of an NPU generator: seeded like it, and seeded anew when somebody seeds the NPU generator anew.
at::Generator shadow(const at::Generator& generator) {
    static std::mutex lock;
    static std::map<const c10::GeneratorImpl*, std::pair<uint64_t, at::Generator>> shadows;
    const std::lock_guard<std::mutex> guard(lock);
    const uint64_t seed = generator.current_seed();
    auto found = shadows.find(generator.unsafeGetGeneratorImpl());
    if (found == shadows.end() || found->second.first != seed) {
        found = shadows.insert_or_assign(generator.unsafeGetGeneratorImpl(),
                                         std::make_pair(seed, at::detail::createCPUGenerator(seed))).first;
    }
    return found->second.second;
}

class Call {
  public:
    Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack) {}

    void run() {
        if (vnpu_graph_activity.load(std::memory_order_relaxed) != 0 && take_turn()) return;
        compute();
    }

  private:
    void compute() {
        const auto arguments = op_.schema().arguments().size();
        const auto first = stack_->size() - arguments;
        for (size_t index = first; index < stack_->size(); ++index) (*stack_)[index] = to_cpu((*stack_)[index]);
        if (recorded_ != nullptr) recorded_->arguments.assign(stack_->begin() + static_cast<ptrdiff_t>(first), stack_->end());
        {
            const at::AutoDispatchBelowADInplaceOrView guard;
            op_.callBoxed(stack_);
        }
        const auto returns = op_.schema().returns().size();
        for (size_t index = stack_->size() - returns; index < stack_->size(); ++index) {
            (*stack_)[index] = to_npu((*stack_)[index]);
        }
        // An operator that gives nothing back may still have written into (or resized) its arguments.
        for (auto& argument : arguments_) write_back(argument);
    }

    // A captured call: its arguments as addresses, and where each tensor that it gave back lies (undefined: in an argument).
    struct Recorded {
        c10::OperatorHandle op;
        torch::jit::Stack arguments;
        std::vector<at::Tensor> results;

        void replay() const {
            torch::jit::Stack stack = arguments;
            {
                const at::AutoDispatchBelowADInplaceOrView guard;
                op.callBoxed(&stack);
            }
            size_t index = 0;
            const auto next = [&](const at::Tensor& result) {
                const at::Tensor& place = results.at(index++);
                if (place.defined()) put(result, place, c10::toString(op.operator_name()));
            };
            for (const c10::IValue& value : stack) {
                if (value.isTensor()) next(value.toTensor());
                if (value.isTensorList()) {
                    for (const at::Tensor& tensor : value.toTensorVector()) next(tensor);
                }
            }
        }
    };

    // Whether the call is done: a graph is captured, or one of its task groups updated.
    bool take_turn() {
        const std::string name = c10::toString(op_.operator_name());
        const Turn turn = current_turn(name.c_str());
        if (turn == Turn::kRun) return false;
        const auto& arguments = op_.schema().arguments();
        const auto first = stack_->size() - arguments.size();
        TORCH_CHECK(turn != Turn::kReplace, "virtual NPU: ", name, " in the update of a task group is not emulated");
        for (const auto& returned : op_.schema().returns()) {
            if (returned.type()->isSubtypeOf(*c10::TensorType::get()) || returned.type()->kind() == c10::TypeKind::ListType) continue;
            graph_refuse_sync(name.c_str(), current_stream());
        }
        if (kSynchronising.count(op_.operator_name().name) != 0) graph_refuse_sync(name.c_str(), current_stream());
        for (size_t index = 0; index < arguments.size(); ++index) {
            const auto* alias = arguments[index].alias_info();
            if (alias == nullptr || !alias->isWrite()) continue;
            const c10::IValue& value = (*stack_)[first + index];
            if (value.isTensor()) preserve(value.toTensor());
            if (!value.isTensorList()) continue;
            for (const at::Tensor& tensor : value.toTensorVector()) preserve(tensor);
        }
        recorded_ = std::make_shared<Recorded>(Recorded{op_, {}, {}});
        compute();
        graph_record(current_stream(), [recorded = recorded_] { recorded->replay(); });
        return true;
    }

    // Wait for the device to know the shape of their result.
    inline static const std::set<std::string> kSynchronising = {"aten::nonzero", "aten::masked_select", "aten::_unique2"};

    at::Tensor remember(const at::Tensor& tensor) {
        if (!tensor.defined() || !tensor.is_privateuseone()) {
            return recorded_ != nullptr && tensor.defined() ? tensor.clone() : tensor;  // host values are part of a graph
        }
        if (!device_.has_value()) device_ = tensor.device();
        for (const auto& known : arguments_) {
            if (known.npu.is_same(tensor)) return known.cpu;
        }
        arguments_.push_back({tensor, recorded_ != nullptr ? at_address(tensor) : as_cpu(tensor)});
        return arguments_.back().cpu;
    }

    c10::IValue to_cpu(const c10::IValue& value) {
        if (value.isTensor()) return remember(value.toTensor());
        if (value.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(remember(tensor));
            return list;
        }
        if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> list;
            for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
                list.push_back(tensor.has_value() ? std::optional<at::Tensor>(remember(*tensor)) : std::nullopt);
            }
            return list;
        }
        if (value.isDevice() && value.toDevice().is_privateuseone()) {
            device_ = value.toDevice();
            return c10::Device(c10::DeviceType::CPU);
        }
        if (value.isGenerator() && value.toGenerator().device().is_privateuseone()) return shadow(value.toGenerator());
        return value;
    }

    at::Tensor to_npu(const at::Tensor& result) {
        const at::Tensor returned = place(result);
        if (recorded_ != nullptr) recorded_->results.push_back(owned_ ? at_address(returned) : at::Tensor());
        return returned;
    }

    at::Tensor place(const at::Tensor& result) {
        owned_ = false;
        if (!result.defined() || !device_.has_value() || !result.device().is_cpu()) return result;
        for (auto& argument : arguments_) {
            if (argument.cpu.is_same(result)) {
                write_back(argument);
                return argument.npu;
            }
        }
        for (const auto& argument : arguments_) {
            if (argument.cpu.storage().data() == result.storage().data() && result.storage().nbytes() > 0) {
                return argument.npu.as_strided(result.sizes(), result.strides(), result.storage_offset());
            }
        }
        owned_ = true;
        return as_npu(result, *device_);
    }

    c10::IValue to_npu(const c10::IValue& value) {
        if (value.isTensor()) return to_npu(value.toTensor());
        if (value.isTensorList()) {
            c10::List<at::Tensor> list;
            for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_npu(tensor));
            return list;
        }
        return value;
    }

    // An out= argument that the CPU kernel resized: give the NPU tensor the new shape and, if the memory moved, the values.
    void write_back(Argument& argument) {
        const bool moved = argument.cpu.storage().data() != argument.npu.storage().data();
        if (!moved && argument.cpu.sizes() == argument.npu.sizes() && argument.cpu.strides() == argument.npu.strides()) return;
        argument.npu.resize_(argument.cpu.sizes());
        if (moved) as_cpu(argument.npu).copy_(argument.cpu);
        const at::Tensor placed = recorded_ != nullptr ? at_address(argument.npu) : as_cpu(argument.npu);
        if (recorded_ == nullptr) {
            argument.cpu = placed;
        } else {  // the recorded arguments hold this very tensor
            argument.cpu.set_(placed.storage(), placed.storage_offset(), placed.sizes(), placed.strides());
        }
    }

    const c10::OperatorHandle& op_;
    torch::jit::Stack* stack_;
    std::optional<c10::Device> device_;
    std::vector<Argument> arguments_;
    std::shared_ptr<Recorded> recorded_;
    bool owned_ = false;  // whether the latest result has memory of its own
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// ---- what crosses devices -------------------------------------------------------------------------------------------------

// All copies. In a capture only what needs no waiting: within the device, or asynchronously to and from pinned memory.
void copy_values(const at::Tensor& destination, const at::Tensor& source, bool non_blocking) {
    const Turn turn = current_turn("copy");
    if (turn == Turn::kRun) {
        as_cpu(destination).copy_(as_cpu(source));
        return;
    }
    TORCH_CHECK(turn != Turn::kReplace, "virtual NPU: a copy in the update of a task group is not emulated");
    for (const at::Tensor& tensor : {destination, source}) {
        if (!tensor.is_cpu() || (non_blocking && tensor.is_pinned())) continue;
        graph_refuse_sync(destination.is_cpu() ? "a copy to the host" : "a copy from the host", current_stream());
    }
    preserve(destination);
    const at::Tensor to = at_address(destination), from = at_address(source);
    to.copy_(from);
    graph_record(current_stream(), [to, from] { to.copy_(from); });
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
    if (self.defined() && source.defined() && self.numel() > 0) copy_values(self, source, non_blocking);
    return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool non_blocking) {
    copy_values(destination, self, non_blocking);
    return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination) {
    destination.resize_(self.sizes());
    return copy_from(self, destination, false);
}

at::Tensor empty_for_copy(const at::Tensor& self, const c10::TensorOptions& options, std::optional<c10::MemoryFormat> format) {
    const auto wanted = format.value_or(c10::MemoryFormat::Preserve);
    if (wanted != c10::MemoryFormat::Preserve) return at::empty(self.sizes(), options.memory_format(wanted));
    if (self.is_non_overlapping_and_dense()) return at::empty_strided(self.sizes(), self.strides(), options);
    return at::empty(self.sizes(), options);
}

at::Tensor to_copy(const at::Tensor& self, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
                   std::optional<c10::Device> device, std::optional<bool> pin_memory, bool non_blocking,
                   std::optional<c10::MemoryFormat> format) {
    const auto options = self.options().merge_in(
        c10::TensorOptions().dtype(dtype).layout(layout).device(device).pinned_memory(pin_memory));
    auto result = empty_for_copy(self, options, format);
    copy_values(result, self, non_blocking);
    return result;
}

at::Tensor clone_npu(const at::Tensor& self, std::optional<c10::MemoryFormat> format) {
    auto result = empty_for_copy(self, self.options(), format);
    copy_values(result, self, false);
    return result;
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
    if (vnpu_graph_activity.load(std::memory_order_relaxed) != 0) graph_refuse_sync("item", current_stream());
    return as_cpu(self).item();
}

at::Tensor contiguous(const at::Tensor& self, c10::MemoryFormat format) {
    return self.is_contiguous(format) ? self : clone_npu(self, format);
}

// CPU histc has no integer kernel; the counts are exact in double.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
    const auto counts = [bins, low, high](const at::Tensor& cpu) {
        return at::histc(cpu.to(at::kDouble), bins, low, high).to(cpu.scalar_type());
    };
    const Turn turn = current_turn("aten::histc");
    TORCH_CHECK(turn != Turn::kReplace, "virtual NPU: histc in the update of a task group is not emulated");
    const auto result = as_npu(counts(as_cpu(self)), self.device());
    if (turn == Turn::kRecord) {
        graph_record(current_stream(), [counts, from = at_address(self), to = at_address(result)] { to.copy_(counts(from)); });
    }
    return result;
}

// ---- registration ---------------------------------------------------------------------------------------------------------

// Left to torch_npu: they allocate, describe or track memory, and read no values.
const std::set<std::string> kKeptByTorchNpu = {
    "empty.memory_format", "empty_strided", "as_strided", "view", "view.dtype", "_reshape_alias", "_unsafe_view", "set_",
    "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "resize_", "resize_as_", "record_stream",
    "is_pinned", "_pin_memory", "is_set_to", "unfold",
};

// Here torch_npu replaces a composite by its own kernel already at the autograd key, above PrivateUse1.
const std::set<std::string> kAutogradOverrides = {
    "where", "one_hot", "argsort", "argsort.stable", "repeat_interleave.self_int", "repeat_interleave.self_Tensor",
    "contiguous",
};

std::vector<std::unique_ptr<torch::Library>>& libraries() {
    static auto* held = new std::vector<std::unique_ptr<torch::Library>>;  // registrations live as long as the process
    return *held;
}

torch::Library& library(c10::DispatchKey key) {
    libraries().push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, __FILE__, __LINE__));
    return *libraries().back();
}

std::string full_name(const c10::OperatorName& name) {
    return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// Overrides torch_npu's aten kernels; returns how many. Called once, after torch_npu is imported.
int64_t install() {
    auto& dispatcher = c10::Dispatcher::singleton();
    const std::set<std::string> own = {"copy_", "_copy_from", "_copy_from_and_resize", "_to_copy", "clone", "_local_scalar_dense",
                                       "histc"};
    auto& npu = library(kNpu);
    int64_t count = 0;
    for (const auto& name : dispatcher.getRegistrationsForDispatchKey(kNpu)) {
        if (name.name.rfind("aten::", 0) != 0) continue;
        const auto full = full_name(name).substr(6);
        if (own.count(full) != 0 || kKeptByTorchNpu.count(full) != 0) continue;
        npu.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
        ++count;
    }
    npu.impl("copy_", copy_);
    npu.impl("_copy_from", copy_from);
    npu.impl("_copy_from_and_resize", copy_from_and_resize);
    npu.impl("_to_copy", to_copy);
    npu.impl("clone", clone_npu);
    npu.impl("_local_scalar_dense", local_scalar_dense);
    npu.impl("histc", histc);
    auto& autograd = library(c10::DispatchKey::AutogradPrivateUse1);
    for (const auto& name : dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::AutogradPrivateUse1)) {
        if (name.name.rfind("aten::", 0) != 0) continue;
        const auto full = full_name(name).substr(6);
        if (kAutogradOverrides.count(full) == 0) continue;
        if (full == "contiguous") {
            autograd.impl("contiguous", contiguous);
        } else {
            autograd.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
        }
        ++count;
    }
    // These go on to _to_copy, and so to what a tracer such as Dynamo puts in between: its tensors have no memory.
    autograd.impl("to.dtype", [](const at::Tensor& self, c10::ScalarType dtype, bool non_blocking, bool copy,
                                 std::optional<c10::MemoryFormat> format) {
        return at::native::to(self, dtype, non_blocking, copy, format);
    });
    autograd.impl("to.device", [](const at::Tensor& self, c10::Device device, c10::ScalarType dtype, bool non_blocking, bool copy,
                                  std::optional<c10::MemoryFormat> format) {
        return at::native::to(self, device, dtype, non_blocking, copy, format);
    });
    autograd.impl("to.other", [](const at::Tensor& self, const at::Tensor& other, bool non_blocking, bool copy,
                                 std::optional<c10::MemoryFormat> format) {
        return at::native::to(self, other, non_blocking, copy, format);
    });
    autograd.impl("to.dtype_layout",
                  [](const at::Tensor& self, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
                     std::optional<c10::Device> device, std::optional<bool> pin_memory, bool non_blocking, bool copy,
                     std::optional<c10::MemoryFormat> format) {
                      return at::native::to(self, dtype, layout, device, pin_memory, non_blocking, copy, format);
                  });
    return count + 4 + static_cast<int64_t>(own.size());
}

}  // namespace
}  // namespace vnpu

namespace {

// A Python callable as a graph holds it: called and given back with the GIL.
std::function<void()> captured(const pybind11::function& call) {
    auto* held = new pybind11::function(call);
    const std::shared_ptr<pybind11::function> owner(held, [](pybind11::function* function) {
        if (!Py_IsInitialized()) return;  // the process ends
        const pybind11::gil_scoped_acquire gil;
        delete function;
    });
    return [owner] {
        const pybind11::gil_scoped_acquire gil;
        try {
            (*owner)();
        } catch (pybind11::error_already_set& error) {
            throw std::runtime_error(error.what());
        }
    };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.doc() = "CPU kernels behind the virtual NPU";
    module.def("install", &vnpu::install, "Override torch_npu's aten kernels; returns how many operators now run on the CPU.");
    module.def("as_cpu", &vnpu::as_cpu, "CPU tensor aliasing the memory of an NPU tensor.");
    module.def("as_npu", [](const at::Tensor& cpu, const at::Tensor& like) { return vnpu::as_npu(cpu, like.device()); },
               "New tensor on the device of `like` with the values of a CPU tensor.");
    module.def("at_address", &vnpu::at_address, "The same, without keeping the memory: for replays.");
    module.def("turn", [](const std::string& name) { return static_cast<int>(vnpu::current_turn(name.c_str())); },
               "What becomes of a call on the current stream: 0 it runs, 1 it is captured, 2 it replaces a captured one.");
    module.def("active", [] { return vnpu_graph_activity.load(std::memory_order_relaxed) != 0; },
               "Whether turn() can be anything but 0.");
    module.def("preserve", &vnpu::preserve, "Put back the tensor's values when the capture ends.");
    module.def("record", [](const pybind11::function& call) { vnpu::graph_record(vnpu::current_stream(), captured(call)); },
               "Add a callable to what the current stream captures or updates.");
}
