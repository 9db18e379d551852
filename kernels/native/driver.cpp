#include "driver.h"

#include <dlfcn.h>
#include <stdint.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda.h"

namespace optimize {
namespace {

// From the documentation of the CUDA driver API: CUresult is 0 for success; these attributes' numbers never change
enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, MOST_DYNAMIC_SHARED = 8 };
constexpr int FREE_SHARED = 48 << 10;  // what a kernel may use of shared memory without asking

struct Driver {
  int (*init)(unsigned);
  int (*error_name)(int, const char**);
  int (*context)(void**);
  int (*device)(int*);
  int (*attribute)(int*, int, int);
  int (*load)(void**, const void*);
  int (*function)(void**, void*, const char*);
  int (*set)(void*, int, int);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*allocate)(uint64_t*, size_t, void*);
  int (*release)(uint64_t, void*);
};

template <class F>
void bind(void* library, const char* name, F& to) {
  to = (F)dlsym(library, name);
  if (!to) throw std::runtime_error(std::string("ai.optimize: libcuda.so.1 has no ") + name + ": the driver is too old");
}

Driver opened() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("ai.optimize: no CUDA driver: ") + dlerror());
  Driver d;
  bind(library, "cuInit", d.init);
  bind(library, "cuGetErrorName", d.error_name);
  bind(library, "cuCtxGetCurrent", d.context);
  bind(library, "cuCtxGetDevice", d.device);
  bind(library, "cuDeviceGetAttribute", d.attribute);
  bind(library, "cuModuleLoadData", d.load);
  bind(library, "cuModuleGetFunction", d.function);
  bind(library, "cuFuncSetAttribute", d.set);
  bind(library, "cuLaunchKernel", d.launch);
  bind(library, "cuMemAllocAsync", d.allocate);
  bind(library, "cuMemFreeAsync", d.release);
  d.init(0);
  return d;
}

const Driver& driver() {
  static const Driver d = opened();
  return d;
}

void check(int result, const char* call) {
  if (result == 0) return;
  const char* name = nullptr;
  driver().error_name(result, &name);
  throw std::runtime_error(std::string("ai.optimize: ") + call + ": " + (name ? name : std::to_string(result).c_str()));
}

void* loaded(const Device& device, const Cubin& cubin) {
  static std::map<std::pair<void*, const Cubin*>, void*> functions;
  static std::mutex guard;
  const std::lock_guard<std::mutex> hold(guard);
  void*& function = functions[{device.context, &cubin}];
  if (function) return function;
  void *module = nullptr, *found = nullptr;
  check(driver().load(&module, cubin.begin), "cuModuleLoadData");
  check(driver().function(&found, module, cubin.entry), "cuModuleGetFunction");
  if (cubin.shared_bytes > FREE_SHARED)
    check(driver().set(found, MOST_DYNAMIC_SHARED, cubin.shared_bytes), "cuFuncSetAttribute");
  return function = found;
}

}  // namespace

Device current_device() {
  Device d{};
  int device = 0, major = 0, minor = 0;
  check(driver().context(&d.context), "cuCtxGetCurrent");
  if (!d.context) throw std::runtime_error("ai.optimize: no CUDA context is current on this thread");
  check(driver().device(&device), "cuCtxGetDevice");
  check(driver().attribute(&major, CAPABILITY_MAJOR, device), "cuDeviceGetAttribute");
  check(driver().attribute(&minor, CAPABILITY_MINOR, device), "cuDeviceGetAttribute");
  d.sm = 10 * major + minor;
  return d;
}

void launch(const Device& device, const Cubin& cubin, unsigned grid, void** values, void* stream) {
  check(driver().launch(loaded(device, cubin), grid, 1, 1, 32 * (unsigned)cubin.warps, 1, 1, (unsigned)cubin.shared_bytes,
                        stream, values, nullptr),
        "cuLaunchKernel");
}

void* allocate_on(void* stream, size_t bytes) {
  uint64_t memory = 0;
  check(driver().allocate(&memory, bytes, stream), "cuMemAllocAsync");
  return (void*)memory;
}

void free_on(void* stream, void* memory) { check(driver().release((uint64_t)memory, stream), "cuMemFreeAsync"); }

}  // namespace optimize
