// A simulated CUDA device for a torch that was built for CPUs: its tensors say "cuda:0" and lie in host memory.
//
// An operator of a device tensor runs as the CPU's kernel on aliases of its arguments, after the checks that CUDA
// makes: all tensors are on one device, and nothing waits or copies unseen. No header of Python is used, so that this
// builds in seconds and loads before torch's Python part asks which devices there are. It asks only once.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr int MOST_DEVICES = 8;

thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_stream = 0;
thread_local bool is_quiet = false;

int device_count() {
  const char* said = std::getenv("SIM_DEVICES");
  return said ? std::atoi(said) : 1;
}

// --- what a test hears of: syncs, transfers, kernels

using Listener = void (*)(const char* kind, const char* what, int64_t bytes);
std::atomic<Listener> listener{nullptr};

void tell(const std::string& kind, const std::string& what, int64_t bytes = 0) {
  if (auto to = listener.load(); to && !is_quiet) to(kind.c_str(), what.c_str(), bytes);
}

// --- memory, counted as torch's allocator counts it, with a limit

struct Memory {
  int64_t allocated = 0, peak = 0, reserved = 0, peak_reserved = 0, retries = 0, failures = 0;
  int64_t limit = INT64_MAX;
};
Memory memory[MOST_DEVICES];
std::recursive_mutex memory_lock;

enum Fault { NONE, ALLOCATOR, DRIVER, CUBLAS };
std::atomic<int> fault{NONE};
std::atomic<int64_t> until_fault{0};

