// A card that is not there: tensors of device `cuda` in the host's memory, computed by CPU kernels.
//
// For tests, in a CPU build of torch, where nothing else speaks for the device. Every operator goes
// through `fallback`, which refuses what a card refuses (tensors of two devices), and counts what
// makes a host wait for a card (`waited`); tensors and autograd are torch's own. It is loaded before
// torch is imported, since torch asks only once whether there is a card.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_cpu_dispatch.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

const Device CARD(DeviceType::CUDA, 0);
const c10::DispatchKeySet CARDS_OWN(c10::DispatchKey::CUDA);

// -- what a host waits for ------------------------------------------------------------------------

std::atomic<bool> telling{false};

// In the words of torch's own `set_sync_debug_mode`, as a warning at the line of Python.
void waited(const std::string& what) {
  if (telling) TORCH_WARN("called a synchronizing CUDA operation: ", what);
}

const std::set<std::string> WAITING = {
    "aten::nonzero",         "aten::nonzero.out",     "aten::masked_select",
    "aten::equal",           "aten::_unique2",        "aten::unique_dim",
    "aten::bincount",        "aten::multinomial",     "aten::masked_select.out",
    "aten::unique_consecutive", "aten::repeat_interleave.Tensor"};

// -- memory ---------------------------------------------------------------------------------------

std::mutex lock;
std::map<uintptr_t, size_t> pinned;

bool is_pinned(const void* at) {
  std::lock_guard<std::mutex> hold(lock);
  auto place = reinterpret_cast<uintptr_t>(at);
  auto next = pinned.upper_bound(place);
  return next != pinned.begin() && place < std::prev(next)->first + std::prev(next)->second;
}

void forget(void* at) {
  std::lock_guard<std::mutex> hold(lock);
  pinned.erase(reinterpret_cast<uintptr_t>(at));
  std::free(at);
}

struct Allocator final : c10::Allocator {
  explicit Allocator(Device device) : device(device) {}
  c10::DataPtr allocate(size_t bytes) override {
    void* at = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (at && device.is_cuda()) std::memset(at, 0x7f, bytes);  // what nobody wrote is no 0
    if (at && device.is_cpu()) {
      std::lock_guard<std::mutex> hold(lock);
      pinned[reinterpret_cast<uintptr_t>(at)] = bytes;
    }
    return {at, at, raw_deleter(), device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return device.is_cpu() ? &forget : &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  Device device;
};

Allocator of_card(CARD), of_pinned(Device(DeviceType::CPU));

// -- what torch asks of a device -------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CARD; }
  Device getDevice() const override { return CARD; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() <= 0, "there is one card, and not ", device);
  }
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* at) const override { return is_pinned(at); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &of_pinned; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &of_card; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  int getNumGPUs() const override { return 1; }
};
using at::CUDAHooksArgs;
using at::CUDAHooksInterface;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

// -- operators -------------------------------------------------------------------------------------

// The same memory, as a tensor of the host.
Tensor on_host(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  auto* held = new c10::Storage(tensor.storage());
  c10::DataPtr at(const_cast<void*>(held->data()), held,
                  [](void* one) { delete static_cast<c10::Storage*>(one); }, DeviceType::CPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), held->nbytes(), std::move(at));
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return out;
}

at::ScalarType type_of(std::optional<at::ScalarType> asked) {
  return asked.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &of_card, CARDS_OWN, type_of(type), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> type, std::optional<at::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &of_card, CARDS_OWN, type_of(type));
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (from.numel() && from.is_cpu() && !(non_blocking && is_pinned(from.const_data_ptr())))
    waited(non_blocking ? "copy from pageable memory" : "copy from the host");
  if (from.numel() && self.is_cpu() && !(non_blocking && is_pinned(self.const_data_ptr())))
    waited("copy to the host");
  on_host(self).copy_(on_host(from));
  return self;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) at::native::resize_(to, self.sizes());
  on_host(to).copy_(on_host(self));
  return to;
}

at::Scalar local_scalar(const Tensor& self) {
  waited("_local_scalar_dense");
  return at::cpu::_local_scalar_dense(on_host(self));
}

// All others: what a card refuses is refused, and the CPU's kernel computes.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name =
      schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const bool indexes = name.find("::index.") != name.npos || name.find("index_put") != name.npos;

  auto look = [&](const Tensor& tensor, bool is_index) {
    if (!tensor.defined()) return;
    if (is_index && (tensor.is_cpu() || tensor.scalar_type() == at::kBool)) waited(name);
    TORCH_CHECK(is_index || tensor.is_cuda() || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but ", name, " got one of sizes ",
                tensor.sizes(), " on the CPU");
  };
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = arguments[i];
    const bool is_index = indexes && schema.arguments()[i].name() == "indices";
    if (value.isTensor()) look(value.toTensor(), is_index);
    if (value.isTensorList())
      for (const auto& each : value.toTensorVector()) look(each, is_index);
    if (value.isOptionalTensorList())
      for (const auto& each : value.toOptionalTensorVector())
        if (each) look(*each, is_index);
  }
  if (WAITING.count(name)) waited(name);

  const bool told = telling.exchange(false);  // its own copies to the CPU are no waits
  struct Restored {
    bool told;
    ~Restored() { telling = told; }
  } restored{told};
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::cpu::view_symint(self, size);
}
Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                  std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::_reshape_alias(self, size, stride);
}
Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::cpu::unfold(self, dimension, size, step);
}
const Tensor& resize_(const Tensor& self, at::IntArrayRef size,
                      std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}
Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::cpu::set_(self, source); }
Tensor& set_storage(Tensor& self, at::Storage source) { return at::cpu::set_(self, source); }
Tensor& set_part(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                 at::IntArrayRef stride) {
  return at::cpu::set_(self, source, offset, size, stride);
}

// What makes tensors, moves them or looks at them in another way.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize_);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_part);
}

}  // namespace

extern "C" void pretended_card_tells(bool on) { telling = on; }
