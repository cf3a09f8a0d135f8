// A CUDA device that computes nothing, for torch's CPU build. Loaded before `import torch`, it lets fake tensors live on "cuda",
// with autograd, autocast, torch.compile and FSDP2. It also chooses the attention kernel as torch does on an H100 (sdp_utils.cpp).
#include <ATen/Context.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
const Device kDevice(DeviceType::CUDA, 0);
const Stream kStream(Stream::DEFAULT, kDevice);
struct NoDeviceGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  Stream getStream(Device) const noexcept override { return kStream; }
  Stream getDefaultStream(Device) const override { return kStream; }
  Stream getNewStream(Device, int = 0) const override { return kStream; }
  Stream exchangeStream(Stream) const noexcept override { return kStream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
  bool isStreamCapturing(const Stream&) const override { return false; }
};
C10_REGISTER_GUARD_IMPL(CUDA, NoDeviceGuard)
} // namespace c10::impl

struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", ::CUDAHooks)

namespace native {
int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double, bool,
                         std::optional<double>, bool grouped) {
  const bool half = q.scalar_type() == kHalf || q.scalar_type() == kBFloat16;
  const auto fits = [](const Tensor& x) { return x.dim() == 4 && x.sym_stride(-1) == 1 && x.sym_size(0) != 0 && x.sym_size(2) != 0; };
  const bool fused = !grouped && fits(q) && fits(k) && fits(v) && q.sym_size(1) == k.sym_size(1) && (!mask || mask->sym_stride(-1) == 1);
  const auto head = q.sym_size(-1), value = v.sym_size(-1);
  const int64_t alignment = half ? 8 : 4; // 16 bytes
  const auto& settings = globalContext();
  if (fused && settings.userEnabledCuDNNSDP() && half && head % 8 == 0)
    return static_cast<int64_t>(SDPBackend::cudnn_attention);
  if (fused && settings.userEnabledFlashSDP() && half && !mask && head == value && head <= 256)
    return static_cast<int64_t>(SDPBackend::flash_attention);
  if (fused && settings.userEnabledMemEfficientSDP() && (half || q.scalar_type() == kFloat) && head % alignment == 0 && value % alignment == 0)
    return static_cast<int64_t>(SDPBackend::efficient_attention);
  return static_cast<int64_t>(SDPBackend::math);
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
} // namespace native
} // namespace at