[[noreturn]] void raise_out_of_memory(int kind) {
  if (kind == DRIVER)
    throw c10::AcceleratorError(
        {__func__, __FILE__, __LINE__}, 2, "CUDA error: out of memory\nCUDA kernel errors might be reported later.");
  if (kind == CUBLAS)
    TORCH_CHECK(false, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`");
  TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...");
}

// Fails once where a test has asked for it: the allocator and the driver at an allocation, cuBLAS at a product.
void maybe_fail(bool is_product) {
  int kind = fault.load();
  if (kind == NONE || (kind == CUBLAS) != is_product || is_quiet) return;
  if (until_fault.fetch_sub(1) > 0) return;
  fault = NONE;
  tell("out of memory", "");
  raise_out_of_memory(kind);
}

int64_t rounded(size_t bytes) { return (static_cast<int64_t>(bytes) + 511) / 512 * 512; }

void take(int device, size_t bytes) {
  maybe_fail(false);
  std::lock_guard<std::recursive_mutex> guard(memory_lock);
  auto& its = memory[device];
  if (its.allocated + rounded(bytes) > its.limit) {
    its.retries++, its.failures++;
    raise_out_of_memory(ALLOCATOR);
  }
  its.allocated += rounded(bytes);
  its.peak = std::max(its.peak, its.allocated);
  its.reserved = std::max(its.reserved, its.allocated);
  its.peak_reserved = std::max(its.peak_reserved, its.reserved);
}

void give_back(int device, size_t bytes) {
  std::lock_guard<std::recursive_mutex> guard(memory_lock);
  memory[device].allocated -= rounded(bytes);
}

// What a device's storage owns: host memory, and its entry in the count.
struct Block {
  c10::DataPtr data;
  c10::Storage storage;
  int device;
  size_t bytes;
  static void release(void* self) {
    auto* block = static_cast<Block*>(self);
    give_back(block->device, block->bytes);
    delete block;
  }
};

struct DeviceAllocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    take(current_device, bytes);
    auto inner = c10::GetCPUAllocator()->allocate(bytes);
    void* place = inner.get();
    auto* block = new Block{std::move(inner), {}, current_device, bytes};
    return {place, block, &Block::release, c10::Device(CUDA, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator device_allocator;

// Pinned host memory: its addresses are known, and it rounds up to a power of two as torch's does.
std::set<std::pair<const char*, size_t>> pinned;
int64_t pinned_bytes = 0, pinned_peak = 0;

size_t power_of_two(size_t bytes) {
  size_t size = 1;
  while (size < bytes) size *= 2;
  return size;
}

struct PinnedAllocator final : public c10::Allocator {
  struct Held {
    c10::DataPtr data;
    size_t bytes;
  };
  c10::DataPtr allocate(size_t bytes) override {
    auto inner = c10::GetCPUAllocator()->allocate(bytes);
    auto* place = static_cast<char*>(inner.get());
    std::lock_guard<std::recursive_mutex> guard(memory_lock);
    pinned.insert({place, bytes});
    pinned_bytes += power_of_two(bytes);
    pinned_peak = std::max(pinned_peak, pinned_bytes);
    return {place, new Held{std::move(inner), bytes}, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* self) {
    auto* held = static_cast<Held*>(self);
    std::lock_guard<std::recursive_mutex> guard(memory_lock);
    pinned.erase({static_cast<char*>(held->data.get()), held->bytes});
    pinned_bytes -= power_of_two(held->bytes);
    delete held;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

bool is_pinned_address(const void* address) {
  std::lock_guard<std::recursive_mutex> guard(memory_lock);
  auto* place = static_cast<const char*>(address);
  auto after = pinned.upper_bound({place, SIZE_MAX});
  return after != pinned.begin() && place < (--after)->first + std::max<size_t>(after->second, 1);
}

// --- what torch asks of a device

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return device_count(); }
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  c10::DeviceIndex current_device() const override { return ::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return ::current_device; }
  bool isPinnedPtr(const void* address) const override { return is_pinned_address(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
};

c10::Stream stream_of(c10::Device device, c10::StreamId id) {
  auto index = device.index() < 0 ? current_device : device.index();
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(CUDA, index), id);
}

// Everything is computed at once, so streams and events have nothing to wait for.
struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(CUDA, current_device); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override { return stream_of(device, current_stream); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    auto before = getStream(stream.device());
    current_stream = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

// --- tensors of the device and of the host that share their memory

at::Tensor with_storage(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  at::Tensor made(std::move(impl));
  if (like.is_conj()) made._set_conj(true);
  return made;
}

c10::Storage host_storage(const c10::Storage& of) {
  void* place = const_cast<void*>(of.unsafeGetStorageImpl()->data());
  c10::DataPtr data(
      place, new c10::Storage(of), [](void* held) { delete static_cast<c10::Storage*>(held); },
      c10::Device(c10::DeviceType::CPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), of.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
}

at::Tensor on_host(const at::Tensor& tensor) {
  return with_storage(host_storage(tensor.storage()), tensor, c10::DispatchKey::CPU);
}

c10::Storage device_storage(const c10::Storage& of, int device) {
  take(device, of.nbytes());
  void* place = const_cast<void*>(of.unsafeGetStorageImpl()->data());
  c10::DataPtr data(place, new Block{{}, of, device, of.nbytes()}, &Block::release, c10::Device(CUDA, device));
  return c10::Storage(c10::Storage::use_byte_size_t(), of.nbytes(), std::move(data), &device_allocator, true);
}

// --- operators

// On CUDA the host waits for the result, or for the size of the result.
const std::unordered_set<std::string> SYNCS{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2",
    "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount"};
const std::unordered_set<std::string> PRODUCTS{"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"};
// They take indices, or optimizer states in paged memory, that lie on the host.
bool takes_host_tensors(const std::string& name) {
  return name.rfind("bitsandbytes::", 0) == 0 || name == "aten::index" || name == "aten::index_put" ||
      name == "aten::index_put_" || name == "aten::_index_put_impl_";
}

// An operator's device arguments as host tensors, and its results as device tensors again.
class Call {
 public:
  explicit Call(const std::string& name) : name_(name) {}

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return tensor_to_host(value.toTensor());
    if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) tensor = tensor_to_host(tensor);
      return c10::IValue(tensors);
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& item : value.toOptionalTensorList())
        tensors.push_back(item ? std::optional<at::Tensor>(tensor_to_host(*item)) : std::nullopt);
      return c10::IValue(tensors);
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (device_ < 0) device_ = value.toDevice().index();
      return c10::IValue(c10::Device(c10::DeviceType::CPU));
    }
    return value;
  }

  void check_devices() {
    if (device_ < 0) device_ = current_device;
    TORCH_CHECK(other_device_ < 0, "Expected all tensors to be on the same device, but found at least two devices, ",
        "cuda:", device_, " and cuda:", other_device_, "! (", name_, ")");
    if (pairs_.empty() || !has_host_tensor_) return;
    TORCH_CHECK(takes_host_tensors(name_), "Expected all tensors to be on the same device, but found at least two ",
        "devices, cuda:", device_, " and cpu! (", name_, ")");
    if (name_.rfind("aten::", 0) == 0) tell("sync", name_ + " with host indices");
  }

  bool has_mask() const { return has_mask_; }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return tensor_to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    auto tensors = value.toTensorVector();
    for (auto& tensor : tensors) tensor = tensor_to_device(tensor);
    return c10::IValue(tensors);
  }

 private:
  at::Tensor tensor_to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      // A number as a CPU tensor goes along with device tensors.
      if (tensor.device().is_cpu() && tensor.dim() > 0) has_host_tensor_ = true;
      return tensor;
    }
    if (device_ < 0) device_ = tensor.device().index();
    if (tensor.device().index() != device_ && tensor.dim() > 0) other_device_ = tensor.device().index();
    if (tensor.scalar_type() == at::kBool) has_mask_ = true;
    for (auto& [original, alias] : pairs_)
      if (original.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) return alias;
    // Two tensors of one storage have aliases of one storage.
    at::Tensor made;
    for (auto& [original, alias] : pairs_)
      if (original.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) {
        made = with_storage(alias.storage(), tensor, c10::DispatchKey::CPU);
        break;
      }
    if (!made.defined()) made = on_host(tensor);
    pairs_.emplace_back(tensor, made);
    return made;
  }

  at::Tensor tensor_to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (auto& [original, alias] : pairs_)
      if (alias.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) {
        adopt(original, tensor);
        return original;
      }
    for (auto& [original, alias] : pairs_)
      if (alias.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl())
        return with_storage(original.storage(), tensor, c10::DispatchKey::CUDA);
    return with_storage(device_storage(tensor.storage(), device_), tensor, c10::DispatchKey::CUDA);
  }

  // The operator may have resized its argument.
  void adopt(const at::Tensor& original, const at::Tensor& alias) {
    auto* impl = original.unsafeGetTensorImpl();
    if (original.storage().data() != alias.storage().data() || original.storage().nbytes() != alias.storage().nbytes())
      impl->set_storage_keep_dtype(device_storage(alias.storage(), device_));
    if (original.sizes() != alias.sizes() || original.strides() != alias.strides() ||
        original.storage_offset() != alias.storage_offset())
      impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  }

  const std::string& name_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;  // (of the device, its alias on the host)
  int device_ = -1, other_device_ = -1;
  bool has_host_tensor_ = false, has_mask_ = false;
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto inputs = op.schema().arguments().size(), outputs = op.schema().returns().size();
  const auto first = stack->size() - inputs;
  if (SYNCS.count(name)) tell("sync", name);
  if (PRODUCTS.count(name)) maybe_fail(true);
  Call call(name);
  for (size_t i = 0; i < inputs; i++) (*stack)[first + i] = call.to_host((*stack)[first + i]);
  call.check_devices();
  if (call.has_mask() && (name == "aten::index" || name.rfind("aten::index_put", 0) == 0))
    tell("sync", name + " with a mask");
  if (name == "aten::cumsum" && (*stack)[first].toTensor().is_floating_point())
    at::globalContext().alertNotDeterministic("cumsum_cuda_kernel");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  for (size_t i = stack->size() - outputs; i < stack->size(); i++) (*stack)[i] = call.to_device((*stack)[i]);
}

struct OnDevice {
  c10::DeviceIndex before = current_device;
  explicit OnDevice(std::optional<at::Device> device) {
    if (device && device->index() >= 0) current_device = device->index();
  }
  ~OnDevice() { current_device = before; }
};

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  OnDevice on(device);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  OnDevice on(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (from.is_meta()) return to;
  if (to.is_cuda() != from.is_cuda())
    tell(std::string(to.is_cuda() ? "to device" : "to host") + (non_blocking ? "" : ", waiting"), "copy_", to.nbytes());
  at::Tensor target = to.is_cuda() ? on_host(to) : to, source = from.is_cuda() ? on_host(from) : from;
  at::AutoDispatchBelowADInplaceOrView below;
  target.copy_(source);
  return to;
}

void record_stream(at::Tensor& self, c10::Stream) { tell("record_stream", "", self.nbytes()); }

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

bool is_pinned(const at::Tensor&, std::optional<at::Device>) { return false; }

// scaled_dot_product_attention by its formula: a CPU's choice among CUDA's kernels would mean nothing.
int64_t fused_sdp_choice(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}

// What CUDA's kernels take and a CPU's refuse: a softmax from half precision to float32, a histogram of integers, a
// depthwise convolution in half precision.
at::Tensor& softmax_out(const at::Tensor& self, int64_t dim, bool to_float, at::Tensor& out) {
  at::AutoDispatchBelowADInplaceOrView below;
  auto host = on_host(self);
  on_host(out).copy_(at::_softmax(to_float ? host.to(at::kFloat) : host, dim, false));
  return out;
}

at::Tensor& softmax_backward_out(
    const at::Tensor& grad, const at::Tensor& output, int64_t dim, at::ScalarType, at::Tensor& out) {
  at::AutoDispatchBelowADInplaceOrView below;
  on_host(out).copy_(at::_softmax_backward_data(on_host(grad), on_host(output), dim, grad.scalar_type()));
  return out;
}

at::Tensor from_host(const at::Tensor& made, const at::Tensor& like) {
  auto storage = device_storage(made.storage(), like.device().index());
  return with_storage(std::move(storage), made, c10::DispatchKey::CUDA);
}

at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  at::AutoDispatchBelowADInplaceOrView below;
  return from_host(at::histc(on_host(self).to(at::kFloat), bins, least, most).to(self.scalar_type()), self);
}

at::Tensor conv_depthwise(
    const at::Tensor& self, const at::Tensor& weight, c10::SymIntArrayRef, const std::optional<at::Tensor>& bias,
    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation) {
  at::AutoDispatchBelowADInplaceOrView below;
  auto bias_host = bias && bias->defined() ? std::optional<at::Tensor>(on_host(*bias)) : std::nullopt;
  auto made = at::conv2d_symint(
      on_host(self), on_host(weight), bias_host, stride, padding, dilation, self.size(1));
  return from_host(made, self);
}

}  // namespace

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("record_stream", &record_stream);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("is_pinned", &is_pinned);
  library.impl("_fused_sdp_choice", &fused_sdp_choice);
  library.impl("_softmax.out", &softmax_out);
  library.impl("_softmax_backward_data.out", &softmax_backward_out);
  library.impl("histc", &histc);
  library.impl("_conv_depthwise2d", &conv_depthwise);
}

// --- for Python's ctypes

extern "C" {
void sim_start() { c10::SetAllocator(CUDA, &device_allocator); }
void sim_listen(Listener to) { listener = to; }
void sim_tell(const char* kind, const char* what) { tell(kind, what); }
void sim_quiet(bool quiet) { is_quiet = quiet; }
int sim_device() { return current_device; }
void sim_set_device(int device) { current_device = device; }
int64_t sim_stream() { return current_stream; }
void sim_set_stream(int64_t stream) { current_stream = stream; }
void sim_fail(int kind, int64_t after) {
  until_fault = after;
  fault = kind;
}
bool sim_will_fail() { return fault.load() != NONE; }
void sim_set_limit(int device, int64_t bytes) { memory[device].limit = bytes; }
void sim_memory(int device, int64_t* out) {
  std::lock_guard<std::recursive_mutex> guard(memory_lock);
  auto& its = memory[device];
  int64_t figures[] = {its.allocated, its.peak, its.reserved, its.peak_reserved, its.retries, its.failures};
  std::copy(std::begin(figures), std::end(figures), out);
}
void sim_reset_peak(int device) {
  std::lock_guard<std::recursive_mutex> guard(memory_lock);
  memory[device].peak = memory[device].allocated;
  memory[device].peak_reserved = memory[device].reserved;
}
void sim_empty_cache() {
  std::lock_guard<std::recursive_mutex> guard(memory_lock);
  for (auto& its : memory) its.reserved = its.allocated;
}
void sim_pinned(int64_t* out) {
  std::lock_guard<std::recursive_mutex> guard(memory_lock);
  out[0] = pinned_bytes;
  out[1] = pinned_peak;
}
}
