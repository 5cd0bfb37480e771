// What torch's CPU build lacks before it lets a tensor say "cuda": hooks that report a device, and
// a guard that switches to it without doing anything. Loaded before `import torch` (pretend.py).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct PretendedCUDA : CUDAHooksInterface {
  PretendedCUDA(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
};

// torch looks the hooks up under this name
using CUDAHooks = PretendedCUDA;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace c10::impl {

struct PretendedGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return {DeviceType::CUDA, 0}; }
  static Stream stream() { return Stream(Stream::DEFAULT, device()); }
  Device getDevice() const override { return device(); }
  Device exchangeDevice(Device) const override { return device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard);

}  // namespace c10::impl
